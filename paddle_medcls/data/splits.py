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


def split_groups(labels: np.ndarray, groups: Sequence[str], share: float, seed: int = 0) -> tuple[list[int], list[int]]:
    """Rows for training and rows held out: whole groups (patients), about this share of each class.

    Groups are shuffled with a fixed seed; one is held out as long as a class that it has still lacks
    images, so that no class is left without.
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
    out = set(held)
    return [row for row in range(len(labels)) if row not in out], sorted(held)
