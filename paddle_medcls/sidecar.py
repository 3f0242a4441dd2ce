"""What travels with a weight file, or with an exported model: `<NAME>.json` beside it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from paddle_medcls.errors import WeightsError
from paddle_medcls.files import sha256, write_json
from paddle_medcls.images import Preprocessing
from paddle_medcls.models import Network
from paddle_medcls.output_head import OutputHead

KIND = "paddle_medcls weights"
SUFFIXES = {  # of a model's files -> the form of the export that they belong to; "": weights
    **dict.fromkeys((".pdparams", ".safetensors"), ""),
    **{".onnx": "onnx", ".xml": "openvino", ".bin": "openvino"},
    **dict.fromkeys((".inference.json", ".inference.pdmodel", ".inference.pdiparams"), "paddle"),
}


def sidecar_of(path: Path) -> Path:
    """Where the sidecar of a model's file lies."""
    stem = next((path.name[: -len(suffix)] for suffix in SUFFIXES if path.name.endswith(suffix)), path.stem)
    return path.with_name(f"{stem}.json")


def form_of(path: Path) -> str:
    """The form of the export that a file belongs to, by its name; "" for weights and whatever else it is."""
    return next((form for suffix, form in SUFFIXES.items() if path.name.endswith(suffix)), "")


def find_model(path: Path) -> Path:
    """A model's file, where its sidecar was given, or a folder that holds one: a run directory or an export.

    Weights come before an export of the same name: they are opened as arrays, an export is a program.
    """
    if path.suffix == ".json" and sidecar_of(path) == path and path.is_file():
        path = next((p for p in _model_files(path.parent) if sidecar_of(p) == path), path)
    if not path.is_dir():
        return path
    files = _model_files(path)
    found = sorted({sidecar_of(p) for p in files if sidecar_of(p).is_file()})
    if len(found) != 1:
        names = ", ".join(item.stem for item in found) or "none"
        raise WeightsError(f"{path}: one model is expected in a folder, found: {names}", do="name its file")
    return next(p for p in files if sidecar_of(p) == found[0])


def _model_files(folder: Path) -> list[Path]:
    """Files of models, weights first."""
    files = [path for path in folder.iterdir() if path.name.endswith(tuple(SUFFIXES))]
    return sorted(files, key=lambda path: (form_of(path) != "", path.name))


@dataclass(frozen=True)
class Sidecar:
    """Everything needed to use a weight file, or what was exported of it, as it was trained.

    Attributes:
        dataset, recipe: names.
        classes: in the order of the probability columns.
        task, loss: see `data.index.Index` and `recipe.Recipe`.
        network, preprocessing: how to build the network and its input.
        flips: axes averaged at evaluation, see `evaluate.predict_logits`; an exported model does it inside.
        temperature: logits are divided by it.
        threshold: of class 1 in a binary task.
        metrics: of the validation split.
        labels: reading of the data set's labels, as in the recipe.
        drawn: trained on images that the project drew.
        sha256: of the weight file; empty where it is not known.
        versions: of the libraries that trained it.
        form: of an exported model, see `engines.FORMS`; empty for a weight file.
        precision: that an exported model is run with, "f32" or "bf16".
        files: of an exported model: name -> sha256.
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
        """What the logits mean."""
        return OutputHead(self.task, self.loss, self.classes, self.temperature, self.threshold)

    def write(self, path: Path) -> None:
        """Writes the JSON file, with `kind` first."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        values |= {"network": self.network.to_json(), "preprocessing": self.preprocessing.to_json()}
        write_json(path, {"kind": KIND, **values})

    @staticmethod
    def read(path: Path) -> Sidecar:
        """Reads a sidecar; a file of another kind or with faulty fields is an error."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(values, dict) or values.pop("kind", None) != KIND:
                raise ValueError(f"not a sidecar: no 'kind': {KIND!r}")
            for name in ("classes", "flips"):
                values[name] = tuple(str(item) for item in values[name])
            values["network"] = Network(**values["network"])
            values["preprocessing"] = Preprocessing.from_json(values["preprocessing"])
            card = Sidecar(**values)
            if not card.classes or not float(card.temperature) > 0 or not 0 <= float(card.threshold) <= 1:
                raise ValueError("classes, temperature or threshold out of range")
            return card
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else error
            raise WeightsError(
                f"the sidecar cannot be read: {reason}", where=path, do="restore it from the run that made the weights"
            ) from None

    def check(self, path: Path) -> None:
        """Refuses a model's files that are not those this sidecar was written for."""
        expected = {path.parent / name: digest for name, digest in self.files.items()} or {path: self.sha256}
        for file, digest in expected.items():
            if not file.is_file():
                raise WeightsError(f"{file}: the file is missing", do="copy all files of the export again")
            if digest and sha256(file) != digest:
                raise WeightsError(
                    f"{file} is not the file that {sidecar_of(path).name} describes (sha256 differs)",
                    do="copy all files again from one place; an interrupted training is resumed with --resume",
                )
