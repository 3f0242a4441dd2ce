"""Fits the novelty score at the end of a training, see `models.novelty`: one pass over the images, not augmented."""

from __future__ import annotations

import numpy as np

from paddle_medcls.core.files import sha256
from paddle_medcls.evaluation.evaluate import forward_split, predict_features
from paddle_medcls.models.novelty import MAX_IMAGES, PASSING, Novelty, novelty_path
from paddle_medcls.models.onednn.network import Accelerated
from paddle_medcls.preprocessing.augmentation import flip_axes
from paddle_medcls.preprocessing.loader import ImageDataset, cut
from paddle_medcls.training.run import Training
from paddle_medcls.training.session import Session


def fit_novelty(training: Training, session: Session) -> dict:
    """Fits the score with the best weights, which the network has, and writes its file.

    Returns:
        The sidecar's record: `limit` and `sha256`; empty where one training image or no spread of the features is.
    """
    data, recipe = training.data, training.recipe
    rows = np.arange(len(data.train))
    if len(rows) > MAX_IMAGES:
        rows = np.sort(np.random.default_rng(recipe.seed).permutation(rows)[:MAX_IMAGES])
    features = _features(training, session, "train", rows)
    if len(rows) < 2 or not features.std(axis=0).any():
        return {}
    novelty = Novelty.fit(features, getattr(training.validated, "stage_channels", [features.shape[1]]))
    scores = novelty.scores(_features(training, session, "val", np.arange(len(data.val))))
    path = novelty_path(training.weights)
    novelty.write(path)
    return {"limit": float(np.quantile(scores, PASSING, method="higher")), "sha256": sha256(path)}


def _features(training: Training, session: Session, split: str, rows: np.ndarray) -> np.ndarray:
    """Features (N, channels) of images of a split, averaged over the flips that predictions are averaged over."""
    network, kernels, recipe = training.validated, training.inference_kernels, training.recipe
    index = training.data.train if split == "train" else training.data.val
    images = ImageDataset(index, training.learner.sidecar.preprocessing, cached_pixels=training.data.decoded[split])

    def forward(x: np.ndarray) -> np.ndarray:
        if kernels is None:
            return predict_features(network, x, recipe.evaluation_flips)[1]
        fast, views = Accelerated(network, kernels), flip_axes(recipe.evaluation_flips)
        return sum(fast.features(np.flip(x, axes) if axes else x) for axes in views) / np.float32(len(views))

    batches = [rows[part.start : part.stop] for part in cut(range(len(rows)), recipe.batch_size)]
    network.eval()
    return np.concatenate(forward_split(forward, images, batches, session.options.workers))
