"""Own images: splits, image lists, folders and tables."""

from __future__ import annotations

import numpy as np

from paddle_medcls.data.splits import stratified_parts


def test_stratified_parts_without_patients_have_the_share_of_each_class() -> None:
    labels = np.repeat([0, 1, 2], [100, 40, 3])
    parts = stratified_parts(labels, [f"i{row}" for row in range(143)], (0.7, 0.1, 0.2), seed=3)
    counts = [np.bincount(parts[labels == label], minlength=3).tolist() for label in range(3)]
    assert counts == [[70, 10, 20], [28, 4, 8], [1, 1, 1]]  # of three images each part gets one
    assert parts.tolist() != stratified_parts(labels, [f"i{row}" for row in range(143)], (0.7, 0.1, 0.2), 4).tolist()


def test_stratified_parts_keep_patients_together() -> None:
    rng = np.random.default_rng(0)
    labels = (rng.random((600, 4)) < [0.5, 0.3, 0.05, 0.02]).astype(int)  # several labels an image, some with none
    groups = [f"p{k}" for k in rng.integers(0, 150, 600)]
    for shares in ((0.2,) * 5, (0.7, 0.1, 0.2)):
        parts = stratified_parts(labels, groups, shares)
        assert all(len({part for part, one in zip(parts, groups) if one == name}) == 1 for name in set(groups))
        for label in range(4):
            found = np.bincount(parts[labels[:, label] == 1], minlength=len(shares))
            assert (abs(found - np.array(shares) * labels[:, label].sum()) <= 4).all()
        assert (abs(np.bincount(parts) - np.array(shares) * 600) <= 12).all()
