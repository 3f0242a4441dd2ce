"""Deterministic splits, the same on every machine: a seeded shuffle and fixed cut points."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

CUTS = (0.0, 0.7, 0.9, 1.0)
"""Cut points of the COVID-19 radiography tutorial, 7:2:1: of n images, part k has int(cut[k] n) to int(cut[k+1] n)."""


def split_by_class(count: int, cuts: Sequence[float], seed: Sequence[int]) -> list[list[int]]:
    """Rows 0 to count - 1 of one class, shuffled and cut at `cuts`, shares of 0 to 1; each part is sorted."""
    order = np.random.default_rng(list(seed)).permutation(count)
    ends = [int(cut * count) for cut in cuts]
    return [sorted(order[start:end].tolist()) for start, end in zip(ends, ends[1:])]


def holdout(labels: np.ndarray, share: float, seed: int = 0) -> tuple[list[int], list[int]]:
    """Holds out the same share of each class.

    Args:
        labels: int (N,) class numbers.
        share: of the images, 0 to 1.
        seed: of the shuffle.

    Returns:
        Rows for training and rows held out, both sorted.
    """
    train: list[int] = []
    held: list[int] = []
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        kept, held_out = split_by_class(len(rows), (0.0, 1 - share, 1.0), (seed, int(label)))
        train += rows[kept].tolist()
        held += rows[held_out].tolist()
    return sorted(train), sorted(held)


def split_groups(labels: np.ndarray, groups: Sequence[str], share: float, seed: int = 0) -> tuple[list[int], list[int]]:
    """Holds out complete groups (patients), about this share of each class.

    Groups are visited in a seeded random order. A group is held out if one of its classes still lacks held-out images;
    each class so gets at least one.

    Args:
        labels: int (N,) class numbers.
        groups: (N,) the patient of each image.
        share: of the images of each class, 0 to 1.
        seed: of the random order.

    Returns:
        Rows for training and rows held out, both sorted.
    """
    names = sorted(set(groups))
    rows_of: dict[str, list[int]] = {name: [] for name in names}
    for row, name in enumerate(groups):
        rows_of[name].append(row)
    lacking = {int(label): max(1.0, share * int((labels == label).sum())) for label in np.unique(labels)}
    held: list[int] = []
    for position in np.random.default_rng(seed).permutation(len(names)):
        rows = rows_of[names[position]]
        present, counts = np.unique(labels[rows], return_counts=True)
        if any(lacking[int(label)] >= 0.5 for label in present):
            held += rows
            for label, count in zip(present, counts):
                lacking[int(label)] -= int(count)
    return sorted(set(range(len(labels))) - set(held)), sorted(held)
