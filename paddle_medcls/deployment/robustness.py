"""How far a model can be pushed: its metrics on corrupted images, by kind and severity."""

from __future__ import annotations

import numpy as np
from prettytable import PrettyTable

from paddle_medcls.core.progress import progress
from paddle_medcls.data.index import Index
from paddle_medcls.deployment.predictor import Predictor
from paddle_medcls.evaluation import calibration, metrics
from paddle_medcls.models.output_head import OutputHead
from paddle_medcls.preprocessing.corruptions import KINDS, SEVERITIES, corrupt
from paddle_medcls.preprocessing.transforms import fit, normalize

MEASURES = ("accuracy", "auc", "balanced_error", "calibration_error", "passed")


def robustness(predictor: Predictor, index: Index, head: OutputHead, batch_size: int = 32) -> dict:
    """Evaluates a model on corrupted images of a split; each image is read once, and goes through the network 46 times.

    Images are scaled to the network's size, rounded to whole values, corrupted, and normalised.

    Args:
        head: what the logits mean: the model's own, or that of a calibration just made.

    Returns:
        `clean`: the measures without a corruption; `corruptions`: kind -> measures at each severity; `mean`: of all
        corruptions and severities; `relative_balanced_error`: of `mean`, minus that of `clean`. Measures: `accuracy`,
        `auc`, `balanced_error` (1 - mean recall of the classes), `calibration_error`, and `passed`, the share of images
        like the training images, None for a model that cannot tell.

    Raises:
        DataError: an image that cannot be read.
    """
    spec = predictor.sidecar.preprocessing
    cases = [("", 0), *((kind, severity) for kind in KINDS for severity in SEVERITIES)]
    logits: dict = {case: [] for case in cases}
    novelty: dict = {case: [] for case in cases}
    with progress(None, f"corrupting {index.split}", len(index), "image") as bar:
        for start in range(0, len(index), batch_size):
            rows = range(start, min(start + batch_size, len(index)))
            images = [_scaled(index, row, predictor) for row in rows]
            for case in cases:
                changed = [corrupt(image, *case, row) if case[1] else image for row, image in zip(rows, images)]
                x = np.stack([normalize(image, spec) for image in changed])
                found, scores = predictor.logits_and_novelty(x)
                logits[case].append(found)
                novelty[case].append(scores)
            bar.update(len(images))
    limit = None if predictor.novelty is None else predictor.sidecar.novelty["limit"]
    measured = {case: _measures(np.concatenate(logits[case]), novelty[case], index, head, limit) for case in cases}
    corruptions = {kind: [measured[kind, severity] for severity in SEVERITIES] for kind in KINDS}
    every = [row for rows in corruptions.values() for row in rows]
    mean = {name: _mean([row[name] for row in every]) for name in MEASURES}
    clean = measured["", 0]
    relative = mean["balanced_error"] - clean["balanced_error"]
    return {"clean": clean, "corruptions": corruptions, "mean": mean, "relative_balanced_error": relative}


def _scaled(index: Index, row: int, predictor: Predictor) -> np.ndarray:
    spec = predictor.sidecar.preprocessing
    image = fit(index.read(row, spec.channels, spec.least_px), spec)
    return np.clip(np.round(image), 0, 255).astype(np.uint8)


def _measures(
    logits: np.ndarray, scores: list, index: Index, head: OutputHead, limit: float | None
) -> dict[str, float | None]:
    """The measures of one case; `limit` of the novelty scores, None for a model without them."""
    labels = index.labels
    probs = head.probabilities(logits, index.ids)
    guesses = head.decide(probs)
    recalls = [row["recall"] for row in metrics.per_class(labels, guesses, head.classes)]
    error = calibration.expected_calibration_error(*calibration.confidence_and_hits(probs, labels, head.task))
    passed = None if limit is None else float((np.concatenate(scores) <= limit).mean())
    return {
        "accuracy": float((guesses == labels).mean()),
        "auc": float(metrics.auc(probs, labels, head.task)),
        "balanced_error": 1 - float(np.nanmean(recalls)),
        "calibration_error": error,
        "passed": passed,
    }


def _mean(values: list):
    return None if None in values else float(np.mean(values))


def robustness_table(report: dict) -> str:
    """A report of `robustness` as text: the accuracy at each severity, and the means of the other measures."""
    table = PrettyTable(
        ["corruption", *(f"accuracy {k}" for k in SEVERITIES), "AUC", "balanced error", "calibration error", "passed"]
    )
    table.align = "r"
    for kind, rows in {"none": [report["clean"]], **report["corruptions"]}.items():
        accuracies = [f"{row['accuracy']:.3f}" for row in rows] + [""] * (len(SEVERITIES) - len(rows))
        means = (_mean([row[name] for row in rows]) for name in MEASURES[1:])
        table.add_row([kind, *accuracies, *("–" if value is None else f"{value:.3f}" for value in means)])
    mean = report["mean"]
    return (
        f"on corrupted images, severities 1 to 5; the right columns are means over them\n{table}\n"
        f"mean accuracy {mean['accuracy']:.4f}, balanced error {mean['balanced_error']:.4f} "
        f"({report['relative_balanced_error']:+.4f} against none)"
    )
