"""Writes a trained network as a Paddle program, an ONNX model or an OpenVINO model, from pixels to probabilities."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path

import numpy as np

from paddle_medcls.core.errors import SetupError
from paddle_medcls.core.openvino_setup import import_openvino
from paddle_medcls.core.paddle_setup import paddle
from paddle_medcls.deployment.graph import KNOWN, pixels_graph
from paddle_medcls.deployment.graph_models import OPSET, to_onnx, to_openvino
from paddle_medcls.deployment.predictor import Predictor
from paddle_medcls.models.novelty import novelty_of
from paddle_medcls.models.output_head import TINY
from paddle_medcls.preprocessing.augmentation import flip_axes


class _Served(paddle.nn.Layer):
    """The network from pixels to probabilities and logits, as `graph.pixels_graph` describes it."""

    def __init__(self, predictor: Predictor) -> None:
        super().__init__()
        self.network = predictor.model
        self.sidecar = predictor.sidecar
        spec = self.sidecar.preprocessing
        self.register_buffer("mean", paddle.to_tensor(np.array(spec.mean, np.float32)))
        self.register_buffer("std", paddle.to_tensor(np.array(spec.std, np.float32)))
        self.axes = flip_axes(self.sidecar.flips)
        self.eval()

    def forward(self, image):  # (N, S, S, C) uint8
        x = image.astype("float32")
        if self.sidecar.preprocessing.channels == "bgr":
            x = paddle.flip(x, [3])
        x = ((x - self.mean) / self.std).transpose([0, 3, 1, 2])
        if len(self.axes) == 1:
            logits = self.network(x)
        else:
            views = paddle.concat([paddle.flip(x, list(axis)) if axis else x for axis in self.axes])
            logits = self.network(views)  # (views * N, outputs)
            logits = logits.reshape([len(self.axes), -1, self.sidecar.network.num_outputs]).mean(0)
        z = logits / self.sidecar.temperature
        if self.sidecar.loss == "softmax":
            probabilities = paddle.nn.functional.softmax(z, axis=1)
        else:
            if self.sidecar.task == "binary":  # class 0 has the logit -z
                z = paddle.concat([-z, z], axis=1)
            # The sigmoid, as a softmax of two: Paddle 3.3 cannot write its own in the format of Paddle 2.
            pairs = paddle.stack([z / 2, -z / 2], axis=2)
            probabilities = paddle.nn.functional.softmax(pairs, axis=2)[:, :, 0]
        return probabilities, logits


class _ServedAverage(paddle.nn.Layer):
    """The average of several models, as `graph.pixels_graph` describes it."""

    def __init__(self, predictor: Predictor) -> None:
        super().__init__()
        self.models = paddle.nn.LayerList([_Served(member) for member in predictor.members])
        self.sidecar = predictor.sidecar
        self.eval()

    def forward(self, image):
        probabilities = sum(model(image)[0] for model in self.models) / len(self.models)
        logits = paddle.log(probabilities + TINY)
        if self.sidecar.loss == "softmax":
            return probabilities, logits
        if self.sidecar.task == "binary":
            return probabilities, logits[:, 1:] - logits[:, :1]
        return probabilities, logits - paddle.log(1 - probabilities + TINY)


def _write_paddle(predictor: Predictor, folder: Path, name: str) -> None:
    spec = predictor.sidecar.preprocessing
    image = paddle.static.InputSpec([None, spec.size_px, spec.size_px, spec.num_channels], "uint8", "image")
    served = _ServedAverage(predictor) if predictor.members else _Served(predictor)
    traced = paddle.jit.to_static(served, input_spec=[image], full_graph=True)
    paddle.jit.save(traced, str(folder / f"{name}.inference"))
    (folder / f"{name}.inference.pdiparams.info").unlink(missing_ok=True)  # of Paddle 2, for training alone


def _format_of_paddle_2() -> contextlib.AbstractContextManager:
    """Lets Paddle 3 write programs in the format of Paddle 2, the only one that OpenVINO reads."""
    return contextlib.nullcontext() if paddle.__version__.startswith("2.") else paddle.pir_utils.DygraphOldIrGuard()


def _write_onnx(predictor: Predictor, folder: Path, name: str) -> None:
    try:
        import onnx
    except ImportError as error:
        raise SetupError(f"exporting needs onnx: {error}", fix="pip install onnx onnxruntime") from None
    model = to_onnx(_graph(predictor)) if _is_known(predictor) else _through_paddle2onnx(predictor, folder, name)
    onnx.checker.check_model(model)
    onnx.save(model, str(folder / f"{name}.onnx"))


def _write_openvino(predictor: Predictor, folder: Path, name: str) -> None:
    openvino = import_openvino()

    if _is_known(predictor):
        model = to_openvino(_graph(predictor))
    else:
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            with _format_of_paddle_2():
                _write_paddle(predictor, Path(scratch), name)
            model = openvino.Core().read_model(str(Path(scratch) / f"{name}.inference.pdmodel"))
        for output, end in zip(model.outputs, ("probabilities", "logits")):
            output.get_tensor().set_names({end})
    openvino.save_model(model, str(folder / f"{name}.xml"), compress_to_fp16=False)


WRITERS = {"paddle": _write_paddle, "onnx": _write_onnx, "openvino": _write_openvino}


def gives_novelty(predictor: Predictor, form: str) -> bool:
    """Whether an export of this form computes the novelty score: those that `graph` makes of a single model."""
    return predictor.novelty is not None and not predictor.members and form != "paddle" and _is_known(predictor)


def _is_known(predictor: Predictor) -> bool:
    return all(model.sidecar.network.model in KNOWN for model in predictor.members or [predictor])


def _graph(predictor: Predictor):
    models = predictor.members or [predictor]
    states = [{key: value.numpy() for key, value in one.model.state_dict().items()} for one in models]
    novelty = novelty_of(predictor.path, predictor.sidecar) if predictor.path and predictor.novelty else None
    return pixels_graph([(one.sidecar, state) for one, state in zip(models, states)], "the network", novelty)


def _through_paddle2onnx(predictor: Predictor, folder: Path, name: str):
    """The ONNX model of a network that `graph` does not know, through Paddle's own export."""
    try:
        import onnx
        import paddle2onnx
    except ImportError as error:
        raise SetupError(
            f"exporting the network {predictor.sidecar.network.model} needs paddle2onnx: {error}",
            fix="--format openvino, or pip install paddle2onnx (Paddle 2.6: 'paddle2onnx<2'; Python 3.13 has none yet)",
        ) from None
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        _write_paddle(predictor, Path(scratch), name)
        program = next(path for path in Path(scratch).iterdir() if path.suffix in (".json", ".pdmodel"))
        # Without a file to save to it leaves its optimizer out, which would install packages by itself.
        data = paddle2onnx.export(
            str(program), str(program.with_suffix(".pdiparams")), None, opset_version=OPSET, verbose=False
        )
    model = onnx.load_model_from_string(data)
    _name_ends(model.graph)
    return model


def _name_ends(graph) -> None:
    """Gives the outputs and the batch axis the names that the documentation promises."""
    names = {output.name: name for output, name in zip(graph.output, ("probabilities", "logits"))}
    for node in graph.node:
        node.output[:] = [names.get(tensor, tensor) for tensor in node.output]
        node.input[:] = [names.get(tensor, tensor) for tensor in node.input]
    for output in graph.output:
        output.name = names[output.name]
    for end in (*graph.input, *graph.output):
        end.type.tensor_type.shape.dim[0].dim_param = "batch"
