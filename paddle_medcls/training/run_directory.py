"""The files of a run directory.

`<NAME>.pdparams` (best weights) and `<NAME>.json` (their sidecar), `last/` (resume state),
`recipe.json`, `data.json`, `environment.json`, `history.csv` and `steps.csv` (exactly reproducible),
`timing.csv` (not), `metrics.json`, `predictions_val.csv`, `README.md` (the model card), and pictures.
"""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from paddle_medcls.core.errors import RunError
from paddle_medcls.core.files import read_json, sha256, write_csv, write_json
from paddle_medcls.evaluation.model_card import is_card
from paddle_medcls.models.sidecar import Sidecar, sidecar_of
from paddle_medcls.models.weights import save_weights
from paddle_medcls.recipes.recipe import Recipe
from paddle_medcls.training.checkpoint import save_state

HISTORY = ("epoch", "step", "lr", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "val_auc")
STEP_LOG = ("step", "lr", "loss", "accuracy")
TIMING = ("epoch", "train_seconds", "images_per_second", "waiting_share", "epoch_seconds")


@dataclass
class State:
    """The progress of a run; with the tensors, all that a resume needs."""

    epoch: int = 0  # epochs done
    batch: int = 0  # batches done of the next epoch
    step: int = 0
    best: float = -math.inf
    best_epoch: int = 0
    history: list[dict] = field(default_factory=list)
    steps: list[list[float]] = field(default_factory=list)  # STEP_LOG
    optimizer: dict = field(default_factory=dict)  # as restored; Paddle 2.6.2 lists it only after a step


def new_run_directory(recipe: Recipe) -> Path:
    """The path of a new run below `runs`, named after its recipe, data set and the time."""
    stem = recipe.name if recipe.name.startswith(recipe.dataset) else f"{recipe.name}-{recipe.dataset}"
    return Path("runs") / f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"


def describe(run_dir: Path, recipe: Recipe, facts: dict, environment: dict) -> None:
    """Writes environment, data and recipe of a new run; first the file by which `refuse_taken` knows a killed run."""
    write_json(run_dir / "environment.json", environment)
    write_json(run_dir / "data.json", facts)
    write_json(run_dir / "recipe.json", recipe.to_json())


def history_row(state: State, sizes: Sequence[int], result: dict) -> dict:
    """The row of `history.csv` of an epoch.

    Args:
        sizes: images of each batch of the epoch; the means over its steps weigh every image the same.
        result: metrics of the validation split.
    """
    steps = np.array(state.steps[-len(sizes) :])
    loss, accuracy = np.average(steps[:, 2:], axis=0, weights=sizes)
    return {
        "epoch": state.epoch + 1,
        "step": state.step,
        "lr": float(steps[-1, 1]),
        "train_loss": float(loss),
        "train_accuracy": float(accuracy),
        "val_loss": result["loss"],
        "val_accuracy": result["accuracy"],
        "val_auc": result["auc"],
    }


def write_history(run_dir: Path, state: State, note: str, picture: bool) -> None:
    """`history.csv`, `steps.csv` and, if wanted, `curves.png`, which takes half a second."""
    write_csv(run_dir / "history.csv", HISTORY, [[row[name] for name in HISTORY] for row in state.history])
    write_csv(run_dir / "steps.csv", STEP_LOG, [[int(row[0]), *row[1:]] for row in state.steps])
    if picture:
        from paddle_medcls.evaluation import plots  # here: matplotlib takes half a second to import

        plots.curves(run_dir / "curves.png", np.array(state.steps), state.history, note)


def is_finished(run_dir: Path) -> bool:
    """Whether a run is finished: the model card is the last file that a training writes."""
    return any(is_card(run_dir / name) for name in ("README.md", "MODEL_CARD.md"))


def read_history(run_dir: Path) -> list[dict]:
    """The rows of `history.csv`; a damaged one is a RunError."""
    path = run_dir / "history.csv"
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        return [{name: float(row[name]) for name in HISTORY} for row in rows]
    except (OSError, csv.Error, ValueError, TypeError, KeyError) as error:
        raise RunError(f"history.csv cannot be read: {error}", path=path, fix="restore it from a copy") from None


def read_metrics(run_dir: Path) -> dict:
    """`metrics.json`, with nan where JSON has null; a damaged one is a RunError."""
    path = run_dir / "metrics.json"
    try:
        found = _nan_for_null(read_json(path))
        if not isinstance(found, dict) or not {"n", "loss", "accuracy", "auc"} <= found.keys():
            raise ValueError("n, loss, accuracy and auc are expected")
        return found
    except (OSError, ValueError) as error:
        raise RunError(f"metrics.json cannot be read: {error}", path=path, fix="restore it from a copy") from None


def _nan_for_null(value):
    if isinstance(value, dict):
        return {name: _nan_for_null(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_nan_for_null(item) for item in value]
    return float("nan") if value is None else value


def read_timing(run_dir: Path) -> list[list[float]]:
    """The rows of `timing.csv`; a damaged one is a ValueError."""
    try:
        with open(run_dir / "timing.csv", encoding="utf-8", newline="") as file:
            header, *rows = list(csv.reader(file)) or [[]]
    except FileNotFoundError:
        return []
    except (OSError, csv.Error) as error:
        raise ValueError(str(error)) from None
    if tuple(header) != TIMING or any(len(row) != len(TIMING) for row in rows):
        raise ValueError(f"the columns {', '.join(TIMING)} are expected")
    return [[float(value) for value in row] for row in rows]


def write_timing(run_dir: Path, row: Sequence[float]) -> None:
    """Adds a row (see TIMING) to `timing.csv`; a repeated epoch replaces the one that a kill has undone.

    Times are kept apart from history.csv, which a repeated run reproduces exactly.
    """
    rows = [earlier for earlier in read_timing(run_dir) if earlier[0] < row[0]]
    write_csv(
        run_dir / "timing.csv", TIMING, [[int(row[0]), *(f"{value:.4f}" for value in row[1:])] for row in [*rows, row]]
    )


def keep_weights(model, weights: Path, sidecar: Sidecar, result: dict) -> Sidecar:
    """Writes the weight file and its sidecar, which is returned."""
    save_weights(model, weights)
    return write_sidecar(weights, sidecar, result)


def write_sidecar(weights: Path, sidecar: Sidecar, result: dict) -> Sidecar:
    """Writes the sidecar of a weight file; the calibration of the same weights is kept."""
    digest, path = sha256(weights), sidecar_of(weights)
    earlier = Sidecar.read(path) if path.is_file() else sidecar
    if earlier.sha256 == digest:
        kept = {name: getattr(earlier, name) for name in ("temperature", "threshold", "prediction_sets")}
        sidecar = replace(sidecar, **kept)
    metrics_kept = {name: value for name, value in result.items() if name not in ("confusion", "by_source")}
    sidecar = replace(sidecar, metrics=metrics_kept, sha256=digest)
    sidecar.write(path)
    return sidecar


def save(run_dir: Path, parts: dict, state: State) -> None:
    """Writes the state of a run, see `resume.restore`."""
    tensors = {name: part.state_dict() for name, part in parts.items() if part is not None}
    tensors["optimizer"] = {**state.optimizer, **tensors["optimizer"]}
    tensors["steps"] = {"table": np.array(state.steps, np.float64).reshape(-1, len(STEP_LOG))}
    scalars = {name: value for name, value in vars(state).items() if name not in ("steps", "optimizer")}
    scalars["best"] = state.best if math.isfinite(state.best) else None
    save_state(run_dir, tensors, scalars)
