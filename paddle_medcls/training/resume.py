"""Resuming a run: locks its directory, checks its files as untrusted ones, and refuses changed data, code or recipe."""

from __future__ import annotations

import contextlib
import json
import math
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from paddle_medcls import __version__
from paddle_medcls.core.errors import RunError
from paddle_medcls.core.files import locked_folder, read_json, remove_abandoned
from paddle_medcls.core.paddle_setup import paddle
from paddle_medcls.models.sidecar import Sidecar, sidecar_of
from paddle_medcls.models.weights import load_strict, read_weights
from paddle_medcls.recipes.recipe import Recipe
from paddle_medcls.training.checkpoint import FILE, load_state
from paddle_medcls.training.run_directory import HISTORY, STEP_LOG, State, read_timing
from paddle_medcls.training.session import Options, Session, run_settings

_RUN_FILES = ("recipe.json", "data.json", "environment.json", "history.csv", "steps.csv", "timing.csv", "metrics.json")


@contextlib.contextmanager
def locked(run_dir: Path, resume: bool, first: bool = True) -> Iterator[None]:
    """Locks a run directory, so that no other command trains in it; the lock ends with the process.

    Args:
        resume: whether an existing run is resumed; without it the directory must not hold one that has saved anything.
        first: False in all processes of a run but the first, which locks for all.

    Raises:
        RunError: another command trains there, or a new run would replace an old one.
    """
    if not first:
        yield
        return
    with locked_folder(run_dir, "is training in this run directory"):
        if not resume:
            refuse_taken(run_dir)
        for folder in (run_dir, run_dir / "last"):
            remove_abandoned(folder)
        for leftover in run_dir.glob("last/.state.safetensors.*"):  # of version 0.1
            leftover.unlink(missing_ok=True)
        yield


def refuse_taken(run_dir: Path) -> None:
    """Refuses a directory for a new run that holds another one, or files that a run would replace.

    A run that was killed before its first save has nothing to lose: it is started over.
    """
    existing = [name for name in _RUN_FILES if (run_dir / name).exists()] + [p.name for p in run_dir.glob("*.pdparams")]
    only_described = {"recipe.json", "environment.json"} <= set(existing)
    if "environment.json" in existing and set(existing) <= {
        "environment.json",
        "data.json",
    }:  # killed before its recipe
        only_described = "paddle_medcls" in _read_json(run_dir, "environment.json")
    if only_described and not (run_dir / FILE).exists() and not (run_dir / "metrics.json").exists():
        return
    if existing:
        fix = f"resume it (--resume {run_dir}), or " if (run_dir / FILE).exists() else ""
        raise RunError(f"{run_dir} already holds a run: {', '.join(existing)}", fix=f"{fix}give another --output")


def read_facts(run_dir: Path) -> dict:
    """`data.json` of a run to resume."""
    facts = _read_json(run_dir, "data.json")
    for split in ("train", "val"):
        split_facts = facts.get(split)
        if not isinstance(split_facts, dict) or not {"images", "fingerprint", "per_image"} <= split_facts.keys():
            raise _damaged(run_dir, "data.json", f"{split}: images, fingerprint and per_image are expected")
    if not isinstance(facts.get("data_root"), str):
        raise _damaged(run_dir, "data.json", "data_root: a path is expected")
    return facts


def read_environment(run_dir: Path) -> dict:
    """`environment.json` of a run to resume."""
    environment = _read_json(run_dir, "environment.json")
    kinds: dict[str, tuple[type, object]] = {"device": (str, None), "kernels": (str, "paddle"), "processes": (int, 1)}
    kinds |= {"amp": (bool, False), "deterministic": (bool, False), "threads": (int, 0)}
    for name, (kind, default) in kinds.items():
        if type(environment.get(name, default)) is not kind:
            raise _damaged(run_dir, "environment.json", f"{name}: {environment.get(name)!r}")
    kernels = ("paddle", "onednn f32", "onednn bf16")
    if environment.get("kernels", "paddle") not in kernels or not environment["device"].startswith(("cpu", "gpu")):
        raise _damaged(
            run_dir, "environment.json", f"kernels or device: {environment.get('kernels')!r}, {environment['device']!r}"
        )
    if environment.get("processes", 1) < 1:
        raise _damaged(run_dir, "environment.json", f"processes: {environment['processes']}")
    return environment


