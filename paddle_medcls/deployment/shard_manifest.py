"""The manifest of a folder of shards: what was predicted, which images each shard has, and which shards are finished.

It is written when the work begins, and again after the files of each shard. What it does not call finished is computed
again. It is as untrusted as any other file: a second start computes all of it anew but the results, and compares.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import reprlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from paddle_medcls.core.errors import RunError
from paddle_medcls.core.files import read_json, sha256, write_json

KIND = "paddle_medcls predictions"
MANIFEST = "manifest.json"
MAX_SHARDS = 8_000  # the manifest is then nearly as large as `read_json` takes


def shard_names(number: int, suffix: str) -> tuple[str, str]:
    """The names of a shard's files: predictions, and errors."""
    return f"predictions-{number:06d}.{suffix}", f"errors-{number:06d}.{suffix}"


def _blocks(images: Iterable[str], rows: int) -> Iterator[list[str]]:
    remaining = iter(images)
    while block := list(itertools.islice(remaining, rows)):
        yield block


def _digest(paths: Sequence[str]) -> str:
    return hashlib.sha256(b"\0".join(map(os.fsencode, paths))).hexdigest()


def plan_shards(images: Iterable[str], rows: int) -> list[dict]:
    """All shards of the list: number of images, and the sha256 of their paths."""
    plan = []
    for block in _blocks(images, rows):
        plan.append({"images": len(block), "paths": _digest(block)})
        if len(plan) > MAX_SHARDS:
            raise RunError(f"more than {MAX_SHARDS:,} shards of {rows:,} images", fix="give a larger --shard-rows")
    return plan


def unfinished(images: Iterable[str], rows: int, shards: list[dict]) -> Iterator[tuple[int, list[str]]]:
    """Yields (number, paths) of the shards that are not finished.

    Raises:
        RunError: the list is no longer the one that was planned with.
    """
    blocks = itertools.zip_longest(shards, _blocks(images, rows))
    for number, (shard, paths) in enumerate(blocks):
        if not shard or not paths or _digest(paths) != shard["paths"]:
            what = f"the list of images has changed since the start, from image {number * rows + 1:,} on"
            raise RunError(what, fix="put it back as it was and repeat the command, or give another --output")
        if "sha256" not in shard:
            yield number, paths


def read_shards(output: Path, settings: dict, plan: list[dict]) -> list[dict]:
    """The shards of the plan with what the folder's manifest says of finished ones; writes a manifest if there is none.

    Args:
        settings: model and options; shards of one folder have the same.

    Raises:
        RunError: a manifest with other settings or another list, a damaged one, or a finished shard that is.
    """
    path = output / MANIFEST
    try:
        found = read_json(path)
    except FileNotFoundError:
        taken = [name for name in sorted(os.listdir(output)) if name.startswith(("predictions-", "errors-"))]
        if taken:
            fix = "give another --output"
            raise RunError(f"{output} holds shards but no {MANIFEST}", items=taken, fix=fix) from None
        write_manifest(output, settings, plan)
        return plan
    except (OSError, ValueError) as error:
        raise _damaged(path, [str(error)]) from None
    if not isinstance(found, dict) or found.get("kind") != KIND:
        raise _damaged(path, [f"not a file of kind {KIND!r}"])
    then, shards = found.get("settings"), found.get("shards")
    if not isinstance(then, dict) or not isinstance(shards, list) or not all(isinstance(one, dict) for one in shards):
        raise _damaged(path, ["settings: an object, and shards: a list of objects, are expected"])
    changes = [
        f"{name}: {reprlib.repr(then.get(name))}, now {reprlib.repr(now)}"
        for name, now in settings.items()
        if then.get(name) != now
    ]
    if not changes:  # else the blocks may be other ones
        lists = [[(one.get("images"), one.get("paths")) for one in each] for each in (shards, plan)]
        differ = [k for k, (one, other) in enumerate(itertools.zip_longest(*lists)) if one != other]
        changes += [f"the list of images, from image {differ[0] * settings['shard_rows'] + 1:,} on"] if differ else []
    if changes:
        raise RunError(
            f"{output} holds predictions with another model, other options or another list",
            items=changes,
            expected="the same arguments and files as at its start",
            fix="give another --output",
        )
    names = (shard_names(number, settings["format"]) for number in range(len(shards)))
    faults = [fault for pair, one in zip(names, shards) if (fault := _fault(output, pair, one))]
    if faults:
        raise _damaged(path, faults)
    return shards


def _fault(output: Path, names: tuple[str, str], shard: dict) -> str:
    """Why the manifest's entry of a finished shard is not true of its files; "" if it is, or it is not finished."""
    if shard.keys() == {"images", "paths"}:
        return ""
    predictions, errors = shard.get("predictions"), shard.get("errors")
    counts = isinstance(predictions, int) and isinstance(errors, int) and (predictions, errors)
    if not counts or min(counts) < 0 or sum(counts) != shard["images"]:
        return f"{names[0]}: rows that are not those of {shard['images']} images"
    files = names[: 2 if errors else 1]
    digests = shard.get("sha256")
    if not isinstance(digests, dict) or digests.keys() != set(files):
        return f"{names[0]}: no sha256 of its files"
    changed = [name for name in files if not (output / name).is_file() or sha256(output / name) != digests[name]]
    return f"{', '.join(changed)}: missing, or changed since it was written" if changed else ""


def _damaged(path: Path, faults: Sequence[str]) -> RunError:
    fix = "restore the folder from a copy, or give another --output"
    return RunError(f"the predictions in {path.parent} are damaged", items=faults, path=path, fix=fix)


def write_manifest(output: Path, settings: dict, shards: list[dict]) -> None:
    """Writes the manifest in one step."""
    write_json(output / MANIFEST, {"kind": KIND, "settings": settings, "shards": shards})
