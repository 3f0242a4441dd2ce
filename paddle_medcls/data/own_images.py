"""A user's own images: from a folder or a table to an `ImageList` with splits.

Layouts of a folder: one sub-folder a class; `train`, `val` and `test` above these; or the lists of PaddleClas and
PaddleX (`train_list.txt`, `val_list.txt`, `test_list.txt` with `path number` in each line, and `labels.txt`). A table
has a row for each image. What is missing is an error; what may be meant is a remark, which a run keeps.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from paddle_medcls.core.errors import DataError
from paddle_medcls.data.duplicates import check_images
from paddle_medcls.data.image_list import ImageList, Remark, check_files, class_fault, class_numbers, path_fault
from paddle_medcls.data.index import image_files, subfolders
from paddle_medcls.data.label_table import Table, cell_fault, read_table
from paddle_medcls.data.splits import stratified_parts

SHARES = {"train": 0.7, "val": 0.1, "test": 0.2}
"""Of the images. The test part gives the result its interval; the validation part only chooses the epoch."""
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
    "split": ("split", "set", "subset", "fold", "partition"),
}
"""Usual names of the columns, without regard to case; "-" and blanks count as "_"."""
LISTS = {"train": "train_list.txt", "val": "val_list.txt", "test": "test_list.txt"}


@dataclass
class _Rows:
    """The images as they were found; each field has one entry for each image."""

    folder: Path
    source: Path  # of the labels
    origin: dict[str, str]
    paths: list[str] = field(default_factory=list)
    labels: list[tuple[str, ...]] = field(default_factory=list)
    patients: list[str] = field(default_factory=list)
    splits: list[str] = field(default_factory=list)  # "" if not given
    classes: tuple[str, ...] = ()  # where their order is given
    remarks: list[Remark] = field(default_factory=list)
    multi_label: bool = False


def own_images(
    root: str | Path,
    labels: str | Path | None = None,
    columns: Mapping[str, str] | None = None,
    ordinal: Sequence[str] = (),
    patient_pattern: str | None = None,
    seed: int = 0,
) -> ImageList:
    """Lists a user's own images with labels, patients and splits, for `train`; no image is decoded.

    Splits that are given are used. Else the patients are assigned, complete and by class, 70% to training, 10% to
    validation, 20% to test; with a training but no validation split an eighth of its patients validates.

    Args:
        root: folder of the images.
        labels: a CSV or Excel file with a row for each image; None: the folders, or list files, name the classes.
        columns: of that file, where their names are not usual: {"path": …, "label": …, "patient": …, "split": …}.
        ordinal: the classes in their order, for an ordinal task.
        patient_pattern: regular expression, found in each path; its first group is the patient.
        seed: of the splits. It is not the seed of a training, so trainings with several seeds share the splits.

    Raises:
        DataError: missing images, unclear labels, a class with one image; see the module's docstring.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError("the folder of the images does not exist", path=root, fix="pass --data-root with that folder")
    rows = (
        _folder_rows(root.absolute()) if labels is None else _table_rows(root.absolute(), Path(labels), columns or {})
    )
    check_files(rows.folder, rows.paths, rows.source)
    classes = _classes(rows, ordinal)
    task = "multi-label" if rows.multi_label else "ordinal" if ordinal else "binary" if len(classes) == 2 else ""
    known = {name: k for k, name in enumerate(classes)}
    result = ImageList(
        folder=rows.folder,
        paths=tuple(rows.paths),
        labels=class_numbers([[known[text] for text in own] for own in rows.labels], len(classes), task),
        patients=_patients(rows, patient_pattern),
        splits=tuple(rows.splits),
        classes=classes,
        task=task or "multi-class",
        origin=rows.origin,
    )
    if not any(result.patients):
        rows.remarks.append(Remark("no patients are known: images of one patient may be in several splits"))
        result.origin["patients"] = "not known"
    elif not all(result.patients):
        lacking = tuple(path for path, patient in zip(result.paths, result.patients) if not patient)
        rows.remarks.append(
            Remark(f"{len(lacking)} images have no patient; each counts as a patient of its own", lacking)
        )
    result = _with_splits(result, seed)
    return replace(result, remarks=(*rows.remarks, *_split_remarks(result)))


