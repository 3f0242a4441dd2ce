"""Converts the logits of a network to probabilities and decisions; NumPy only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from paddle_medcls.core.errors import WeightsError

TINY = 1e-30  # a float32 too


@dataclass(frozen=True)
class OutputHead:
    """The meaning of a network's logits: task, loss, classes and calibration.

    Attributes:
        task: "binary", "multi-class", "ordinal" or "multi-label", see `data.index.Index`.
        loss: that the network was trained with, "softmax" or "sigmoid". A binary sigmoid has one output.
        classes: names, in the order of the probability columns.
        temperature: logits are divided by it.
        threshold: in [0, 1]; binary: of class 1; multi-label: of each label; else not used.
    """

    task: str
    loss: str
    classes: tuple[str, ...]
    temperature: float = 1.0
    threshold: float = 0.5

    @property
    def num_outputs(self) -> int:
        """Width of the logits."""
        return 1 if self.loss == "sigmoid" and self.task == "binary" else len(self.classes)

    def scaled(self, logits: np.ndarray, names: Sequence[object] = ()) -> np.ndarray:
        """Checked logits, divided by the temperature: (N, outputs) float64.

        Args:
            logits: (N, outputs).
            names: of the N images, for the message; default: row numbers.

        Raises:
            WeightsError: logits of another shape, or not finite.
        """
        if logits.ndim != 2 or logits.shape[1] != self.num_outputs:
            raise WeightsError(
                f"the network gives logits of shape {logits.shape}",
                expected=f"(images, {self.num_outputs}) for {len(self.classes)} classes, {self.task}, {self.loss}",
                fix="use the sidecar that was written with these weights",
            )
        names = names or [f"image {row}" for row in range(len(logits))]
        return check_finite(logits, names).astype(np.float64) / self.temperature

    def probabilities(self, logits: np.ndarray, names: Sequence[object] = ()) -> np.ndarray:
        """Logits (N, outputs) -> (N, C) float64, one column a class.

        Multi-label columns are independent; a binary sigmoid's one output p becomes the columns 1 - p and p.

        Args:
            logits, names: see `scaled`.

        Raises:
            WeightsError: logits of another shape, or not finite.
        """
        z = self.scaled(logits, names)
        if self.loss == "softmax":
            return softmax(z)
        p = sigmoid(z)
        return p if self.task == "multi-label" else np.concatenate([1 - p, p], axis=1)

    def logits_of(self, probs: np.ndarray) -> np.ndarray:
        """Logits (N, outputs) float64 whose probabilities, at temperature 1, are these (N, C).

        A probability of 0 counts as 1e-30, so that its logit is finite.
        """
        logs = np.log(probs + TINY)
        if self.loss == "softmax":
            return logs
        if self.task == "multi-label":
            return logs - np.log(1 - probs + TINY)
        return logs[:, 1:] - logs[:, :1]

    def decide(self, probs: np.ndarray) -> np.ndarray:
        """Probabilities (N, C) -> class numbers (N,), or 0/1 (N, C) for a multi-label task.

        A binary class 1, or a label, needs a probability above the threshold.
        """
        if self.task == "multi-label":
            return (probs > self.threshold).astype(np.int64)
        if self.task == "binary":
            return (probs[:, 1] > self.threshold).astype(np.int64)
        return probs.argmax(axis=1)

    def decide_one(self, probs: np.ndarray) -> tuple[list[int], float]:
        """The decision for one image.

        Args:
            probs: (C,), its probabilities.

        Returns:
            The classes: one, or for a multi-label task any number. The probability of that one, or the largest.
        """
        decision = self.decide(probs[None])[0]
        if self.task == "multi-label":
            return np.flatnonzero(decision).tolist(), float(probs.max())
        return [int(decision)], float(probs[int(decision)])

    def explained(self, probs: np.ndarray) -> np.ndarray:
        """Returns the class (N,) that each image's heat map explains: the decided one, or the most probable label."""
        return probs.argmax(axis=1) if self.task == "multi-label" else self.decide(probs)


def check_finite(logits: np.ndarray, names: Sequence[object]) -> np.ndarray:
    """Returns the logits (N, outputs) unchanged.

    Args:
        names: of the N images, for the message.

    Raises:
        WeightsError: NaN or infinity among them; names the images.
    """
    bad = np.flatnonzero(~np.isfinite(logits).all(axis=1))
    if len(bad):
        raise WeightsError(
            f"the network computes nan or infinity for {len(bad)} of {len(logits)} image(s)",
            items=[f"{names[row]}: logits {', '.join(format(z, '.4g') for z in logits[row][:8])}" for row in bad[:21]],
            expected="finite logits",
            fix="use other weights; if this is a training, lower --lr or lengthen the warm-up",
        )
    return logits


def softmax(logits: np.ndarray) -> np.ndarray:
    """(N, C) logits -> (N, C) probabilities, float64."""
    z = logits.astype(np.float64)
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Elementwise 1 / (1 + exp(-z)), float64, without overflow."""
    return 0.5 * (1 + np.tanh(0.5 * logits.astype(np.float64)))
