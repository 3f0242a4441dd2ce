"""Metrics of a split with 95% intervals, from arrays; without Paddle.

A metric that is not defined (the AUC of a class without images, the precision of a class never
predicted) is nan, not 0, and is left out of averages.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence

import numpy as np

from paddle_medcls.models.output_head import OutputHead

Z = 1.959963984540054  # of a 95% interval
RESAMPLES = 1000


def loss_value(logits: np.ndarray, labels: np.ndarray, loss: str) -> float:
    """Mean cross-entropy (softmax) or binary cross-entropy (sigmoid) over the split, unweighted.

    Args:
        logits: (N, outputs).
        labels: (N,) class numbers, or (N, L) of 0 and 1.
        loss: "softmax" or "sigmoid".
    """
    z = logits.astype(np.float64)
    if loss == "softmax":
        top = z.max(axis=1, keepdims=True)
        log_sum = np.log(np.exp(z - top).sum(axis=1)) + top[:, 0]
        return float((log_sum - z[np.arange(len(z)), labels]).mean())
    target = labels.reshape(len(z), -1)
    return float((np.maximum(z, 0) - z * target + np.log1p(np.exp(-np.abs(z)))).mean())


def roc_auc(truth: np.ndarray, scores: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Area under the ROC curve: P(score of a positive > score of a negative), ties count one half.

    Args:
        truth: (N,) of 0 and 1.
        scores: (N,), larger means more positive.
        weights: (B, N) counts of each image in B resamples; None: each once.

    Returns:
        (B,) areas, or a scalar array without weights; nan where one class has no weight.
    """
    order = np.argsort(scores, kind="stable")
    truth = truth[order].astype(np.float64)
    single = weights is None
    w = np.ones((1, len(truth))) if weights is None else weights[:, order].astype(np.float64)
    # groups of equal scores: a positive beats the negatives below its group and half of its own's
    starts = np.flatnonzero(np.r_[True, np.diff(scores[order]) != 0])
    positive = np.add.reduceat(w * truth, starts, axis=1)
    negative = np.add.reduceat(w * (1 - truth), starts, axis=1)
    below = np.cumsum(negative, axis=1) - negative
    wins = (positive * (below + 0.5 * negative)).sum(axis=1)
    pairs = positive.sum(axis=1) * negative.sum(axis=1)
    area = np.divide(wins, pairs, out=np.full(len(wins), np.nan), where=pairs > 0)
    return area[0] if single else area


def auc(probs: np.ndarray, labels: np.ndarray, task: str, weights: np.ndarray | None = None) -> np.ndarray:
    """AUC of a task: binary, of class 1; otherwise the average over classes, one against the rest.

    Args:
        probs: (N, C).
        labels: (N,) class numbers, or (N, C) for multi-label.
        weights: see `roc_auc`.

    Returns:
        (B,) areas, or a scalar array without weights; nan where it is not defined.
    """
    if task == "binary":
        return roc_auc(labels, probs[:, 1], weights)
    truth = labels if labels.ndim == 2 else np.eye(probs.shape[1], dtype=np.int64)[labels]
    areas = [roc_auc(truth[:, k], probs[:, k], weights) for k in range(probs.shape[1])]
    return _nanmean(np.stack(areas), axis=0)


def _nanmean(values: np.ndarray, axis: int | None = None) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # an empty average is nan, which is the answer
        return np.nanmean(values, axis=axis)


def wilson(correct: float, total: int) -> tuple[float, float]:
    """95% interval of a proportion, (low, high).

    Source:
        Wilson, Journal of the American Statistical Association 22, 1927.
    """
    p = correct / total
    centre = p + Z * Z / (2 * total)
    half = Z * np.sqrt(p * (1 - p) / total + Z * Z / (4 * total * total))
    scale = 1 + Z * Z / total
    return max(0.0, float((centre - half) / scale)), min(1.0, float((centre + half) / scale))  # rounding: -1e-17


def clusters_of(groups: Sequence[str]) -> np.ndarray | None:
    """Patient numbers (N,) of N images; None where patients are unknown, or each has one image.

    Images of one patient are alike, so intervals and tests resample patients: otherwise ten images of each of
    twenty patients would count as two hundred independent cases.
    """
    names, numbers = np.unique(np.asarray(groups, str), return_inverse=True)
    return numbers.reshape(-1) if 0 < len(names) < len(numbers) else None


