"""What the data are, before any pixel is read."""

from __future__ import annotations

import filecmp
import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from paddle_medcls.errors import DataError, printable
from paddle_medcls.images import SUFFIXES, image_mode, read_image

DEPTH = 6  # of the folders that readers look through: <archive>/<archive inside>/<its top folder>/<set>/<split>/<class>
MAX_FOLDERS = 2000

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


def subfolders(root: Path, depth: int = DEPTH) -> list[Path]:
    """`root` and the folders below it, nearest first, sorted by name; hidden ones and __MACOSX are left out.

    Raises:
        DataError: more than MAX_FOLDERS, as a home directory has.
    """
    if not root.is_dir():
        return []
    found, level = [root], [root]
    seen = {_identity(root)}  # a link to a folder above would be walked again and again
    for _ in range(depth):
        inside = [Path(entry.path) for parent in level for entry in os.scandir(parent) if _is_visible_folder(entry)]
        level = [folder for folder in sorted(inside) if _identity(folder) not in seen]
        seen.update(map(_identity, level))
        found += level
        if len(found) > MAX_FOLDERS:
            raise DataError(
                f"more than {MAX_FOLDERS} folders to look through",
                where=root,
                expected="a folder that holds the data set and little else",
                do="point --data-root at the folder of the data set itself",
            )
    return found


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _is_visible_folder(entry: os.DirEntry) -> bool:
    return not entry.name.startswith((".", "__MACOSX")) and entry.is_dir()


def image_files(folder: Path, suffixes: Sequence[str] = SUFFIXES) -> list[Path]:
    """The images of one folder by their names, sorted; hidden files are left out (macOS keeps its own beside images).

    Raises:
        DataError: a folder, pipe, device or broken link among them; a name with a line end, another control
            character, bytes that are not UTF-8, or a blank at an end: lists and tables could not hold it.
    """
    found, faults = [], []
    for entry in os.scandir(folder):
        path = Path(entry.path)
        if entry.name.startswith(".") or path.suffix.strip().lower() not in suffixes:
            continue
        if entry.name != printable(entry.name) or entry.name != entry.name.strip():
            faults.append(f"{entry.name!r}: a name with a control character, a blank at an end, or not in UTF-8")
        elif not entry.is_file():
            faults.append(f"{entry.name!r}: no file, but a folder, a pipe, a device or a broken link")
        found.append(path)
    if faults:
        raise DataError(
            f"{len(faults)} of {len(found)} image(s) cannot be used",
            items=sorted(faults),
            where=folder,
            do="rename or remove them",
        )
    return sorted(found)


def only_copy(places: Sequence[Path], files: Callable[[Path], list[Path]] = image_files) -> Path:
    """The first of several places of the same part of a data set, which must all hold the same.

    Some archives hold the set twice (Kaggle's of OCT2017). Single files are compared by their bytes, folders by
    the names and sizes of their files.

    Raises:
        DataError: they differ; all are named.
    """

    def same(a: Path, b: Path) -> bool:
        if a.is_file():
            return filecmp.cmp(a, b, shallow=False)
        contents = ([(str(path.relative_to(at)), path.stat().st_size) for path in files(at)] for at in (a, b))
        return next(contents) == next(contents)

    if not all(same(places[0], place) for place in places[1:]):
        raise DataError(
            f"{places[0].name} is there {len(places)} times, with different content",
            items=[str(place) for place in places],
            do="point --data-root at one of them, or remove the others",
        )
    return places[0]
