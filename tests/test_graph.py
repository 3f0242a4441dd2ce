"""Inference graphs: against the network in Paddle, and against the same operations written out in NumPy."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from fakes import ROOT, import_openvino_or_skip
from toynet import without_values

from paddle_medcls.core.errors import SetupError, WeightsError
from paddle_medcls.core.openvino_setup import signal_stack_kept
from paddle_medcls.core.paddle_setup import paddle
from paddle_medcls.deployment import graph as graphs
from paddle_medcls.deployment.graph import Graph, Operation
from paddle_medcls.deployment.graph_models import to_onnx, to_openvino
from paddle_medcls.evaluation.evaluate import predict_logits
from paddle_medcls.models.network import Network
from paddle_medcls.models.sidecar import Sidecar
from paddle_medcls.preprocessing.transforms import Preprocessing, normalize

NETWORKS = {
    **{f"resnet{depth}": Network(f"resnet{depth}", 3) for depth in (18, 34, 50, 101, 152)},
    "small stem": Network("resnet18", 3, 3, "small"),
    "small stem, bottleneck": Network("resnet50", 3, 1, "small"),
    "small stem, two bottlenecks": Network("toy_bottleneck", 3, 1, "small"),
    "grey": Network("toy_resnet", 1, 1),
    "PaddleClas": Network("resnet34", 2, 3, project_first=True),
    "PaddleClas, small": Network("toy_resnet", 2, 3, project_first=True),
    "vgg16": Network("vgg16", 4),
    "vgg16, narrow": Network("vgg16", 4),
}


def toy_sidecar(network: Network, side: int = 40, **changes: object) -> Sidecar:
    channels = "bgr" if network.in_channels == 3 else "gray"
    mean, std = ((101.5, 120.25, 131.0), (58.3, 57.0, 55.1))[:2]
    mean, std = mean[: network.in_channels], std[: network.in_channels]
    spec = Preprocessing(size_px=side, channels=channels, mean=mean, std=std)
    classes = tuple("abcde"[: max(2, network.num_outputs)])
    task, loss = ("binary", "sigmoid") if network.num_outputs == 1 else ("multi-class", "softmax")
    return replace(Sidecar("covid", "covid", classes, task, loss, network, spec), **changes)


def trained(network: Network, side: int) -> tuple[object, dict[str, np.ndarray]]:
    """A network whose batch norm has seen images, and its arrays."""
    paddle.seed(3)
    model = network.build()
    norms = [layer for layer in model.sublayers() if isinstance(layer, paddle.nn.BatchNorm2D)]
    for layer in norms:
        layer._momentum = 0.0  # statistics of the one batch that follows, so that values keep their size
        layer.weight.set_value(paddle.rand(layer.weight.shape) * 0.5 + 0.25)
        layer.bias.set_value(paddle.randn(layer.bias.shape) * 0.1)
    if norms:
        model(paddle.randn([8, network.in_channels, side, side]))
    model.eval()
    return model, {name: value.numpy() for name, value in model.state_dict().items()}


def run_openvino(graph: Graph, x: np.ndarray) -> dict[str, np.ndarray]:
    openvino = import_openvino_or_skip()
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    with signal_stack_kept():
        found = openvino.Core().compile_model(to_openvino(graph), "CPU", settings)(x)
    return {name: found[name] for name in graph.outputs}


def run_onnx(graph: Graph, x: np.ndarray) -> dict[str, np.ndarray]:
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    model = to_onnx(graph)
    if graph.input_shape[-1] < 40:
        onnx.checker.check_model(model, full_check=True)
    session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return dict(zip(graph.outputs, session.run(list(graph.outputs), {"image": x})))


def run_numpy(graph: Graph, x: np.ndarray) -> dict[str, np.ndarray]:
    """Each operation as it is defined, in float64, one value after the other."""
    values = [x]
    for operation in graph.operations:
        values.append(by_definition(operation, [values[k] for k in operation.inputs]))
    return {name: values[number] for name, (number, _) in graph.outputs.items()}


def by_definition(operation: Operation, inputs: list[np.ndarray]) -> np.ndarray:
    x, arrays, numbers = inputs[0], operation.arrays, operation.numbers
    if operation.kind == "convolution":
        weight, (stride, padding) = arrays[0], numbers
        around = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
        height, width = ((n - weight.shape[2]) // stride + 1 for n in around.shape[2:])
        made = np.zeros((len(x), len(weight), height, width))
        for i in range(weight.shape[2]):
            for j in range(weight.shape[3]):
                part = around[:, :, i : i + stride * height : stride, j : j + stride * width : stride]
                made += np.einsum("nchw,oc->nohw", part, weight[:, :, i, j])
        return made + arrays[1].reshape(1, -1, 1, 1)
    if operation.kind == "max_pool":
        kernel, stride, padding = numbers
        around = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)), constant_values=-np.inf)
        height, width = ((n - kernel) // stride + 1 for n in around.shape[2:])
        made = np.empty((*x.shape[:2], height, width))
        for i in range(height):
            for j in range(width):
                window = around[:, :, i * stride : i * stride + kernel, j * stride : j * stride + kernel]
                made[:, :, i, j] = window.max(axis=(2, 3))
        return made
    if operation.kind == "softmax":
        return np.exp(x) / np.exp(x).sum(axis=1, keepdims=True)
    return {
        "linear": lambda: x @ arrays[0] + arrays[1],
        "relu": lambda: np.maximum(x, 0),
        "log": lambda: np.log(x),
        "sigmoid": lambda: 1 / (1 + np.exp(-x)),
        "add": lambda: x + inputs[1],
        "pool_to": lambda: arrays[0] @ x @ arrays[1],
        "mean": lambda: x.mean(axis=numbers),
        "reshape": lambda: x.reshape(numbers),
        "transpose": lambda: x.transpose(numbers),
        "take": lambda: np.take(x, arrays[0], numbers[0]),
        "concat": lambda: np.concatenate(inputs, numbers[0]),
        "subtract": lambda: x - arrays[0],
        "divide": lambda: x / arrays[0],
        "cast": lambda: x.astype(np.float64),
    }[operation.kind]()


RUNNERS = {"openvino": run_openvino, "onnx": run_onnx}


def exact_logits(model, x: np.ndarray) -> np.ndarray:
    """Of the network in Paddle, in float64."""
    model.to(dtype="float64")
    with paddle.no_grad():
        return model(paddle.to_tensor(x.astype(np.float64))).numpy()


REPEATED = ("resnet34", "resnet101", "resnet152", "small stem, bottleneck", "PaddleClas", "vgg16")
"""The same blocks as in the other networks, more or fewer of them, or wider ones."""


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in REPEATED)) for n in NETWORKS])
def test_every_network_gives_the_logits_of_paddle(name: str, request: pytest.FixtureRequest) -> None:
    """A hundred layers of float32 round; a graph may be as far from float64 as Paddle's own float32."""
    if "narrow" in name:
        request.getfixturevalue("narrow_vgg")
    network = NETWORKS[name]
    side = 18 if network.stem == "small" else 40
    model, state = trained(network, side)
    graph = graphs.logits_graph(toy_sidecar(network, side), state, "file")
    x = np.random.default_rng(0).normal(0, 1, (3, network.in_channels, side, side)).astype(np.float32)
    in_paddle = predict_logits(model, x)
    exact = exact_logits(model, x)
    tolerance = 1e-5 + 2 * np.abs(in_paddle - exact).max()
    assert tolerance < 1e-3 * max(1, np.abs(exact).max())
    for runner in RUNNERS.values():
        np.testing.assert_allclose(runner(graph, x)["logits"], exact, rtol=0, atol=tolerance)


