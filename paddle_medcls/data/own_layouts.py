"""Finds a user's own images with their labels: in folders, in the lists of PaddleClas and PaddleX, or in a table."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from paddle_medcls.core.errors import DataError
from paddle_medcls.data.image_list import Remark, path_fault, refuse_rows
from paddle_medcls.data.index import image_files, subfolders
from paddle_medcls.data.label_table import Table, read_table

MAX_FOLDERS = 100_000  # one a patient, below each class
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
COLUMN_NAMES = {
    "path": (
        "path",
        "file",
        "filename",
        "file_name",
        "filepath",
        "image",
        "image_path",
        "image_name",
        "img",
        "imgname",
    ),
    "label": ("label", "labels", "class", "classes", "diagnosis", "finding", "findings", "finding_labels", "grade"),
    "patient": ("patient", "patient_id", "patientid", "subject", "subject_id", "case", "case_id"),
    "split": ("split", "set", "subset", "partition"),
}
"""Usual names of the columns, without regard to case; "-" and blanks count as "_"."""
LISTS = {"train": "train_list.txt", "val": "val_list.txt", "test": "test_list.txt"}


@dataclass(frozen=True)
class Found:
    """An image: path in the folder of the images, labels, patient, split; "" where the last two are not given."""

    path: str
    labels: tuple[str, ...]
    patient: str = ""
    split: str = ""


@dataclass
class Layout:
    """The images of a user.

    Attributes:
        folder: of the images.
        source: where the labels come from: the folder or a file.
        origin: see `ImageList`.
        images: all of them.
        classes: in their order, where it is given.
        remarks: see `ImageList`.
        multi_label: whether an image may have several labels.
    """

    folder: Path
    source: Path
    origin: dict[str, str]
    images: list[Found] = field(default_factory=list)
    classes: tuple[str, ...] = ()
    remarks: list[Remark] = field(default_factory=list)
    multi_label: bool = False


def read_folder(root: Path) -> Layout:
    """Reads one sub-folder a class, `train`, `val` and `test` above these, or list files.

    Raises:
        DataError: none of these, or folders of masks.
    """
    if (root / LISTS["train"]).is_file():
        return _read_lists(root)
    layout = Layout(root, root, {"labels": "names of the folders"})
    inside = subfolders(root, 1)[1:]
    splits = [folder for folder in inside if folder.name.lower() in SPLIT_NAMES]
    for folder in splits or [root]:
        _add_classes(layout, folder, SPLIT_NAMES[folder.name.lower()] if splits else "")
    others = [folder.name for folder in inside if folder not in splits]
    if splits and others:
        layout.remarks.append(Remark(f"{len(others)} folder(s) beside the splits were not used", tuple(others)))
    return layout


def _add_classes(layout: Layout, folder: Path, split: str) -> None:
    """Adds the images of the class folders in a folder."""
    empty, masks = [], []
    classes = subfolders(folder, 1)[1:]
    for one in classes:
        places = subfolders(one, most=MAX_FOLDERS)
        masks += [str(place) for place in places[1:] if place.name.lower() in ("mask", "masks")]
        paths = [path for place in places for path in image_files(place)]
        label = (unicodedata.normalize("NFC", one.name),)
        layout.images += [Found(path.relative_to(layout.folder).as_posix(), label, "", split) for path in paths]
        empty += [] if paths else [one.name]
    if masks:
        raise DataError(
            f"{len(masks)} folder(s) hold masks, not images of a class", items=masks, fix="move them elsewhere"
        )
    if len(empty) == len(classes):
        raise DataError(
            f"{folder.name or folder}: no sub-folders with images",
            path=folder,
            expected="one sub-folder a class; or train, val and test above these; or train_list.txt and labels.txt",
            fix="for labels in a CSV or Excel file: --dataset table --labels FILE",
        )
    beside = [path.name for path in image_files(folder)]
    if empty:
        layout.remarks.append(Remark(f"{len(empty)} folder(s) in {folder.name} hold no images", tuple(empty)))
    if beside:
        what = f"{len(beside)} image(s) beside the class folders have no class and were not used"
        layout.remarks.append(Remark(what, tuple(beside)))


def _read_lists(root: Path) -> Layout:
    """The list files of PaddleClas and PaddleX: `path number` in each line, and the names of the classes."""
    names = _lines(root / "labels.txt")
    layout = Layout(root, root / LISTS["train"], {"labels": "the list files"})
    faults = []
    for split, file in LISTS.items():
        for number, line in enumerate(_lines(root / file), start=1):
            match = re.fullmatch(r"(?:\./)?(.*\S)\s+(\d{1,6})", line)
            if match is None or path_fault(match[1]) or (names and int(match[2]) >= len(names)):
                faults.append(f"{file}, line {number}: {line[:100]!r}")
            else:
                label = names[int(match[2])] if names else match[2]
                layout.images.append(Found(match[1], (label,), "", split))
    if faults:
        expected = f"a relative path and a number{f' of 0 to {len(names) - 1}' if names else ''}"
        raise DataError(f"{len(faults)} faulty line(s)", items=faults, path=root, expected=expected)
    used = {label for image in layout.images for label in image.labels}
    unused = tuple(name for name in names if name not in used)
    layout.classes = tuple(name for name in names if name in used)
    if not names:
        layout.remarks.append(Remark("there is no labels.txt: the classes are called by their numbers"))
    if unused:
        layout.remarks.append(Remark(f"{len(unused)} class(es) of labels.txt have no images", unused))
    return layout


def _lines(path: Path) -> list[str]:
    """The lines of a text file; none of a missing one."""
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path.name} cannot be read: {error}", path=path, expected="text in UTF-8") from None


def read_labels(root: Path, path: Path, columns: Mapping[str, str]) -> Layout:
    """Reads a table with a row for each image.

    Args:
        root: folder of the images.
        path: of the table.
        columns: see `own_images`.

    Raises:
        DataError: unclear columns, images that cannot be found, rows without a label or with an unknown split.
    """
    table = read_table(path)
    at = _columns(table, columns)
    cells = {name: [row[k] for row in table.rows.values()] for name, k in at.items()}
    none = [""] * len(table.rows)
    folder, paths = _find_files(root, path.absolute().parent, cells["path"], table)
    texts, given = _whole_numbers(cells["label"]), cells.get("split", none)
    multi_label = any(";" in text for text in texts)
    labels = [tuple(dict.fromkeys(part.strip() for part in text.split(";") if part.strip())) for text in texts]
    splits = [SPLIT_NAMES.get(text.lower(), "") for text in given]
    faults = [f"row {k}: no label" for k, own in zip(table.rows, labels) if not own and not multi_label]
    if any(given):
        faults += [f"row {k}: {text!r} is no split" for k, text, split in zip(table.rows, given, splits) if not split]
    expected = "a label in each row, empty only in tables with several labels a row (a;b); train, val or test"
    refuse_rows(table, faults, expected)
    origin = {
        f"{name}s": f"column {table.columns[at[name]]!r} of {path.name}" for name in ("label", "patient") if name in at
    }
    patients = _whole_numbers(cells.get("patient", none))
    images = list(map(Found, paths, labels, patients, splits))
    return Layout(folder, path, origin, images, (), [Remark(text) for text in table.remarks], multi_label)


def _columns(table: Table, columns: Mapping[str, str]) -> dict[str, int]:
    """The position of each column by its meaning."""
    plain = [re.sub(r"[\s-]+", "_", name.lower()) for name in table.columns]
    faults = [f"{meaning}={name}" for meaning, name in columns.items() if name not in table.columns]
    faults += [f"{meaning}=…: no such meaning" for meaning in columns if meaning not in COLUMN_NAMES]
    at = {meaning: table.columns.index(name) for meaning, name in columns.items() if name in table.columns}
    for meaning, usual in COLUMN_NAMES.items():
        found = [k for k, name in enumerate(plain) if name in usual]
        if meaning in columns:
            continue
        if len(found) > 1:
            faults.append(f"{meaning}: {' or '.join(table.columns[k] for k in found)}?")
        elif found:
            at[meaning] = found[0]
        elif meaning in ("path", "label"):
            faults.append(f"no column for {meaning}, which is usually called {', '.join(usual)}")
    if faults:
        raise DataError(
            f"{table.path.name}: its columns are unclear",
            items=faults,
            path=table.path,
            expected=f"columns for path and label; found: {', '.join(table.columns)}",
            fix="name them: --columns path=NAME label=NAME patient=NAME split=NAME",
        )
    return at


def _whole_numbers(texts: list[str]) -> list[str]:
    """A column of whole numbers, some written as "1.0", without decimal points; any other column as it is."""
    whole = all(re.fullmatch(r"(-?\d+(\.0*)?)?", text) for text in texts)
    return [text.partition(".")[0] for text in texts] if whole else texts


def _find_files(root: Path, beside: Path, names: Sequence[str], table: Table) -> tuple[Path, list[str]]:
    """The folder of the images, the data root or else that of the table, and the path of each image in it."""
    paths, faults = _find_in(root, names, list(table.rows))
    if not faults:
        return root, paths
    paths, others = _find_in(beside, names, list(table.rows))
    if not others:
        return beside, paths
    raise DataError(
        f"{table.path.name}: {len(faults)} of {len(names)} image(s) cannot be found",
        items=faults,
        path=root,
        expected="paths in --data-root or the table's folder; suffix and folders may be missing where it is clear",
        fix="correct the table or --data-root; remove rows without an image",
    )


def _find_in(folder: Path, names: Sequence[str], numbers: Sequence[int]) -> tuple[list[str], list[str]]:
    """The path of each image in a folder, and a line for each that is not found or not clear."""
    by_name: dict[str, set[str]] = {}
    found, faults = [], []
    for number, name in zip(numbers, names):
        path = name.replace("\\", "/").removeprefix(f"{folder.as_posix()}/").removeprefix("./")
        if path_fault(path):
            faults.append(f"row {number}: {name!r} {path_fault(path)}")
        elif os.path.isfile(folder / path):  # False for impossible names, too
            found.append(path)
        else:
            by_name = by_name or _names_below(folder)
            fitting = sorted(by_name.get(unicodedata.normalize("NFC", path), ()))
            found += fitting[:1]
            if len(fitting) != 1:
                clue = f"may be {' or '.join(fitting[:3])}" if fitting else "does not exist"
                faults.append(f"row {number}: {name!r} {clue}")
    return found, faults


def _names_below(folder: Path) -> dict[str, set[str]]:
    """The images below a folder, by all that they may be called: with or without folders and suffix."""
    by_name: dict[str, set[str]] = defaultdict(set)
    for path in (path for place in subfolders(folder, most=MAX_FOLDERS) for path in image_files(place)):
        relative = path.relative_to(folder)
        for name in (relative.as_posix(), relative.with_suffix("").as_posix(), path.name, path.stem):
            by_name[unicodedata.normalize("NFC", name)].add(relative.as_posix())
    return by_name
