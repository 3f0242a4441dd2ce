"""The sidecar of a weight file or an exported model: `<NAME>.json` beside it, with everything needed to use it."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from paddle_medcls.core.errors import WeightsError, did_you_mean
from paddle_medcls.core.files import NAME, NAME_RULE, read_json, sha256, write_json
from paddle_medcls.models.network import LOSSES, MODELS, Network
from paddle_medcls.models.output_head import OutputHead
from paddle_medcls.preprocessing.augmentation import FLIPS
from paddle_medcls.preprocessing.transforms import MAX_SIDE_PX, Preprocessing

KIND = "paddle_medcls weights"
FORMS = ("paddle", "onnx", "openvino")  # of an export, see `export`
PRECISIONS = ("f32", "bf16")
SUFFIXES = {  # of a model's files -> the form of the export that they belong to; "": weights
    **dict.fromkeys((".pdparams", ".safetensors"), ""),
    **{".onnx": "onnx", ".xml": "openvino", ".bin": "openvino"},
    **dict.fromkeys((".inference.json", ".inference.pdmodel", ".inference.pdiparams"), "paddle"),
}

MAX_CLASSES = 1000


def sidecar_of(path: Path) -> Path:
    """Returns the path of the sidecar of a model's file."""
    stem = next((path.name[: -len(suffix)] for suffix in SUFFIXES if path.name.endswith(suffix)), path.stem)
    return path.with_name(f"{stem}.json")


def form_of(path: Path) -> str:
    """Returns the form of the export that a file belongs to, by its name; "" for weights and other files."""
    return next((form for suffix, form in SUFFIXES.items() if path.name.endswith(suffix)), "")


def find_model(path: Path) -> Path:
    """Returns the file of a model, given that file, its sidecar, or a folder with one model (a run or an export).

    Weights come before an export of the same name: they are opened as arrays, an export is a program.

    Raises:
        WeightsError: a folder without a model, or with several.
    """
    if path.suffix == ".json" and sidecar_of(path) == path and path.is_file():
        path = next((p for p in _model_files(path.parent) if sidecar_of(p) == path), path)
    if not path.is_dir():
        return path
    files = _model_files(path)
    sidecars = sorted({sidecar_of(p) for p in files if sidecar_of(p).is_file()})
    if len(sidecars) != 1:
        names = ", ".join(item.stem for item in sidecars) or "none"
        raise WeightsError(f"{path}: one model is expected in a folder, found: {names}", fix="name its file")
    return next(p for p in files if sidecar_of(p) == sidecars[0])


def _model_files(folder: Path) -> list[Path]:
    """Returns the files of models in a folder, weights first."""
    files = [path for path in folder.iterdir() if path.name.endswith(tuple(SUFFIXES))]
    return sorted(files, key=lambda path: (form_of(path) != "", path.name))


def pixels_spec(spec: Preprocessing) -> Preprocessing:
    """Returns the preprocessing before an exported model, which takes uint8 pixels: decoding and scaling only."""
    count = spec.num_channels
    channels = "gray" if count == 1 else "rgb"
    return replace(spec, channels=channels, mean=(0.0,) * count, std=(1.0,) * count, resize_dtype="uint8")