def compared(images: ImageList, workers: int) -> ImageList:
    """Reads all images and compares each with all others; adds a remark for copies in two splits.

    Raises:
        DataError: images that cannot be read; the same pixels under two labels.
    """
    report = check_images([images.index(split) for split in images.names], workers)
    if report.unreadable:
        raise DataError(
            f"{len(report.unreadable)} of {report.images} image(s) cannot be read",
            items=report.unreadable,
            fix="copy these files again, or remove them and their rows",
        )
    lines = {pair: f"{pair.a[1]} ({pair.a[0]}) and {pair.b[1]} ({pair.b[0]})" for pair in report.pairs}
    unclear = [line for pair, line in lines.items() if pair.exact and not pair.same_label]
    if unclear:
        raise DataError(
            f"{len(unclear)} pair(s) of the same image have two labels",
            items=unclear,
            path=images.folder,
            fix="find out which label is right and remove the other file; several labels of one image need a table",
        )
    remarks = list(images.remarks)
    for exact, what in ((True, "the same image"), (False, "nearly the same image")):
        found = [line for pair, line in lines.items() if pair.exact == exact and pair.a[0] != pair.b[0]]
        if found:
            text = f"{len(found)} pair(s) of {what} are in two splits: results on the later one are too high"
            remarks.append(Remark(text, tuple(found)))
    inside = [line for pair, line in lines.items() if pair.a[0] == pair.b[0]]
    if inside:
        remarks.append(
            Remark(f"{len(inside)} pair(s) of the same or nearly the same image are in one split", tuple(inside))
        )
    return replace(images, remarks=tuple(remarks), compared=True)


# --- folders -----------------------------------------------------------------------------------------


def _folder_rows(root: Path) -> _Rows:
    if (root / LISTS["train"]).is_file():
        return _list_rows(root)
    inside = [path for path in subfolders(root, 1)[1:]]
    by_split = {SPLIT_NAMES[path.name.lower()]: path for path in inside if path.name.lower() in SPLIT_NAMES}
    rows = _Rows(root, root, {"labels": "names of the folders"})
    if not by_split:
        _add_classes(rows, root, "")
        return rows
    others = [path.name for path in inside if path not in by_split.values()]
    if others:
        rows.remarks.append(Remark(f"{len(others)} folder(s) beside the splits were not used", tuple(others)))
    for split, folder in by_split.items():
        _add_classes(rows, folder, split)
    return rows


def _add_classes(rows: _Rows, folder: Path, split: str) -> None:
    """Adds the images of the class folders in a folder."""
    classes = subfolders(folder, 1)[1:]
    empty, masks = [], []
    for one in classes:
        places = subfolders(one, most=MAX_FOLDERS)
        masks += [str(place) for place in places[1:] if re.fullmatch("masks?", place.name.lower())]
        found = [path for place in places for path in image_files(place)]
        if not found:
            empty.append(one.name)
        for path in found:
            rows.paths.append(path.relative_to(rows.folder).as_posix())
            rows.labels.append((unicodedata.normalize("NFC", one.name),))
            rows.patients.append("")
            rows.splits.append(split)
    if masks:
        raise DataError(
            f"{len(masks)} folder(s) hold masks, not images of a class", items=masks, fix="move them elsewhere"
        )
    if len(classes) - len(empty) < 1:
        raise DataError(
            f"{folder.name or folder}: no sub-folders with images",
            path=folder,
            expected="one sub-folder a class; or train, val and test above these; or train_list.txt and labels.txt",
            fix="for labels in a CSV or Excel file: --dataset table --labels FILE",
        )
    if empty:
        rows.remarks.append(Remark(f"{len(empty)} folder(s) in {folder.name} hold no images", tuple(empty)))
    if beside := image_files(folder):
        names = tuple(path.name for path in beside)
        rows.remarks.append(Remark(f"{len(beside)} image(s) beside the class folders have no class; not used", names))


