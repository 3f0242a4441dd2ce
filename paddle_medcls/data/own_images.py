"""A user's own images: classes, patients and splits, from a folder or a table to an `ImageList`.

What is unclear is an error; what may be meant is a remark, which a run keeps. Nothing is left out silently.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from paddle_medcls.core.errors import DataError
from paddle_medcls.data.decode import SUFFIXES
from paddle_medcls.data.duplicates import check_images
from paddle_medcls.data.image_list import COPIES, ImageList, Remark, check_files, class_fault, class_numbers
from paddle_medcls.data.label_table import cell_fault
from paddle_medcls.data.own_layouts import Layout, read_folder, read_labels
from paddle_medcls.data.splits import stratified_parts

SHARES = {"train": 0.7, "val": 0.1, "test": 0.2}
"""Of the images. The test part gives the result its interval; the validation part only chooses the epoch."""


def own_images(
    root: str | Path,
    labels: str | Path | None = None,
    columns: Mapping[str, str] | None = None,
    ordinal: Sequence[str] = (),
    patient_pattern: str | None = None,
    seed: int | None = 0,
) -> ImageList:
    """Lists a user's own images with labels, patients and splits, for `train` and `evaluate`; decodes none.

    Splits that are given are used. Else 70% of the images are for training, 10% for validation, 20% for test, with
    complete patients and the same share of each class. Of a given training split without validation an eighth is for
    validation.

    Args:
        root: folder of the images: one sub-folder a class; `train`, `val` and `test` above these; or the list files of
            PaddleClas and PaddleX.
        labels: a CSV or Excel file with a row for each image; several labels of one image have ";" between.
        columns: of that file, where their names are not usual: {"path": …, "label": …, "patient": …, "split": …}.
        ordinal: the classes in their order, for an ordinal task.
        patient_pattern: regular expression, found in each path; its first group is the patient.
        seed: of the splits; it is not the seed of a training, so that trainings with other seeds share the splits.
            None: all images are `test`, and a class may lack images, to evaluate a model that is trained already.

    Raises:
        DataError: missing images, unclear labels, a class with one image and the like; all faults are listed.
    """
    root = Path(root).absolute()
    if not root.is_dir():
        raise DataError("the folder of the images does not exist", path=root, fix="pass --data-root with that folder")
    layout = read_folder(root) if labels is None else read_labels(root, Path(labels), columns or {})
    check_files(layout.folder, [image.path for image in layout.images], layout.source)
    classes = _classes(layout, ordinal, least=1 if seed is None else 2)
    task = "ordinal" if ordinal else "binary" if len(classes) == 2 else "multi-class"
    task = "multi-label" if layout.multi_label else task
    number = {name: k for k, name in enumerate(classes)}
    images = ImageList(
        folder=layout.folder,
        paths=tuple(image.path for image in layout.images),
        labels=class_numbers([[number[name] for name in image.labels] for image in layout.images], len(classes), task),
        patients=_patients(layout, patient_pattern),
        splits=tuple("test" if seed is None else image.split for image in layout.images),
        classes=classes,
        task=task,
        origin=layout.origin,
    )
    if seed is not None:
        images = _with_splits(images, seed)
    return replace(images, remarks=(*layout.remarks, *_left_out(layout), *_remarks(images)))


def compared(images: ImageList, workers: int) -> ImageList:
    """Reads all images and compares each with all others; adds remarks about copies.

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
    apart = tuple(line for pair, line in lines.items() if pair.a[0] != pair.b[0])
    together = tuple(line for pair, line in lines.items() if pair.a[0] == pair.b[0])
    found = {
        f"{len(apart)} {COPIES} two splits; results may be too high": apart,
        f"{len(together)} {COPIES} one split": together,
    }
    remarks = [Remark(what, pairs) for what, pairs in found.items() if pairs]
    return replace(images, remarks=(*images.remarks, *remarks), compared=True)


def _left_out(layout: Layout) -> list[Remark]:
    """Files beside the images that are not among them: images that no row names, and below classes other files."""
    used = {image.path for image in layout.images}
    beside = set()
    for folder in {os.path.dirname(path) for path in used}:
        names = (entry.name for entry in os.scandir(layout.folder / folder) if entry.is_file())
        beside |= {os.path.join(folder, name) for name in names if not name.startswith(".")}
    rest = sorted(beside - used)
    images = tuple(path for path in rest if Path(path).suffix.lower() in SUFFIXES)
    others = (
        tuple(path for path in rest if Path(path).suffix.lower() not in SUFFIXES)
        if layout.source == layout.folder
        else ()
    )
    remarks = [Remark(f"{len(images)} image(s) beside the listed ones were not used", images)] if images else []
    return remarks + ([Remark(f"{len(others)} file(s) of other kinds were not used", others)] if others else [])


