"""Transfer learning with frozen features: the features are computed once, and only the head is trained.

A network with frozen features gives the same features for the same image, so the head trains on cached ones in
seconds. Training images are augmented: `cache_views` random versions of each are cached, and epoch e uses version
e modulo `cache_views`.

A cache file is named by a hash of everything that it depends on (frozen weights, device, precision, preprocessing,
augmentation, the bytes of the images, the versions of Paddle and the decoders), so it never becomes stale and later
runs can use it.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import weakref
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np

from paddle_medcls.core.files import atomic_write, folder_error
from paddle_medcls.core.paddle_setup import paddle
from paddle_medcls.core.progress import progress
from paddle_medcls.preprocessing.image_cache import content_key, keyed_file, refuse_changed
from paddle_medcls.preprocessing.loader import Batch, ImageDataset, cut, load_batches


def freeze(model) -> None:
    """Turns gradients off for all parameters except the head's."""
    head = {id(parameter) for parameter in model.head.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in head:
            parameter.stop_gradient = True


def start_training(model, frozen: bool) -> None:
    """Sets training mode; frozen layers stay in evaluation mode: fixed batch-norm statistics, no dropout."""
    if frozen:
        model.eval()
        model.head.train()
    else:
        model.train()


def frozen_hash(model) -> str:
    """sha256 of all parameters and buffers except the head's."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        if not name.startswith(model.head_name + "."):
            digest.update(name.encode() + np.ascontiguousarray(value.numpy()).tobytes())
    return digest.hexdigest()


class FeatureDataset:
    """Cached features and labels, for `load_batches`."""

    whole_batches = True

    def __init__(self, features: np.ndarray, labels: np.ndarray) -> None:
        self.features = features
        self.labels = labels

    def batch(self, rows) -> Batch:
        """Features and labels of these rows."""
        rows = np.asarray(rows)
        return Batch(np.asarray(self.features[rows]), self.labels[rows], rows)


def cached_features(model, weights_hash: str, dataset: ImageDataset, folder: Path, workers: int) -> Path:
    """The file with the features of every image of a data set, computed if it does not exist yet.

    Args:
        model: its `embed(x)` computes the features.
        dataset: its `epoch` is the number of the augmented version.

    Returns:
        A .npy file, (N, D) float32.
    """
    content = content_key(dataset.index, workers)
    device = paddle.get_device().partition(":")[0]  # a GPU rounds differently
    precision = str(next(iter(model.parameters())).dtype)
    key: list = [weights_hash, paddle.__version__, device, precision, dataset.spec.to_json(), content]
    if dataset.augmentation is not None:
        key += [dataset.epoch, dataset.seed, asdict(dataset.augmentation)]
    path = keyed_file(folder, key)
    if not path.is_file():

        def write(temporary: str) -> None:
            _compute_features(model, dataset, temporary, workers)
            refuse_changed(dataset.index, content, workers)

        atomic_write(path, write)
    return path


def usable_folder(folder: Path, model, say: Callable[[str], None]) -> Path:
    """The folder; if it cannot be written, a temporary one that is removed together with the model."""
    error = folder_error(folder)
    if not error:
        return folder
    say(f"features are not cached for later runs: {folder}: {error}")
    temporary = tempfile.mkdtemp(prefix="paddle_medcls-features-")
    weakref.finalize(model, shutil.rmtree, temporary, ignore_errors=True)
    return Path(temporary)


def _compute_features(model, dataset: ImageDataset, target: str, workers: int) -> None:
    """Writes `model.embed` of every image to a .npy file."""
    what = f"features of {dataset.index.split}" + (f", view {dataset.epoch + 1}" if dataset.augmentation else "")
    model.eval()
    batches = cut(range(len(dataset)), 32)
    table = None
    with progress(load_batches(dataset, batches, workers), what, len(batches), "batch") as bar:
        for batch in bar:
            with paddle.no_grad():
                features = model.embed(paddle.to_tensor(batch.x)).numpy()
            if table is None:
                shape = (len(dataset), features.shape[1])
                table = np.lib.format.open_memmap(target, "w+", np.float32, shape)
            table[np.asarray(batch.rows)] = features
    assert table is not None, "an index is never empty"
    table.flush()


def head_logits(model, features: np.ndarray) -> np.ndarray:
    """Logits (N, outputs) of cached features (N, D), with dropout off."""
    was_training = model.head.training
    model.head.eval()
    batches = cut(range(len(features)), 1024)
    with paddle.no_grad():
        logits = [model.head(paddle.to_tensor(features[rows.start : rows.stop])).numpy() for rows in batches]
    if was_training:
        model.head.train()
    return np.concatenate(logits)
