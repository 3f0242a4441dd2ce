"""Shortcut audit: the accuracy of a linear model on the image border, the centre and small versions of an image.

Where the classes come from different hospitals, frames, letters and brightness can reveal the hospital. A multinomial
logistic regression is trained on the grey pixels of small images, once for each view of the image. A high accuracy on
the border alone shows a shortcut, since the border holds no lung and no retina.
"""

from __future__ import annotations

import cv2
import numpy as np

from paddle_medcls.core.errors import DataError
from paddle_medcls.data.index import Index
from paddle_medcls.data.reading import map_images, refuse_unreadable
from paddle_medcls.evaluation.metrics import accuracy_interval, auc, bootstrap_areas, clusters_of, percentile_interval
from paddle_medcls.models.output_head import softmax

SIDE = 40  # pixels of the small image
FRAME = 4  # pixels: the outer 10% of each side
CENTRE = 8  # pixels on each side of the centre, which is the middle 60% of each side
THUMBNAIL = 16
L2 = 1e-4  # the loss is the mean cross-entropy + L2 / 2 * squared weights; fixed: not to be tuned on the scored split
STEPS = 500  # of gradient descent


def audit(train: Index, scored: Index, workers: int) -> dict:
    """Trains a linear model on one split of a data set and scores it on another, for each view.

    Returns:
        `dataset`, `train` and `scored` (names of the splits), `n` (images scored), `patients` (their number, where
        the data set names them), `majority` (accuracy of always predicting the most frequent training class), and
        `views`: name -> `pixels`, `accuracy`, `auc` and `intervals` (95%; over patients if some have several
        images, see `metrics.evaluate_logits`).

    Raises:
        DataError: images that cannot be read, or a multi-label data set.
    """
    if train.task == "multi-label":
        raise DataError(f"{train.dataset}: the audit needs one label an image; this data set has several")
    train_views, scored_views = (_views(_small_images(index, workers)) for index in (train, scored))
    clusters = clusters_of(scored.groups)
    views = {}
    for name in train_views:
        x, x_scored = standardise(train_views[name], scored_views[name])
        weights, biases = softmax_regression(x, train.labels, len(train.classes))
        probs = softmax(x_scored @ weights + biases)
        correct = probs.argmax(axis=1) == scored.labels
        views[name] = {
            "pixels": x.shape[1],
            "accuracy": float(correct.mean()),
            "auc": float(auc(probs, scored.labels, scored.task)),
            "intervals": {
                "accuracy": accuracy_interval(correct, clusters),
                "auc": percentile_interval(bootstrap_areas(probs, scored.labels, scored.task, clusters)),
            },
        }
    majority = float((scored.labels == np.argmax(np.bincount(train.labels))).mean())
    return {
        "dataset": train.dataset,
        "train": train.split,
        "scored": scored.split,
        "n": len(scored),
        **({"patients": len(set(scored.groups))} if scored.groups else {}),
        "majority": majority,
        "views": views,
    }


def _small_images(index: Index, workers: int) -> np.ndarray:
    """Grey images (N, SIDE, SIDE), stretched to a square, values 0 to 1."""

    def read(index: Index, row: int) -> np.ndarray:
        return cv2.resize(index.read(row, "gray")[:, :, 0], (SIDE, SIDE), interpolation=cv2.INTER_AREA)

    places = [(index, row) for row in range(len(index))]
    images = list(map_images(places, read, workers, f"reading {index.dataset} {index.split}"))
    refuse_unreadable(index, [image for image in images if isinstance(image, str)])
    return np.stack(images).astype(np.float32) / 255


def _views(images: np.ndarray) -> dict[str, np.ndarray]:
    """The pixels (N, P) of each view of images (N, SIDE, SIDE), by the name of the view."""
    frame = np.ones((SIDE, SIDE), bool)
    frame[FRAME:-FRAME, FRAME:-FRAME] = False
    centre = np.zeros((SIDE, SIDE), bool)
    centre[CENTRE:-CENTRE, CENTRE:-CENTRE] = True
    thumbnails = [cv2.resize(image, (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_AREA) for image in images]
    return {
        "border alone, outer 10%": images[:, frame],
        "centre masked, middle 60%": images[:, ~centre],
        "centre alone": images[:, centre],
        f"thumbnail {THUMBNAIL}x{THUMBNAIL}": np.stack(thumbnails).reshape(len(images), -1),
        f"whole image {SIDE}x{SIDE}": images.reshape(len(images), -1),
    }


def standardise(train: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scales pixels (N, P) of two splits to mean 0 and variance 1 / P on the training images.

    The length of an image's row is then near 1 in every view, so that one weight decay suits them all.
    """
    mean = train.mean(axis=0)
    spread = np.maximum(train.std(axis=0), 0.01) * np.sqrt(train.shape[1])  # a constant pixel stays small
    return (train - mean) / spread, (other - mean) / spread


def softmax_regression(x: np.ndarray, labels: np.ndarray, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Multinomial logistic regression by Nesterov's accelerated gradient descent from zero weights; deterministic.

    Args:
        x: (N, P) pixels.
        labels: (N,) class numbers.

    Returns:
        Weights (P, C) and biases (C,); logits are x @ weights + biases.
    """
    x1 = np.c_[x, np.ones(len(x))].astype(np.float64)
    targets = np.eye(num_classes)[labels]
    decay = np.r_[np.full(x.shape[1], L2), 0][:, None]  # not on the biases
    curvature = 0.5 * np.linalg.eigvalsh(x1.T @ x1 / len(x))[-1] + L2  # an upper bound of the curvature of the loss
    momentum = (np.sqrt(curvature) - np.sqrt(L2)) / (np.sqrt(curvature) + np.sqrt(L2))
    w = ahead = np.zeros((x1.shape[1], num_classes))
    for _ in range(STEPS):
        gradient = x1.T @ (softmax(x1 @ ahead) - targets) / len(x) + decay * ahead
        previous, w = w, ahead - gradient / curvature
        ahead = w + momentum * (w - previous)
    return w[:-1], w[-1]
