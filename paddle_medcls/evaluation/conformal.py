"""Prediction sets: the classes that are possible for an image, such that a given share of sets holds the true class.

Split conformal prediction: images that the training has not seen give every level of coverage a threshold; a class is
in the set of an image if its score is not above the threshold. The promise holds for images like those of the
calibration, drawn in the same way, and on average over them; it says nothing about images of another hospital.

| method | score of a class |
|---|---|
| `lac` | 1 - its probability: the smallest sets on average. A set is empty where no class is probable enough |
| `aps` | the sum of its probability and those of all more probable classes: larger sets for doubtful images, and the most probable class is always in |

`lac-by-class` and `aps-by-class` have a threshold for each class: the promise then holds for each class alone, also for
a rare one.

Sources: Sadinle, Lei and Wasserman 2019, arXiv:1609.00451 (LAC); Romano, Sesia and Candès 2020, arXiv:2006.02544 (APS);
Angelopoulos and Bates 2021, arXiv:2107.07511 (the correction for a finite number of images).
"""  # noqa: E501  a row of the table

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from paddle_medcls.core.errors import RunError
from paddle_medcls.data.index import Index
from paddle_medcls.data.splits import stratified_parts
from paddle_medcls.evaluation.metrics import accuracy_interval, clusters_of
from paddle_medcls.models.sidecar_checks import COVERAGES, SET_METHODS  # noqa: F401  SET_METHODS for callers


def calibration_rows(index: Index) -> list[int]:
    """Rows of the half of a split that thresholds are chosen on: complete patients, the same share of each class.

    The same half every time, so that the other half can be told from it later.
    """
    part = stratified_parts(index.labels, index.groups or index.ids, (0.5, 0.5))
    return np.flatnonzero(part == 0).tolist()


def calibrate_sets(probs: np.ndarray, index: Index, method: str) -> dict:
    """The record of a calibration, as the sidecar keeps it.

    Args:
        probs: (N, C) of the images of a split.
        index: the split. Half of its images are used, see `calibration_rows`.
        method: one of SET_METHODS.

    Returns:
        `method`, `split`, `images` (their number), `fingerprint` of these images, and `thresholds`: a row for all
        classes, or one a class, with the threshold of each of COVERAGES; 1 lets every class in.
    """
    rows = calibration_rows(index)
    own = index.subset(rows)
    truth = class_scores(probs[rows], method)[np.arange(len(rows)), own.labels]
    groups = [truth]
    if method.endswith("-by-class"):
        groups = [truth[own.labels == k] for k in range(len(index.classes))]
    thresholds = [[_threshold(np.sort(group), coverage) for coverage in COVERAGES] for group in groups]
    record = {"method": method, "split": index.split, "images": len(rows), "fingerprint": own.fingerprint()}
    return {**record, "thresholds": thresholds}


def class_scores(probs: np.ndarray, method: str) -> np.ndarray:
    """How unfitting each class is for each image: probabilities (N, C) -> (N, C) in [0, 1]."""
    if method.startswith("lac"):
        return 1 - probs
    order = np.argsort(-probs, axis=1, kind="stable")
    sums = np.cumsum(np.take_along_axis(probs, order, axis=1), axis=1)
    scores = np.empty_like(sums)
    np.put_along_axis(scores, order, np.minimum(sums, 1), axis=1)
    return scores


def _threshold(ordered: np.ndarray, coverage: float) -> float:
    """Of n sorted scores the ceil((n + 1) coverage)-th; 1, which lets every class in, where n is too small for it."""
    rank = math.ceil((len(ordered) + 1) * coverage - 1e-9)
    return float(ordered[rank - 1]) if rank <= len(ordered) else 1.0


def check_coverage(coverage: float) -> int:
    """The number of a level among COVERAGES.

    Raises:
        RunError: not one of them.
    """
    level = next((k for k, known in enumerate(COVERAGES) if abs(known - coverage) < 1e-9), None)
    if level is None:
        raise RunError(f"no prediction sets for a coverage of {coverage:g}", expected="0.5, 0.51, 0.52 … 0.99")
    return level


