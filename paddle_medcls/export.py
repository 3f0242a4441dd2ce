"""A trained network in a form that leaves the house: written, opened again, compared, only then kept.

| form | files |
|---|---|
| `paddle` | `<NAME>.inference.json` (Paddle 3) or `.pdmodel` (Paddle 2), `<NAME>.inference.pdiparams` |
| `onnx` | `<NAME>.onnx`, opset 17 |
| `openvino` | `<NAME>.xml`, `<NAME>.bin`, f32 |

Every form takes `image` float32 (N, C, S, S), preprocessed as the sidecar `<NAME>.json` says, any N, and gives
`logits` (N, outputs). Flips that the recipe averages at evaluation are averaged inside.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from paddle_medcls.data import load_index
from paddle_medcls.data.sample import draw
from paddle_medcls.engines import FORMS, require, stdout_to_stderr
from paddle_medcls.errors import RunError, SetupError, WeightsError
from paddle_medcls.evaluate import flip_axes
from paddle_medcls.files import sha256
from paddle_medcls.modelcard import run_facts, write_card
from paddle_medcls.predict import Predictor
from paddle_medcls.runtime import paddle
from paddle_medcls.sidecar import Sidecar, sidecar_of

TOLERANCE = {"f32": 1e-4, "bf16": 0.1}
"""Largest difference of a probability that an export may show; bf16's is there to catch a broken model."""

OPSET = 17


@dataclass(frozen=True)
class Agreement:
    """How an exported model compares with its network.

    Attributes:
        images: number compared.
        batches: batch sizes that they went through in.
        difference: largest of a probability.
        same_labels: share of images decided alike, in [0, 1].
    """

    images: int
    batches: tuple[int, ...]
    difference: float
    same_labels: float


