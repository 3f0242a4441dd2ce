"""Tests whether two models differ on the same images, from their predictions alone.

Accuracy: McNemar's exact test on the images that only one of them predicts correctly. AUC of two classes: DeLong,
DeLong and Clarke-Pearson 1988; of more classes or labels: the paired bootstrap of the images. Where a file
patients_<split>.csv beside the predictions says that several images are of one patient, all intervals and
both tests are paired bootstraps of the patients. Differences are B - A. Probabilities are those of the files,
with 8 decimals.
"""

from __future__ import annotations

import math

import numpy as np

from paddle_medcls.core.errors import DataError
from paddle_medcls.evaluation.metrics import (
    Z,
    accuracy_interval,
    auc,
    bootstrap_areas,
    bootstrap_means,
    clusters_of,
    percentile_interval,
)
from paddle_medcls.evaluation.predictions import Predictions

NAN_INTERVAL = (float("nan"), float("nan"))
NO_SPREAD = "no spread between the images: too few of them for an interval or a test"


def compare(a: Predictions, b: Predictions) -> dict:
    """Compares two models on the same images; their order may differ between the files.

    Returns:
        `accuracy` and `auc`, each with `a` and `b` (value, 95% interval), `difference` (B - A), its
        95% `interval`, `p` (two-sided) and `test`, the name of the test; for single labels the accuracy
        also has `only_a` and `only_b`, the number of images that only one of them predicts correctly. A value that
        is not defined (an AUC of one class) is nan; `reason` says why, where there are too few images for a test.
        Where patients are resampled, `accuracy` and `auc` also have `patients`, their number.

    Raises:
        DataError: the files are not of the same images, labels and classes.
    """
    row_in_b = {name: row for row, name in enumerate(b.ids)}
    missing = [name for name in a.ids if name not in row_in_b]
    if missing or len(a.ids) != len(b.ids) or a.classes != b.classes or a.labels.ndim != b.labels.ndim:
        items = [f"A: {len(a.ids)} images in {len(a.classes)} classes: {', '.join(a.classes)}"]
        items += [f"B: {len(b.ids)} images in {len(b.classes)} classes: {', '.join(b.classes)}"]
        items += [f"only in A: {name}" for name in missing[:5]]
        items += [f"only in B: {name}" for name in sorted(set(b.ids) - set(a.ids))[:5]]
        raise DataError("the two files are not predictions of the same images", items=items, path=b.path)
    rows = [row_in_b[name] for name in a.ids]
    patients = tuple(b.patients[row] for row in rows) if b.patients else ()
    if a.patients and patients and a.patients != patients:
        items = [f"{name}: {p} in A, {q} in B" for name, p, q in zip(a.ids, a.patients, patients) if p != q]
        raise DataError(f"{len(items)} of {len(a.ids)} images have another patient in B", items=items, path=b.path)
    b = Predictions(b.path, a.ids, b.labels[rows], b.guesses[rows], b.probs[rows], b.classes)
    relabelled = np.flatnonzero((a.labels != b.labels).reshape(len(a.ids), -1).any(axis=1))
    if len(relabelled):
        items = [
            f"{a.ids[row]}: {a.labels[row].tolist()} in A, {b.labels[row].tolist()} in B" for row in relabelled[:20]
        ]
        raise DataError(f"{len(relabelled)} of {len(a.ids)} images have another label in B", items=items, path=b.path)
    clusters = clusters_of(a.patients or patients)
    result = {"accuracy": _accuracy(a, b, clusters), "auc": _auc(a, b, clusters)}
    if clusters is not None:
        for row in result.values():
            row["patients"] = int(clusters.max()) + 1
    return result


def _accuracy(a: Predictions, b: Predictions, clusters: np.ndarray | None = None) -> dict:
    hits = [(model.guesses == model.labels).reshape(len(a.ids), -1).mean(axis=1) for model in (a, b)]
    sides = [(float(hit.mean()), accuracy_interval(hit, clusters)) for hit in hits]
    gains = hits[1] - hits[0]
    same = np.array_equal(a.guesses, b.guesses)
    result: dict = {"a": sides[0], "b": sides[1], "difference": sides[1][0] - sides[0][0]}
    counts = {"only_a": int((gains == -1).sum()), "only_b": int((gains == 1).sum())} if a.task != "multi-label" else {}
    if clusters is not None:
        differs = abs(np.bincount(clusters, gains)) > 1e-12  # patients on whom the models differ
        differing = int(np.count_nonzero(differs))
        return {**result, **_resampled(bootstrap_means(gains, clusters), differing, same), **counts}
    if a.task == "multi-label":  # McNemar's test needs images that are right or wrong; here they can be partly right
        variance = gains.var(ddof=1) / len(gains) if len(gains) > 1 else float("nan")
        return {**result, **_normal(result["difference"], variance, same), "test": "paired z"}
    only_a, only_b = counts.values()
    interval = paired_interval(only_a, only_b, len(a.ids))
    return {**result, "interval": interval, "p": mcnemar(only_a, only_b), "test": "McNemar, exact", **counts}


