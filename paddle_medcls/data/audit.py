"""The shortcut audit: how well a small model tells the classes apart by the border of the images.

Where the classes come from several hospitals, frames, letters and brightness can reveal the hospital, and so the
class. A multinomial logistic regression on the grey pixels of small images is trained on the training split, once
for each view of the images. A high accuracy on the border alone is a warning: the border shows no lung and no retina.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np

from paddle_medcls.data.index import Index
from paddle_medcls.errors import DataError
from paddle_medcls.metrics import accuracy_interval, auc, bootstrap_auc, clusters_of
from paddle_medcls.output_head import softmax
from paddle_medcls.progress import progress

SIDE = 40  # pixels of the small image
FRAME = 4  # pixels: the outer 10% of each side
CENTRE = 8  # pixels before the centre begins: it is the middle 60% of each side
THUMBNAIL = 16
L2 = 1e-4  # fixed, so that nothing is tuned on the scored split


def audit(train: Index, scored: Index, workers: int) -> dict:
    """Trains a small model on one split of a data set and scores it on another, for each view.

    Args:
        train: the split to train on.
        scored: the split to score.
        workers: threads that read images.

    Returns:
        `dataset`, `train` and `scored` (names of the splits), `n` (images scored), `patients` (their number, where
        the data set names them), `majority` (accuracy of always predicting the most frequent training class), and
        `views`: name -> `pixels`, `accuracy`, `auc` and `intervals` (95%; over patients where several images are
        of one, see `metrics.evaluate_logits`).

    Raises:
        DataError: images that cannot be read, or a data set with several labels an image.
    """
    if train.task == "multi-label":
        raise DataError(f"{train.dataset}: the audit is for one label an image; this set has several")
    seen, unseen = (_views(_small_images(index, workers)) for index in (train, scored))
    clusters = clusters_of(scored.groups)
    views = {}
    for name in seen:
        x, other = standardise(seen[name], unseen[name])
        weights, biases = softmax_regression(x, train.labels, len(train.classes))
        probs = softmax(other @ weights + biases)
        hits = probs.argmax(axis=1) == scored.labels
        views[name] = {
            "pixels": x.shape[1],
            "accuracy": float(hits.mean()),
            "auc": float(auc(probs, scored.labels, scored.task)),
            "intervals": {
                "accuracy": accuracy_interval(hits, clusters),
                "auc": bootstrap_auc(probs, scored.labels, scored.task, clusters=clusters),
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
    """Grey images (N, SIDE, SIDE), both sides scaled, values 0 to 1."""

    def read(row: int) -> np.ndarray | str:
        try:
            image = index.read(row, "gray")
        except DataError as error:
            return str(error).splitlines()[0]
        return cv2.resize(image[:, :, 0], (SIDE, SIDE), interpolation=cv2.INTER_AREA)

    with ThreadPoolExecutor(max(1, workers)) as pool:
        results = pool.map(read, range(len(index)))
        small = list(progress(results, f"reading {index.dataset} {index.split}", len(index), "image"))
    unreadable = [line for line in small if isinstance(line, str)]
    if unreadable:
        what = f"{index.dataset}: {len(unreadable)} of {len(index)} {index.split} image(s) cannot be read"
        raise DataError(what, items=unreadable, do="copy or download these files again; nothing is skipped")
    return np.stack(small).astype(np.float32) / 255


def _views(images: np.ndarray) -> dict[str, np.ndarray]:
    """Images (N, SIDE, SIDE) -> pixels (N, P) of each view."""
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
    """Pixels (N, P) with mean 0 and variance 1 / P on the training images: lengths near 1 in every view."""
    mean = train.mean(axis=0)
    spread = np.maximum(train.std(axis=0), 0.01) * np.sqrt(train.shape[1])  # a constant pixel stays small
    return (train - mean) / spread, (other - mean) / spread


def softmax_regression(
    x: np.ndarray, labels: np.ndarray, num_classes: int, l2: float = L2, steps: int = 500
) -> tuple[np.ndarray, np.ndarray]:
    """Multinomial logistic regression by Nesterov's accelerated gradient from zero; nothing is random.

    Args:
        x: (N, P).
        labels: (N,) class numbers.
        l2: the minimised loss is the mean cross-entropy + l2 / 2 * the sum of the squared weights.

    Returns:
        Weights (P, C) and biases (C,); logits are x @ weights + biases.
    """
    x1 = np.c_[x, np.ones(len(x))].astype(np.float64)
    truth = np.eye(num_classes)[labels]
    decay = np.r_[np.full(x.shape[1], l2), 0][:, None]  # not on the biases
    steepest = 0.5 * np.linalg.eigvalsh(x1.T @ x1 / len(x))[-1] + l2  # bounds the curvature of the loss
    momentum = (np.sqrt(steepest) - np.sqrt(l2)) / (np.sqrt(steepest) + np.sqrt(l2))
    w = ahead = np.zeros((x1.shape[1], num_classes))
    for _ in range(steps):
        gradient = x1.T @ (softmax(x1 @ ahead) - truth) / len(x) + decay * ahead
        before, w = w, ahead - gradient / steepest
        ahead = w + momentum * (w - before)
    return w[:-1], w[-1]
