"""COVID-19 Radiography Database: chest X-rays in four classes, as in the COVID-19 radiography tutorial.

The split files `loop.txt`, `val.txt` and `test.txt` in the data root hold one `relative/path label` in each line;
`prepare --dataset covid --split` writes them. Two layouts are read: Kaggle's (`COVID/images/…`, `Lung_Opacity`,
`Viral Pneumonia`; its masks are ignored) and the tutorial's (`COVID/…`, `LungOpacity`, `ViralPneumonia`).
"""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

from paddle_medcls.core.errors import DataError, command
from paddle_medcls.data.index import Index, image_files, index_of_files, subfolders
from paddle_medcls.data.splits import CUTS, split_by_class

WEIGHTS_NAME = "COVID"
SPLITS = ("train", "val", "test")
CLASSES = ("COVID", "LungOpacity", "Normal", "ViralPneumonia")

ABOUT = {
    "title": "COVID-19 Radiography Database",
    "what": "chest X-rays, 299 × 299 PNG; grey, but some of the viral pneumonias are RGB",
    "classes": "`COVID` 3616, `LungOpacity` 6012, `Normal` 10192, `ViralPneumonia` 1345: 21,165 in all",
    "splits": "split files, 7:2:1 within each class: 14,814 / 4,232 / 2,119",
    "made by": "Qatar University, University of Dhaka and partners",
    "from": "Kaggle, `tawsifurrahman/covid19-radiography-database`",
    "to cite": "Chowdhury et al., IEEE Access 8 (2020); Rahman et al., arXiv:2012.02238",
    "licence": "a collection of several public sources; read the terms of each. Not for clinical use",
}
"""The table of `datasets/covid/README.md`, for model cards."""
KNOWN_FAULTS = (
    "The classes come from different hospitals and collections (the viral pneumonias are children's), so a "
    "network can tell them apart by the border of the image. High accuracy does not prove that it sees the disease. "
    "`tools/prepare.py --dataset covid --audit` on 398 images of each class (seed 0, 160 scored): a logistic "
    "regression on the outer 10% of a 40-pixel grey image alone has an accuracy of 72.5% (95% 65.1 to 78.8), on the "
    "complete image 75.0% (67.8 to 81.1); chance is 25%.",
    "There is no patient number: images of one patient may be in both training and test.",
    "A few files have the same bytes under two names.",
)
"""The section "Known faults" of `datasets/covid/README.md`, for model cards."""


def _plain(folder_name: str) -> str:
    return folder_name.replace("_", "").replace(" ", "").replace("-", "").lower()


_NUMBERS = tuple(str(label) for label in range(len(CLASSES)))
_LABEL_OF_FOLDER = {_plain(name): label for label, name in enumerate(CLASSES)}


def describe(name: str, labels: str = "default") -> tuple[tuple[str, ...], str]:
    """Class names and task; "default" is the only reading of the labels.

    Raises:
        DataError: another reading.
    """
    if labels != "default":
        raise DataError(f"covid has no labels {labels!r}", expected="default")
    return CLASSES, "multi-class"


def load(name: str, root: Path, split: str, labels: str = "default") -> Index:
    """The images and labels of one split file.

    Raises:
        DataError: no split file, or faulty lines in it.
    """
    description = describe(name, labels)
    split_file = root / f"{split}.txt"
    if not split_file.is_file():
        raise DataError(
            f"covid: no split file {split}.txt",
            path=root,
            fix=f"write the split files: {command('prepare')} --dataset covid --split --data-root {root}",
        )
    ids, numbers = read_split_file(split_file)
    return index_of_files(name, split, root, [root / path for path in ids], numbers, description)


