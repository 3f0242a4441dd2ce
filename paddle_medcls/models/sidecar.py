"""The sidecar of a weight file or an exported model: `<NAME>.json` beside it, with everything needed to use it."""

from __future__ import annotations

import dataclasses
import functools
import re
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from paddle_medcls.core.errors import WeightsError, did_you_mean
from paddle_medcls.core.files import read_json, sha256, write_json
from paddle_medcls.models.network import Network
from paddle_medcls.models.output_head import OutputHead
from paddle_medcls.models.sidecar_checks import faults
from paddle_medcls.preprocessing.transforms import Preprocessing

KIND = "paddle_medcls weights"
SUFFIXES = {  # of a model's files -> the form of the export that they belong to; "": weights
    **dict.fromkeys((".pdparams", ".safetensors"), ""),
    **{".onnx": "onnx", ".xml": "openvino", ".bin": "openvino"},
    **dict.fromkeys((".inference.json", ".inference.pdmodel", ".inference.pdiparams"), "paddle"),
}


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


def find_models(path: str | Path | Sequence[str | Path]) -> list[Path]:
    """Returns the models that are used as one: a path, several, or for the folder of a cross-validation its folds.

    Raises:
        WeightsError: a fold is missing or unfinished; nothing is named.
    """
    if isinstance(path, (str, Path)):
        return _folds(Path(path)) or [Path(path)]
    if not path:
        raise WeightsError("no model is named", expected="one or more weight files")
    return [model for one in path for model in find_models(one)]


def is_model(path: Path) -> bool:
    """Returns whether a path names a model, by the names of the files alone; an image or a folder of them does not."""
    if path.is_dir():
        return (path / "fold1").is_dir() or bool(_model_files(path))
    return path.name.endswith((*SUFFIXES, ".json"))


def _folds(folder: Path) -> list[Path]:
    """Returns the run directories of a cross-validation; [] for other folders and files."""
    if not (folder / "fold1").is_dir():
        return []
    numbers = {int(one.name[4:]): one for one in folder.glob("fold*") if re.fullmatch("fold[1-9][0-9]{0,2}", one.name)}
    faults, recipes = [], {}
    for number, one in sorted(numbers.items()):
        try:
            recipe = read_json(one / "recipe.json")
            recipes[number] = recipe if isinstance(recipe, dict) else {}
        except FileNotFoundError:
            continue  # only the models were copied
        except (OSError, ValueError) as error:
            faults.append(f"{one.name}/recipe.json: {error}")
    counts = [count for count in (recipe.get("folds") for recipe in recipes.values()) if type(count) is int]
    count = min(999, max([*numbers, *counts]))
    faults += [f"fold{number} is missing" for number in range(1, count + 1) if number not in numbers]
    for number, recipe in recipes.items():
        if (recipe.get("folds"), recipe.get("fold")) != (count, number):
            faults.append(f"fold{number} is not fold {number} of {count}")
        elif not (numbers[number] / "metrics.json").is_file():
            faults.append(f"fold{number} is not finished")
    if faults or len(numbers) < 2:
        raise WeightsError(
            f"{folder} is no complete cross-validation",
            items=faults or ["it has one fold"],
            fix="continue its training (train --resume), or name the models: --weights FILE FILE …",
        )
    return [numbers[number] for number in sorted(numbers)]


def _model_files(folder: Path) -> list[Path]:
    """Returns the files of models in a folder, weights first."""
    files = [path for path in folder.iterdir() if path.name.endswith(tuple(SUFFIXES))]
    return sorted(files, key=lambda path: (form_of(path) != "", path.name))


def without_scale(spec: Preprocessing) -> Preprocessing:
    """Returns the preprocessing that gives pixel values: mean 0, std 1."""
    return replace(spec, mean=(0.0,) * spec.num_channels, std=(1.0,) * spec.num_channels)


def pixels_spec(spec: Preprocessing) -> Preprocessing:
    """Returns the preprocessing before an exported model, which takes uint8 pixels: decoding and scaling only."""
    return replace(without_scale(spec), channels="gray" if spec.num_channels == 1 else "rgb", resize_dtype="uint8")


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
        prediction_sets: calibration of prediction sets, see `evaluation.conformal`; empty without one.
        novelty: `limit` of the novelty score and `sha256` of its file, see `models.novelty`; of an export the limit
            alone; empty without a score.
        metrics: of the validation split, as `metrics.json` has them.
        labels: reading of the data set's labels, as in the recipe.
        drawn: trained on synthetic images; the name that it has in the files of 0.1.
        sha256: of the weight file; empty if unknown.
        versions: of the libraries that it was trained with.
        form: of an exported model, one of FORMS; empty for a weight file.
        precision: of an exported model at inference, "f32" or "bf16".
        files: of an exported model: name -> sha256.
        members: of an average of models: sha256 of each weight file -> its network.

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
    members: dict = field(default_factory=dict)
    prediction_sets: dict = field(default_factory=dict)
    novelty: dict = field(default_factory=dict)

    @property
    def head(self) -> OutputHead:
        """The output head: what the logits mean."""
        return OutputHead(self.task, self.loss, self.classes, self.temperature, self.threshold)

    def __post_init__(self) -> None:
        fault = next(faults(self), None)
        if fault:
            name, expected = fault
            value = functools.reduce(getattr, name.split(), self)
            raise WeightsError(f"{name}: {reprlib.repr(value)}; expected {expected}")

    def to_json(self) -> dict:
        """Returns what the JSON file holds, `kind` first."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        values |= {"network": self.network.to_json(), "preprocessing": self.preprocessing.to_json()}
        return {"kind": KIND, **values}

    def write(self, path: Path) -> None:
        """Writes the JSON file."""
        write_json(path, self.to_json())

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
                raise _other_file(file)

    def check_digest(self, path: Path, digest: str) -> None:
        """As `check`, for a weight file whose bytes have this sha256."""
        if self.sha256 and digest != self.sha256:
            raise _other_file(path)


def _other_file(file: Path) -> WeightsError:
    return WeightsError(
        f"{file} is not the file that {sidecar_of(file).name} describes (sha256 differs)",
        fix="copy all files again from one place; an interrupted training is resumed with --resume",
    )


def _fields(values: object, kind: type, prefix: str) -> dict:
    """Returns the fields of a record, lists as tuples; an unknown or missing field is an error."""
    if not isinstance(values, dict):
        raise ValueError(f"{prefix.strip()}: {reprlib.repr(values)}; expected an object")
    fields = {entry.name: entry for entry in dataclasses.fields(kind)}
    for name in values.keys() - fields.keys():
        raise ValueError(f"unknown field {prefix}{name[:100]!r}{did_you_mean(name[:100], fields)}")
    for name, entry in fields.items():
        if name not in values and entry.default is entry.default_factory is dataclasses.MISSING:
            raise ValueError(f"{prefix}{name} is missing")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
