"""The list of a split's images with labels and patients (`Index`), and the search for image files."""

from __future__ import annotations

import filecmp
import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from paddle_medcls.core.errors import DataError, printable
from paddle_medcls.data.decode import SUFFIXES, image_mode, read_image

DEPTH = 6  # of the search for folders: <archive>/<archive inside>/<its top folder>/<set>/<split>/<class>
MAX_FOLDERS = 2000

SYNTHETIC_MARK = "DRAWN.txt"
"""A data root with this file holds synthetic images; every output says so."""


@dataclass(frozen=True)
class Index:
    """The images of one split of a data set: parallel sequences with one entry for each image.

    Attributes:
        dataset: name of the data set, as in `--dataset`.
        split: "train", "val" or "test".
        ids: unique names; for files the path relative to the data root.
        images: their paths, or an uint8 array (N, H, W, C) or (N, H, W) in RGB order.
        labels: int64 (N,) class numbers; (N, L) of 0 and 1 for a multi-label task.
        classes: class names, in class order.
        task: "binary", "multi-class", "ordinal" or "multi-label".
        groups: the patient of each image; empty if the data set does not name patients.
        synthetic: whether the images are synthetic.
        note: a remark on the files that every output repeats, such as an unexpected checksum; else "".
        sources: the collection or hospital of each image; empty if the data set does not name them.
    """

    dataset: str
    split: str
    ids: tuple[str, ...]
    images: Sequence[Path] | np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    task: str
    groups: tuple[str, ...] = ()
    synthetic: bool = False
    note: str = ""
    sources: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not len(self.ids):
            raise DataError(f"{self.dataset}: the {self.split} split is empty")
        assert len(self.ids) == len(self.images) == len(self.labels), "an Index is parallel sequences"

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, row: int, channels: str, least_px: int = 0) -> np.ndarray:
        """Image `row` as uint8 (H, W, C); `channels` and `least_px` as in `decode.read_image`."""
        if not isinstance(self.images, np.ndarray):
            return read_image(self.images[row], channels, least_px)
        return self.read_rows(np.array([row]), channels)[0]

    def read_rows(self, rows: Sequence[int] | np.ndarray, channels: str) -> np.ndarray:
        """Several images of an index in memory: uint8 (n, H, W, C), for n `rows`.

        Raises:
            DataError: colour images for a network that takes grey ones.
        """
        assert isinstance(self.images, np.ndarray), "images in files are read one by one"
        images = self.images[rows]
        if images.ndim == 3:
            images = images[..., None]
        expected = 1 if channels == "gray" else 3
        if images.shape[3] == 1 and expected == 3:
            return np.repeat(images, 3, axis=3)
        if images.shape[3] != expected:
            raise DataError(f"{self.dataset}: images have {images.shape[3]} channels, the network takes {expected}")
        return images[..., ::-1] if channels == "bgr" else images

    def mode(self, row: int) -> str:
        """Pillow's mode of image `row` as stored: "L" (grey), "RGB", "I;16", …"""
        if isinstance(self.images, np.ndarray):
            return "RGB" if self.images.ndim == 4 and self.images.shape[3] == 3 else "L"
        return image_mode(self.images[row])

    def subset(self, rows: Sequence[int]) -> Index:
        """The images of these rows, in this order."""
        numbers = np.asarray(rows, np.int64)

        def of(names: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(names[row] for row in numbers) if names else ()

        images = self.images[numbers] if isinstance(self.images, np.ndarray) else [self.images[int(k)] for k in numbers]
        ids, groups, sources = of(self.ids), of(self.groups), of(self.sources)
        return replace(self, ids=ids, images=images, labels=self.labels[numbers], groups=groups, sources=sources)

    def __getitem__(self, row: int) -> tuple[np.ndarray, int | np.ndarray]:
        """Image `row` and its label: uint8 RGB (H, W, 3), and the class number, or 0/1 (L,) for a multi-label task.

        Raises:
            IndexError: no such row.
            DataError: the file cannot be read.
        """
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of {len(self)} images")
        label = self.labels[row]
        return self.read(row % len(self), "rgb"), label if label.ndim else int(label)

    def examples(self, count: int = 6) -> dict[str, list[int]]:
        """Up to `count` rows of each class, by class name, spread evenly over the index."""
        is_member = self.labels if self.labels.ndim == 2 else self.labels[:, None] == np.arange(len(self.classes))
        rows = [np.flatnonzero(column) for column in np.transpose(is_member)]
        return {
            name: members[:: max(1, len(members) // count)][:count].tolist()
            for name, members in zip(self.classes, rows)
        }

    def show(self, count: int = 6):
        """A matplotlib figure with up to `count` images of each class, which a notebook displays."""
        from paddle_medcls.data.contact_sheet import contact_sheet  # matplotlib takes half a second to import

        return contact_sheet(
            [(name, [self[row][0] for row in rows]) for name, rows in self.examples(count).items() if rows]
        )

    def counts(self) -> dict[str, int]:
        """Number of images of each class (of each label, for a multi-label task), by name."""
        if self.labels.ndim == 2:
            return dict(zip(self.classes, self.labels.sum(axis=0).tolist()))
        return dict(zip(self.classes, np.bincount(self.labels, minlength=len(self.classes)).tolist()))

    def fingerprint(self) -> str:
        """sha256 of ids and labels: equal for two runs on the same images with the same labels."""
        digest = hashlib.sha256("\n".join(self.ids).encode())
        digest.update(np.ascontiguousarray(self.labels, dtype="<i8").tobytes())
        return digest.hexdigest()


def is_synthetic(root: Path) -> bool:
    """Whether a data root holds synthetic images."""
    return (root / SYNTHETIC_MARK).exists()


def index_of_files(
    dataset: str, split: str, root: Path, paths: Sequence[Path], labels: Sequence[int], description: tuple
) -> Index:
    """The `Index` of image files below a data root; `description`: class names and task."""
    return Index(
        dataset=dataset,
        split=split,
        ids=tuple(path.relative_to(root).as_posix() for path in paths),
        images=paths,
        labels=np.array(labels, np.int64),
        classes=description[0],
        task=description[1],
        synthetic=is_synthetic(root),
    )


def subfolders(root: Path, depth: int = DEPTH, most: int = MAX_FOLDERS) -> list[Path]:
    """`root` and the folders below it, nearest first, sorted by name; without hidden ones and __MACOSX.

    Raises:
        DataError: more than `most`, as a home directory has.
    """
    if not root.is_dir():
        return []
    folders, level = [root], [root]
    seen = {_identity(root)}  # a link to a parent folder would be searched without end
    for _ in range(depth):
        children = [Path(entry.path) for parent in level for entry in os.scandir(parent) if _is_visible_folder(entry)]
        level = [folder for folder in sorted(children) if _identity(folder) not in seen]
        seen.update(map(_identity, level))
        folders += level
        if len(folders) > most:
            raise DataError(
                f"more than {most} folders to search",
                path=root,
                expected="a folder that holds little more than the data set",
                fix="point --data-root at the folder of the data set itself",
            )
    return folders


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _is_visible_folder(entry: os.DirEntry) -> bool:
    return not entry.name.startswith((".", "__MACOSX")) and entry.is_dir()


def image_files(folder: Path, suffixes: Sequence[str] = SUFFIXES) -> list[Path]:
    """The image files of one folder, sorted by name; without hidden files, which macOS adds.

    Raises:
        DataError: a folder, pipe, device or broken link with an image's suffix; a name with a line end, another
            control character, bytes that are not UTF-8, or a blank at an end: split files and tables cannot hold it.
    """
    images, faults = [], []
    for entry in os.scandir(folder):
        path = Path(entry.path)
        if entry.name.startswith(".") or path.suffix.strip().lower() not in suffixes:
            continue
        if entry.name != printable(entry.name) or entry.name != entry.name.strip():
            faults.append(f"{entry.name!r}: a name with a control character, a blank at an end, or not in UTF-8")
        elif not entry.is_file():
            faults.append(f"{entry.name!r}: not a file, but a folder, a pipe, a device or a broken link")
        images.append(path)
    if faults:
        raise DataError(
            f"{len(faults)} of {len(images)} image(s) cannot be used",
            items=sorted(faults),
            path=folder,
            fix="rename or remove them",
        )
    return sorted(images)


def only_copy(places: Sequence[Path], files: Callable[[Path], list[Path]] = image_files) -> Path:
    """The first of several copies of the same file or folder of a data set.

    Some archives hold the data set twice (Kaggle's OCT2017). Files are compared byte by byte, folders by the names and
    sizes of their `files`.

    Raises:
        DataError: the copies differ; all are listed.
    """

    def equal(a: Path, b: Path) -> bool:
        if a.is_file():
            return filecmp.cmp(a, b, shallow=False)
        contents = ([(str(path.relative_to(at)), path.stat().st_size) for path in files(at)] for at in (a, b))
        return next(contents) == next(contents)

    if not all(equal(places[0], place) for place in places[1:]):
        raise DataError(
            f"{places[0].name} was found {len(places)} times, with different content",
            items=[str(place) for place in places],
            fix="point --data-root at one of them, or remove the others",
        )
    return places[0]
