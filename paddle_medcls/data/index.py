"""What the data are, before any pixel is read."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from paddle_medcls.errors import DataError
from paddle_medcls.images import image_mode, read_image

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
        groups: the patient of each image, where the data set tells; else empty.
        drawn: whether the images are drawn by the project, not taken from patients.
        note: what every output must say about the files, as that they are not the published ones.
    """

    dataset: str
    split: str
    ids: tuple[str, ...]
    sources: Sequence[Path] | np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    task: str
    groups: tuple[str, ...] = ()
    drawn: bool = False
    note: str = ""

    def __post_init__(self) -> None:
        if not len(self.ids):
            raise DataError(f"{self.dataset}: the {self.split} split is empty")
        assert len(self.ids) == len(self.sources) == len(self.labels), "an Index is parallel sequences"

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, row: int, channels: str, least_px: int = 0) -> np.ndarray:
        """Image `row` as uint8 (H, W, C); `channels` and `least_px` as in `images.read_image`."""
        if not isinstance(self.sources, np.ndarray):
            return read_image(self.sources[row], channels, least_px)
        return self.read_rows(np.array([row]), channels)[0]

    def read_rows(self, rows: Sequence[int] | np.ndarray, channels: str) -> np.ndarray:
        """Several images of an index in memory at once: uint8 (n, H, W, C)."""
        assert isinstance(self.sources, np.ndarray), "images in files are read one by one"
        images = self.sources[rows]
        if images.ndim == 3:
            images = images[..., None]
        wanted = 1 if channels == "gray" else 3
        if images.shape[3] == 1 and wanted == 3:
            return np.repeat(images, 3, axis=3)
        if images.shape[3] != wanted:
            raise DataError(f"{self.dataset}: images have {images.shape[3]} channels, the network takes {wanted}")
        return images[..., ::-1] if channels == "bgr" else images

    def mode(self, row: int) -> str:
        """How image `row` is stored: "L" (grey), "RGB", "I;16", … as Pillow names it."""
        if isinstance(self.sources, np.ndarray):
            return "RGB" if self.sources.ndim == 4 and self.sources.shape[3] == 3 else "L"
        return image_mode(self.sources[row])

    def subset(self, rows: Sequence[int]) -> Index:
        """The images of these rows, in this order."""
        chosen = np.asarray(rows, np.int64)
        known = self.sources
        sources = known[chosen] if isinstance(known, np.ndarray) else [known[int(row)] for row in chosen]
        groups = tuple(self.groups[row] for row in chosen) if self.groups else ()
        ids = tuple(self.ids[row] for row in chosen)
        return replace(self, ids=ids, sources=sources, labels=self.labels[chosen], groups=groups)

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