def _read_json(run_dir: Path, name: str) -> dict:
    try:
        content = read_json(run_dir / name)
    except (OSError, ValueError) as error:
        raise _damaged(run_dir, name, error) from None
    if not isinstance(content, dict):
        raise _damaged(run_dir, name, "not an object")
    return content


def _damaged(run_dir: Path, name: str, fault: object) -> RunError:
    return RunError(
        f"{run_dir} cannot be resumed: {name}: {fault}",
        path=run_dir / name,
        fix="restore the file from a copy, or train again with another --output",
    )


def refuse_changes(run_dir: Path, recipe: Recipe, facts: dict, session: Session) -> None:
    """Refuses to resume a run on other data, other code or another number of processes, unless it is forced."""
    old_facts, old_environment = read_facts(run_dir), read_environment(run_dir)
    changes = [
        f"{split} split: {old_facts[split]['images']} images then, {facts[split]['images']} now (fingerprint differs)"
        for split in ("train", "val")
        if old_facts[split]["fingerprint"] != facts[split]["fingerprint"]
    ]
    changes += [
        f"{split} images: other pixels under the same names"
        for split in ("train", "val")
        if json.dumps(old_facts[split]["per_image"]) != json.dumps(facts[split]["per_image"])
    ]
    if old_facts.get("frozen_weights") != facts.get("frozen_weights"):
        changes.append("the weights that the run started from and keeps frozen")
    if old_facts.get("note", "") != facts["note"]:
        changes.append(f"files: {old_facts.get('note') or 'as published'} then, {facts['note'] or 'as published'} now")
    current = {"paddle_medcls": __version__, "paddle": paddle.__version__, "processes": session.world}
    for name, current_value in current.items():
        if old_environment.get(name, 1) != current_value:
            changes.append(f"{name}: {old_environment.get(name, 1)} then, {current_value} now")
    if "amp" not in old_environment and recipe.warmup_epochs and recipe.schedule in ("step", "polynomial"):
        changes.append("learning rate: in version 0.1 a warm-up delayed the decay points; now they stay in place")
    if changes and not session.options.force:
        raise RunError(
            f"cannot resume {run_dir}: the run has changed", items=changes, fix="restore these, or pass --force"
        )
    threads = int(os.environ.get("OMP_NUM_THREADS", "1").split(",")[0])
    old_threads = old_environment.get("threads", threads)
    if session.device == "cpu" and old_threads != threads:
        session.say(
            f"threads: {old_threads} then, {threads} now: sums round differently, so the last digits of an "
            f"uninterrupted run are not repeated; OMP_NUM_THREADS={old_threads} keeps them"
        )


def refuse_other_recipe(run_dir: Path, recipe: Recipe, options: Options) -> None:
    """Refuses a directory whose run was begun or finished with another recipe or precision.

    Raises:
        RunError: lists the differences.
    """
    if not (run_dir / "recipe.json").exists():
        return
    earlier = Recipe.from_file(run_dir / "recipe.json")
    if recipe.statistics == "train":  # the run's recipe.json has the computed mean and std
        recipe = recipe.replace(mean=earlier.preprocessing.mean, std=earlier.preprocessing.std)
    changes = earlier.differences(recipe)
    if (run_dir / "environment.json").exists():
        settings = run_settings(read_environment(run_dir))
        kernels, precision = settings["kernels"], settings["precision"]
        if precision != options.precision or options.kernels not in ("auto", kernels):
            changes = [*changes, f"operators: {kernels} {precision} then, {options.kernels} {options.precision} now"]
    if changes:
        raise RunError(
            f"{run_dir.name} was run with another recipe",
            items=changes,
            path=run_dir,
            fix="use the original options, or choose another --output",
        )