@pytest.mark.parametrize("side", [32, 64, 224, 250])
def test_vgg_pools_as_paddle_at_every_size(side: int) -> None:
    """Below 224 pixels the maps are smaller than the 7 x 7 that they are pooled to."""
    inside = side // 32
    x = np.random.default_rng(side).normal(0, 1, (2, 3, inside, inside)).astype(np.float32)
    expected = paddle.nn.AdaptiveAvgPool2D(7)(paddle.to_tensor(x)).numpy()
    rows = graphs._averages(inside, 7)
    np.testing.assert_allclose(rows @ x @ rows.T, expected, atol=1e-6)


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("task", ["binary", "softmax", "multi-label"])
def test_pixels_become_probabilities(task: str, runner: str) -> None:
    """Channel order, mean, std, flips and temperature inside; NumPy and Paddle, each on its own, agree."""
    changes = {
        "binary": {"task": "binary", "loss": "sigmoid", "classes": ("a", "b")},
        "softmax": {"task": "multi-class", "loss": "softmax"},
        "multi-label": {"task": "multi-label", "loss": "sigmoid"},
    }[task]
    network = Network("toy_resnet", 1 if task == "binary" else 3, 3, "small")
    model, state = trained(network, 8)
    sidecar = toy_sidecar(network, 8, temperature=1.7, flips=("flip", "flip_vertical"), **changes)
    graph = graphs.pixels_graph([(sidecar, state)], "file")
    image = np.random.default_rng(1).integers(0, 256, (2, 8, 8, 3), np.uint8)
    logits = predict_logits(model, normalize(image[..., ::-1], sidecar.preprocessing), sidecar.flips)
    expected = {"logits": logits, "probabilities": sidecar.head.probabilities(logits)}
    by_numpy, found = run_numpy(graph, image), RUNNERS[runner](graph, image)
    for name, values in expected.items():
        np.testing.assert_allclose(by_numpy[name], values, atol=1e-5)
        np.testing.assert_allclose(found[name], values, atol=1e-5)


