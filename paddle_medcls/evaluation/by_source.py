"""Sources of images: what the source alone tells of the label, and the metrics of each source.

Where the classes of a data set come from different hospitals, a network that recognises the hospital has a high
accuracy without seeing the disease. The metrics of each source show it, and so does a source kept out of training.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from prettytable import PrettyTable

from paddle_medcls.data.index import Index
from paddle_medcls.evaluation.metrics import (
    accuracy_interval,
    auc,
    bootstrap_areas,
    clusters_of,
    per_class,
    percentile_interval,
    wilson,
)


def class_counts(indexes: Sequence[Index]) -> dict[str, list[int]]:
    """Images of each class, by source, of some splits together; sources sorted by name."""
    sources = np.concatenate([np.asarray(index.sources, str) for index in indexes])
    labels = np.concatenate([index.labels for index in indexes])
    is_member = labels if labels.ndim == 2 else np.eye(len(indexes[0].classes), dtype=np.int64)[labels]
    return {str(name): is_member[sources == name].sum(axis=0).tolist() for name in np.unique(sources)}


def label_from_source(train: Index, scored: Index) -> dict:
    """How much of the label the source alone gives away.

    Args:
        train: the split that shows the most frequent class of each source; one label an image.
        scored: the split whose labels are guessed: the most frequent class of the image's source, or of all training
            images for a source that training lacks.

    Returns:
        `accuracy` of the guesses with its 95% `interval`, `chance` (accuracy of always naming the most frequent class),
        `n` images scored, and, in bits, the entropy of the training labels (`label_bits`) and the part of it that the
        source tells (`source_bits`, mutual information).
    """
    counts = class_counts([train])
    totals = np.sum(list(counts.values()), axis=0)
    guesses = np.array([int(np.argmax(counts.get(name, totals))) for name in scored.sources])
    hits = guesses == scored.labels
    rest = sum(sum(row) * entropy(row) for row in counts.values()) / len(train)
    return {
        "accuracy": float(hits.mean()),
        "interval": list(accuracy_interval(hits, clusters_of(scored.groups))),
        "chance": float((scored.labels == np.argmax(totals)).mean()),
        "n": len(scored),
        "label_bits": entropy(totals),
        "source_bits": entropy(totals) - rest,
    }


def entropy(counts: Sequence[int] | np.ndarray) -> float:
    """Entropy of a distribution, in bits, from counts that are not all 0."""
    shares = np.asarray(counts, np.float64) / np.sum(counts)
    return float(-(shares * np.log2(np.where(shares > 0, shares, 1))).sum())


def metrics_by_source(probs: np.ndarray, guesses: np.ndarray, index: Index) -> dict[str, dict]:
    """Metrics of the images of each source.

    Args:
        probs: (N, C).
        guesses: (N,) class numbers, or (N, L) of 0 and 1.
        index: the split, with sources.

    Returns:
        Name of the source -> `n`, `accuracy`, `auc` (of the classes that the source has and lacks images of; nan for a
        single class), `intervals` (95%, as in `metrics.evaluate_logits`) and `recall`: one row for each class that the
        source has images of, with `class`, `recall`, `support` and `interval` (95%, Wilson).
    """
    sources = np.asarray(index.sources, str)
    result = {}
    for name in np.unique(sources):
        rows = np.flatnonzero(sources == name)
        part = index.subset(rows.tolist())
        hits = (guesses[rows] == part.labels).reshape(len(rows), -1).mean(axis=1)
        clusters = clusters_of(part.groups)
        classes = [row for row in per_class(part.labels, guesses[rows], index.classes) if row["support"]]
        result[str(name)] = {
            "n": len(rows),
            "accuracy": float(hits.mean()),
            "auc": float(auc(probs[rows], part.labels, index.task)),
            "intervals": {
                "accuracy": list(accuracy_interval(hits, clusters)),
                "auc": list(percentile_interval(bootstrap_areas(probs[rows], part.labels, index.task, clusters))),
            },
            "recall": [
                {
                    **{key: row[key] for key in ("class", "recall", "support")},
                    "interval": list(wilson(row["recall"] * row["support"], row["support"])),
                }
                for row in classes
            ],
        }
    return result


def source_table(metrics: dict[str, dict]) -> str:
    """The result of `metrics_by_source` as text."""
    table = PrettyTable(["source", "images", "accuracy (95%)", "AUC (95%)", "recall of each class (95%)"], align="l")
    for name, row in metrics.items():
        cells = [_cell(row[key], row["intervals"][key]) for key in ("accuracy", "auc")]
        recalls = [
            f"{one['class']} {_cell(one['recall'], one['interval'])} of {one['support']}" for one in row["recall"]
        ]
        table.add_row([name, row["n"], *cells, "\n".join(recalls)])
    return str(table)


def _cell(value: float, interval: Sequence[float]) -> str:
    return "–" if np.isnan(value) else f"{value:.3f} ({interval[0]:.3f} to {interval[1]:.3f})"


def check_sources(indexes: Sequence[Index]) -> tuple[dict, str]:
    """What `prepare --check` reports on sources: as values for a JSON file, and as text.

    Args:
        indexes: all splits of a data set, with sources; the first is for training.
    """
    classes, counts = indexes[0].classes, class_counts(indexes)
    table = PrettyTable(["source", *classes, "images"], align="r")
    table.align["source"] = "l"
    for name, row in counts.items():
        images = sum(index.sources.count(name) for index in indexes)
        table.add_row([name, *row, images])
    record: dict = {"classes": list(classes), "counts": counts}
    lines = [f"{len(counts)} source(s) of images:", str(table)]
    if indexes[0].task != "multi-label":
        found = record["label_from_source"] = label_from_source(indexes[0], indexes[-1])
        low, high = found["interval"]
        lines += [
            f"the source alone gives the class of {found['accuracy']:.3f} (95% {low:.3f} to {high:.3f}) of the "
            f"{found['n']} images of {indexes[-1].split}; naming always the most frequent class {found['chance']:.3f}",
            f"it tells {found['source_bits']:.2f} of the {found['label_bits']:.2f} bits of a training label",
        ]
    return record, "\n".join(lines)
