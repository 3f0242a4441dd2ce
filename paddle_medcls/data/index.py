"""What the data are, before any pixel is read."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from paddle_medcls.errors import DataError
from paddle_medcls.images import read_image

DRAWN_MARK = "DRAWN.txt"
"""A data root with this file holds images that the project drew; every output says so."""


@dataclass(frozen=True)
class Index:
    """One split of one data set: parallel sequences, one entry an image.

    Attributes:
        dataset: name of the data set, as `--dataset` takes it.
        split: "train", "val" or "test".
        ids: unique names; for files the path relative to the data root.
        sources: paths of the images, or an uint8 array (N, H, W, C) or (N, H, W) in RGB order.
        labels: int64 (N,) class numbers; (N, L) of 0 and 1 for a multi-label task.
        classes: class names, in class order.
        task: "binary", "multi-class", "ordinal" or "multi-label".
        drawn: whether the images are drawn by the project, not taken from patients.
    """

    dataset: str
    split: str
    ids: tuple[str, ...]
    sources: Sequence[Path] | np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    task: str
    drawn: bool = False

    def __post_init__(self) -> None:
        if not len(self.ids):
            raise DataError(f"{self.dataset}: the {self.split} split is empty")
        assert len(self.ids) == len(self.sources) == len(self.labels), "an Index is parallel sequences"

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, row: int, channels: str) -> np.ndarray:
        """Image `row` as uint8 (H, W, C); `channels` as in `images.read_image`."""
        if not isinstance(self.sources, np.ndarray):
            return read_image(self.sources[row], channels)
        image = self.sources[row]
        if image.ndim == 2:
            image = image[:, :, None]
        wanted = 1 if channels == "gray" else 3
        if image.shape[2] == 1 and wanted == 3:
            return np.repeat(image, 3, axis=2)
        if image.shape[2] != wanted:
            raise DataError(f"{self.dataset}: images have {image.shape[2]} channels, the network takes {wanted}")
        return image[:, :, ::-1] if channels == "bgr" else image

    def subset(self, rows: Sequence[int]) -> Index:
        """The images of these rows, in this order."""
        rows = np.asarray(rows, np.int64)
        is_array = isinstance(self.sources, np.ndarray)
        sources = self.sources[rows] if is_array else [self.sources[row] for row in rows]
        return replace(self, ids=tuple(self.ids[row] for row in rows), sources=sources, labels=self.labels[rows])

    def counts(self) -> dict[str, int]:
        """Images of each class (of each label, for a multi-label task)."""
        if self.labels.ndim == 2:
            return dict(zip(self.classes, self.labels.sum(axis=0).tolist()))
        return dict(zip(self.classes, np.bincount(self.labels, minlength=len(self.classes)).tolist()))

    def fingerprint(self) -> str:
        """sha256 over ids and labels: two runs with the same one saw the same list."""
        digest = hashlib.sha256("\n".join(self.ids).encode())
        digest.update(np.ascontiguousarray(self.labels, dtype="<i8").tobytes())
        return digest.hexdigest()


def is_drawn(root: Path) -> bool:
    return (root / DRAWN_MARK).exists()


def subfolders(root: Path, depth: int = 2) -> list[Path]:
    """`root` and the folders below it down to `depth`, nearest first, sorted, hidden ones left out."""
    if not root.is_dir():
        return []
    found, level = [root], [root]
    for _ in range(depth):
        level = sorted(
            folder
            for parent in level
            for folder in parent.iterdir()
            if folder.is_dir() and not folder.name.startswith((".", "__MACOSX"))
        )
        found += level
    return found
