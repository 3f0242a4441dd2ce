"""Deterministic splits, the same on every machine: a seeded shuffle and fixed cut points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from paddle_medcls.core.errors import DataError
from paddle_medcls.data.index import Index

FOLD_SEED = 5  # not the recipe's seed: runs with other seeds have the same folds
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


def stratified_parts(labels: np.ndarray, groups: Sequence[str], shares: Sequence[float], seed: int = 0) -> np.ndarray:
    """Assigns complete groups (patients) to parts, such that each part gets about its share of every class.

    Iterative stratification (Sechidis et al. 2011) of groups. The rarest class comes first; its groups are visited in a
    seeded random order, and each goes to the part that lacks most images of the class. A part's share of a class counts
    at least as one group of average size, where there are enough groups. For folds all shares are equal.

    Args:
        labels: int (N,) class numbers, or 0 and 1 (N, L) of a multi-label task.
        groups: (N,) the patient of each image; the image's own name where it has none.
        shares: of the parts, above 0; they add up to 1.
        seed: of the random order.

    Returns:
        int64 (N,), the number of each image's part.
    """
    y = labels if labels.ndim == 2 else labels[:, None] == np.arange(labels.max() + 1)
    y = np.column_stack([y, ~y.any(axis=1)]).astype(np.int64)  # images without any label are a class, too
    names, group_of = np.unique(np.asarray(groups, object).astype(str), return_inverse=True)
    counts = np.zeros((len(names), y.shape[1]), np.int64)  # images of each class in each group
    np.add.at(counts, group_of.ravel(), y)
    lacking = np.outer(shares, counts.sum(axis=0))  # (parts, classes)
    holders = (counts > 0).sum(axis=0)
    least = np.where(holders >= len(shares), counts.sum(axis=0) / np.maximum(holders, 1), 0)  # a group of average size
    more = np.maximum(least - lacking, 0)
    lacking += more
    lacking[np.argmax(shares)] -= more.sum(axis=0)
    order = np.random.default_rng(seed).permutation(len(names))
    part = np.full(len(names), -1)
    while (part < 0).any():
        remaining = counts[part < 0].sum(axis=0)
        label = np.flatnonzero(remaining)[np.argmin(remaining[remaining > 0])]
        for group in order[(part[order] < 0) & (counts[order, label] > 0)]:
            wish = np.round(np.column_stack([lacking[:, label], lacking.sum(axis=1)]), 6)
            part[group] = max(range(len(wish)), key=lambda k: tuple(wish[k]))
            lacking[part[group]] -= counts[group]
    return part[group_of.ravel()]


def fold_of(index: Index, count: int, fold: int) -> tuple[Index, Index]:
    """The training and validation images of one fold of a cross-validation; patients stay together.

    Args:
        index: all images of the cross-validation.
        count: number of folds.
        fold: 1 to `count`: its images are for validation, all others for training.

    Raises:
        DataError: a fold has no image of a class.
    """
    groups = index.groups or index.ids
    parts = stratified_parts(index.labels, groups, [1 / count] * count, FOLD_SEED)
    faults = []
    for k, name in enumerate(index.classes):
        rows = np.flatnonzero(index.labels[:, k] if index.labels.ndim == 2 else index.labels == k)
        if len(set(parts[rows])) < count:
            patients = f" of {len({groups[row] for row in rows})} patient(s)" if index.groups else ""
            faults.append(f"{name}: {len(rows)} image(s){patients}")
    if faults:
        raise DataError(
            f"{index.dataset}: not each of {count} folds has images of every class",
            items=faults,
            expected=f"images of {count} or more patients in each class" if index.groups else f"{count} or more images",
            fix="take fewer folds, or leave these classes out",
        )
    train, val = (index.subset(np.flatnonzero(rows).tolist()) for rows in (parts != fold - 1, parts == fold - 1))
    return replace(train, split="train"), replace(val, split="val")