def export(
    predictor: Predictor, weights: Path, form: str, folder: Path, precision: str, images: Sequence[np.ndarray]
) -> Agreement:
    """Exports a network and proves it: the folder is there only if the model in it agrees.

    Args:
        predictor: of the weight file, with the engine "paddle".
        weights: the file; it names the export.
        form: see `engines.FORMS`.
        folder: new, empty, or an earlier export, which is replaced.
        precision: "f32" or "bf16", that the exported model is to be run with.
        images: decoded, as for `Predictor.logits`; five or more.

    Raises:
        SetupError: a library is missing.
        RunError: the folder holds something else; the export failed, is empty, or does not agree.
    """
    require(FORMS[form], precision)
    folder = folder.absolute()
    _refuse_foreign(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        name = sidecar_of(weights).stem
        with stdout_to_stderr():
            _WRITERS[form](_Served(predictor), predictor.input_zeros().shape, made, name)
        opener_first = sorted(made.iterdir(), key=lambda path: (path.suffix in (".bin", ".pdiparams"), path.name))
        files = {path.name: sha256(path) for path in opener_first}
        empty = [path.name for path in made.iterdir() if path.stat().st_size == 0]
        if empty or not files:
            raise RunError(f"the export is empty: {', '.join(empty) or 'no file'}", do="free some space and try again")
        card = replace(predictor.card, form=form, precision=precision, files=files, sha256=sha256(weights))
        card.write(made / f"{name}.json")
        write_card(made, card, form, list(files), run_facts(weights, card))
        agreement = compare(predictor, Predictor.from_weights(made), images)
        if not agreement.difference <= TOLERANCE[precision]:
            raise RunError(
                f"the exported model disagrees: a probability differs by {agreement.difference:.2g}",
                expected=f"at most {TOLERANCE[precision]:g}",
                do="report this with the versions of the libraries; nothing was kept",
            )
        _put_in_place(made, folder)
        return agreement
    except OSError as error:
        raise RunError(f"cannot write {folder}: {error.strerror or error}", do="free some space") from None
    finally:
        shutil.rmtree(made, ignore_errors=True)


def compare(a: Predictor, b: Predictor, images: Sequence[np.ndarray], batches: tuple[int, ...] = (1, 5)) -> Agreement:
    """Probabilities of two predictors on the same images, in batches of these sizes."""
    probs, others = [], []
    for size in batches:
        for start in range(0, len(images), size):
            group = images[start : start + size]
            probs.append(a.head.probabilities(a.logits(group)))
            others.append(b.head.probabilities(b.logits(group)))
    p, q = np.concatenate(probs), np.concatenate(others)
    same = (a.head.decide(p) == b.head.decide(q)).reshape(len(p), -1).all(axis=1)
    return Agreement(len(images), batches, float(np.abs(p - q).max()), float(same.mean()))


def drawn_images(card: Sidecar, count: int = 5) -> list[np.ndarray]:
    """Images that the project draws for the card's data set, decoded for its preprocessing."""
    with tempfile.TemporaryDirectory() as folder:
        draw(card.dataset, Path(folder), 0)
        index = load_index(card.dataset, Path(folder), "val", card.labels)
        rows = np.linspace(0, len(index) - 1, count).astype(int)
        return [index.read(int(row), card.preprocessing.channels) for row in rows]


class _Served(paddle.nn.Layer):
    """The network as it is evaluated: logits averaged over an image and its flips, in one pass."""

    def __init__(self, predictor: Predictor) -> None:
        super().__init__()
        self.network = predictor.model
        self.axes = flip_axes(predictor.card.flips)
        self.eval()

    def forward(self, image):  # (N, C, S, S)
        if len(self.axes) == 1:
            return self.network(image)
        views = paddle.concat([paddle.flip(image, list(axis)) if axis else image for axis in self.axes])
        logits = self.network(views)  # (views * N, outputs)
        return logits.reshape([len(self.axes), -1, logits.shape[1]]).mean(0)


def _write_paddle(served: _Served, shape: tuple[int, ...], folder: Path, name: str) -> None:
    spec = paddle.static.InputSpec([None, *shape[1:]], "float32", "image")
    traced = paddle.jit.to_static(served, input_spec=[spec], full_graph=True)
    paddle.jit.save(traced, str(folder / f"{name}.inference"))
    (folder / f"{name}.inference.pdiparams.info").unlink(missing_ok=True)  # of Paddle 2, for training alone


def _write_onnx(served: _Served, shape: tuple[int, ...], folder: Path, name: str) -> None:
    try:
        import onnx
        import paddle2onnx
    except ImportError as error:
        raise SetupError(
            f"exporting needs paddle2onnx and onnx: {error}",
            do="pip install onnx paddle2onnx (with Paddle 2.6: 'paddle2onnx<2'; Python 3.13 has none yet)",
        ) from None
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        _write_paddle(served, shape, Path(scratch), name)
        program = next(path for path in Path(scratch).iterdir() if path.suffix in (".json", ".pdmodel"))
        # Without a file to save to it leaves its optimizer out, which would install packages by itself.
        data = paddle2onnx.export(
            str(program), str(program.with_suffix(".pdiparams")), None, opset_version=OPSET, verbose=False
        )
    model = onnx.load_model_from_string(data)
    _name_ends(model.graph)
    onnx.checker.check_model(model)
    onnx.save(model, str(folder / f"{name}.onnx"))


def _name_ends(graph) -> None:
    """Gives the output and the batch axis the names that the documentation promises."""
    (output,) = graph.output
    for node in graph.node:
        for k, tensor in enumerate(node.output):
            if tensor == output.name:
                node.output[k] = "logits"
        for k, tensor in enumerate(node.input):
            if tensor == output.name:
                node.input[k] = "logits"
    output.name = "logits"
    for end in (*graph.input, output):
        end.type.tensor_type.shape.dim[0].dim_param = "batch"


def _write_openvino(served: _Served, shape: tuple[int, ...], folder: Path, name: str) -> None:
    import openvino

    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        _write_onnx(served, shape, Path(scratch), name)
        model = openvino.convert_model(str(Path(scratch) / f"{name}.onnx"))
    openvino.save_model(model, str(folder / f"{name}.xml"), compress_to_fp16=False)


_WRITERS = {"paddle": _write_paddle, "onnx": _write_onnx, "openvino": _write_openvino}


def _put_in_place(made: Path, folder: Path) -> None:
    """Renames; an earlier export goes only after the new one has its place."""
    made.chmod(0o755)  # mkdtemp's 0700 would hide it from the user's group
    earlier = made.with_name(f"{made.name}.earlier")
    if folder.exists():
        folder.rename(earlier)
    made.rename(folder)
    shutil.rmtree(earlier, ignore_errors=True)


def _refuse_foreign(folder: Path) -> None:
    """An earlier export may be replaced, nothing else."""
    if not folder.exists():
        return
    inside = list(folder.iterdir()) if folder.is_dir() else [folder]
    cards = [path for path in inside if path.suffix == ".json" and _is_export(path)]
    if inside and not cards:
        raise RunError(f"{folder} holds something else than an export", do="give --output a new folder")


def _is_export(path: Path) -> bool:
    try:
        return bool(Sidecar.read(path).form)
    except WeightsError:
        return False