def _list_rows(root: Path) -> _Rows:
    """The list files of PaddleClas and PaddleX."""
    rows = _Rows(root, root / LISTS["train"], {"labels": "the list files"})
    names = _lines(root / "labels.txt") if (root / "labels.txt").is_file() else []
    faults = []
    for split, file in LISTS.items():
        for number, line in enumerate(_lines(root / file) if (root / file).is_file() else [], start=1):
            match = re.fullmatch(r"(.*\S)\s+(\d+)", line)
            path = match[1].removeprefix("./") if match else line
            label = int(match[2]) if match else -1
            if match is None or path_fault(path) or (names and label >= len(names)):
                faults.append(f"{file}, line {number}: {line[:100]!r}")
                continue
            rows.paths.append(path)
            rows.labels.append((names[label] if names else str(label),))
            rows.patients.append("")
            rows.splits.append(split)
    if faults:
        expected = f"a relative path and a number{f' of 0 to {len(names) - 1}' if names else ''}"
        raise DataError(f"{len(faults)} faulty line(s)", items=faults, path=root, expected=expected)
    rows.classes = tuple(name for name in names if (name,) in set(rows.labels))
    if not names:
        rows.remarks.append(Remark("there is no labels.txt: the classes are called by their numbers"))
    elif len(rows.classes) < len(names):
        rows.remarks.append(Remark("classes of labels.txt have no images", tuple({*names} - {*rows.classes})))
    return rows


def _lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path.name} cannot be read: {error}", path=path, expected="text in UTF-8") from None


# --- tables ------------------------------------------------------------------------------------------


def _table_rows(root: Path, path: Path, columns: Mapping[str, str]) -> _Rows:
    table = read_table(path)
    at = _columns(table, columns)

    def column(name: str) -> list[str]:
        return [row[at[name]] for row in table.rows.values()] if name in at else [""] * len(table.rows)

    files = column("path")
    folder, paths = _find_files(root, path.absolute().parent, files, table)
    texts = _as_numbers(column("label"))
    multi_label = any(";" in text for text in texts)
    labels = [tuple(dict.fromkeys(part.strip() for part in text.split(";") if part.strip())) for text in texts]
    given = column("split")
    splits = [SPLIT_NAMES.get(text.lower(), "") for text in given]
    faults = [] if multi_label else [f"row {k}: no label" for k, own in zip(table.rows, labels) if not own]
    if any(given):
        faults += [f"row {k}: {text!r} is no split" for k, text, split in zip(table.rows, given, splits) if not split]
    if faults:
        raise DataError(
            f"{path.name}: {len(faults)} faulty row(s)",
            items=faults,
            path=path,
            expected=f"a label in each row (only with several labels a row may it be empty); {', '.join(SPLIT_NAMES)}",
        )
    origin = {"labels": f"column {table.columns[at['label']]!r} of {path.name}"}
    if "patient" in at:
        origin["patients"] = f"column {table.columns[at['patient']]!r} of {path.name}"
    remarks = [Remark(text) for text in table.remarks]
    patients = _as_numbers(column("patient"))
    return _Rows(folder, path, origin, paths, labels, patients, splits, (), remarks, multi_label)


def _columns(table: Table, columns: Mapping[str, str]) -> dict[str, int]:
    """The position of each column by its meaning."""
    plain = [re.sub(r"[\s-]+", "_", name.lower()) for name in table.columns]
    faults = [f"{meaning}={name}: no such column" for meaning, name in columns.items() if name not in table.columns]
    faults += [f"{meaning}=…: no such meaning" for meaning in columns if meaning not in COLUMN_NAMES]
    at = {}
    for meaning, usual in COLUMN_NAMES.items():
        found = [k for k, name in enumerate(plain) if name in usual]
        if meaning in columns:
            at[meaning] = table.columns.index(columns[meaning]) if not faults else 0
        elif len(found) > 1:
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


