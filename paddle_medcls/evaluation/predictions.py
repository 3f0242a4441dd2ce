"""Reads files of predictions: `predictions_<split>.csv` as `eval --output` and training write them."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from paddle_medcls.core.errors import DataError, command

FIXED = ["id", "label", "predicted"]
PATIENTS = ["id", "patient"]


@dataclass(frozen=True)
class Predictions:
    """One `predictions_<split>.csv`.

    Attributes:
        path: of the file.
        ids: names of the images, unique.
        labels, guesses: class numbers (N,), or 0 and 1 (N, L) for a multi-label task.
        probs: (N, C) in [0, 1].
        classes: names of the columns.
        patients: of each image, where `patients_<split>.csv` beside the file names them; else empty.
    """

    path: Path
    ids: list[str]
    labels: np.ndarray
    guesses: np.ndarray
    probs: np.ndarray
    classes: tuple[str, ...]
    patients: tuple[str, ...] = ()

    @property
    def task(self) -> str:
        """ "multi-label", "binary" or "multi-class"; a file does not say whether classes are ordered."""
        if self.labels.ndim == 2:
            return "multi-label"
        return "binary" if len(self.classes) == 2 else "multi-class"


def read_predictions(path: Path) -> Predictions:
    """Reads predictions as `eval --output` and `train` write them; every faulty row is reported.

    Raises:
        DataError: no such file, several to choose from, or faulty rows.
    """
    path = _file(path)
    try:
        with open(path, encoding="utf-8", newline="") as file:
            header, *rows = csv.reader(file, strict=True)
    except (OSError, ValueError, csv.Error) as error:
        reason = error if isinstance(error, (OSError, UnicodeDecodeError, csv.Error)) else "it is empty"
        raise DataError(f"{path}: cannot be read: {reason}", expected="a predictions_<split>.csv") from None
    if header[-1:] == ["fold"] and all(row[-1:] and row[-1].isdigit() for row in rows):  # of a cross-validation
        header, rows = header[:-1], [row[:-1] for row in rows]
    classes = tuple(header[3:])
    if header[:3] != FIXED or len(classes) < 2 or len(set(classes)) < len(classes) or not rows:
        expected = "a header id,label,predicted and a column for each of two or more classes; rows below"
        raise DataError(f"{path}: not predictions (begins with {','.join(header)[:60]!r})", expected=expected)
    multi_label = all(len(row) > 1 and len(row[1]) == len(classes) for row in rows)  # labels as 0/1 strings
    faults = [
        f"line {number}: {fault}" for number, row in enumerate(rows, 2) if (fault := _fault(row, classes, multi_label))
    ]
    ids = [row[0] for row in rows if row]
    if len(set(ids)) < len(ids):
        faults.append(f"{len(ids) - len(set(ids))} image(s) are named twice")
    if faults:
        raise DataError(f"{path}: {len(faults)} faulty line(s) of {len(rows)}", items=faults)
    numbers = [[list(map(int, text)) if multi_label else int(text) for text in row[1:3]] for row in rows]
    labels, guesses = np.moveaxis(np.array(numbers, np.int64), 1, 0)
    probs = np.array([row[3:] for row in rows], np.float64)
    return Predictions(path, ids, labels, guesses, probs, classes, _read_patients(path, ids))


def _read_patients(predictions: Path, ids: list[str]) -> tuple[str, ...]:
    """The patient of each image, from `patients_<split>.csv` beside `predictions_<split>.csv`, if there is one."""
    path = predictions.with_name(predictions.name.replace("predictions_", "patients_", 1))
    if path == predictions or not path.is_file():
        return ()
    try:
        with open(path, encoding="utf-8", newline="") as file:
            header, *rows = csv.reader(file, strict=True)
        if header != PATIENTS or any(len(row) != 2 for row in rows):
            raise ValueError("its columns differ")
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read: {error}", expected=f"columns {', '.join(PATIENTS)}") from None
    patient_of = dict(rows)
    missing = [name for name in ids if not patient_of.get(name)]
    if missing or len(patient_of) != len(rows):
        raise DataError(
            f"{path}: {len(missing)} image(s) of {len(ids)} without a patient, "
            f"{len(rows) - len(patient_of)} named twice",
            items=missing,
            fix="write both files again (eval --output), or remove this one to compare by images",
        )
    return tuple(patient_of[name] for name in ids)


def _file(path: Path) -> Path:
    if not path.is_dir():
        return path
    files = sorted(path.glob("predictions_*.csv"))
    if len(files) != 1:
        names = ", ".join(file.name for file in files)
        raise DataError(
            f"{path}: {f'several predictions: {names}' if files else 'no predictions_<split>.csv in this folder'}",
            fix="name one of the files" if files else f"write one: {command('eval')} --weights FILE --output DIR",
        )
    return files[0]


def _fault(row: list[str], classes: tuple[str, ...], multi_label: bool) -> str | None:
    if len(row) != 3 + len(classes):
        return f"{len(row)} columns, the header has {3 + len(classes)}"
    allowed = {str(number) for number in range(len(classes))}
    for text in row[1:3]:
        if not (len(text) == len(classes) and set(text) <= {"0", "1"} if multi_label else text in allowed):
            return f"{text!r} is no class of {len(classes)}"
    for text in row[3:]:
        try:
            if 0 <= float(text) <= 1:
                continue
        except ValueError:
            pass
        return f"{text!r} is no probability"
    return None
