"""COVID-19 Radiography Database: chest X-rays in four classes, as in the COVID-19 radiography tutorial.

The split files `train.txt`, `val.txt` and `test.txt` in the data root hold one `relative/path label` in each line;
`prepare --dataset covid --split` writes them. Two layouts are read: Kaggle's (`COVID/images/…`, `Lung_Opacity`,
`Viral Pneumonia`; its masks are ignored) and the tutorial's (`COVID/…`, `LungOpacity`, `ViralPneumonia`).

A second split lies in a folder of the data root, and that folder is its data root: with `held_out.txt` in it, the paths
of its split files are relative to the folder above.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path, PurePosixPath

from paddle_medcls.core.errors import DataError, command, did_you_mean
from paddle_medcls.core.files import NAME, NAME_RULE, read_bounded
from paddle_medcls.data.datasets.covid_sources import plain, sources_of
from paddle_medcls.data.index import Index, image_files, index_of_files, subfolders
from paddle_medcls.data.splits import CUTS, split_by_class

WEIGHTS_NAME = "COVID"
SPLITS = ("train", "val", "test")
HELD_OUT = "held_out.txt"
"""Names the source that the split files beside it leave to the test split."""
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
    "`Normal` has two sources: numbers 63 to 1403 are children, from the collection of the viral pneumonias, the "
    "others adults, from that of the lung opacities. On 15,049 of the images the source alone gives the right class of "
    "83.8% of the test images; naming always Normal, of 61.6%. `tools/eval.py` prints the metrics of each source.",
    "There is no patient number: images of one patient may be in both training and test.",
    "A few files have the same bytes under two names.",
)
"""The section "Known faults" of `datasets/covid/README.md`, for model cards."""


_NUMBERS = tuple(str(label) for label in range(len(CLASSES)))
_LABEL_OF_FOLDER = {plain(name): label for label, name in enumerate(CLASSES)}


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
    held_out = _held_out(root)
    base = root.parent if held_out else root
    ids, numbers = read_split_file(split_file, base)
    index = index_of_files(name, split, base, [base / path for path in ids], numbers, description)
    note = f"all images of the source {held_out} are in the test split" if held_out else ""
    return replace(index, note=note, sources=() if index.synthetic else sources_of(base, ids))


def _held_out(root: Path) -> str:
    """The source that the split files of a data root leave to the test split; "" for the usual split."""
    if not (root / HELD_OUT).exists():
        return ""
    try:
        name = read_bounded(root / HELD_OUT, 200).decode("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"covid: {HELD_OUT} cannot be read: {error}", path=root / HELD_OUT) from None
    if not NAME.fullmatch(name):
        raise DataError(f"covid: {HELD_OUT} does not name a source", path=root / HELD_OUT, expected=NAME_RULE)
    return name


def read_split_file(path: Path, base: Path | None = None) -> tuple[list[str], list[int]]:
    """Paths relative to `base`, and labels 0 to 3, of one split file.

    Args:
        path: of the split file.
        base: the folder that holds the images; None: the split file's own.

    Raises:
        DataError: unreadable, empty, or faulty lines, of which all are listed.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"covid: {path.name} cannot be read: {error}", path=path) from None
    ids, labels, faults = _parse_split_file(text, base or path.parent)
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
        folder = next((_LABEL_OF_FOLDER[key] for key in map(plain, parts[-2::-1]) if key in _LABEL_OF_FOLDER), None)
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
        label = _LABEL_OF_FOLDER.get(plain(folder.name))
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


def hold_out_source(root: Path, seed: int, source: str) -> tuple[Path, dict[str, str]]:
    """A second split, in which all images of one source are in the test split; the others stay where they are.

    Returns:
        The folder for its files, which is its data root, and the text of each file by name.

    Raises:
        DataError: see `make_split_files`; an unknown source, or one without which training or validation is empty.
    """
    rows = [(split, line) for split, text in make_split_files(root, seed).items() for line in text.splitlines()]
    sources = sources_of(root, [line.rpartition(" ")[0] for _, line in rows])
    if source not in sources:
        names = sorted(set(sources))
        hint = did_you_mean(source, names)
        raise DataError(f"covid: no image is of the source {source!r}{hint}", expected=", ".join(names), path=root)
    texts = dict.fromkeys(SPLITS, "")
    for (split, line), name in zip(rows, sources):
        texts["test" if name == source else split] += f"{line}\n"
    empty = [split for split, text in texts.items() if not text]
    if empty:
        raise DataError(f"covid: without {source} there is no image for {' and '.join(empty)}", path=root)
    return root / f"without_{source}", {HELD_OUT: f"{source}\n", **{f"{split}.txt": texts[split] for split in SPLITS}}