def _auc(a: Predictions, b: Predictions, clusters: np.ndarray | None = None) -> dict:
    areas = [bootstrap_areas(model.probs, model.labels, model.task, clusters) for model in (a, b)]
    values = [float(auc(model.probs, model.labels, model.task)) for model in (a, b)]
    sides = [(value, percentile_interval(resamples)) for value, resamples in zip(values, areas)]
    same = np.array_equal(a.probs, b.probs)
    result: dict = {"a": sides[0], "b": sides[1], "difference": values[1] - values[0]}
    if a.task == "binary" and clusters is None:
        variance = delong_variance(a.labels, a.probs[:, 1], b.probs[:, 1])
        return {**result, **_normal(result["difference"], variance, same), "test": "DeLong"}
    units = len(a.ids) if clusters is None else clusters.max() + 1
    tested = _resampled(areas[1] - areas[0], units, same)
    return {**result, **tested, "test": "paired bootstrap" if clusters is None else tested["test"]}


def _resampled(gains: np.ndarray, units: int, same: bool) -> dict:
    """Interval and p of a difference from its resamples (B,) of `units` images or patients."""
    row = {"interval": percentile_interval(gains), "p": bootstrap_p(gains, units)}
    finite = gains[np.isfinite(gains)]
    if len(finite) and np.ptp(finite) < 1e-12 and not same:
        row = {"interval": NAN_INTERVAL, "p": float("nan"), "reason": NO_SPREAD}
    return {**row, "test": "paired bootstrap of patients"}


def _normal(difference: float, variance: float, same: bool = True) -> dict:
    """Interval and p of a difference that is normal with this variance.

    Args:
        same: whether the two models give the same predictions. Only then is a difference of 0 certain; else a
            variance of 0 means too few images, and nothing is known.
    """
    if variance <= 1e-18 and not (same and difference == 0):
        return {"interval": NAN_INTERVAL, "p": float("nan"), "reason": NO_SPREAD}
    error = math.sqrt(variance) if variance > 1e-18 else 0.0 if variance == variance else variance
    p = math.erfc(abs(difference) / error / math.sqrt(2)) if error else 1.0
    return {"interval": (difference - Z * error, difference + Z * error), "p": p}


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided exact p of McNemar's test; images that only model A, and only model B, predicts correctly."""
    n, term, tail = only_a + only_b, 1, 0
    for k in range(min(only_a, only_b) + 1):  # binomial coefficients, one from the other
        tail += term
        term = term * (n - k) // (k + 1)
    return min(1.0, 2 * tail / 2**n)


def paired_interval(only_a: int, only_b: int, n: int) -> tuple[float, float]:
    """95% interval of a difference of paired proportions: the adjusted Wald interval.

    Args:
        only_a, only_b: see `mcnemar`.

    Source:
        Bonett and Price, Journal of Educational and Behavioral Statistics 37, 2012.
    """
    p, q = (only_a + 1) / (n + 2), (only_b + 1) / (n + 2)
    half = Z * math.sqrt((p + q - (q - p) ** 2) / (n + 2))
    return max(-1.0, q - p - half), min(1.0, q - p + half)


def delong_variance(truth: np.ndarray, scores_a: np.ndarray, scores_b: np.ndarray) -> float:
    """Variance of the difference of two AUCs on the same images.

    Args:
        truth: (N,) of 0 and 1.
        scores_a, scores_b: (N,), larger means more positive.

    Returns:
        The variance; nan with fewer than two images of a class.

    Source:
        DeLong, DeLong and Clarke-Pearson, Biometrics 44, 1988.
    """
    if min(truth.sum(), len(truth) - truth.sum()) < 2:
        return float("nan")
    gains = [_placements(truth, scores_b)[k] - _placements(truth, scores_a)[k] for k in (0, 1)]
    return float(sum(gain.var(ddof=1) / len(gain) for gain in gains))


def _placements(truth: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each positive the share of negatives below it, for each negative of positives above; ties one half."""
    positive, negative = np.sort(scores[truth == 1]), np.sort(scores[truth == 0])

    def below(values: np.ndarray, others: np.ndarray) -> np.ndarray:
        return (np.searchsorted(others, values, "left") + np.searchsorted(others, values, "right")) / (2 * len(others))

    return below(scores[truth == 1], negative), 1 - below(scores[truth == 0], positive)


def bootstrap_p(gains: np.ndarray, units: int = 1000) -> float:
    """Two-sided p of resampled differences: twice the share on the rarer side of 0.

    At least 2 / (B + 1), and at least 2 / 2^units, the smallest p of an exact test of so many pairs: if all
    of three images favour one model, so does every resample, which proves little.

    Args:
        gains: (B,); nan among them are left out.
        units: images or patients that were resampled; those that favour neither model need not count.
    """
    gains = gains[np.isfinite(gains)]
    if not len(gains):
        return float("nan")
    rarer = min((gains <= 1e-12).sum(), (gains >= -1e-12).sum())  # sums of the same numbers differ by rounding
    return float(min(1.0, max(2 * (rarer + 1) / (len(gains) + 1), 2.0 ** (1 - int(units)))))


def verdict(result: dict) -> str:
    """One line: which metrics differ significantly (p < 0.05)."""
    parts = []
    for name, title in (("accuracy", "accuracy"), ("auc", "AUC")):
        p, difference = result[name]["p"], result[name]["difference"]
        if math.isnan(p):
            parts.append(f"{title}: {result[name].get('reason', 'not defined on these images')}")
        elif p < 0.05:
            parts.append(f"{title}: {'B' if difference > 0 else 'A'} is better")
        else:
            parts.append(f"{title}: no difference shown")
    return "; ".join(parts)
