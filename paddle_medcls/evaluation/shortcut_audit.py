"""Shortcut audit: the accuracy of a linear model on the image border, the centre, small versions and the file's size.

Where the classes come from different hospitals, frames, letters and brightness can reveal the hospital. A multinomial
logistic regression is trained on the grey pixels of small images, once for each view of the image. A high accuracy on
the border alone shows a shortcut, since the border holds no lung and no retina. One more model sees no pixel: width,
height and mode (grey or colour) of the file alone.
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
SIZE_ALONE = "no pixel: width, height and mode of the file"
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
    (images, sizes), (scored_images, scored_sizes) = (_read(index, workers) for index in (train, scored))
    modes = sorted({mode for *_, mode in sizes})
    train_views, scored_views = (
        {SIZE_ALONE: _size_features(of, modes), **_views(small)}
        for small, of in ((images, sizes), (scored_images, scored_sizes))
    )
    clusters = clusters_of(scored.groups)
    views = {}
    for name in train_views:
        x, x_scored = standardise(train_views[name], scored_views[name])
        weights, biases = softmax_regression(x, train.labels, len(train.classes))
        probs = softmax(x_scored @ weights + biases)
        correct = probs.argmax(axis=1) == scored.labels
        views[name] = {
            "pixels": 0 if name == SIZE_ALONE else x.shape[1],
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


def _read(index: Index, workers: int) -> tuple[np.ndarray, list[tuple[int, int, str]]]:
    """Grey images (N, SIDE, SIDE), stretched to a square, values 0 to 1; width, height and mode of each as stored."""

    def read(index: Index, row: int) -> tuple:
        image = index.read(row, "gray")[:, :, 0]
        small = cv2.resize(image, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
        return small, (image.shape[1], image.shape[0], index.mode(row))

    places = [(index, row) for row in range(len(index))]
    results = list(map_images(places, read, workers, f"reading {index.dataset} {index.split}"))
    refuse_unreadable(index, [result for result in results if isinstance(result, str)])
    return np.stack([small for small, _ in results]).astype(np.float32) / 255, [size for _, size in results]


def _size_features(sizes: list[tuple[int, int, str]], modes: list[str]) -> np.ndarray:
    """(N, 2 + modes): width, height, and 1 in the column of the image's mode; a mode without a column has none."""
    return np.array([[width, height, *(mode == one for one in modes)] for width, height, mode in sizes], np.float64)


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
