"""A trained network in a form for other programs: written, opened again, compared, only then kept.

| form | files |
|---|---|
| `paddle` | `<NAME>.inference.json` (Paddle 3) or `.pdmodel` (Paddle 2), `<NAME>.inference.pdiparams` |
| `onnx` | `<NAME>.onnx`, opset 17 |
| `openvino` | `<NAME>.xml`, `<NAME>.bin`, f32 |

Every form takes `image` uint8 (N, S, S, 3) RGB or (N, S, S, 1), scaled to the network's size, any N, and gives
`probabilities` (N, classes) and `logits` (N, outputs); ONNX and OpenVINO of a known network whose weights have a
novelty score also `novelty` (N, 1). Channel order, mean, std, flips and temperature are inside; the
sidecar `<NAME>.json` of an export describes what is left to do outside.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from paddle_medcls.core.errors import DataError, RunError, WeightsError, did_you_mean
from paddle_medcls.core.files import sha256
from paddle_medcls.core.progress import progress
from paddle_medcls.data.datasets import dataset_names, is_own, load_index
from paddle_medcls.data.sample import draw
from paddle_medcls.deployment.export_writers import WRITERS, gives_novelty
from paddle_medcls.deployment.exported_models import stdout_to_stderr
from paddle_medcls.deployment.inference_engines import FORMS, require
from paddle_medcls.deployment.predictor import AnyImage, Predictor
from paddle_medcls.evaluation.model_card import is_card, write_card
from paddle_medcls.evaluation.model_facts import run_facts
from paddle_medcls.models.sidecar import Sidecar, find_model, find_models, form_of, pixels_spec, sidecar_of

TOLERANCE = {"f32": 1e-4, "bf16": 0.1}
"""Largest difference of a probability that an export may show, and of a novelty score by its size; bf16's is there to
catch a broken model."""
BATCHES = (1, 5)
"""Batch sizes that an export is compared in."""


@dataclass(frozen=True)
class Agreement:
    """How an exported model compares with its network.

    Attributes:
        images: number compared.
        batches: batch sizes that they went through in.
        difference: largest of a probability, on the same pixels.
        same_labels: share of images decided alike, in [0, 1].
        rounding: largest change of a probability because pixels are rounded after resizing, as an export takes them;
            0 where the network was trained so.
        novelty: largest difference of a novelty score, as a share of it; 0 where the export has none.
    """

    images: int
    batches: tuple[int, ...]
    difference: float
    same_labels: float
    rounding: float = 0.0
    novelty: float = 0.0


def export(
    weights: str | Path | Sequence[str | Path] | Predictor,
    form: str,
    folder: str | Path,
    images: Sequence[AnyImage] = (),
    precision: str = "f32",
) -> Agreement:
    """Exports a trained model and compares the export with it: only an export that agrees is put into the folder.

    Args:
        weights: a weight file, a folder that holds one, or a Predictor of one whose backend is the network in Paddle;
            several files, or the folder of a cross-validation: their average in one file.
        form: "onnx", "openvino" or "paddle".
        folder: new, empty, or with an earlier export of these weights, whose files are replaced.
        images: five or more to compare on, as for `Predictor.logits`; none: synthetic ones.
        precision: "f32" or "bf16", that the exported model is to be run with.

    Raises:
        SetupError: a library is missing.
        WeightsError: see `Predictor.from_weights`; the weights are an export themselves.
        DataError: fewer than five images.
        RunError: an unknown form; the folder holds something else; the export failed, is empty, or does not agree.
    """
    if form not in FORMS:
        raise RunError(f"unknown form {form!r}{did_you_mean(form, FORMS)}", expected=", ".join(FORMS))
    require(FORMS[form], precision)
    predictor = weights if isinstance(weights, Predictor) else Predictor.from_weights(weight_files(weights))
    models = predictor.members or [predictor]
    if any(model.path is None for model in models):
        raise WeightsError("a network in memory cannot be exported", fix="export from the weight file (.pdparams)")
    files_of_models = weight_files([model.path for model in models if model.path])
    images = comparison_images(predictor.sidecar, images)
    folder = Path(folder).absolute()
    name = sidecar_of(files_of_models[0]).stem
    _earlier_files(folder, name)  # refuses before the work
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        with stdout_to_stderr():
            WRITERS[form](predictor, temporary, name)
        opener_first = sorted(temporary.iterdir(), key=lambda path: (path.suffix in (".bin", ".pdiparams"), path.name))
        files = {path.name: sha256(path) for path in opener_first}
        empty = [path.name for path in temporary.iterdir() if path.stat().st_size == 0]
        if empty or not files:
            raise RunError(f"the export is empty: {', '.join(empty) or 'no file'}", fix="free some space and try again")
        pixels_only = pixels_spec(predictor.sidecar.preprocessing)
        sidecar = replace(predictor.sidecar, preprocessing=pixels_only, flips=())
        digest = "" if predictor.members else sha256(files_of_models[0])
        novelty = {"limit": predictor.sidecar.novelty["limit"]} if gives_novelty(predictor, form) else {}
        sidecar = replace(sidecar, form=form, precision=precision, files=files, sha256=digest, novelty=novelty)
        sidecar.write(temporary / f"{name}.json")
        facts = {} if predictor.members else run_facts(files_of_models[0], predictor.sidecar)
        write_card(temporary, sidecar, form, list(files), facts)
        agreement = compare(predictor, Predictor.from_weights(temporary, allow_program=True), images)
        if not max(agreement.difference, agreement.novelty) <= TOLERANCE[precision]:
            raise RunError(
                f"the exported model disagrees: a probability differs by {agreement.difference:.2g}, "
                f"a novelty score by {agreement.novelty:.2g} of it",
                expected=f"at most {TOLERANCE[precision]:g}",
                fix="report this with the versions of the libraries; nothing was kept",
            )
        _put_in_place(temporary, folder, name)
        return agreement
    except OSError as error:
        raise RunError(f"cannot write {folder}: {error.strerror or error}", fix="free some space") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def weight_files(paths: str | Path | Sequence[str | Path]) -> list[Path]:
    """The weight files that paths name, see `find_models`; an export is refused before it is opened."""
    files = [find_model(path) for path in find_models(paths)]
    for path in files:
        if form_of(path):
            raise WeightsError(f"{path} is an export itself", fix="export from the weight file (.pdparams)")
    return files


def compare(network: Predictor, served: Predictor, images: Sequence[AnyImage]) -> Agreement:
    """Compares the probabilities of a network and of its export on the same images, in batches of `BATCHES`."""
    spec = network.sidecar.preprocessing
    as_pixels = replace(network.sidecar, preprocessing=replace(spec, resize_dtype="uint8"))
    rounded = Predictor(as_pixels, network.backend, novelty=network.novelty if served.novelty else None)
    difference = rounding = novelty = 0.0
    same = total = 0
    with progress(None, "comparing", len(images) * len(BATCHES), "image") as bar:
        for size in BATCHES:
            for start in range(0, len(images), size):
                group = [network.decode(image) for image in images[start : start + size]]
                logits, scores = rounded.logits_and_novelty(rounded.input_of(group))
                expected = rounded.head.probabilities(logits)
                outputs = served.backend.outputs(served.input_of(group))  # type: ignore[union-attr]
                by_head = served.head.probabilities(outputs["logits"])
                for probs in (by_head, outputs["probabilities"]):
                    difference = max(difference, float(np.abs(probs - expected).max()))
                if scores is not None and served.novelty is not None:
                    novelty = max(novelty, float(np.abs(served.novelty(outputs) / scores - 1).max()))
                equal = served.head.decide(by_head) == network.head.decide(expected)
                same += int(equal.reshape(len(group), -1).all(axis=1).sum())
                total += len(group)
                if spec.resize_dtype != "uint8":
                    exact = network.head.probabilities(network.logits(group))
                    rounding = max(rounding, float(np.abs(exact - expected).max()))
                bar.update(len(group))
    return Agreement(len(images), BATCHES, difference, same / total, rounding, novelty)


def comparison_images(sidecar: Sidecar, images: Sequence[AnyImage]) -> Sequence[AnyImage]:
    """The images to compare on, five or more; synthetic ones where there are none."""
    if 0 < len(images) < 5:
        raise DataError(f"{len(images)} image(s) to compare on", expected="five or more")
    return images or synthetic_images(sidecar)


def synthetic_images(sidecar: Sidecar) -> list[np.ndarray]:
    """Five images of the synthetic sample of the model's data set, or of noise, as `Predictor.decode` gives them."""
    channels = "gray" if sidecar.preprocessing.channels == "gray" else "rgb"
    if sidecar.dataset not in dataset_names() or is_own(sidecar.dataset):
        shape = (5, 256, 256, sidecar.preprocessing.num_channels)
        return list(np.random.default_rng(0).integers(0, 256, shape, np.uint8))
    with tempfile.TemporaryDirectory() as folder:
        draw(sidecar.dataset, Path(folder), 0)
        index = load_index(sidecar.dataset, Path(folder), "val", sidecar.labels)
        rows = np.linspace(0, len(index) - 1, 5).astype(int)
        return [index.read(int(row), channels) for row in rows]


