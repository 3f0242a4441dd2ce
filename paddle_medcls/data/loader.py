"""Batches of an index: threads decode ahead while the network computes.

Paddle's own DataLoader hangs for ever when a reader raises without workers, hides the true error
with workers, and leaves processes and shared memory behind when it is killed. Decoding and resizing
release Python's lock, so threads are as fast here, and errors simply come through.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from paddle_medcls.augment import augment, augments
from paddle_medcls.data.index import Index
from paddle_medcls.images import Preprocessing, fit, normalize
from paddle_medcls.recipe import Recipe
from paddle_medcls.runtime import paddle


class ImageDataset(paddle.io.Dataset):
    """An index as a Paddle data set: item -> (x float32 (C, S, S), label).

    Args:
        index: what to read.
        spec: preprocessing.
        recipe: its augmentation is applied, for training; None for evaluation.
        seed, epoch: with the row, they seed each image's augmentation.
    """

    def __init__(
        self, index: Index, spec: Preprocessing, recipe: Recipe | None = None, seed: int = 0, epoch: int = 0
    ) -> None:
        super().__init__()
        self.index = index
        self.spec = spec
        self.recipe = recipe if recipe is not None and augments(recipe) else None
        self.seed = seed
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        image = fit(self.index.read(row, self.spec.channels), self.spec)
        if self.recipe is not None:
            image = augment(image, self.recipe, np.random.default_rng([self.seed, self.epoch, row]))
        return normalize(image, self.spec), self.index.labels[row]


@dataclass(frozen=True)
class Batch:
    """x: float32 (N, C, S, S); labels: int64 (N,) or (N, L); rows: the index's rows, in order."""

    x: np.ndarray
    labels: np.ndarray
    rows: Sequence[int]


def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """The shuffled rows of one epoch: a function of seed and epoch alone, so that a resume repeats it."""
    return np.random.default_rng([seed, epoch]).permutation(count)


def cut(order: Sequence[int], batch_size: int) -> list[Sequence[int]]:
    """Rows of each batch; the last one may be smaller."""
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def load_batches(dataset: ImageDataset, batches: Sequence[Sequence[int]], workers: int) -> Iterator[Batch]:
    """Yields the batches in order, two of them read ahead by `workers` threads (0: none ahead)."""
    if workers == 0:
        for rows in batches:
            yield _stack([dataset[row] for row in rows], rows)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="reader")
    waiting: deque = deque()
    remaining = iter(batches)
    try:
        while True:
            while len(waiting) < 3 and (rows := next(remaining, None)) is not None:
                waiting.append((rows, [pool.submit(dataset.__getitem__, row) for row in rows]))
            if not waiting:
                return
            rows, futures = waiting.popleft()
            yield _stack([future.result() for future in futures], rows)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _stack(items: list[tuple[np.ndarray, np.ndarray]], rows: Sequence[int]) -> Batch:
    return Batch(np.stack([x for x, _ in items]), np.stack([label for _, label in items]), rows)