def _as_numbers(texts: list[str]) -> list[str]:
    """A column of whole numbers, some with a decimal point as "1.0", without it; any other column as it is."""
    if all(re.fullmatch(r"-?\d+(\.0*)?|", text) for text in texts):
        return [text.partition(".")[0] for text in texts]
    return texts


def _find_files(root: Path, beside: Path, names: Sequence[str], table: Table) -> tuple[Path, list[str]]:
    """The folder of the images (the data root, else that of the table), and the path of each image in it.

    A path may lack its suffix or its folders, where only one image in the folder fits it.
    """
    best: tuple[list[str], Path, list[str]] | None = None
    for folder in dict.fromkeys((root, beside)):
        found, faults = _find_in(folder, names, list(table.rows))
        if not faults:
            return folder, found
        best = best or (faults, folder, found)
    assert best is not None
    raise DataError(
        f"{table.path.name}: {len(best[0])} of {len(names)} image(s) cannot be found",
        items=best[0],
        path=best[1],
        expected="paths relative to --data-root or to the table; suffix and folders may be missing where it is clear",
        fix="correct the table or --data-root; give all images or remove their rows",
    )


def _find_in(folder: Path, names: Sequence[str], numbers: Sequence[int]) -> tuple[list[str], list[str]]:
    """The path of each image in a folder, and a line for each that is not found or not clear."""
    by_key: dict[str, set[str]] = defaultdict(set)
    found, faults = [], []
    for number, name in zip(numbers, names):
        path = name.replace("\\", "/").removeprefix(f"{folder.as_posix()}/").removeprefix("./")
        if path_fault(path):
            faults.append(f"row {number}: {name!r} {path_fault(path)}")
        elif (folder / path).is_file():
            found.append(path)
        else:
            if not by_key:
                _add_keys(by_key, folder)
            fitting = sorted(by_key.get(unicodedata.normalize("NFC", path), ()))
            found += fitting[:1]
            if len(fitting) != 1:
                clue = f" may be {' or '.join(fitting[:3])}" if fitting else " does not exist"
                faults.append(f"row {number}: {name!r}{clue}")
    return found, faults


def _add_keys(by_key: dict[str, set[str]], folder: Path) -> None:
    """All that an image below a folder may be called by."""
    for place in subfolders(folder, most=MAX_FOLDERS):
        for path in image_files(place):
            relative = path.relative_to(folder)
            keys = (relative.as_posix(), relative.with_suffix("").as_posix(), path.name, path.stem)
            for key in keys:
                by_key[unicodedata.normalize("NFC", key)].add(relative.as_posix())


# --- classes, patients, splits -----------------------------------------------------------------------


def _classes(rows: _Rows, ordinal: Sequence[str]) -> tuple[str, ...]:
    """The class names in order, checked."""
    counts = Counter(name for own in rows.labels for name in own)
    faults = []
    similar = defaultdict(list)
    for name in sorted(counts):
        similar["".join(unicodedata.normalize("NFKC", name).casefold().split())].append(name)
    for names in similar.values():
        if len(names) > 1:
            faults.append(
                "the same but for case or blanks: " + ", ".join(f"{name!r} ({counts[name]})" for name in names)
            )
    faults += [f"{name!r} {cell_fault(name)}" for name in counts if cell_fault(name)]
    if ordinal and rows.multi_label:
        faults.append("an ordinal task has one label for each image")
    if ordinal:
        faults += [f"{name!r} is not in --ordinal" for name in sorted(counts.keys() - set(ordinal))]
        faults += [f"{name!r} of --ordinal has no image" for name in ordinal if name not in counts]
    faults += [f"{name!r} has one image" for name, count in sorted(counts.items()) if count == 1]
    classes = tuple(ordinal or rows.classes or sorted(counts, key=_natural))
    fault = class_fault(classes, "multi-label" if rows.multi_label else "multi-class")
    if faults or fault:
        raise DataError(
            f"the classes cannot be used: {fault}" if fault else f"{len(faults)} fault(s) of the classes",
            items=faults,
            path=rows.source,
            expected="at least two classes, of two or more images each, each spelled in one way",
            fix="rename or merge the folders or labels",
        )
    return classes


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """A sort key: "grade 2" comes before "grade 10"."""
    parts = re.split(r"(\d+)", name)
    return [(not part.isdecimal(), int(part) if part.isdecimal() else 0, part.casefold()) for part in parts if part]


