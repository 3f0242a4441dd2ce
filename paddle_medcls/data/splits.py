"""Splits that are the same on every machine: sorted names, a seeded shuffle, fixed cut points."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

CUTS = (0.0, 0.7, 0.9, 1.0)
"""Cut points of document 003: 7:2:1. Of n images, part k takes int(cut[k] n) to int(cut[k + 1] n)."""


def split_by_class(count: int, cuts: Sequence[float], seed: Sequence[int]) -> list[list[int]]:
    """Rows 0..count-1 of one class, shuffled and cut; each part comes back sorted."""
    order = np.random.default_rng(list(seed)).permutation(count)
    ends = [int(cut * count) for cut in cuts]
    return [sorted(order[start:end].tolist()) for start, end in zip(ends, ends[1:])]


def holdout(labels: np.ndarray, share: float, seed: int = 0) -> tuple[list[int], list[int]]:
    """Rows for training and rows held out, the same share of each class; both sorted."""
    train: list[int] = []
    held: list[int] = []
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        kept, out = split_by_class(len(rows), (0.0, 1 - share, 1.0), (seed, int(label)))
        train += rows[kept].tolist()
        held += rows[out].tolist()
    return sorted(train), sorted(held)