def require_calibration(record: dict) -> None:
    """Refuses a model without a calibration of its prediction sets.

    Raises:
        RunError: the record is empty.
    """
    if not record:
        raise RunError(
            "this model has no calibration for prediction sets",
            fix="run eval --calibrate on its weight file first; a multi-label model has none",
        )


def prediction_sets(probs: np.ndarray, record: dict, coverage: float) -> np.ndarray:
    """Whether each class is in the set of each image: probabilities (N, C) -> bool (N, C).

    Args:
        record: of `calibrate_sets`.
        coverage: the share of sets that are to hold the true class, one of COVERAGES.

    Raises:
        RunError: no calibration in the record, or another coverage.
    """
    level = check_coverage(coverage)
    require_calibration(record)
    inside = class_scores(probs, record["method"]) <= np.array(record["thresholds"])[:, level]
    if record["method"].startswith("aps"):  # else the surest images would have empty sets
        inside[np.arange(len(probs)), probs.argmax(axis=1)] = True
    return inside


def coverage_report(probs: np.ndarray, index: Index, record: dict, coverage: float) -> dict:
    """How often the sets hold the true class, on the images of a split that were not used for the calibration.

    Args:
        probs: (N, C) of the split.
        index: the split, or any other one.
        record, coverage: as of `prediction_sets`.

    Returns:
        `target`, `method`, `images` (counted), `calibrated_on` (a sentence), `coverage` with its 95% `interval`,
        `mean_size`, `sizes` (images whose set has 0, 1, 2 … classes), `by_class` (the same for each class).
    """
    inside = prediction_sets(probs, record, coverage)
    others = np.ones(len(index), bool)
    known = record["split"] == index.split and (rows := calibration_rows(index))
    if known and index.subset(rows).fingerprint() == record["fingerprint"]:
        others[rows] = False
    elif record["split"] == index.split:
        raise RunError(
            f"the {index.split} split has changed since the calibration: its images cannot be told from the others",
            fix="run eval --calibrate again",
        )
    chosen = np.flatnonzero(others).tolist()
    inside, index = inside[chosen], index.subset(chosen)
    covered, sizes = inside[np.arange(len(chosen)), index.labels], inside.sum(axis=1)
    by_class = []
    for k, name in enumerate(index.classes):
        own = index.labels == k
        by_class.append(
            {"class": name, **_share(covered[own], sizes[own], [g for g, o in zip(index.groups, own) if o])}
        )
    found = {"target": coverage, "method": record["method"], "calibrated_on": calibration_text(record)}
    counts = np.bincount(sizes, minlength=len(index.classes) + 1).tolist()
    return {**found, **_share(covered, sizes, index.groups), "sizes": counts, "by_class": by_class}


def _share(covered: np.ndarray, sizes: np.ndarray, groups: Sequence[str]) -> dict:
    if not len(covered):
        return {"images": 0, "coverage": None, "interval": None, "mean_size": None}
    interval = accuracy_interval(covered.astype(float), clusters_of(groups))
    return {
        "images": len(covered),
        "coverage": float(covered.mean()),
        "interval": list(interval),
        "mean_size": float(sizes.mean()),
    }


def calibration_text(record: dict) -> str:
    """Which images the thresholds were chosen on, and what else these were used for."""
    used = "used for nothing else"
    if record["split"] == "val":
        used = (
            "which also chose the temperature, and the epoch unless the recipe keeps the last one: "
            "new images may be covered less often"
        )
    return f"{record['images']} images, one half of {record['split']}, {used}"


def coverage_table(report: dict) -> str:
    """A `coverage_report` as text."""

    def line(name: str, row: dict) -> str:
        if not row["images"]:
            return f"  {name}: no images"
        low, high = row["interval"]
        between = f"(95% {low:.4f} to {high:.4f})"
        return f"  {name}: {row['coverage']:.4f} {between}, {row['mean_size']:.2f} classes, {row['images']} images"

    sizes = ", ".join(f"{count} with {size}" for size, count in enumerate(report["sizes"]) if count)
    lines = [f"prediction sets for a coverage of {report['target']:g} ({report['method']})"]
    lines += [line("coverage", report), *(line(row["class"], row) for row in report["by_class"])]
    lines += [f"  sets by number of classes: {sizes}", f"  calibrated on {report['calibrated_on']}"]
    return "\n".join(lines)
