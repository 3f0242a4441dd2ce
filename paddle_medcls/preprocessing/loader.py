"""Batches of images, read ahead by threads while the network computes.

Images in memory that have the network's size, or are enlarged by an integer factor, are read, augmented and normalised
a batch at a time (MedMNIST); all others image by image.

Paddle's own DataLoader hangs if a reader without workers raises, hides the error if there are workers, and leaves
processes and shared memory behind if it is killed. Decoding and resizing release Python's lock, so threads are as
fast here, and their exceptions reach the caller.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from paddle_medcls.core.paddle_setup import paddle
from paddle_medcls.data.index import Index
from paddle_medcls.data.reading import read_ahead
from paddle_medcls.preprocessing.augmentation import Augmentation, augment, augment_batch, draw_epoch, random_version
from paddle_medcls.preprocessing.transforms import Preprocessing, fit, normalize

Rows = TypeVar("Rows", range, np.ndarray)


class ImageDataset(paddle.io.Dataset):
    """An index as a Paddle data set: item -> (x float32 (C, S, S), label).

    Args:
        augmentation: random changes, for training; None for evaluation.
        seed, epoch: with the row, they seed each image's augmentation.
        cached_pixels: the decoded and scaled images, uint8 (N, S, S, C), see `data.cache`.
    """

    def __init__(
        self,
        index: Index,
        spec: Preprocessing,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        epoch: int = 0,
        cached_pixels: np.ndarray | None = None,
    ) -> None:
        super().__init__()
        self.index = index
        self.spec = spec
        self.augmentation = augmentation if augmentation is not None and augmentation.active else None
        self.seed = seed
        self.epoch = epoch
        self.cached_pixels = cached_pixels
        self.enlarge = _enlargement(index, spec)
        self.draws = draw_epoch(len(index), seed, epoch) if self.enlarge and self.augmentation else None

    def __len__(self) -> int:
        return len(self.index)

    @property
    def whole_batches(self) -> bool:
        """Whether `batch` can be used, which is faster than image by image."""
        return self.enlarge > 0

    def __getitem__(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng([self.seed, self.epoch, row])
        if self.cached_pixels is not None:
            image = np.array(self.cached_pixels[row])
            image = image if self.augmentation is None else augment(image, self.augmentation, rng)
        else:
            image = self.index.read(row, self.spec.channels, self.spec.least_px)
            image = (
                fit(image, self.spec)
                if self.augmentation is None
                else random_version(image, self.spec, self.augmentation, rng)
            )
        return normalize(image, self.spec), self.index.labels[row]

    def batch(self, rows: range | np.ndarray) -> Batch:
        """Reads a whole batch at once; only if `whole_batches`."""
        rows = np.asarray(rows)
        images = self.index.read_rows(rows, self.spec.channels)
        if self.enlarge > 1:
            images = images.repeat(self.enlarge, axis=1).repeat(self.enlarge, axis=2)
        if self.augmentation is not None and self.draws is not None:
            images = augment_batch(images, self.augmentation, self.draws[rows])
        return Batch(normalize(images, self.spec), self.index.labels[rows], rows)


def _enlargement(index: Index, spec: Preprocessing) -> int:
    """Integer factor that enlarges images in memory to the network's size; 0 if they have to be read one by one."""
    if not isinstance(index.images, np.ndarray) or spec.fit != "stretch":
        return 0
    height, width = index.images.shape[1:3]
    factor, rest = divmod(spec.size_px, height)
    integer = height == width and rest == 0 and (factor == 1 or spec.interpolation == "nearest")
    return factor if integer else 0


@dataclass(frozen=True)
class Batch:
    """Network input x, float32 (N, C, S, S); labels, int64 (N,) or (N, L); rows of the index, in the batch's order."""

    x: np.ndarray
    labels: np.ndarray
    rows: range | np.ndarray


def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """The shuffled rows of one epoch; they depend on seed and epoch alone, so that a resume repeats them."""
    return np.random.default_rng([seed, epoch]).permutation(count)


def cut(order: Rows, batch_size: int) -> list[Rows]:
    """Divides rows into batches; the last one may be smaller."""
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def load_batches(dataset, batches: Sequence[range | np.ndarray], workers: int) -> Generator[Batch, None, None]:
    """Yields the batches in order, with two batches read ahead.

    Args:
        dataset: an `ImageDataset`, or another class with its `whole_batches` and `batch`, as
            `frozen_features.FeatureDataset`.
        workers: reading threads; 0: each batch is read when it is needed.
    """
    if dataset.whole_batches:
        with contextlib.closing(read_ahead(dataset.batch, ([rows] for rows in batches), workers)) as loaded:
            yield from (batch for _, (batch,) in loaded)
        return
    with contextlib.closing(read_ahead(dataset.__getitem__, batches, workers)) as loaded:
        for rows, items in loaded:
            yield Batch(np.stack([x for x, _ in items]), np.stack([label for _, label in items]), rows)