def resampled_counts(n: int, clusters: np.ndarray | None = None, resamples: int = RESAMPLES) -> Iterator[np.ndarray]:
    """Yields counts (b, N) of each image in b resamples of the images, or of patients; `resamples` rows in all.

    Every call draws the same images, so that two models are compared on the same resamples.

    Args:
        clusters: (N,) patient of each image, numbered from 0, see `clusters_of`; None: images are resampled.
    """
    rng = np.random.default_rng(0)
    units = n if clusters is None else int(clusters.max()) + 1
    step = max(1, 2_000_000 // n)  # keeps the counts of one round under 16 MB
    for start in range(0, resamples, step):
        rows = range(min(step, resamples - start))
        counts = np.stack([np.bincount(rng.integers(0, units, units), minlength=units) for _ in rows])
        yield counts if clusters is None else counts[:, clusters]


def bootstrap_areas(
    probs: np.ndarray, labels: np.ndarray, task: str, clusters: np.ndarray | None = None, resamples: int = RESAMPLES
) -> np.ndarray:
    """AUC (B,) of resamples, see `resampled_counts`."""
    counts = resampled_counts(len(labels), clusters, resamples)
    return np.concatenate([auc(probs, labels, task, weights) for weights in counts])


def bootstrap_means(values: np.ndarray, clusters: np.ndarray | None = None) -> np.ndarray:
    """Mean over the images (B,) of values (N,) in 1000 resamples, see `resampled_counts`."""
    counts = resampled_counts(len(values), clusters)
    return np.concatenate([weights @ values / weights.sum(axis=1) for weights in counts])


def percentile_interval(values: np.ndarray) -> tuple[float, float]:
    """The middle 95% of resampled values (B,); nan among them are left out."""
    values = values[np.isfinite(values)]
    if not len(values):
        return float("nan"), float("nan")
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def accuracy_interval(hits: np.ndarray, clusters: np.ndarray | None = None) -> tuple[float, float]:
    """95% interval of an accuracy: Wilson's, or of resampled patients where clusters are given.

    Args:
        hits: (N,) whether each image is predicted correctly; multi-label: the share of its labels.
        clusters: see `clusters_of`.
    """
    if clusters is not None:
        shares = bootstrap_means(hits, clusters)
        if np.ptp(shares) > 1e-12:
            return percentile_interval(shares)
        units = int(clusters.max()) + 1  # all patients alike: resampling would give an interval of width 0
        return wilson(float(np.mean(hits)) * units, units)
    return wilson(float(np.sum(hits)), len(hits))


def confusion(labels: np.ndarray, guesses: np.ndarray, num_classes: int) -> np.ndarray:
    """Counts (C, C): rows are the true classes, columns the predicted ones."""
    return np.bincount(labels * num_classes + guesses, minlength=num_classes**2).reshape(num_classes, num_classes)


def _ratio(numerator: float, denominator: float) -> float:
    return float(numerator / denominator) if denominator else float("nan")


def per_class(labels: np.ndarray, guesses: np.ndarray, classes: Sequence[str]) -> list[dict]:
    """Precision, recall, F1, specificity and support of each class.

    Args:
        labels: (N,) class numbers, or (N, L) of 0 and 1: then each label is a class.
    """
    rows = []
    for k, name in enumerate(classes):
        truth = labels[:, k] == 1 if labels.ndim == 2 else labels == k
        guess = guesses[:, k] == 1 if labels.ndim == 2 else guesses == k
        hits = int((truth & guess).sum())
        precision, recall = _ratio(hits, guess.sum()), _ratio(hits, truth.sum())
        rows.append(
            {
                "class": name,
                "precision": precision,
                "recall": recall,
                "f1": _ratio(2 * hits, truth.sum() + guess.sum()),
                "specificity": _ratio((~truth & ~guess).sum(), (~truth).sum()),
                "support": int(truth.sum()),
                "predicted": int(guess.sum()),
            }
        )
    return rows


def quadratic_kappa(labels: np.ndarray, guesses: np.ndarray, num_classes: int) -> float:
    """Cohen's kappa with quadratic weights, for ordered classes; in [-1, 1]."""
    table = confusion(labels, guesses, num_classes).astype(np.float64)
    grid = np.arange(num_classes)
    penalty = (grid[:, None] - grid[None, :]) ** 2
    chance = np.outer(table.sum(axis=1), table.sum(axis=0)) / table.sum()
    return 1 - _ratio((penalty * table).sum(), (penalty * chance).sum())


def evaluate_logits(
    logits: np.ndarray, labels: np.ndarray, head: OutputHead, intervals: bool = True, groups: Sequence[str] = ()
) -> dict:
    """All metrics of a split.

    Args:
        logits: (N, outputs), as the network gives them.
        labels: (N,) class numbers, or (N, L) of 0 and 1.
        head: what the logits mean.
        intervals: also the 95% intervals; the bootstrap of the AUC takes about a second.
        groups: the patient of each image, where known: patients are then resampled.

    Returns:
        `n`, `loss`, `accuracy`, `auc`, `per_class`, `confusion` (rows true; not for multi-label),
        `intervals` (95%: `accuracy` by Wilson, `auc` by bootstrap; both by bootstrap of the patients where
        several images are of one), `patients` (their number, where known); for binary tasks `sensitivity` and
        `specificity` of class 1, for ordinal ones `quadratic_kappa` and `mean_absolute_error`.
        Multi-label accuracy is the share of correct (image, label) pairs.
    """
    task, classes = head.task, head.classes
    probs = head.probabilities(logits)
    guesses = head.decide(probs)
    result: dict = {
        "n": len(labels),
        "loss": loss_value(head.scaled(logits), labels, head.loss),
        "accuracy": float((guesses == labels).mean()),
        "auc": float(auc(probs, labels, task)),
        "per_class": per_class(labels, guesses, classes),
    }
    if task != "multi-label":
        result["confusion"] = confusion(labels, guesses, len(classes)).tolist()
    if task == "binary":
        result["sensitivity"] = result["per_class"][1]["recall"]
        result["specificity"] = result["per_class"][1]["specificity"]
    if task == "ordinal":
        result["quadratic_kappa"] = quadratic_kappa(labels, guesses, len(classes))
        result["mean_absolute_error"] = float(np.abs(guesses - labels).mean())
    if len(groups):
        result["patients"] = len(set(groups))
    if intervals:
        clusters = clusters_of(groups)
        # labels of one image are not independent: for multi-label its accuracy counts as one trial
        hits = (guesses == labels).reshape(len(labels), -1).mean(axis=1)
        result["intervals"] = {
            "accuracy": list(accuracy_interval(hits, clusters)),
            "auc": list(percentile_interval(bootstrap_areas(probs, labels, task, clusters))),
        }
    return result