@pytest.mark.parametrize(
    "network",
    [pytest.param(Network("vgg16", 2, 1), marks=pytest.mark.slow), Network("resnet50", 2, 3, "small")],
    ids=str,
)
def test_the_operations_as_defined(network: Network) -> None:
    side = 32 if network.model == "vgg16" else 8
    model, state = trained(network, side)
    x = np.random.default_rng(2).normal(0, 1, (1, network.in_channels, side, side)).astype(np.float32)
    found = run_numpy(graphs.logits_graph(toy_sidecar(network, side), state, "file"), x)["logits"]
    np.testing.assert_allclose(found, exact_logits(model, x), atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_arrays_that_a_file_must_hold(name: str) -> None:
    state = without_values(NETWORKS[name]).state_dict()
    shapes = graphs.array_shapes(graphs.layers_of(NETWORKS[name]))
    assert shapes == {key: tuple(value.shape) for key, value in state.items()}


def test_other_arrays_are_refused() -> None:
    network = Network("toy_resnet", 3, 3, "small")
    _, state = trained(network, 16)
    state["fc.bias"] = state["fc.bias"][:2]
    state["fc.weight"] = state["fc.weight"].astype(np.float64)
    state["conv.1._mean"] = np.full(64, np.nan, np.float32)
    state["more"] = state.pop("conv.0.weight")
    with pytest.raises(WeightsError) as caught:
        graphs.logits_graph(toy_sidecar(network, 16), state, "a.pdparams")
    for fault in (
        "missing      conv.0.weight",
        "unexpected   more",
        "wrong shape  fc.bias",
        "not finite   conv.1._mean",
    ):
        assert fault in str(caught.value)
    assert "wrong type   fc.weight: float64" in str(caught.value)


def test_too_small_an_image_is_one_message() -> None:
    network = Network("vgg16", 2)
    state = {key: np.zeros(shape, np.float32) for key, shape in graphs.array_shapes(graphs.layers_of(network)).items()}
    with pytest.raises(SetupError, match="too small"):
        graphs.logits_graph(toy_sidecar(network, 31), state, "file")


def test_a_graph_needs_no_paddle() -> None:
    code = (
        "import sys; sys.modules['paddle'] = None\nimport numpy as np\n"
        "from paddle_medcls.deployment import graph, inference_engines, predictor\n"
        "from paddle_medcls.models import weights\nfrom paddle_medcls.models.network import Network\n"
        "shapes = graph.array_shapes(graph.layers_of(Network('resnet50', 2)))\nprint(len(shapes))\n"
        "slow = {'matplotlib', 'pandas', 'http.client', 'urllib.request'} & sys.modules.keys()\nassert not slow, slow\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.strip() == str(53 * 5 + 2), done.stderr


def test_openvino_is_imported_without_the_converter_that_reports_to_its_makers() -> None:
    import_openvino_or_skip()
    code = (
        "import importlib.util, sys\n"
        "from paddle_medcls.core.openvino_setup import import_openvino\n"
        "import_openvino()\n"
        "print([n for n in sys.modules if n.startswith(('openvino_telemetry', 'openvino.tools.ovc'))])\n"
        "assert importlib.util.find_spec('openvino.tools.ovc')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