def _patients(rows: _Rows, pattern: str | None) -> tuple[str, ...]:
    if pattern is None:
        return tuple(rows.patients)
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise DataError(f"--patient-pattern {pattern!r} is no regular expression: {error}") from None
    if expression.groups < 1:
        raise DataError(f"--patient-pattern {pattern!r} has no group", fix=r"put the patient in brackets: 'P(\d+)_'")
    if any(rows.patients):
        raise DataError("both a column and --patient-pattern name the patients", fix="leave one of them out")
    found = [expression.search(path) for path in rows.paths]
    faults = [path for path, match in zip(rows.paths, found) if not (match and match[1])]
    if faults:
        raise DataError(f"--patient-pattern {pattern!r} finds no patient in {len(faults)} path(s)", items=faults)
    rows.origin["patients"] = f"the pattern {pattern}"
    patients = tuple(match[1] for match in found if match)
    bad = [patient for patient in patients if cell_fault(patient)]
    if bad:
        raise DataError(f"{len(bad)} patient(s) cannot stand in a table", items=bad, fix="use another pattern")
    return patients


def _with_splits(images: ImageList, seed: int) -> ImageList:
    """Makes the splits that are not given."""
    given = set(images.splits) - {""}
    if not given:
        made, rows = SHARES, np.arange(len(images))
    elif given >= {"train", "val"}:
        images.origin["splits"] = "as given"
        return images
    elif "train" in given:
        part = SHARES["train"] + SHARES["val"]
        made = {"train": SHARES["train"] / part, "val": SHARES["val"] / part}
        rows = np.flatnonzero(np.array(images.splits) == "train")
    else:
        raise DataError(f"the splits {', '.join(sorted(given))} are given, but no training split", path=images.folder)
    parts = stratified_parts(images.labels[rows], [images.groups[row] for row in rows], list(made.values()), seed)
    splits = np.array(images.splits, "<U5")
    splits[rows] = np.array(list(made))[parts]
    shares = ", ".join(f"{name} {share:.3g}" for name, share in made.items())
    first = "as given, but the given training split" if given else "all images"
    images.origin["splits"] = f"{first} by class and complete patients, seed {seed}: {shares}"
    return replace(images, splits=tuple(splits.tolist()), made=tuple(set(made) - given))


def _split_remarks(images: ImageList) -> list[Remark]:
    """Patients in two splits, and classes that a split lacks.

    Raises:
        DataError: the training split lacks a class.
    """
    remarks = []
    places: dict[str, set[str]] = defaultdict(set)
    for patient, split in zip(images.patients, images.splits):
        places[patient].add(split)
    shared = tuple(name for name, found in places.items() if name and len(found) > 1)
    if shared:
        remarks.append(Remark(f"{len(shared)} patient(s) are in two given splits: results are too high", shared))
    for split in images.names:
        lacking = tuple(name for name, count in images.index(split).counts().items() if not count)
        if lacking and split == "train":
            raise DataError(
                f"the training split has no image of {len(lacking)} class(es)", items=lacking, path=images.folder
            )
        if lacking:
            remarks.append(Remark(f"the {split} split lacks {len(lacking)} class(es)", lacking))
    return remarks
