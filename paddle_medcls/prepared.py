"""Weights in another engine: their exported form, prepared once and kept beside them in `.engines`."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from paddle_medcls.engines import FORMS, Forward, of_later_paddle, open_model, require
from paddle_medcls.errors import SetupError, WeightsError
from paddle_medcls.files import python_path, sha256
from paddle_medcls.recipe import Recipe
from paddle_medcls.sidecar import Sidecar, sidecar_of

FASTEST_FIRST = ("openvino", "onnxruntime", "onednn")
"""On a CPU; see tools/benchmark.py."""


def candidates(path: Path, engine: str | None, precision: str) -> list[str]:
    """Engines to try, the fastest first; the network itself ends the list."""
    if engine is None or not path.is_file():
        return ["paddle"]
    if engine != "auto":
        return [engine]
    return [name for name in FASTEST_FIRST if _usable(path, name, precision)] + ["paddle"]


def _usable(path: Path, engine: str, precision: str) -> bool:
    """Whether an engine is installed, and its form of these weights is there or can be made."""
    try:
        require(engine, precision)
    except SetupError:
        return False
    can_export = engine == "onednn" or importlib.util.find_spec("paddle2onnx") is not None
    return _prepared_folder(path, engine).is_dir() or (can_export and os.access(path.parent, os.W_OK))


def _prepared_folder(weights: Path, engine: str) -> Path:
    return weights.parent / ".engines" / f"{weights.name}-{engine}"


def open_prepared(
    weights: Path, own: Sidecar | None, recipe: Recipe | None, engine: str, precision: str, say: Callable[[str], None]
) -> tuple[Sidecar, Forward]:
    """The weights' exported form, made beside them when there is none or it is another file's.

    Args:
        own: the weights' sidecar, if they have one.
        recipe: how they were trained, where there is no sidecar and their layout does not tell.
        engine: one of `engines.ENGINES`, not "paddle".
        say: takes a line when a form is being prepared.

    Returns:
        The sidecar (the weights' own, or what was found out for the export) and what computes logits.

    Raises:
        SetupError: the engine is not installed, or the form cannot be made or read.
        WeightsError: faulty weights.
    """
    require(engine, precision)
    if own is not None:
        own.check(weights)
    digest = own.sha256 if own is not None and own.sha256 else sha256(weights)
    sidecar = _prepared_folder(weights, engine) / sidecar_of(weights).name
    card = _prepared(sidecar, digest, own)
    if card is None:
        say(f"preparing {weights.name} for {engine}, once; kept in {sidecar.parent}")
        _prepare(weights, recipe, engine, sidecar.parent)
        card = _prepared(sidecar, digest, own)
    if card is None:
        raise SetupError(f"{sidecar.parent}: what was prepared cannot be read", do="remove this folder")
    forward = open_model(sidecar.parent, sidecar.stem, card.form, precision)
    return own or replace(card, form="", files={}), forward


def _prepared(sidecar: Path, digest: str, own: Sidecar | None) -> Sidecar | None:
    """The sidecar of what was prepared; None where it is missing, damaged, of other weights or flips, or too new."""
    try:
        card = Sidecar.read(sidecar)
        if card.sha256 != digest or (own is not None and card.flips != own.flips):
            return None
        card.check(sidecar)
        unreadable = card.form == "paddle" and of_later_paddle(sidecar.parent, sidecar.stem)
        return None if unreadable else card
    except WeightsError:
        return None


def _prepare(weights: Path, recipe: Recipe | None, engine: str, folder: Path) -> None:
    """Exports in a process of its own: this one stays without Paddle, and its output clean."""
    form = next(form for form, name in FORMS.items() if name == engine)
    command = [sys.executable, "-m", "paddle_medcls.commands.export", "--weights", str(weights), "--format", form]
    command += ["--output", str(folder)] + (["--recipe", recipe.name] if recipe else [])
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": python_path()})
    if done.returncode != 0:
        kind, _, said = next((line for line in done.stderr.splitlines() if "Error: " in line), "").partition(": ")
        if kind == "WeightsError":
            raise WeightsError(said)
        why = f"{kind}: {said}" if kind else f"exit code {done.returncode}"
        raise SetupError(f"exporting failed: {why}", do=f"try it: tools/export.py --weights {weights}")
