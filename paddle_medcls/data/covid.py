"""COVID-19 Radiography: chest X-rays in four classes. Document 003.

Splits are list files in the data root (`train.txt`, `val.txt`, `test.txt`; one `relative/path label`
a line), written by `tools/prepare.py --dataset covid --split`. Both layouts that people have are
read: Kaggle's (`COVID/images/…`, `Lung_Opacity`, `Viral Pneumonia`, masks beside, which are left
out) and the tutorial's (`COVID/…`, `LungOpacity`, `ViralPneumonia`).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from paddle_medcls.data.index import Index, is_drawn, subfolders
from paddle_medcls.data.splits import CUTS, split_by_class
from paddle_medcls.errors import DataError
from paddle_medcls.images import SUFFIXES

WEIGHTS_NAME = "COVID"
SPLITS = ("train", "val", "test")
CLASSES = ("COVID", "LungOpacity", "Normal", "ViralPneumonia")


def _plain(folder_name: str) -> str:
    return folder_name.replace("_", "").replace(" ", "").replace("-", "").lower()


_LABEL_OF_FOLDER = {_plain(name): label for label, name in enumerate(CLASSES)}


def describe(name: str, labels: str = "default") -> tuple[tuple[str, ...], str]:
    """Class names and task."""
    if labels != "default":
        raise DataError(f"covid has no labels {labels!r}", expected="default")
    return CLASSES, "multi-class"


def load(name: str, root: Path, split: str, labels: str = "default") -> Index:
    """The images of one list file."""
    classes, task = describe(name, labels)
    list_file = root / f"{split}.txt"
    if not list_file.is_file():
        raise DataError(
            f"covid: no list file {split}.txt",
            where=root,
            do=f"make the splits: python tools/prepare.py --dataset covid --split --data-root {root}",
        )
    ids, numbers = read_list(list_file)
    return Index(
        dataset=name,
        split=split,
        ids=tuple(ids),
        sources=[root / path for path in ids],
        labels=np.array(numbers, np.int64),
        classes=classes,
        task=task,
        drawn=is_drawn(root),
    )


def read_list(path: Path) -> tuple[list[str], list[int]]:
    """Paths and labels of one list file; every faulty line is reported.

    The label follows the last space, so that paths may hold spaces ("Viral Pneumonia/…").
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"covid: {path.name} cannot be read: {error}", where=path) from None
    ids, labels, faults = [], [], []
    seen: set[str] = set()
    for number, line in enumerate(lines, start=1):
        name, _, label = line.rpartition(" ")
        folder = next(
            (_LABEL_OF_FOLDER[_plain(part)] for part in name.split("/")[:-1] if _plain(part) in _LABEL_OF_FOLDER), None
        )
        if not name or not (label.isdecimal() and label.isascii()) or int(label) >= len(CLASSES):
            faults.append(f"line {number}: {line!r} is not 'relative/path label' with a label of 0 to 3")
        elif Path(name).is_absolute() or ".." in Path(name).parts:
            faults.append(f"line {number}: {name!r} leads out of the data root")
        elif name in seen:
            faults.append(f"line {number}: {name!r} is listed twice")
        elif folder is not None and folder != int(label):
            faults.append(f"line {number}: {name!r} has label {label}, its folder says {folder}")
        else:
            ids.append(name)
            labels.append(int(label))
        seen.add(name)
    missing = [name for name in ids if not (path.parent / name).is_file()]
    faults += [f"{name!r} does not exist" for name in missing]
    if faults or not ids:
        raise DataError(
            f"covid: {path.name}: {len(faults)} faulty line(s) of {len(lines)}",
            items=faults,
            where=path,
            do="make the list again: python tools/prepare.py --dataset covid --split",
        )
    return ids, labels


def find_images(root: Path) -> dict[str, list[str]]:
    """Images of each class as paths relative to the root, in class order, sorted by name."""
    found: dict[str, list[str]] = {}
    for folder in subfolders(root, depth=2)[1:]:  # the root itself may well be called "covid"
        label = _LABEL_OF_FOLDER.get(_plain(folder.name))
        if label is None:
            continue
        folder = folder / "images" if (folder / "images").is_dir() else folder
        names = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
        if names and CLASSES[label] in found:
            raise DataError(
                f"covid: two folders hold the class {CLASSES[label]}",
                where=root,
                items=[str(folder), str((root / found[CLASSES[label]][0]).parent)],
                do="point --data-root at one of them",
            )
        if names:
            found[CLASSES[label]] = [path.relative_to(root).as_posix() for path in names]
    missing = [name for name in CLASSES if name not in found]
    if missing:
        raise DataError(
            f"covid: no images of {', '.join(missing)}",
            where=root,
            expected="COVID, Lung_Opacity (or LungOpacity), Normal, Viral Pneumonia (or ViralPneumonia)",
            do="unpack the archive there (datasets/covid/README.md), or pass --data-root",
        )
    return {name: found[name] for name in CLASSES}


def make_lists(root: Path, seed: int) -> dict[str, str]:
    """The text of each list file: 7:2:1 within each class, at the tutorial's cut points.

    Returns:
        {"train": text, "val": text, "test": text}; the same images and seed give the same text.
    """
    by_class = find_images(root)
    lines: dict[str, list[str]] = {split: [] for split in SPLITS}
    for label, name in enumerate(CLASSES):
        for split, rows in zip(SPLITS, split_by_class(len(by_class[name]), CUTS, (seed, label))):
            lines[split] += [f"{by_class[name][row]} {label}" for row in rows]
    return {split: "".join(f"{line}\n" for line in lines[split]) for split in SPLITS}