def read_split_file(path: Path) -> tuple[list[str], list[int]]:
    """Paths relative to the data root, and labels 0 to 3, of one split file.

    Raises:
        DataError: unreadable, empty, or faulty lines, of which all are listed.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"covid: {path.name} cannot be read: {error}", path=path) from None
    ids, labels, faults = _parse_split_file(text, path.parent)
    if faults or not ids:
        raise DataError(
            f"covid: {path.name}: {len(faults)} faulty line(s) of {len(text.splitlines())}",
            items=faults,
            path=path,
            fix=f"write the split files again: {command('prepare')} --dataset covid --split --data-root {path.parent}",
        )
    return ids, labels


def _parse_split_file(text: str, root: Path) -> tuple[list[str], list[int], list[str]]:
    """Paths, labels and faults of the text of a split file.

    The label follows the last space, so that paths may hold spaces ("Viral Pneumonia/…"). "./a" and "a" are one path.
    """
    ids, labels, faults = [], [], []
    seen: set[str] = set()
    for number, line in enumerate(text.splitlines(), start=1):
        path_text, _, label = line.rpartition(" ")
        parts = PurePosixPath(path_text).parts
        name = "/".join(parts)
        folder = next(
            (_LABEL_OF_FOLDER[plain] for plain in map(_plain, parts[-2::-1]) if plain in _LABEL_OF_FOLDER), None
        )
        if not name or label not in _NUMBERS:
            faults.append(f"line {number}: {line!r} is not 'relative/path label' with a label of 0 to 3")
        elif parts[0] == "/" or Path(name).is_absolute() or ".." in parts:
            faults.append(f"line {number}: {path_text!r} leaves the data root")
        elif name in seen:
            faults.append(f"line {number}: {path_text!r} is listed twice")
        elif folder is not None and folder != int(label):
            faults.append(f"line {number}: {path_text!r} has label {label}, its folder says {folder}")
        else:
            ids.append(name)
            labels.append(int(label))
        seen.add(name)
    missing = [name for name in ids if not os.path.isfile(root / name)]  # False for impossible names too
    return ids, labels, [*faults, *(f"{name!r} does not exist, or is no file" for name in missing)]


def find_images(root: Path) -> dict[str, list[str]]:
    """Paths of the images of each class relative to `root`, by class name, sorted.

    Raises:
        DataError: a class without images, or two folders with images of one class.
    """
    folders: dict[str, list[Path]] = {name: [] for name in CLASSES}
    for folder in subfolders(root)[1:]:  # the root itself may be called "covid"
        label = _LABEL_OF_FOLDER.get(_plain(folder.name))
        if label is not None:
            folder = folder / "images" if (folder / "images").is_dir() else folder
            if image_files(folder):
                folders[CLASSES[label]].append(folder)
    missing = [name for name, places in folders.items() if not places]
    if missing:
        raise DataError(
            f"covid: no images of {', '.join(missing)}",
            path=root,
            expected="COVID, Lung_Opacity (or LungOpacity), Normal, Viral Pneumonia (or ViralPneumonia)",
            fix=f"unpack the archive: {command('prepare')} --dataset covid --archives DIR, or pass --data-root",
        )
    for name, places in folders.items():
        if len(places) > 1:
            raise DataError(
                f"covid: two folders hold the class {name}",
                path=root,
                items=[str(folder) for folder in places],
                fix="point --data-root at one of them, or remove the other",
            )
    return {
        name: [path.relative_to(root).as_posix() for path in image_files(places[0])] for name, places in folders.items()
    }


def make_split_files(root: Path, seed: int) -> dict[str, str]:
    """The text of each split file: 7:2:1 within each class, at the tutorial's cut points.

    Returns:
        {"train": text, "val": text, "test": text}; the same images and seed give the same text.

    Raises:
        DataError: missing classes; images whose paths `read_split_file` would refuse.
    """
    by_class = find_images(root)
    lines: dict[str, list[str]] = {split: [] for split in SPLITS}
    for label, name in enumerate(CLASSES):
        for split, rows in zip(SPLITS, split_by_class(len(by_class[name]), CUTS, (seed, label))):
            lines[split] += [f"{by_class[name][row]} {label}" for row in rows]
    texts = {split: "".join(f"{line}\n" for line in lines[split]) for split in SPLITS}
    faults = [f"{split}.txt: {fault}" for split, text in texts.items() for fault in _parse_split_file(text, root)[2]]
    if faults:
        raise DataError(
            f"covid: {len(faults)} image path(s) cannot be written to a split file",
            items=faults,
            path=root,
            fix="rename or remove these files or folders",
        )
    return texts