def restore(run_dir: Path, recipe: Recipe, parts: dict, weights: Path) -> State:
    """Reads the state of a run into its parts, after checking it.

    Args:
        parts: "model", "average", "optimizer" and "scaler", see `setup.Learner`.
        weights: the run's best weights, which are there if the state says so.

    Raises:
        RunError, WeightsError: the state, the timing or the best weights are damaged or of another run.
    """
    groups, scalars = load_state(run_dir)
    try:
        state = _checked_state(groups, scalars)
        _check_optimizer(groups["optimizer"], parts["optimizer"], state.step)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        fault = f"{error} is missing" if isinstance(error, KeyError) else error
        raise _damaged(run_dir, FILE, fault) from None
    if state.epoch > recipe.epochs:
        raise _damaged(run_dir, FILE, f"{state.epoch} epochs are done, of {recipe.epochs} in recipe.json")
    if state.best_epoch:
        read_weights(weights)
        Sidecar.read(sidecar_of(weights))
    try:
        read_timing(run_dir)
    except ValueError as error:
        raise _damaged(run_dir, "timing.csv", error) from None
    for name in ("model", "average"):
        if parts[name] is not None:
            load_strict(parts[name], groups.get(name, {}), run_dir / FILE)
    with warnings.catch_warnings():
        # Paddle's own: a warm-up's inner schedule is restored by another name.
        warnings.filterwarnings("ignore", message="There are some unused values in state_dict")
        try:
            parts["optimizer"].set_state_dict(groups["optimizer"])
            if groups.get("scaler"):
                parts["scaler"].load_state_dict(groups["scaler"])
        except (ValueError, TypeError, KeyError, AttributeError, AssertionError, RuntimeError) as error:
            raise _damaged(run_dir, FILE, f"the optimizer refuses it: {error}") from None
    return state


def _checked_state(groups: dict[str, Any], scalars: dict) -> State:
    """The state of a run; a value of the wrong type or range is a ValueError, KeyError or TypeError."""
    counts = {name: scalars[name] for name in ("epoch", "batch", "step", "best_epoch")}
    for name, value in counts.items():
        if type(value) is not int or value < 0:
            raise ValueError(f"{name}: {value!r} is no count")
    best = -math.inf if scalars["best"] is None else scalars["best"]
    if type(best) not in (int, float) or math.isnan(best):
        raise ValueError(f"best: {best!r} is no number")
    history = scalars["history"]
    complete = isinstance(history, list) and len(history) == counts["epoch"]
    if not complete or not all(type(row[name]) in (int, float) for row in history for name in HISTORY):
        raise ValueError(f"history: one row of numbers for each of {counts['epoch']} epochs is expected")
    steps = groups["steps"]["table"]
    if not isinstance(steps, np.ndarray) or steps.shape != (counts["step"], len(STEP_LOG)):
        raise ValueError(f"steps: a table of {counts['step']} rows is expected")
    if counts["best_epoch"] > counts["epoch"]:
        raise ValueError(f"best_epoch: {counts['best_epoch']} of {counts['epoch']}")
    return State(**counts, best=best, history=history, steps=steps.tolist(), optimizer=groups["optimizer"])


def _check_optimizer(saved: dict, optimizer, step: int) -> None:
    """Moments must be finite and, once a step was taken, there for every parameter that is trained."""
    for name, value in saved.items():
        if isinstance(value, np.ndarray) and value.dtype.kind == "f" and not np.isfinite(value).all():
            raise ValueError(f"optimizer: {name} is not finite")
    arrays = [name for name, value in saved.items() if isinstance(value, np.ndarray)]
    for group in optimizer._param_groups:
        for parameter in group["params"] if isinstance(group, dict) else [group]:
            moments = [name for name in arrays if name.startswith(f"{parameter.name}_")]
            if step and not moments:
                raise ValueError(f"optimizer: nothing is kept for {parameter.name}")
            for name in moments:
                if saved[name].size not in (1, parameter.size):
                    raise ValueError(f"optimizer: {name} has shape {saved[name].shape}, not {tuple(parameter.shape)}")
