"""Selective prediction: does the network know when it errs? Errors among the answers that it is most certain of.

Source: Geifman and El-Yaniv 2017, arXiv:1705.08500; the area and its excess: Geifman, Uziel and El-Yaniv 2019,
arXiv:1805.08206.
"""

from __future__ import annotations

import numpy as np

from paddle_medcls.evaluation.metrics import accuracy_interval
from paddle_medcls.models.output_head import OutputHead

SHARES = (0.5, 0.7, 0.8, 0.9, 0.95, 1.0)
"""Shares of the answers that the tables show."""


def certainty(probs: np.ndarray, head: OutputHead) -> np.ndarray:
    """How certain each answer is, for ordering: probabilities (N, C) -> (N,).

    The largest probability; of two classes the distance to the threshold, as logits; of several labels that of the
    least certain one.
    """
    if head.task not in ("binary", "multi-label"):
        return probs.max(axis=1)
    p = np.clip(probs if head.task == "multi-label" else probs[:, 1:], 1e-15, 1 - 1e-15)
    limit = np.clip(head.threshold, 1e-15, 1 - 1e-15)
    return np.abs(np.log(p / (1 - p)) - np.log(limit / (1 - limit))).min(axis=1)


def errors_of(labels: np.ndarray, guesses: np.ndarray) -> np.ndarray:
    """(N,) 1 where an answer is wrong; of several labels the share that is wrong."""
    return (guesses != labels).reshape(len(labels), -1).mean(axis=1)


def risk_coverage(certain: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """(N,): element k is the mean error of the k + 1 most certain answers.

    Equally certain answers count as their mean, so that their order does not matter.

    Args:
        certain: (N,), see `certainty`.
        errors: (N,) in [0, 1].
    """
    _, tied = np.unique(-certain, return_inverse=True)
    means = np.bincount(tied, errors) / np.bincount(tied)
    ordered = means[np.sort(tied)]
    return np.cumsum(ordered) / np.arange(1, len(ordered) + 1)


def areas(certain: np.ndarray, errors: np.ndarray) -> dict[str, float]:
    """`aurc`, the mean of the risk-coverage curve, and `excess_aurc`, what it is above that of the best order."""
    area = float(risk_coverage(certain, errors).mean())
    best = float(risk_coverage(-errors, errors).mean())
    return {"aurc": area, "excess_aurc": max(0.0, area - best)}


def kept_accuracies(curve: np.ndarray) -> list[tuple[float, int, float]]:
    """(share, answers, accuracy) at SHARES of a risk-coverage curve (N,)."""
    counts = [max(1, round(share * len(curve))) for share in SHARES]
    return [(share, count, 1 - float(curve[count - 1])) for share, count in zip(SHARES, counts)]


def passed_report(novelty: np.ndarray, limit: float, errors: np.ndarray, clusters: np.ndarray | None) -> dict:
    """How many images are like the training images, and how accurate the answers to these and to the others are.

    Args:
        novelty: (N,) of the images, see `models.novelty`.
        limit: of the novelty.
        errors: (N,), see `errors_of`.
        clusters: (N,) patients, see `metrics.clusters_of`.

    Returns:
        `limit`, `passed` (share in [0, 1]) with its 95% `interval`, `accuracy_passed` and `accuracy_refused`; None
        where there is no such image.
    """
    passed = novelty <= limit
    accuracies = [1 - float(errors[rows].mean()) if rows.any() else None for rows in (passed, ~passed)]
    interval = list(accuracy_interval(passed.astype(float), clusters))
    found = {"limit": limit, "passed": float(passed.mean()), "interval": interval}
    return {**found, "accuracy_passed": accuracies[0], "accuracy_refused": accuracies[1]}


def passed_table(report: dict) -> str:
    """A `passed_report` as text."""
    low, high = report["interval"]
    accuracy = [
        "–" if report[f"accuracy_{name}"] is None else f"{report[f'accuracy_{name}']:.4f}"
        for name in ("passed", "refused")
    ]
    return (
        f"like the training images (score up to {report['limit']:.4g}): {report['passed']:.4f} "
        f"(95% {low:.4f} to {high:.4f}) of the images\n"
        f"  accuracy {accuracy[0]} on these, {accuracy[1]} on the others"
    )