def _classes(layout: Layout, ordinal: Sequence[str], least: int) -> tuple[str, ...]:
    """The class names in order, checked; each has at least so many images."""
    counts = Counter(name for image in layout.images for name in image.labels)
    spellings = defaultdict(list)
    for name in sorted(counts):
        spellings["".join(unicodedata.normalize("NFKC", name).casefold().split())].append(f"{name!r} ({counts[name]})")
    faults = [f"the same but for case or blanks: {', '.join(own)}" for own in spellings.values() if len(own) > 1]
    if ordinal:
        faults += [f"{name!r} is not in --ordinal" for name in sorted(counts.keys() - set(ordinal))]
        faults += [f"{name!r} of --ordinal has no image" for name in ordinal if counts[name] < min(least - 1, 1)]
        faults += ["several labels of one image cannot be ordinal"] if layout.multi_label else []
    faults += [f"{name!r} has one image" for name, count in sorted(counts.items()) if count < least]
    classes = tuple(ordinal or layout.classes or sorted(counts, key=_natural))
    fault = class_fault(classes, "multi-label" if layout.multi_label or least == 1 else "multi-class")
    if faults or fault:
        raise DataError(
            f"the classes cannot be used{': ' if fault else ''}{fault}",
            items=faults,
            path=layout.source,
            expected="two or more classes with two or more images each, every name spelled in one way",
            fix="rename or merge the folders or labels",
        )
    return classes


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """A sort key: "grade 2" comes before "grade 10"."""
    parts = re.split(r"([0-9]{1,18})", name)
    return [(not part.isdigit(), int(part) if part.isdigit() else 0, part.casefold()) for part in parts if part]


def _patients(layout: Layout, pattern: str | None) -> tuple[str, ...]:
    if pattern is None:
        return tuple(image.patient for image in layout.images)
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise DataError(f"--patient-pattern {pattern!r} is no regular expression: {error}") from None
    if expression.groups < 1:
        raise DataError(f"--patient-pattern {pattern!r} has no group", fix=r"put the patient in brackets: 'P(\d+)_'")
    if any(image.patient for image in layout.images):
        raise DataError("a column and --patient-pattern both name the patients", fix="leave --patient-pattern out")
    matches = [expression.search(image.path) for image in layout.images]
    patients = tuple((match and match[1]) or "" for match in matches)
    faults = [image.path for image, patient in zip(layout.images, patients) if not patient or cell_fault(patient)]
    if faults:
        raise DataError(f"--patient-pattern {pattern!r} finds no patient in {len(faults)} path(s)", items=faults)
    layout.origin["patients"] = f"found in the paths by {pattern}"
    return patients


def _with_splits(images: ImageList, seed: int) -> ImageList:
    """Makes the splits that are not given."""
    splits = np.array(images.splits, "<U5")
    given = set(images.splits) - {""}
    if {"train", "val"} <= given:
        return replace(images, origin={**images.origin, "splits": "as given"})
    if given and "train" not in given:
        raise DataError(f"of the splits only {' and '.join(sorted(given))} is given, and no train", path=images.folder)
    rows = np.flatnonzero(splits == ("train" if given else ""))
    names = ["train", "val"] if given else list(SHARES)
    total = sum(SHARES[name] for name in names)
    shares = [SHARES[name] / total for name in names]
    parts = stratified_parts(images.labels[rows], [images.groups[row] for row in rows], shares, seed)
    splits[rows] = np.array(names)[parts]
    text = ", ".join(f"{name} {share:.1%}" for name, share in zip(names, shares))
    which = "the given training split" if given else "all images"
    text = f"made of {which}, with complete patients and equal shares of the classes, seed {seed}: {text}"
    made = tuple(name for name in names if name not in given)
    return replace(images, splits=tuple(splits.tolist()), made=made, origin={**images.origin, "splits": text})


def _remarks(images: ImageList) -> list[Remark]:
    """Images without patients, patients in two splits, classes that a split lacks.

    Raises:
        DataError: the training split lacks a class.
    """
    remarks = []
    unknown = tuple(path for path, patient in zip(images.paths, images.patients) if not patient)
    if len(unknown) == len(images):
        remarks.append(Remark("the patients are not known: images of one patient may be in two splits"))
    elif unknown:
        what = f"{len(unknown)} image(s) have no patient; each counts as a patient of its own"
        remarks.append(Remark(what, unknown))
    places = defaultdict(set)
    for patient, split in zip(images.patients, images.splits):
        places[patient].add(split)
    shared = tuple(name for name, found in sorted(places.items()) if name and len(found) > 1)
    if shared:
        remarks.append(Remark(f"{len(shared)} patient(s) are in two splits; results may be too high", shared))
    for split in images.names:
        lacking = tuple(name for name, count in images.index(split).counts().items() if not count)
        if lacking and split == "train":
            raise DataError(f"the train split lacks {len(lacking)} class(es)", items=lacking, path=images.folder)
        if lacking:
            remarks.append(Remark(f"the {split} split lacks {len(lacking)} class(es)", lacking))
    return remarks
