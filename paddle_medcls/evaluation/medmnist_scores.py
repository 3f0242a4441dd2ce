"""Writes predictions in the file format of MedMNIST's own evaluator."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from paddle_medcls.core.errors import RunError
from paddle_medcls.core.files import write_text
from paddle_medcls.data.datasets.medmnist import card_of
from paddle_medcls.data.index import Index
from paddle_medcls.evaluation.metrics import auc
from paddle_medcls.models.output_head import OutputHead


def write_scores(folder: Path, index: Index, probs: np.ndarray, run: str) -> Path:
    """Writes the predictions of a MedMNIST split; an earlier file of the same split and run is replaced.

    Name: `{flag}_{split}_[AUC]0.901_[ACC]0.863@{run}.csv`; lines: row of the split, then the scores.

    Args:
        probs: (N, C).
        run: name of the run, letters, digits and `_.-` only, as it becomes part of a file name.

    Raises:
        RunError: another name.
    """
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", run):
        raise RunError(f"{run!r} cannot be part of a file name", expected="letters, digits and _ . -")
    card, side = card_of(index.dataset)
    stem = f"{card.flag}_{index.split}_" if side == 28 else f"{card.flag}_{side}_{index.split}_"
    for old in folder.glob(f"{stem}*@{run}.csv"):
        old.unlink()
    guesses = OutputHead(index.task, "softmax", index.classes).decide(probs)  # the evaluator's threshold is 0.5
    area, accuracy = float(auc(probs, index.labels, index.task)), float((guesses == index.labels).mean())
    path = folder / f"{stem}[AUC]{area:.3f}_[ACC]{accuracy:.3f}@{run}.csv"
    lines = (",".join([str(row), *map(repr, scores)]) for row, scores in enumerate(probs.tolist()))
    write_text(path, "".join(f"{line}\n" for line in lines))
    return path