# --- the folder --------------------------------------------------------------------------------------


def _earlier_files(folder: Path, name: str) -> list[Path]:
    """Files of an earlier export of this name; a folder with anything else in their place is refused.

    Files that an export did not write stay: only those are replaced that its sidecar lists, unchanged.
    """
    if not folder.exists():
        return []
    sidecar = folder / f"{name}.json"
    existing = list(folder.iterdir()) if folder.is_dir() else [folder]
    if existing and not _is_export(sidecar):
        raise RunError(f"{folder} holds other files, not an export of {name}", fix="give --output a new folder")
    if not existing:
        return []
    listed = {folder / Path(file).name: digest for file, digest in Sidecar.read(sidecar).files.items()}
    changed = [path.name for path, digest in listed.items() if path.is_file() and sha256(path) != digest]
    if changed:
        raise RunError(
            f"{folder}: {', '.join(changed)} changed since the export that is to be replaced",
            fix="give --output a new folder, or remove these files",
        )
    return [sidecar, *(path for path in listed if path.is_file())]


def _put_in_place(made: Path, folder: Path, name: str) -> None:
    """Moves a new export's files into its folder; the sidecar, which vouches for the others, comes last."""
    earlier = _earlier_files(folder, name)
    if (folder / "README.md").exists() and not is_card(folder / "README.md"):
        (made / "README.md").rename(made / "MODEL_CARD.md")
    last = f"{name}.json"
    new = sorted(made.iterdir(), key=lambda path: (path.name == last, path.name))
    existing = [path.name for path in new if (folder / path.name).exists() and folder / path.name not in earlier]
    foreign = [file for file in existing if not is_card(folder / file)]
    if foreign:
        raise RunError(
            f"{folder}: {', '.join(foreign)} would be overwritten, and no export wrote it",
            fix="give --output a new folder",
        )
    folder.mkdir(exist_ok=True)
    for path in earlier:
        path.unlink()
    for path in new:
        os.replace(path, folder / path.name)


def _is_export(path: Path) -> bool:
    try:
        return bool(Sidecar.read(path).form)
    except WeightsError:
        return False
