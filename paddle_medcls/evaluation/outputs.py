"""Writes the results of a split: metrics, predictions, pictures, and the calibration of a sidecar."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from paddle_medcls.core.files import sha256, write_json
from paddle_medcls.data.datasets.medmnist import NAMES
from paddle_medcls.data.index import Index
from paddle_medcls.evaluation import calibration, metrics, model_card, model_facts, selective, tables
from paddle_medcls.evaluation.by_source import metrics_by_source
from paddle_medcls.evaluation.medmnist_scores import write_scores
from paddle_medcls.models.novelty import novelty_path
from paddle_medcls.models.output_head import OutputHead
from paddle_medcls.models.sidecar import Sidecar, sidecar_of


def score_split(logits: np.ndarray, index: Index, head: OutputHead) -> dict:
    """All metrics of a split with intervals, see `metrics.evaluate_logits`, and of each source where known."""
    result = metrics.evaluate_logits(logits, index.labels, head, groups=index.groups)
    probs = head.probabilities(logits, index.ids)
    confidences = calibration.confidence_and_hits(probs, index.labels, head.task)
    error = calibration.expected_calibration_error(*confidences)
    result |= selective.areas(selective.certainty(probs, head), selective.errors_of(index.labels, head.decide(probs)))
    extra: dict = {"calibration_error": error, "temperature": head.temperature, "threshold": head.threshold}
    if index.sources:
        extra["by_source"] = metrics_by_source(probs, head.decide(probs), index)
    return {"split": index.split, **result, **extra, "drawn": index.synthetic, "note": index.note}


def calibrate(
    sidecar: Sidecar, logits: np.ndarray, index: Index, sensitivity: float | None, output: Path | None
) -> Sidecar:
    """Fits the temperature and, for a given sensitivity, the threshold on a split.

    Args:
        logits: (N, outputs) of the validation split.

    Returns:
        The new sidecar, without prediction sets: these belong to a temperature.
    """
    temperature = calibration.fit_temperature(logits, index.labels, sidecar.loss)
    threshold = sidecar.threshold
    if sensitivity is not None:
        probs = replace(sidecar.head, temperature=temperature).probabilities(logits)
        threshold = calibration.threshold_for(probs[:, 1], index.labels, sensitivity)
    if output is not None:
        from paddle_medcls.evaluation import plots  # here: matplotlib takes half a second to import

        diagrams = []
        for name, t in (("before", 1.0), (f"after, temperature {temperature:.3f}", temperature)):
            probs = replace(sidecar.head, temperature=t).probabilities(logits)
            confidences = calibration.confidence_and_hits(probs, index.labels, sidecar.task)
            diagrams.append(
                (name, calibration.reliability(*confidences), calibration.expected_calibration_error(*confidences))
            )
        note = tables.SYNTHETIC_NOTICE if index.synthetic or sidecar.drawn else ""
        plots.reliability(output / "calibration.png", diagrams, f"{index.dataset}, {index.split}", note)
    return replace(sidecar, temperature=temperature, threshold=threshold, prediction_sets={})


def keep_calibration(weights: Path, sidecar: Sidecar) -> Sidecar:
    """Writes the sidecar of a weight file, also where there was none, and its model card; returns the sidecar."""
    sidecar = replace(sidecar, sha256=sha256(weights))
    sidecar.write(sidecar_of(weights))
    if model_card.is_card(weights.parent / "README.md"):
        files = [path.name for path in (weights, novelty_path(weights)) if path.is_file()]
        model_card.write_card(weights.parent, sidecar, "weights", files, model_facts.run_facts(weights, sidecar))
    return sidecar


def write_outputs(folder: Path, logits: np.ndarray, index: Index, sidecar: Sidecar, result: dict) -> None:
    """Writes `metrics.json`, `predictions_<split>.csv`, and `confusion_`, `roc_` and `risk_coverage_<split>.png`.

    For a MedMNIST set also the predictions in the format of its own evaluator.

    Args:
        logits: (N, outputs) of the split.
    """
    from paddle_medcls.evaluation import plots  # here: matplotlib takes half a second to import

    note = tables.SYNTHETIC_NOTICE if index.synthetic or sidecar.drawn else ""
    probs = sidecar.head.probabilities(logits)
    guesses = sidecar.head.decide(probs)
    write_json(folder / "metrics.json", result)
    tables.write_predictions(folder / f"predictions_{index.split}.csv", index, probs, guesses)
    if index.dataset in NAMES:
        write_scores(folder, index, probs, run=f"{sidecar.recipe}-{sidecar.network.model}")
    title = f"{index.dataset}, {index.split}: {len(index)} images"
    if "confusion" in result:
        plots.confusion(folder / f"confusion_{index.split}.png", result["confusion"], index.classes, title, note)
    curve = selective.risk_coverage(
        selective.certainty(probs, sidecar.head), selective.errors_of(index.labels, guesses)
    )
    plots.risk_coverage(folder / f"risk_coverage_{index.split}.png", curve, result["aurc"], title, note)
    plots.roc(folder / f"roc_{index.split}.png", probs, index.labels, index.classes, index.task, note)
