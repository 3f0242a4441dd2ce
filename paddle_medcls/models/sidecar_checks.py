"""The checks of a sidecar: every value, as it was read from a file of unknown origin."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from paddle_medcls.core.files import NAME, NAME_RULE
from paddle_medcls.models.network import LOSSES, MODELS, Network
from paddle_medcls.preprocessing.augmentation import FLIPS
from paddle_medcls.preprocessing.transforms import MAX_SIDE_PX, Preprocessing

if TYPE_CHECKING:
    from paddle_medcls.models.sidecar import Sidecar


FORMS = ("paddle", "onnx", "openvino")  # of an export, see `export`
PRECISIONS = ("f32", "bf16")
MONITORS = ("accuracy", "auc", "loss", "last")  # of `recipe.Recipe`: what the epoch was chosen by
MAX_CLASSES = 1000
MAX_MEMBERS = 1000
SET_METHODS = ("lac", "aps", "lac-by-class", "aps-by-class")  # of prediction sets, see `evaluation.conformal`
COVERAGES = tuple(k / 100 for k in range(50, 100))


def faults(sidecar: Sidecar) -> Iterator[tuple[str, str]]:
    """Yields (field, expected) for each faulty field, as "network stem"; a later check relies on the earlier ones."""

    def check(name: str, ok: object, expected: str) -> Iterator[tuple[str, str]]:
        if not ok:
            yield name, expected

    for name in ("dataset", "recipe", "labels"):
        value = getattr(sidecar, name)
        yield from check(name, isinstance(value, str) and NAME.fullmatch(value), NAME_RULE)
    yield from check("task", isinstance(sidecar.task, str) and sidecar.task in LOSSES, ", ".join(LOSSES))
    yield from check(
        "loss", sidecar.loss in LOSSES[sidecar.task], f"{' or '.join(LOSSES[sidecar.task])} for a {sidecar.task} task"
    )
    classes = sidecar.classes
    expected = f"up to {MAX_CLASSES} different names of up to 200 printable characters"
    distinct = isinstance(classes, tuple) and all(map(_is_text, classes)) and len(set(classes)) == len(classes)
    yield from check("classes", distinct and len(classes) <= MAX_CLASSES, expected)
    fewest = 1 if sidecar.task == "multi-label" else 2
    fitting = len(classes) == 2 if sidecar.task == "binary" else len(classes) >= fewest
    yield from check("classes", fitting, f"{'two names' if sidecar.task == 'binary' else 'more names'} for this task")

    network, spec = sidecar.network, sidecar.preprocessing
    yield from check("network", isinstance(network, Network), "a network")
    yield from check("preprocessing", isinstance(spec, Preprocessing), "the preprocessing of images")
    outputs, channels = sidecar.head.num_outputs, spec.num_channels
    expected = f"{outputs} for {len(classes)} classes, {sidecar.task}, {sidecar.loss}"
    yield from check("network num_outputs", network.num_outputs == outputs, expected)
    yield from check(
        "network in_channels", network.in_channels == channels, f"{channels}, as {spec.channels} images have"
    )
    strided = network.stem == "imagenet" and MODELS[network.model] == "resnet"
    largest = MAX_SIDE_PX if strided else MAX_SIDE_PX // 2  # the first layers keep four times as many values
    yield from check("preprocessing size_px", spec.size_px <= largest, f"at most {largest} for this network")

    flips = isinstance(sidecar.flips, tuple) and all(isinstance(name, str) and name in FLIPS for name in sidecar.flips)
    yield from check(
        "flips", flips and len(set(sidecar.flips)) == len(sidecar.flips), f"each at most once: {', '.join(FLIPS)}"
    )
    yield from check("temperature", _is_number(sidecar.temperature, 0.001, 1000), "a number of 0.001 to 1000")
    yield from check("threshold", _is_number(sidecar.threshold, 0, 1), "a number of 0 to 1")
    expected = "a calibration as eval --calibrate writes it, or nothing"
    yield from check("prediction_sets", sidecar.prediction_sets == {} or _are_sets(sidecar), expected)
    novelty = sidecar.novelty
    # an export computes the score itself, an average takes it from its models
    keys = {"limit"} if sidecar.form or sidecar.members else {"limit", "sha256"}
    scored = isinstance(novelty, dict) and novelty.keys() == keys and _is_number(novelty["limit"], 0, 1e6)
    scored = scored and _is_sha256(novelty.get("sha256", "0" * 64))
    yield from check("novelty", novelty == {} or scored, f"{' and '.join(sorted(keys))}, the limit 0 to 1000000")
    yield from check("drawn", isinstance(sidecar.drawn, bool), "true or false")
    yield from check("sha256", sidecar.sha256 == "" or _is_sha256(sidecar.sha256), "64 hexadecimal digits, or nothing")
    versions = isinstance(sidecar.versions, dict) and len(sidecar.versions) <= 100
    versions = versions and all(map(_is_text, (*sidecar.versions, *sidecar.versions.values())))
    yield from check("versions", versions, "names and versions")
    yield from check("metrics", _are_metrics(sidecar.metrics), "metrics as evaluation writes them: n, accuracy, auc, …")
    yield from check(
        "form", sidecar.form == "" or isinstance(sidecar.form, str) and sidecar.form in FORMS, ", ".join(FORMS)
    )
    yield from check("precision", sidecar.precision in PRECISIONS, " or ".join(PRECISIONS))
    files = isinstance(sidecar.files, dict) and len(sidecar.files) <= 100 and bool(sidecar.files) == bool(sidecar.form)
    files = files and all(map(_is_file_name, sidecar.files)) and all(map(_is_sha256, sidecar.files.values()))
    members = isinstance(sidecar.members, dict) and len(sidecar.members) <= MAX_MEMBERS and len(sidecar.members) != 1
    members = members and all(map(_is_sha256, sidecar.members)) and all(map(_is_text, sidecar.members.values()))
    yield from check("members", members, "sha256 of two or more weight files, each with the name of its network")
    yield from check("files", files, "names of an export's files with their sha256; none for a weight file")


def _is_number(value: object, low: float, high: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


def _is_text(value: object, most: int = 200) -> bool:
    return isinstance(value, str) and 0 < len(value) <= most and value.isprintable()


def _is_sha256(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _is_file_name(value: object) -> bool:
    return _is_text(value) and not re.search(r"[/\\:]", str(value)) and value not in (".", "..")


def _are_sets(sidecar: Sidecar) -> bool:
    """Whether the calibration of prediction sets is complete: thresholds in [0, 1] that grow with the coverage."""
    record = sidecar.prediction_sets
    names = {"method", "split", "images", "fingerprint", "thresholds"}
    if not isinstance(record, dict) or record.keys() != names or sidecar.task == "multi-label":
        return False
    if not isinstance(record["method"], str) or record["method"] not in SET_METHODS:
        return False
    rows = record["thresholds"]
    count = len(sidecar.classes) if record["method"].endswith("-by-class") else 1
    return (
        record["split"] in ("val", "test")
        and _is_metric(record["images"])
        and _is_sha256(record["fingerprint"])
        and isinstance(rows, list)
        and len(rows) == count
        and all(isinstance(row, list) and len(row) == len(COVERAGES) for row in rows)
        and all(_is_number(value, 0, 1) for row in rows for value in row)
        and all(low <= high for row in rows for low, high in zip(row, row[1:]))
    )


_SHARE, _POSITIVE = (0.0, 1.0), (0.0, math.inf)
_CLASS_METRICS: dict[str, tuple[float, float] | None] = {
    **dict.fromkeys(("precision", "recall", "f1", "specificity"), _SHARE),
    **dict.fromkeys(("support", "predicted")),
}
_METRICS: dict[str, tuple[float, float] | None] = {
    **dict.fromkeys(("n", "patients", "epoch", "fold")),
    **dict.fromkeys(("accuracy", "auc", "sensitivity", "specificity", "calibration_error", "threshold"), _SHARE),
    **dict.fromkeys(("aurc", "excess_aurc"), _SHARE),
    **dict.fromkeys(("loss", "mean_absolute_error", "temperature"), _POSITIVE),
    "quadratic_kappa": (-math.inf, 1.0),
}
"""Numbers that evaluation writes -> range, None for a count; see `metrics.evaluate_logits`, `outputs.score_split`."""


def _are_metrics(metrics: object) -> bool:
    """Whether metrics are as evaluation writes them: `n` and any of the others, nothing else."""
    return isinstance(metrics, dict) and (not metrics or "n" in metrics) and all(map(_fits, metrics, metrics.values()))


def _fits(name: str, value: object) -> bool:
    """Whether a value is one that evaluation writes under this name."""
    if name in ("split", "note"):
        return value == "" or _is_text(value, 1000)
    if name == "drawn":
        return isinstance(value, bool)
    if name == "monitor":
        return value in MONITORS
    if name == "intervals":
        pairs = list(value.values()) if isinstance(value, dict) and value.keys() <= {"accuracy", "auc"} else [None]
        return all(
            isinstance(pair, list) and len(pair) == 2 and all(_is_metric(x, _SHARE) for x in pair) for pair in pairs
        )
    if name in ("per_class", "confusion"):
        rows = value if isinstance(value, list) and len(value) <= MAX_CLASSES else [None]
        if name == "per_class":
            return all(map(_is_class_row, rows))
        return all(isinstance(row, list) and len(row) == len(rows) and all(map(_is_metric, row)) for row in rows)
    return name in _METRICS and _is_metric(value, _METRICS[name])


def _is_class_row(row: object) -> bool:
    return (
        isinstance(row, dict)
        and row.keys() == {"class", *_CLASS_METRICS}
        and _is_text(row["class"])
        and all(_is_metric(row[name], limits) for name, limits in _CLASS_METRICS.items())
    )


def _is_metric(value: object, limits: tuple[float, float] | None = None) -> bool:
    """Whether a value is a count (no limits), or a number within limits or undefined: None or not finite."""
    if limits is None:
        return type(value) is int and value >= 0
    if value is None or (isinstance(value, float) and not math.isfinite(value)):  # null in the file
        return True
    return _is_number(value, limits[0] - 1e-6, limits[1] + 1e-6)  # an area may be 1 + 1e-16
