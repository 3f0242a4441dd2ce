"""What an evaluated split writes: metrics, predictions, pictures, and the calibration of a sidecar."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from paddle_medcls import calibration, metrics, modelcard, plots, report
from paddle_medcls.data.index import Index
from paddle_medcls.data.medmnist import NAMES
from paddle_medcls.files import sha256, write_json
from paddle_medcls.medmnist_scores import write_scores
from paddle_medcls.output_head import OutputHead
from paddle_medcls.sidecar import Sidecar, sidecar_of


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