@dataclass(frozen=True)
class Sidecar:
    """Everything needed to use a weight file, or a model exported from it, as it was trained.

    A sidecar is as untrusted as the weights: every value is checked when the record is made.

    Attributes:
        dataset, recipe: their names.
        classes: names, in the order of the probability columns.
        task, loss: see `data.index.Index` and `recipe.Recipe`.
        network, preprocessing: how to build the network and its input.
        flips: axes averaged at evaluation, see `evaluate.predict_logits`; an exported model does it inside.
        temperature: logits are divided by it.
        threshold: in [0, 1]: of class 1 in a binary task, of each label in a multi-label task.
        metrics: of the validation split, as `metrics.json` has them.
        labels: reading of the data set's labels, as in the recipe.
        drawn: trained on synthetic images.
        sha256: of the weight file; empty if unknown.
        versions: of the libraries that it was trained with.
        form: of an exported model, one of FORMS; empty for a weight file.
        precision: of an exported model at inference, "f32" or "bf16".
        files: of an exported model: name -> sha256.

    Raises:
        WeightsError: a faulty value; names the field, the value and the expected ones.
    """

    dataset: str
    recipe: str
    classes: tuple[str, ...]
    task: str
    loss: str
    network: Network
    preprocessing: Preprocessing
    flips: tuple[str, ...] = ()
    temperature: float = 1.0
    threshold: float = 0.5
    metrics: dict = field(default_factory=dict)
    labels: str = "default"
    drawn: bool = False
    sha256: str = ""
    versions: dict = field(default_factory=dict)
    form: str = ""
    precision: str = "f32"
    files: dict = field(default_factory=dict)

    @property
    def head(self) -> OutputHead:
        """The output head: what the logits mean."""
        return OutputHead(self.task, self.loss, self.classes, self.temperature, self.threshold)

    def __post_init__(self) -> None:
        fault = next(_faults(self), None)
        if fault:
            name, expected = fault
            value = functools.reduce(getattr, name.split(), self)
            raise WeightsError(f"{name}: {reprlib.repr(value)}; expected {expected}")

    def write(self, path: Path) -> None:
        """Writes the JSON file, with `kind` first."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        values |= {"network": self.network.to_json(), "preprocessing": self.preprocessing.to_json()}
        write_json(path, {"kind": KIND, **values})

    @staticmethod
    def read(path: Path) -> Sidecar:
        """Reads a sidecar.

        Raises:
            WeightsError: not a sidecar, or a faulty value; names the field, the value and the expected ones.
        """
        try:
            values = read_json(path)
            if not isinstance(values, dict) or values.pop("kind", None) != KIND:
                raise ValueError(f"not a sidecar: no 'kind': {KIND!r}")
            values = _fields(values, Sidecar, "")
            values["network"] = Network(**_fields(values["network"], Network, "network "))
            spec = _fields(values["preprocessing"], Preprocessing, "preprocessing ")
            values["preprocessing"] = Preprocessing(**spec)
            return Sidecar(**values)
        except (OSError, ValueError, WeightsError) as error:
            raise WeightsError(
                f"the sidecar cannot be read: {error.what if isinstance(error, WeightsError) else error}",
                path=path,
                fix="restore it from the run that made the weights",
            ) from None

    def check(self, path: Path) -> None:
        """Checks that a model's files are those that this sidecar was written for.

        Args:
            path: the weight file, or any file of the export.

        Raises:
            WeightsError: a file is missing, differs in its sha256, or is not listed.
        """
        expected = {path.parent / name: digest for name, digest in self.files.items()} or {path: self.sha256}
        for file in path.parent.iterdir() if self.files else ():
            if file.name.endswith(tuple(SUFFIXES)) and sidecar_of(file) == sidecar_of(path) and file not in expected:
                raise WeightsError(
                    f"{file.name} is not listed in {sidecar_of(path).name}", path=file, fix="copy the export again"
                )
        for file, digest in expected.items():
            if not file.is_file():
                raise WeightsError(f"{file}: the file is missing", fix="copy all files of the export again")
            if digest and sha256(file) != digest:
                raise WeightsError(
                    f"{file} is not the file that {sidecar_of(path).name} describes (sha256 differs)",
                    fix="copy all files again from one place; an interrupted training is resumed with --resume",
                )


def _fields(values: object, kind: type, prefix: str) -> dict:
    """Returns the fields of a record, lists as tuples; an unknown or missing field is an error."""
    if not isinstance(values, dict):
        raise ValueError(f"{prefix.strip()}: {reprlib.repr(values)}; expected an object")
    known = {one.name: one for one in dataclasses.fields(kind)}
    for name in values.keys() - known.keys():
        raise ValueError(f"unknown field {prefix}{name[:100]!r}{did_you_mean(name[:100], known)}")
    for name, one in known.items():
        if name not in values and one.default is one.default_factory is dataclasses.MISSING:
            raise ValueError(f"{prefix}{name} is missing")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


# --- the checks ------------------------------------------------------------------------------------


def _faults(sidecar: Sidecar) -> Iterator[tuple[str, str]]:
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
    yield from check("files", files, "names of an export's files with their sha256; none for a weight file")


def _is_number(value: object, low: float, high: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


def _is_text(value: object, most: int = 200) -> bool:
    return isinstance(value, str) and 0 < len(value) <= most and value.isprintable()


def _is_sha256(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _is_file_name(value: object) -> bool:
    return _is_text(value) and not re.search(r"[/\\:]", str(value)) and value not in (".", "..")


_SHARE, _POSITIVE = (0.0, 1.0), (0.0, math.inf)
_CLASS_METRICS: dict[str, tuple[float, float] | None] = {
    **dict.fromkeys(("precision", "recall", "f1", "specificity"), _SHARE),
    **dict.fromkeys(("support", "predicted")),
}
_METRICS: dict[str, tuple[float, float] | None] = {
    **dict.fromkeys(("n", "patients", "epoch")),
    **dict.fromkeys(("accuracy", "auc", "sensitivity", "specificity", "calibration_error", "threshold"), _SHARE),
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
