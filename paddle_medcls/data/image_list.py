"""The list of a user's own images: `images.csv` (path, label, patient, split) and `images.json` beside it.

A run on own images writes both, so that the same images with the same splits can be used again. `images.csv` may be
edited in a spreadsheet program. Both files are checked as files of unknown origin when they are read.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np

from paddle_medcls.core.errors import DataError, printable
from paddle_medcls.core.files import read_json, write_csv, write_json
from paddle_medcls.data.index import Index, is_synthetic
from paddle_medcls.data.label_table import Table, cell_fault, read_table
from paddle_medcls.data.splits import fold_of

COLUMNS = ("path", "label", "patient", "split")
SPLITS = ("train", "val", "test")
TASKS = ("binary", "multi-class", "ordinal", "multi-label")
KIND = "paddle_medcls images"
MAX_CLASSES = 1000
MAX_ITEMS = 1000  # of a remark; its sentence has their number
CSV, JSON = "images.csv", "images.json"
COPIES = "pair(s) of the same or nearly the same image are in"  # in the remarks about them


@dataclass(frozen=True)
class Remark:
    """Something about the images that the user must know, but that may be meant.

    Attributes:
        what: one sentence, without names of files or patients.
        items: the files, patients or classes that it is about.
    """

    what: str
    items: tuple[str, ...] = ()

    def __str__(self) -> str:
        shown = "".join(f"\n  {printable(item)}" for item in self.items[:5])
        return f"warning: {printable(self.what)}{shown}" + (
            f"\n  … and {len(self.items) - 5} more, in {JSON}" if len(self.items) > 5 else ""
        )


@dataclass(frozen=True)
class ImageList:
    """A user's own images with labels, patients and splits: parallel sequences with one entry for each image.

    Attributes:
        folder: of the images.
        paths: relative to it, with "/".
        labels: int64 (N,) class numbers; (N, L) of 0 and 1 for a multi-label task.
        patients: of the images, "" where unknown.
        splits: "train", "val" or "test".
        classes: names, in class order.
        task: one of TASKS.
        origin: sentences about "labels", "patients" and "splits": where they come from.
        made: splits that were made just now; in a list that was read all are given.
        remarks: what is kept for the user to know.
        compared: whether duplicate images were looked for.
    """

    folder: Path
    paths: tuple[str, ...]
    labels: np.ndarray
    patients: tuple[str, ...]
    splits: tuple[str, ...]
    classes: tuple[str, ...]
    task: str
    origin: dict[str, str]
    made: tuple[str, ...] = ()
    remarks: tuple[Remark, ...] = ()
    compared: bool = False

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def names(self) -> tuple[str, ...]:
        """The splits that have images, in order."""
        return tuple(split for split in SPLITS if split in self.splits)

    @property
    def groups(self) -> tuple[str, ...]:
        """The patient of each image; an image of an unknown patient is a patient of its own."""
        return tuple(patient or f"/{path}" for patient, path in zip(self.patients, self.paths))

    def index(self, split: str, dataset: str = "folder") -> Index:
        """The images of one split.

        Raises:
            DataError: there are none.
        """
        rows = [row for row, name in enumerate(self.splits) if name == split]
        if not rows:
            raise DataError(f"the images have no {split} split", expected=", ".join(self.names))
        return Index(
            dataset=dataset,
            split=split,
            ids=tuple(self.paths[row] for row in rows),
            images=[self.folder / self.paths[row] for row in rows],
            labels=self.labels[rows],
            classes=self.classes,
            task=self.task,
            groups=tuple(self.groups[row] for row in rows) if any(self.patients) else (),
            synthetic=is_synthetic(self.folder),
        )

    def for_folds(self) -> ImageList:
        """The same images for a cross-validation: all are for training but those of a given test split."""
        splits = tuple("test" if split == "test" and "test" not in self.made else "train" for split in self.splits)
        remarks = tuple(remark for remark in self.remarks if COPIES not in remark.what)  # they are compared again
        return replace(self, splits=splits, made=(), remarks=remarks, compared=False)

    def fold(self, count: int, number: int) -> ImageList:
        """The same images with the splits of one fold of a cross-validation, see `splits.fold_of`."""
        images = self.for_folds()
        val = set(fold_of(images.index("train"), count, number)[1].ids)
        splits = tuple("val" if path in val else split for path, split in zip(self.paths, images.splits))
        return replace(images, splits=splits)

    def matched(self, classes: Sequence[str], task: str) -> ImageList:
        """The same images with the classes of a trained model, found by their names.

        Raises:
            DataError: labels that the model does not know; several labels of one image for a model of single ones.
        """
        if tuple(classes) == self.classes and task == self.task:
            return self
        unknown = [name for name in self.classes if name not in classes]
        several = self.task == "multi-label" != task
        if unknown or several:
            raise DataError(
                "the images have several labels each"
                if several
                else f"the model does not know {len(unknown)} class(es)",
                items=unknown,
                expected=f"{task}: {', '.join(classes)}",
                fix="name the classes in the table or the folders as the model does",
            )
        number = [list(classes).index(name) for name in self.classes]
        rows = self.labels if self.labels.ndim == 2 else np.eye(len(self.classes), dtype=np.int64)[self.labels]
        labels = class_numbers([[number[k] for k in np.flatnonzero(row)] for row in rows], len(classes), task)
        return replace(self, labels=labels, classes=tuple(classes), task=task)

    def label_text(self, row: int) -> str:
        """The class of an image, or its labels with ";" between."""
        label = self.labels[row]
        return ";".join(self.classes[k] for k in np.flatnonzero(label)) if label.ndim else self.classes[int(label)]

    def summary(self) -> str:
        """Number of images and patients of each split and class, and where they come from, as text."""
        from prettytable import PrettyTable

        table = PrettyTable(["split", "images", "patients", *self.classes])
        for split in self.names:
            index = self.index(split)
            table.add_row([split, len(index), len(set(index.groups)) or "?", *index.counts().values()])
        origin = "".join(f"\n{name}: {printable(text)}" for name, text in self.origin.items())
        return f"{table}\n{self.task}, images in {printable(self.folder)}{origin}"

    def write(self, folder: str | Path) -> Path:
        """Writes `images.csv`, whose path is returned, and `images.json` beside it."""
        folder = Path(folder)
        rows = zip(self.paths, map(self.label_text, range(len(self))), self.patients, self.splits)
        write_csv(folder / CSV, COLUMNS, rows)
        values = {name: getattr(self, name) for name in ("task", "classes", "origin", "compared")}
        values["remarks"] = [{"what": remark.what, "items": remark.items[:MAX_ITEMS]} for remark in self.remarks]
        write_json(folder / JSON, {"kind": KIND, "folder": str(self.folder), **values})
        return folder / CSV


def read_image_list(path: str | Path, folder: str | Path | None = None) -> ImageList:
    """Reads an image list.

    Args:
        path: of `images.csv`, or of the folder that holds it.
        folder: of the images, where they have been moved.

    Raises:
        DataError: faulty values, paths that leave the folder, images that are missing or listed twice; lists them all.
    """
    path = Path(path) / CSV if Path(path).is_dir() else Path(path)
    values = read_facts(path.with_name(JSON))
    table = read_table(path)
    if table.columns != COLUMNS:
        raise DataError(f"{path.name}: other columns than {', '.join(COLUMNS)}", path=path, fix="restore the columns")
    classes, task = tuple(values["classes"]), values["task"]
    known = {name: k for k, name in enumerate(classes)}
    faults, labels = [], []
    for number, (name, label, _, split) in table.rows.items():
        if fault := path_fault(name):
            faults.append(f"row {number}: {name!r} {fault}")
        if split not in SPLITS:
            faults.append(f"row {number}: {split!r} is no split")
        texts = [text for text in label.split(";") if text] if task == "multi-label" else [label]
        faults += [f"row {number}: {text!r} is no class" for text in texts if text not in known]
        labels.append([known[text] for text in texts if text in known])
    refuse_rows(
        table, faults, f"paths in the folder of the images, classes ({', '.join(classes)}), {', '.join(SPLITS)}"
    )
    paths, _, patients, splits = zip(*table.rows.values())
    result = ImageList(
        folder=Path(folder or values["folder"]),
        paths=paths,
        labels=class_numbers(labels, len(classes), task),
        patients=patients,
        splits=splits,
        classes=classes,
        task=task,
        origin=values["origin"],
        remarks=tuple(Remark(one["what"], tuple(one["items"])) for one in values["remarks"]),
        compared=values["compared"],
    )
    check_files(result.folder, paths, path)
    return result


def class_numbers(labels: Sequence[Sequence[int]], classes: int, task: str) -> np.ndarray:
    """Class numbers of each image -> int64 (N,), or 0 and 1 (N, L) for a multi-label task."""
    if task != "multi-label":
        return np.array([numbers[0] for numbers in labels], np.int64)
    result = np.zeros((len(labels), classes), np.int64)
    for row, numbers in enumerate(labels):
        result[row, list(numbers)] = 1
    return result


def path_fault(name: str) -> str:
    """Why a text is no path relative to the folder of the images; "" if it is one."""
    parts = PurePosixPath(name).parts
    if not parts or PurePosixPath(name).is_absolute() or Path(name).is_absolute() or ".." in parts:
        return "is no path in the folder of the images"
    return "" if name == "/".join(parts) else f"is not written as {'/'.join(parts)!r}"


def refuse_rows(table: Table, faults: Sequence[str], expected: str) -> None:
    """Raises a DataError that lists the faulty rows of a table, if there are any."""
    if faults:
        raise DataError(
            f"{table.path.name}: {len(faults)} faulty row(s)", items=faults, path=table.path, expected=expected
        )


def check_files(folder: Path, paths: Sequence[str], source: Path) -> None:
    """Refuses images that are missing, no regular files, or listed twice, also under two names of one file.

    Raises:
        DataError: names all of them.
    """
    seen: dict[tuple[int, int], str] = {}
    missing, twice = [], []
    for name in paths:
        try:
            status = os.stat(folder / name)
        except (OSError, ValueError):
            missing.append(name)
            continue
        if not stat.S_ISREG(status.st_mode):
            missing.append(f"{name}: not a file")
            continue
        first = seen.setdefault((status.st_dev, status.st_ino), name)
        if first is not name:
            twice.append(f"{name}, which is also {first}" if name != first else f"{name}, listed twice")
    if missing:
        raise DataError(
            f"{len(missing)} of {len(paths)} image(s) in {source.name} are missing",
            items=missing,
            path=folder,
            fix="restore them or remove their rows; if the images have been moved, pass --data-root with their folder",
        )
    if twice:
        raise DataError(
            f"{len(twice)} image(s) in {source.name} are there twice",
            items=twice,
            path=folder,
            expected="one row, and one file, for each image; several labels of one image with ';' between",
            fix="remove the other rows or files",
        )


def read_facts(path: Path) -> dict:
    """The values of `images.json`, checked.

    Raises:
        DataError: missing, or a faulty value.
    """
    try:
        values = read_json(path)
    except (OSError, ValueError) as error:
        raise _faulty(path, str(error)) from None
    kinds = {
        "kind": str,
        "folder": str,
        "task": str,
        "classes": list,
        "origin": dict,
        "remarks": list,
        "compared": bool,
    }
    if not isinstance(values, dict) or values.get("kind") != KIND:
        raise _faulty(path, "it does not describe images")
    for name in values.keys() ^ kinds.keys():
        raise _faulty(path, f"{name[:60]!r} is {'unknown' if name in values else 'missing'}")
    for name, kind in kinds.items():
        if type(values[name]) is not kind:
            raise _faulty(path, f"{name} is no {kind.__name__}")
    classes, task = values["classes"], values["task"]
    if task not in TASKS:
        raise _faulty(path, f"{task[:60]!r} is no task")
    if fault := class_fault(classes, task):
        raise _faulty(path, fault)
    remarks = [one for one in values["remarks"] if isinstance(one, dict) and one.keys() == {"what", "items"}]
    texts = [*values["origin"].values(), *(one["what"] for one in remarks)]
    texts += [item for one in remarks for item in (one["items"] if isinstance(one["items"], list) else [None])]
    if len(remarks) < len(values["remarks"]) or not all(isinstance(text, str) for text in texts):
        raise _faulty(path, "origin or remarks are no sentences")
    if not Path(values["folder"]).is_absolute():
        raise _faulty(path, "the folder of the images is not an absolute path")
    return values


def class_fault(classes: Sequence[object], task: str) -> str:
    """Why these cannot be the names of a task's classes, in one sentence; "" if they can."""
    if not (1 if task == "multi-label" else 2) <= len(classes) <= MAX_CLASSES or len(set(map(str, classes))) < len(
        classes
    ):
        return f"{len(classes)} classes, where at least two different ones are expected, and at most {MAX_CLASSES}"
    if task == "binary" and len(classes) != 2:
        return f"{len(classes)} classes for a binary task"
    for name in classes:
        if not isinstance(name, str) or not 0 < len(name) <= 200 or not name.isprintable() or ";" in name:
            return f"{str(name)[:60]!r} is no class name: up to 200 printable characters without ';' are expected"
        if fault := cell_fault(name):
            return f"the class {name[:60]!r} {fault}"
    return ""


def _faulty(path: Path, fault: str) -> DataError:
    return DataError(
        f"{path.name} cannot be used: {fault}",
        path=path,
        fix=f"restore it from the run or folder that {CSV} comes from",
    )
