"""Calibration of probabilities, and the choice of a decision threshold."""

from __future__ import annotations

import numpy as np

from paddle_medcls.core.errors import DataError
from paddle_medcls.evaluation.metrics import loss_value
from paddle_medcls.models.output_head import sigmoid

TEMPERATURES = (0.05, 20.0)
"""The range in which a temperature is looked for."""


def confidence_and_hits(probs: np.ndarray, labels: np.ndarray, task: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the confidence of each prediction and whether it was right.

    Args:
        probs: (N, C).
        labels: (N,), or (N, C) for multi-label.

    Returns:
        (M,) probabilities of the more probable side and (M,) booleans; M = N, or N * C for multi-label,
        where each label is a prediction of its own.
    """
    if task == "multi-label":
        p, truth = probs.ravel(), labels.ravel() == 1
        return np.maximum(p, 1 - p), (p > 0.5) == truth
    return probs.max(axis=1), probs.argmax(axis=1) == labels


def reliability(confidence: np.ndarray, hits: np.ndarray, bins: int = 15) -> list[dict]:
    """Bins of equal width over [0, 1]: `low`, `high`, `count`, mean `confidence`, `accuracy`; empty ones left out."""
    where = np.minimum((confidence * bins).astype(int), bins - 1)
    rows = []
    for k in np.unique(where):
        inside = where == k
        rows.append(
            {
                "low": k / bins,
                "high": (k + 1) / bins,
                "count": int(inside.sum()),
                "confidence": float(confidence[inside].mean()),
                "accuracy": float(hits[inside].mean()),
            }
        )
    return rows


def expected_calibration_error(confidence: np.ndarray, hits: np.ndarray, bins: int = 15) -> float:
    """Returns the mean of |confidence - accuracy| over the bins, weighted by their images (Guo et al. 2017)."""
    rows = reliability(confidence, hits, bins)
    return sum(row["count"] * abs(row["confidence"] - row["accuracy"]) for row in rows) / len(confidence)


def fit_temperature(logits: np.ndarray, labels: np.ndarray, loss: str) -> float:
    """The T > 0 that makes the loss of logits / T smallest (Guo et al. 2017), by golden-section search.

    The loss is convex in 1 / T, so there is one minimum; the search covers T from 0.05 to 20.
    """
    low, high = np.log(TEMPERATURES)
    ratio = (np.sqrt(5) - 1) / 2
    for _ in range(60):
        a, b = high - ratio * (high - low), low + ratio * (high - low)
        if loss_value(logits / np.exp(a), labels, loss) < loss_value(logits / np.exp(b), labels, loss):
            high = b
        else:
            low = a
    return float(np.exp((low + high) / 2))


def fit_logistic(margins: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """The temperature T, and the threshold that makes the two sides of the decision equally probable.

    Logistic regression P(1) = sigmoid((margin - b) / T) by Newton's method; its targets lie a little inside 0 and 1, so
    that separable classes give a finite T too (Platt 1999).

    Args:
        margins: (N,) log-odds of class 1, float.
        labels: (N,) of 0 and 1, both present.

    Returns:
        T, from 0.05 to 20, and the probability sigmoid(b / T) that the network's own sigmoid(margin / T) has at b.
    """
    positives = int((labels == 1).sum())
    targets = np.where(labels == 1, (positives + 1) / (positives + 2), 1 / (len(labels) - positives + 2))
    x = np.stack([margins, np.ones(len(margins))], axis=1)
    w = np.array([1.0, 0.0])

    def loss(w: np.ndarray) -> float:
        return float(np.mean(np.logaddexp(0, x @ w) - targets * (x @ w)))

    for _ in range(100):
        p = sigmoid(x @ w)
        hessian = (x * (p * (1 - p))[:, None]).T @ x / len(x) + 1e-12 * np.eye(2)
        step: np.ndarray = np.linalg.solve(hessian, x.T @ (p - targets) / len(x))
        while loss(w - step) > loss(w) and np.abs(step).max() > 1e-12:
            step = step / 2
        w = w - step
    coldest, warmest = TEMPERATURES
    return float(1 / np.clip(w[0], 1 / warmest, 1 / coldest)), float(sigmoid(-w[1]))


def threshold_for(scores: np.ndarray, labels: np.ndarray, sensitivity: float) -> float:
    """The largest threshold at which at least this share of the positives lies above it.

    Args:
        scores: (N,) probability of class 1.
        labels: (N,) of 0 and 1.
        sensitivity: the target, above 0 and at most 1.

    Returns:
        A threshold t for `score > t`; midway to the next lower score, so that rounding does not matter.

    Raises:
        DataError: no positives.
    """
    positives = np.sort(scores[labels == 1])[::-1]
    if not len(positives):
        raise DataError(
            "no positive image: no threshold can be chosen for a sensitivity",
            expected="images of both classes in the validation split",
            fix="leave --sensitivity out, or use a validation split with both classes",
        )
    needed = positives[int(np.ceil(sensitivity * len(positives) - 1e-9)) - 1]  # the weakest that must pass
    lower = scores[scores < needed]
    return float((needed + lower.max()) / 2) if len(lower) else float(needed / 2)


def predictive_values(sensitivity: float, specificity: float, prevalence: float) -> tuple[float, float]:
    """PPV and NPV at this prevalence (Bayes' rule); nan where undefined."""
    true_positive, false_positive = sensitivity * prevalence, (1 - specificity) * (1 - prevalence)
    true_negative, false_negative = specificity * (1 - prevalence), (1 - sensitivity) * prevalence
    positive, negative = true_positive + false_positive, true_negative + false_negative
    return (
        true_positive / positive if positive else float("nan"),
        true_negative / negative if negative else float("nan"),
    )
