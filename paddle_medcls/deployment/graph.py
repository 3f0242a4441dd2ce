"""A network as an inference graph: a list of operations with their arrays, made without Paddle.

From a `Network` record and the arrays of a weight file: first the layers (`layers_of`, which also tells the
arrays that the file must hold), then a `Graph` with batch normalisation folded into the convolutions, of
which `graph_models` makes one of OpenVINO or ONNX. ResNet-18 to 152 with both stems, and VGG-16;
other networks are Paddle's.

| operation | arrays | numbers | gives |
|---|---|---|---|
| `convolution` | weight (O, I, k, k), bias (O,) | stride, padding | (N, O, h, w) |
| `linear` | weight (I, O), bias (O,) | | (N, O) |
| `relu`, `sigmoid`, `softmax` (axis 1), `log`, `sqrt`, `add`, `multiply` | | | as the input |
| `max_pool` | | kernel, stride, padding | (N, C, h, w) |
| `pool_to` | rows (a, h), columns (w, b) | | rows @ x @ columns: (N, C, a, b) |
| `mean` | | axes, which disappear | |
| `reshape`, `transpose` | | shape with one -1; order of the axes | |
| `take` | indices | axis | as the input, reordered along the axis |
| `concat` | | axis | |
| `subtract`, `divide` | what is subtracted, divided by | | as the input |
| `cast` | | | float32 |
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from paddle_medcls.core.errors import SetupError
from paddle_medcls.models.network import Network
from paddle_medcls.models.novelty import Novelty
from paddle_medcls.models.output_head import TINY
from paddle_medcls.models.weights import check_arrays
from paddle_medcls.preprocessing.augmentation import flip_axes

if TYPE_CHECKING:
    from paddle_medcls.models.sidecar import Sidecar

RESNETS = {  # blocks of each stage, and the channels that a block widens to
    "resnet18": ((2, 2, 2, 2), 1),
    "resnet34": ((3, 4, 6, 3), 1),
    "resnet50": ((3, 4, 6, 3), 4),
    "resnet101": ((3, 4, 23, 3), 4),
    "resnet152": ((3, 8, 36, 3), 4),
}
VGG_STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
KNOWN = [*RESNETS, "vgg16"]
EPSILON = 1e-5  # of Paddle's BatchNorm2D


class Layer(NamedTuple):
    """One step of a network: an operation whose arrays are still names in a weight file.

    Attributes:
        kind: of the operation.
        inputs: numbers of the values that it reads: 0 is the network's input, k what layer k gave.
        numbers: see the table above.
        name, shape: prefix and shape of its weight.
        norm: prefix of the batch normalisation that follows; "": there is none, and the layer has a bias.
        ends_stage: whether the features of a stage come out of it.
    """

    kind: str
    inputs: tuple[int, ...]
    numbers: tuple[int, ...] = ()
    name: str = ""
    shape: tuple[int, ...] = ()
    norm: str = ""
    ends_stage: bool = False


class Operation(NamedTuple):
    """One step of a graph; see the table above. `inputs` as in `Layer`."""

    kind: str
    inputs: tuple[int, ...]
    arrays: tuple[np.ndarray, ...] = ()
    numbers: tuple[int, ...] = ()


@dataclass(frozen=True)
class Graph:
    """What an inference library needs.

    Attributes:
        input_type: "float32" or "uint8".
        input_shape: of the input `image`, without the batch axis.
        operations: in the order in which they are done.
        outputs: name -> number of its value, as in `Operation.inputs`, and its columns.
    """

    input_type: str
    input_shape: tuple[int, int, int]
    operations: tuple[Operation, ...]
    outputs: dict[str, tuple[int, int]]


# --- layers ------------------------------------------------------------------------------------------


def layers_of(network: Network) -> list[Layer]:
    """The layers of a known network, from its input (N, C, H, W) to the logits (N, num_outputs)."""
    return _resnet(network) if network.model in RESNETS else _vgg(network)


def _resnet(network: Network) -> list[Layer]:
    layers: list[Layer] = []

    def add(kind: str, *inputs: int, **fields: object) -> int:
        layers.append(Layer(kind, inputs, **fields))  # type: ignore[arg-type]
        return len(layers)

    def convolution(x: int, name: str, shape: tuple[int, ...], stride: int = 1) -> int:
        numbers = (stride, shape[2] // 2)
        return add("convolution", x, numbers=numbers, name=f"{name}.0", shape=shape, norm=f"{name}.1")

    depths, widening = RESNETS[network.model]
    small = network.stem == "small"
    side = 3 if small else 7
    x = add("relu", convolution(0, "conv", (64, network.in_channels, side, side), 1 if small else 2))
    if not small:
        x = add("max_pool", x, numbers=(3, 2, 1))
    channels, block = 64, 0
    for stage, depth in enumerate(depths):
        width = 64 * 2**stage
        for order in range(depth):
            name, stride = f"block.{block}", 2 if order == 0 and stage > 0 else 1
            if widening == 1:
                parts = [((width, channels, 3, 3), stride), ((width, width, 3, 3), 1)]
            else:
                parts = [((width, channels, 1, 1), 1), ((width, width, 3, 3), stride)]
                parts.append(((width * widening, width, 1, 1), 1))
            shortcut = x
            if stride != 1 or channels != width * widening or (network.project_first and block == 0):
                shortcut = convolution(x, f"{name}.shortcut", (width * widening, channels, 1, 1), stride)
            for number, (shape, step) in enumerate(parts, start=1):
                x = convolution(x, f"{name}.conv{number}", shape, step)
                x = add("relu", x) if number < len(parts) else x
            x = add("relu", add("add", x, shortcut), ends_stage=order == depth - 1)
            channels, block = width * widening, block + 1
    x = add("mean", x, numbers=(2, 3))
    add("linear", x, name="fc", shape=(channels, network.num_outputs))
    return layers


def _vgg(network: Network) -> list[Layer]:
    layers: list[Layer] = []

    def add(kind: str, **fields: object) -> None:
        layers.append(Layer(kind, (len(layers),), **fields))  # type: ignore[arg-type]

    channels, number = network.in_channels, 0
    for width, count in VGG_STAGES:
        for _ in range(count):
            add("convolution", numbers=(1, 1), name=f"features.{number}", shape=(width, channels, 3, 3))
            add("relu")
            channels, number = width, number + 2
        add("max_pool", numbers=(2, 2, 0), ends_stage=True)
        number += 1
    add("pool_to", numbers=(7, 7))
    add("reshape", numbers=(-1, channels * 49))
    sizes = (channels * 49, 4096, 4096, 256, network.num_outputs)
    for name, inside, outside in zip(("0", "3", "6.0", "6.3"), sizes, sizes[1:]):
        add("linear", name=f"classifier.{name}", shape=(inside, outside))
        if name != "6.3":
            add("relu")
    return layers


def stage_channels(network: Network) -> list[int]:
    """Channels of the maps that each stage of a known network ends with."""
    if network.model in RESNETS:
        depths, widening = RESNETS[network.model]
        return [64 * 2**stage * widening for stage in range(len(depths))]
    return [width for width, _ in VGG_STAGES]


def array_shapes(layers: Sequence[Layer]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the arrays that a weight file of these layers holds."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in layers:
        if not layer.name:
            continue
        outputs = layer.shape[0] if layer.kind == "convolution" else layer.shape[1]
        shapes[f"{layer.name}.weight"] = layer.shape
        names = [f"{layer.norm}.{part}" for part in ("weight", "bias", "_mean", "_variance")]
        shapes |= dict.fromkeys(names if layer.norm else [f"{layer.name}.bias"], (outputs,))
    return shapes


# --- graphs ------------------------------------------------------------------------------------------


def logits_graph(sidecar: Sidecar, state: dict[str, np.ndarray], name: object, features: bool = False) -> Graph:
    """From preprocessed `image` (N, C, S, S) float32 to `logits` (N, outputs), averaged over the sidecar's flips.

    Args:
        sidecar: of a network in KNOWN.
        state: arrays of the weight file under our names.
        features: also give `features` (N, channels): the maps that each stage ends with, averaged over the image, one
            stage after the other.

    Raises:
        WeightsError: arrays are missing, unexpected, of another shape or type, or not finite.
    """
    spec = sidecar.preprocessing
    operations: list[Operation] = []
    ends = _add_network(operations, 0, sidecar, state, name)
    shape = (spec.num_channels, spec.size_px, spec.size_px)
    ends = ends if features else {"logits": ends["logits"]}
    return Graph("float32", shape, tuple(operations), ends)


def pixels_graph(
    models: Sequence[tuple[Sidecar, dict[str, np.ndarray]]], name: object, novelty: Novelty | None = None
) -> Graph:
    """From pixels `image` (N, S, S, C) uint8, RGB or grey, to `logits` and `probabilities` (N, classes).

    Channel order, mean, std, flips and temperature of each sidecar are inside, and the average of several models.

    Args:
        models: the sidecar and the arrays of each, as for `logits_graph`.
        name: of the model, for messages.
        novelty: of a single model: also give `novelty` (N, 1), its score.
    """
    sidecar = models[0][0]
    operations: list[Operation] = []
    pixels = _add(operations, "cast", 0)
    ends = [_add_model(operations, pixels, *model, name) for model in models]
    probabilities, logits, features = ends[0]
    if len(ends) > 1:
        probabilities, logits = _add_average(operations, [one[0] for one in ends], sidecar)
    spec = sidecar.preprocessing
    shape = (spec.size_px, spec.size_px, spec.num_channels)
    outputs = {"probabilities": (probabilities, len(sidecar.classes)), "logits": (logits, sidecar.head.num_outputs)}
    if novelty is not None:
        outputs["novelty"] = (_add_novelty(operations, features, novelty), 1)
    return Graph("uint8", shape, tuple(operations), outputs)


def _add(
    operations: list[Operation], kind: str, *inputs: int, array: object = None, numbers: tuple[int, ...] = ()
) -> int:
    """Adds an operation; gives the number of its value."""
    operations.append(Operation(kind, inputs, () if array is None else (np.asarray(array),), numbers))
    return len(operations)


def _add_model(
    operations: list[Operation], pixels: int, sidecar: Sidecar, state: dict[str, np.ndarray], name: object
) -> tuple[int, int, int]:
    """Adds a model from pixels (N, S, S, C) float32; gives the numbers of its probabilities, logits and features."""
    spec, x = sidecar.preprocessing, pixels
    if spec.channels == "bgr":
        x = _add(operations, "take", x, array=[2, 1, 0], numbers=(3,))
    x = _add(operations, "subtract", x, array=np.array(spec.mean, np.float32).reshape(1, 1, 1, -1))
    x = _add(operations, "divide", x, array=np.array(spec.std, np.float32).reshape(1, 1, 1, -1))
    x = _add(operations, "transpose", x, numbers=(0, 3, 1, 2))
    ends = _add_network(operations, x, sidecar, state, name)
    logits, features = ends["logits"][0], ends["features"][0]
    z = _add(operations, "divide", logits, array=np.array([sidecar.temperature], np.float32))
    if sidecar.loss == "softmax":
        return _add(operations, "softmax", z), logits, features
    if sidecar.task == "binary":  # class 0 has the logit -z
        negative = _add(operations, "divide", z, array=np.array([-1], np.float32))
        z = _add(operations, "concat", negative, z, numbers=(1,))
    return _add(operations, "sigmoid", z), logits, features


def _add_novelty(operations: list[Operation], features: int, novelty: Novelty) -> int:
    """Adds `Novelty.scores` of features (N, channels); gives the number of its value (N, 1)."""

    def linear(x: int, weight: np.ndarray) -> int:  # weight (inside, outside)
        bias = np.zeros(weight.shape[1], np.float32)
        operations.append(Operation("linear", (x,), (np.ascontiguousarray(weight), bias)))
        return len(operations)

    def mean_square(x: int, scale: object) -> int:
        x = _add(operations, "divide", x, array=np.asarray(scale, np.float32).reshape(1, -1))
        return _add(operations, "mean", _add(operations, "multiply", x, x), numbers=(1,))

    total, start = 0, 0
    for mean, axes, scales, rest in zip(novelty.means, novelty.axes, novelty.scales, novelty.rests):
        stage = _add(operations, "take", features, array=np.arange(start, start + len(mean)), numbers=(1,))
        centred = _add(operations, "subtract", stage, array=mean.reshape(1, -1))
        along = linear(centred, axes.T)
        beside = _add(operations, "subtract", centred, linear(along, axes))
        for term in (mean_square(along, scales), mean_square(beside, rest / np.sqrt(len(mean)))):
            total = _add(operations, "add", total, term) if total else term
        start += len(mean)
    total = _add(operations, "divide", total, array=np.array([2 * len(novelty.means)], np.float32))
    return _add(operations, "reshape", _add(operations, "sqrt", total), numbers=(-1, 1))


def _add_average(operations: list[Operation], probabilities: Sequence[int], sidecar: Sidecar) -> tuple[int, int]:
    """Adds the mean of probabilities (N, classes), and its logits as `OutputHead.logits_of` has them."""

    def log(x: int) -> int:
        return _add(operations, "log", _add(operations, "subtract", x, array=np.array([-TINY], np.float32)))

    total = probabilities[0]
    for one in probabilities[1:]:
        total = _add(operations, "add", total, one)
    mean = _add(operations, "divide", total, array=np.array([len(probabilities)], np.float32))
    if sidecar.loss == "softmax":
        return mean, log(mean)
    yes = no = mean
    if sidecar.task == "binary":
        no, yes = (_add(operations, "take", mean, array=[k], numbers=(1,)) for k in (0, 1))
    else:
        negative = _add(operations, "divide", mean, array=np.array([-1], np.float32))
        no = _add(operations, "subtract", negative, array=np.array([-1], np.float32))
    minus = _add(operations, "divide", log(no), array=np.array([-1], np.float32))
    return mean, _add(operations, "add", log(yes), minus)


def _add_network(
    operations: list[Operation], x: int, sidecar: Sidecar, state: dict[str, np.ndarray], name: object
) -> dict[str, tuple[int, int]]:
    """Adds the network, averaged over an image and its flips in one batch; gives `logits` and `features`."""
    layers = layers_of(sidecar.network)
    check_arrays(state, array_shapes(layers), name)
    views = flip_axes(sidecar.flips)
    side = sidecar.preprocessing.size_px
    backwards = np.arange(side - 1, -1, -1)
    parts = [x]
    for axes in views[1:]:
        view = x
        for axis in axes:
            operations.append(Operation("take", (view,), (backwards,), (axis,)))
            view = len(operations)
        parts.append(view)
    if len(parts) > 1:
        operations.append(Operation("concat", tuple(parts), (), (0,)))
        x = len(operations)
    first, sides = len(operations), [side]
    for layer in layers:
        before = sides[layer.inputs[0]]
        arrays: tuple[np.ndarray, ...] = ()
        numbers = layer.numbers
        if layer.name:
            arrays = _folded(layer, state)
        elif layer.kind == "pool_to":
            rows, columns = numbers
            arrays, numbers = (_averages(before, rows), np.ascontiguousarray(_averages(before, columns).T)), ()
        inputs = tuple(first + k if k else x for k in layer.inputs)
        operations.append(Operation(layer.kind, inputs, arrays, numbers))
        sides.append(_side(layer, before))
    logits, stages = len(operations), [k for k, layer in enumerate(layers, start=1) if layer.ends_stage]
    for number in stages:
        operations.append(Operation("mean", (first + number,), (), (2, 3)))
    operations.append(Operation("concat", tuple(logits + 1 + k for k in range(len(stages))), (), (1,)))
    ends = {}
    channels = sum(stage_channels(sidecar.network))
    for end, number, columns in (("logits", logits, sidecar.network.num_outputs), ("features", 0, channels)):
        number = number or logits + len(stages) + 1
        if len(views) > 1:
            operations.append(Operation("reshape", (number,), (), (len(views), -1, columns)))
            operations.append(Operation("mean", (len(operations),), (), (0,)))
            number = len(operations)
        ends[end] = number, columns
    return ends


def _folded(layer: Layer, state: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Weight and bias of a layer, with the batch normalisation that follows it inside; computed in float64."""
    weight = state[f"{layer.name}.weight"]
    if not layer.norm:
        bias = state[f"{layer.name}.bias"]
        return np.require(weight, requirements=["C", "A", "W"]), np.require(bias, requirements=["C", "A", "W"])
    parts = ("weight", "bias", "_mean", "_variance")
    gamma, beta, mean, variance = (state[f"{layer.norm}.{part}"].astype(np.float64) for part in parts)
    with np.errstate(all="ignore"):  # a file may hold a negative variance: the logits then are not finite
        scale = gamma / np.sqrt(variance + EPSILON)
        bias = beta - mean * scale
        return weight * scale.astype(np.float32).reshape(-1, 1, 1, 1), bias.astype(np.float32)


def _side(layer: Layer, side: int) -> int:
    """Height and width of what a layer gives; 0 where it has none."""
    if layer.kind in ("relu", "add"):
        return side
    if layer.kind == "convolution":
        (stride, padding), kernel = layer.numbers, layer.shape[2]
    elif layer.kind == "max_pool":
        kernel, stride, padding = layer.numbers
    else:
        return 0
    side = (side + 2 * padding - kernel) // stride + 1
    if side < 1:
        raise SetupError("the images are too small for this network", expected="32 pixels or more")
    return side


def _averages(inside: int, outside: int) -> np.ndarray:
    """(outside, inside): the adaptive average pooling of Paddle along one axis."""
    matrix = np.zeros((outside, inside), np.float32)
    for row in range(outside):
        start, end = row * inside // outside, math.ceil((row + 1) * inside / outside)
        matrix[row, start:end] = 1 / (end - start)
    return matrix
