"""The run directory: what a training keeps, how it is read again, and the figures of a split.

`<NAME>.pdparams` (best weights) and `<NAME>.json` (their sidecar), `last/` (resume state),
`recipe.json`, `data.json`, `environment.json`, `history.csv` and `steps.csv` (exactly reproducible),
`timing.csv` (not), `metrics.json`, `predictions_val.csv`, `README.md` (the model card), and pictures.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from paddle_medcls import __version__, calibration, metrics, modelcard, plots, report
from paddle_medcls.checkpoint import load_state, save_state
from paddle_medcls.data.index import Index
from paddle_medcls.data.medmnist import NAMES
from paddle_medcls.errors import RunError
from paddle_medcls.files import sha256, write_csv, write_json
from paddle_medcls.medmnist_scores import write_scores
from paddle_medcls.models.weights import load_strict, save_weights
from paddle_medcls.output_head import OutputHead
from paddle_medcls.recipe import Recipe
from paddle_medcls.runtime import paddle
from paddle_medcls.sidecar import Sidecar, sidecar_of

HISTORY = ("epoch", "step", "lr", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "val_auc")
STEP_LOG = ("step", "lr", "loss", "accuracy")


@dataclass
class State:
    """Where a run stands; with the tensors, all that a resume needs."""

    epoch: int = 0  # epochs done
    batch: int = 0  # batches done of the next epoch
    step: int = 0
    best: float = -math.inf
    best_epoch: int = 0
    history: list[dict] = field(default_factory=list)
    steps: list[list[float]] = field(default_factory=list)  # STEP_LOG
    optimizer: dict = field(default_factory=dict)  # as restored; Paddle 2.6.2 lists it only after a step


def describe(run_dir: Path, recipe: Recipe, facts: dict, surroundings: dict) -> None:
    write_json(run_dir / "recipe.json", recipe.to_json())
    write_json(run_dir / "data.json", facts)
    write_json(run_dir / "environment.json", surroundings)


def refuse_changes(run_dir: Path, facts: dict, processes: int, force: bool) -> None:
    before = json.loads((run_dir / "data.json").read_text(encoding="utf-8"))
    versions = json.loads((run_dir / "environment.json").read_text(encoding="utf-8"))
    changes = [
        f"{split} list: {before[split]['images']} images then, {facts[split]['images']} now (fingerprint differs)"
        for split in ("train", "val")
        if before[split]["fingerprint"] != facts[split]["fingerprint"]
    ]
    changes += [
        f"{split} images: other pixels under the same names"
        for split in ("train", "val")
        if json.dumps(before[split]["per_image"]) != json.dumps(facts[split]["per_image"])
    ]
    if before.get("frozen_weights") != facts.get("frozen_weights"):
        changes.append("the weights that the run started from and keeps frozen")
    if before.get("note", "") != facts["note"]:
        changes.append(f"files: {before.get('note') or 'as published'} then, {facts['note'] or 'as published'} now")
    current = {"paddle_medcls": __version__, "paddle": paddle.__version__, "processes": processes}
    for name, now in current.items():
        if versions.get(name, 1) != now:
            changes.append(f"{name}: {versions.get(name, 1)} then, {now} now")
    if changes and not force:
        raise RunError(
            f"{run_dir} cannot be resumed as the same run", items=changes, do="restore these, or go on with --force"
        )


def kernels_of(run_dir: Path) -> tuple[str, str]:
    """Whose operators a run was begun with, "paddle" or "onednn", and in which precision, "f32" or "bf16"."""
    surroundings = json.loads((run_dir / "environment.json").read_text(encoding="utf-8"))
    kernels, _, precision = surroundings.get("kernels", "paddle").partition(" ")
    return kernels, precision or "f32"


def history_row(state: State, batches: int, result: dict) -> dict:
    steps = np.array(state.steps[-batches:])
    return {
        "epoch": state.epoch + 1,
        "step": state.step,
        "lr": float(steps[-1, 1]),
        "train_loss": float(steps[:, 2].mean()),
        "train_accuracy": float(steps[:, 3].mean()),
        "val_loss": result["loss"],
        "val_accuracy": result["accuracy"],
        "val_auc": result["auc"],
    }


def write_history(run_dir: Path, state: State, note: str, picture: bool) -> None:
    """`history.csv`, `steps.csv` and, if wanted, `curves.png`, which takes half a second."""
    write_csv(run_dir / "history.csv", HISTORY, [[row[name] for name in HISTORY] for row in state.history])
    write_csv(run_dir / "steps.csv", STEP_LOG, [[int(row[0]), *row[1:]] for row in state.steps])
    if picture:
        plots.curves(run_dir / "curves.png", np.array(state.steps), state.history, note)


def append_timing(run_dir: Path, epoch: int, trained: float, waited: float, images: int, started: float) -> None:
    """Times are kept apart from history.csv, which a repeated run reproduces exactly."""
    path = run_dir / "timing.csv"
    new = not path.exists()
    with open(path, "a", encoding="utf-8") as file:
        if new:
            file.write("epoch,train_seconds,images_per_second,waiting_share,epoch_seconds\n")
        total = time.perf_counter() - started
        file.write(f"{epoch},{trained:.2f},{images / trained:.2f},{waited / trained:.4f},{total:.2f}\n")


def keep_weights(model, weights: Path, card: Sidecar, result: dict) -> Sidecar:
    """Writes the weight file and the sidecar that describes it, which is returned."""
    save_weights(model, weights)
    metrics_kept = {name: value for name, value in result.items() if name != "confusion"}
    card = replace(card, metrics=metrics_kept, sha256=sha256(weights))
    card.write(sidecar_of(weights))
    return card


def save(run_dir: Path, parts: dict, state: State) -> None:
    tensors = {name: part.state_dict() for name, part in parts.items() if part is not None}
    tensors["optimizer"] = {**state.optimizer, **tensors["optimizer"]}
    tensors["steps"] = {"table": np.array(state.steps, np.float64).reshape(-1, len(STEP_LOG))}
    scalars = {name: value for name, value in vars(state).items() if name not in ("steps", "optimizer")}
    scalars["best"] = state.best if math.isfinite(state.best) else None
    save_state(run_dir, tensors, scalars)


def restore(run_dir: Path, parts: dict) -> State:
    """Reads the state of a run into its parts; files that a killed save left behind are removed."""
    for left in run_dir.glob("last/.state.safetensors.*"):
        left.unlink(missing_ok=True)  # several processes may be at it
    groups, scalars = load_state(run_dir)
    for name, part in parts.items():
        if part is None:
            continue
        if name in ("model", "average"):
            load_strict(part, groups[name], run_dir)
        elif name == "optimizer":
            part.set_state_dict(groups[name])
        elif groups.get(name):
            part.load_state_dict(groups[name])
    best = -math.inf if scalars["best"] is None else scalars["best"]
    steps = groups["steps"]["table"].tolist()
    return State(**{**scalars, "best": best, "steps": steps, "optimizer": groups["optimizer"]})


def score_split(logits: np.ndarray, index: Index, head: OutputHead) -> dict:
    """All figures of a split with intervals; see `metrics.evaluate_logits`."""
    figures = metrics.evaluate_logits(logits, index.labels, head, groups=index.groups)
    claims = calibration.confidence_and_hits(head.probabilities(logits, index.ids), index.labels, head.task)
    error = calibration.expected_calibration_error(*claims)
    extra = {"calibration_error": error, "temperature": head.temperature, "threshold": head.threshold}
    return {"split": index.split, **figures, **extra, "drawn": index.drawn, "note": index.note}


def calibrate(
    weights: Path, card: Sidecar, logits: np.ndarray, index: Index, sensitivity: float | None, output: Path | None
) -> Sidecar:
    """Fits temperature and, if a sensitivity is wanted, threshold on a split, and writes them to the sidecar.

    Args:
        weights: the weight file; its sidecar is written, also where there was none.
        logits: (N, outputs) of the validation split.
        output: folder for `calibration.png`, if any.

    Returns:
        The new sidecar.
    """
    temperature = calibration.fit_temperature(logits, index.labels, card.loss)
    threshold = card.threshold
    if sensitivity is not None:
        probs = replace(card.head, temperature=temperature).probabilities(logits)
        threshold = calibration.threshold_for(probs[:, 1], index.labels, sensitivity)
    if output is not None:
        diagrams = []
        for name, t in (("before", 1.0), (f"after, temperature {temperature:.3f}", temperature)):
            probs = replace(card.head, temperature=t).probabilities(logits)
            claims = calibration.confidence_and_hits(probs, index.labels, card.task)
            diagrams.append((name, calibration.reliability(*claims), calibration.expected_calibration_error(*claims)))
        note = report.DRAWN_NOTICE if index.drawn or card.drawn else ""
        plots.reliability(output / "calibration.png", diagrams, f"{index.dataset}, {index.split}", note)
    card = replace(card, temperature=temperature, threshold=threshold, sha256=sha256(weights))
    card.write(sidecar_of(weights))
    if modelcard.is_card(weights.parent / "README.md"):
        modelcard.write_card(weights.parent, card, "weights", [weights.name], modelcard.run_facts(weights, card))
    return card


def write_outputs(folder: Path, logits: np.ndarray, index: Index, card: Sidecar, result: dict) -> None:
    """`metrics.json`, `predictions_<split>.csv`, `confusion_<split>.png`, `roc_<split>.png`.

    For a MedMNIST set also the predictions as its own evaluator reads them.
    """
    note = report.DRAWN_NOTICE if index.drawn or card.drawn else ""
    probs = card.head.probabilities(logits)
    guesses = card.head.decide(probs)
    write_json(folder / "metrics.json", result)
    report.write_predictions(folder / f"predictions_{index.split}.csv", index, probs, guesses)
    if index.dataset in NAMES:
        write_scores(folder, index, probs, run=f"{card.recipe}-{card.network.model}")
    title = f"{index.dataset}, {index.split}: {len(index)} images"
    if "confusion" in result:
        plots.confusion(folder / f"confusion_{index.split}.png", result["confusion"], index.classes, title, note)
    plots.roc(folder / f"roc_{index.split}.png", probs, index.labels, index.classes, index.task, note)
