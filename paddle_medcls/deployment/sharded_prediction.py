"""Predicts very many images into files of bounded size, shards, and continues after any interruption.

The output folder holds, for each block of images of the list:

    predictions-000000.parquet   a row for each image, in the order of the list
    errors-000000.parquet        a row for each image that cannot be read; only if there are any
    manifest.json                model, options, the sha256 of each block's paths, and which shards are finished

A shard is finished when the manifest holds the sha256 of its files; it is written after them, in one step. Shards that
it does not name are those of an interrupted attempt and are replaced. Memory holds one block of the list.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import reprlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

from paddle_medcls import __version__
from paddle_medcls.core.errors import DataError, RunError, SetupError, Stopped, WeightsError
from paddle_medcls.core.files import (
    atomic_write,
    locked_folder,
    read_json,
    remove_abandoned,
    sha256,
    write_csv,
    write_json,
)
from paddle_medcls.core.hardware import installed_version
from paddle_medcls.core.progress import progress
from paddle_medcls.deployment.prediction import check_options, table_columns, table_row
from paddle_medcls.deployment.predictor import Predictor

KIND = "paddle_medcls predictions"
MANIFEST = "manifest.json"
FORMATS = ("parquet", "csv")
MAX_SHARDS = 10_000  # the manifest is then 3 MB
ERRORS: list[tuple[str, type]] = [("image", str), ("error", str)]


@dataclass(frozen=True)
class ShardOptions:
    """How very many images are predicted.

    Attributes:
        rows: images of a shard.
        format: one of FORMATS; "": Parquet where pyarrow is installed, else CSV.
        coverage, refuse: see `prediction.check_options`.
        batch_size: images at a time.
        workers: threads that read images.
    """

    rows: int = 100_000
    format: str = ""
    coverage: float | None = None
    refuse: bool = False
    batch_size: int = 16
    workers: int = 2


class Totals(NamedTuple):
    """Images of all shards: those that were predicted, and those that cannot be read."""

    predicted: int
    unreadable: int


def predict_shards(
    predictor: Predictor,
    images: Iterable[str],
    output: str | Path,
    options: ShardOptions = ShardOptions(),  # noqa: B008
) -> Totals:
    """Predicts the images of a list into the shards of a folder; those that are finished there are not repeated.

    Args:
        images: paths, in the same order whenever they are iterated: once to count them, once to predict.
        output: a new folder, or that of an interrupted call with the same arguments.

    Raises:
        RunError: the folder holds something else, or predictions of another model, other options or another list.
        Stopped: Ctrl-C.
        MedclsError: see `Predictor.predict`; a list that cannot be read.
    """
    output = Path(output)
    check_options(predictor.sidecar, predictor.novelty is not None, options.coverage, options.refuse)
    if not options.format:
        options = replace(options, format="parquet" if installed_version("pyarrow") else "csv")
    settings = _settings(predictor, options)
    names = Counter(settings["columns"]).most_common(1)
    if options.format == "parquet" and names[0][1] > 1:
        raise RunError(f"two columns have the name {names[0][0]!r}: Parquet files cannot", fix="give --format csv")
    with locked_folder(output, "predicts into this folder"):
        remove_abandoned(output)
        shards = _shards(output, settings, _plan(images, options.rows))
        to_do = sum(shard["images"] for shard in shards if "sha256" not in shard)
        with progress(None, "predicting", to_do, "image") as bar:
            try:
                for number, paths in _unfinished(images, options.rows, shards):
                    shards[number] |= predict_shard(predictor, paths, output, number, options, bar.update)
                    _write_manifest(output, settings, shards)
            except KeyboardInterrupt:
                finished = sum("sha256" in shard for shard in shards)
                text = f"interrupted: {finished} of {len(shards)} shards are finished; the same command continues"
                raise Stopped(text) from None
    return Totals(sum(shard["predictions"] for shard in shards), sum(shard["errors"] for shard in shards))


def predict_shard(
    predictor: Predictor,
    paths: Sequence[str],
    output: Path,
    number: int,
    options: ShardOptions,
    update: Callable[[], object] = lambda: None,
) -> dict:
    """Predicts one block of the list and writes its files.

    Args:
        number: of the block.
        update: called after each image.

    Returns:
        Rows of both files, and `sha256`: name -> digest.
    """
    rows, errors = [], []
    for path, _, found in predictor.predict_decoded(paths, options.batch_size, options.workers, keep_images=False):
        if isinstance(found, DataError):
            errors.append([path, found.what])
        else:
            if options.coverage is not None:
                found = replace(found, prediction_set=predictor.possible_classes(found.probs, options.coverage))
            rows.append(table_row(path, found, options.refuse))
        update()
    names = _names(number, options.format)
    tables = [(names[0], _columns(predictor, options), rows), (names[1], ERRORS, errors)]
    for name, columns, lines in tables:
        if name == names[0] or lines:
            _write_table(output / name, columns, lines)
        else:
            (output / name).unlink(missing_ok=True)  # of an interrupted attempt that could not read a file
    digests = {name: sha256(output / name) for name, _, lines in tables if name == names[0] or lines}
    return {"predictions": len(rows), "errors": len(errors), "sha256": digests}


# --- the list -------------------------------------------------------------------------------------------


def _blocks(images: Iterable[str], rows: int) -> Iterator[list[str]]:
    remaining = iter(images)
    while block := list(itertools.islice(remaining, rows)):
        yield block


def _digest(paths: Sequence[str]) -> str:
    return hashlib.sha256(b"\0".join(map(os.fsencode, paths))).hexdigest()


def _plan(images: Iterable[str], rows: int) -> list[dict]:
    """All shards of the list: number of images, and the sha256 of their paths."""
    plan = []
    for block in _blocks(images, rows):
        plan.append({"images": len(block), "paths": _digest(block)})
        if len(plan) > MAX_SHARDS:
            raise RunError(f"more than {MAX_SHARDS:,} shards of {rows:,} images", fix="give a larger --shard-rows")
    return plan


def _unfinished(images: Iterable[str], rows: int, shards: list[dict]) -> Iterator[tuple[int, list[str]]]:
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


# --- the manifest ---------------------------------------------------------------------------------------


def _settings(predictor: Predictor, options: ShardOptions) -> dict:
    """Model and options as in the manifest: shards of one folder have the same."""
    sidecar = predictor.sidecar
    weights = sorted([*sidecar.members, *sidecar.files.values()]) or [sidecar.sha256]
    if not weights[0]:
        if predictor.path is None:
            raise WeightsError("a network in memory cannot be told from others", fix="open its weight file")
        weights = [sha256(predictor.path)]
    sidecars = [asdict(one.sidecar) for one in (predictor, *predictor.members)]
    return {
        "paddle_medcls": __version__,
        "weights": weights,
        "sidecar": hashlib.sha256(json.dumps(sidecars, sort_keys=True, default=str).encode()).hexdigest(),
        "engine": predictor.engine,
        "precision": predictor.precision,
        "columns": [name for name, _ in _columns(predictor, options)],
        "shard_rows": options.rows,
        **{name: getattr(options, name) for name in ("format", "coverage", "refuse", "batch_size")},
    }


def _shards(output: Path, settings: dict, plan: list[dict]) -> list[dict]:
    """The shards of the plan with what the folder's manifest says of finished ones; writes a manifest if there is none.

    Raises:
        RunError: see `predict_shards`; a damaged manifest or shard.
    """
    path = output / MANIFEST
    try:
        found = read_json(path)
    except FileNotFoundError:
        taken = [name for name in sorted(os.listdir(output)) if name.startswith(("predictions-", "errors-"))]
        if taken:
            fix = "give another --output"
            raise RunError(f"{output} holds shards but no {MANIFEST}", items=taken, fix=fix) from None
        _write_manifest(output, settings, plan)
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
    faults = [fault for k, one in enumerate(shards) if (fault := _fault(output, _names(k, settings["format"]), one))]
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


def _write_manifest(output: Path, settings: dict, shards: list[dict]) -> None:
    write_json(output / MANIFEST, {"kind": KIND, "settings": settings, "shards": shards})


# --- the files of a shard -------------------------------------------------------------------------------


def _names(number: int, suffix: str) -> tuple[str, str]:
    return f"predictions-{number:06d}.{suffix}", f"errors-{number:06d}.{suffix}"


def _columns(predictor: Predictor, options: ShardOptions) -> list[tuple[str, type]]:
    kinds = options.coverage is not None, predictor.novelty is not None, bool(predictor.members)
    return table_columns(predictor.sidecar, *kinds)


def _write_table(path: Path, columns: Sequence[tuple[str, type]], rows: Sequence[Sequence]) -> None:
    """Writes the rows in the format of the path's suffix; bytes of names that are not UTF-8 become escapes."""
    if path.suffix == ".csv":
        write_csv(path, [name for name, _ in columns], rows)
        return
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise SetupError("Parquet files need pyarrow", fix="pip install pyarrow, or --format csv") from None
    types = {str: pyarrow.string(), float: pyarrow.float32(), int: pyarrow.int32(), bool: pyarrow.bool_()}
    schema = pyarrow.schema([(name, types[kind]) for name, kind in columns])
    values = [[_utf8(row[k]) for row in rows] for k in range(len(columns))]
    table = pyarrow.table([pyarrow.array(*pair) for pair in zip(values, schema.types)], schema=schema)
    atomic_write(path, lambda temporary: parquet.write_table(table, temporary, compression="zstd"))


def _utf8(value: object) -> object:
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value
