"""Grad-CAM and Grad-CAM++ heat maps: which parts of an image are evidence for a class.

Grad-CAM (Selvaraju et al. 2017) is ReLU(sum_k a_k A_k), where A_k are the channels of one layer's output and a_k is
the mean gradient of the class's logit with respect to channel k. On a network that ends in a global average
pool and one linear layer (the ResNets here) it is CAM (Zhou et al. 2016) up to a factor.

Grad-CAM++ (Chattopadhay et al. 2018) uses only positive gradients, and weights each less the
more active its channel is: for a score exp(logit) and a network that is linear around the image, its
weights g2 / (2 g2 + sum(A) g3) of relu(g), with g, g2, g3 the score's first to third derivatives, come to
a_k = sum relu(g) / (2 + sum(A_k) relu(g)), up to a factor.

Each cell of a map is placed in the middle of its part of the image, as usual. The padding of a ResNet's strided
layers shifts the true centres by up to half a cell (16 pixels), and the receptive fields of border cells lie mostly
further inside: a map shows a region, not exact pixels.

`trust` measures how faithful a map is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import numpy as np

from paddle_medcls.core.errors import RecipeError, did_you_mean
from paddle_medcls.core.paddle_setup import paddle

nn = paddle.nn

METHODS = {"gradcam": "Grad-CAM", "gradcam++": "Grad-CAM++"}
"""Methods: value of the option -> name in the literature."""
MIN_SIDE = 4
"""The default layer's map has at least this many cells a side; at 224 pixels it has 7."""
_PASSING = (nn.MaxPool2D, nn.AvgPool2D, nn.AdaptiveAvgPool2D, nn.Dropout, nn.Identity, nn.Sequential)
"""Layers that are never the default: they pass on or pool the maps of another."""


def gradcam(
    model, x: np.ndarray, layer: str | None, class_index: int | Sequence[int], method: str = "gradcam"
) -> np.ndarray:
    """Heat maps of a batch.

    The network runs in evaluation mode, and without gradients up to the layer, whose output becomes the
    leaf from which they are taken: frozen parameters and callers under `no_grad` make no difference.
    Afterwards modes, hooks and gradients are as before, also when something fails.

    Args:
        model: gives logits (N, outputs). With one output class 1 is its logit and class 0 the negative.
        x: (N, C, H, W) float32, preprocessed.
        layer: name of a layer that gives (N, channels, h, w), see `layer_shapes`; None: `default_layer`.
        class_index: number of the class, one for all images or one for each.
        method: one of METHODS; "gradcam++" needs a layer without negative outputs (after its ReLU).

    Returns:
        (N, H, W) float32 in [0, 1], each map divided by its largest value; all 0 where the
        layer has no positive evidence for the class.

    Raises:
        RecipeError: no such layer, or one that gives no map; a class that the network does not have.

    Source:
        Selvaraju et al., "Grad-CAM", ICCV 2017; COVID-19 radiography tutorial.
        Chattopadhay et al., "Grad-CAM++", WACV 2018.
    """
    classes = np.broadcast_to(np.asarray(class_index, np.int64), len(x))
    layers = dict(model.named_sublayers())
    if layer is None:
        layer = default_layer(model, x[:1])
    if layer not in layers:
        hint = did_you_mean(layer, layers, n=3)
        raise RecipeError(f"unknown layer {layer!r}{hint}", fix="gradcam --list-layers prints the layers")
    outputs: list = []

    def keep(_, __, output):
        shape = tuple(getattr(output, "shape", ()))
        if len(shape) != 4:
            raise RecipeError(
                f"layer {layer!r} gives the shape {shape}, which is no map",
                expected="(images, channels, height, width)",
                fix="gradcam --list-layers prints the layers",
            )
        leaf = output.detach()
        leaf.stop_gradient = False
        outputs.append(leaf)
        paddle.set_grad_enabled(True)  # until the end of no_grad below
        return leaf

    with _evaluating(model), _hooks([layers[layer]], [keep]), paddle.no_grad():
        logits = model(paddle.to_tensor(x))
        target = _logits_of(logits, classes).sum()
        (gradient,) = paddle.grad([target], [outputs[-1]])
        features = outputs[-1].detach()
    with paddle.no_grad():
        if method == "gradcam++":
            if float(features.min()) < 0:
                fix = "choose a layer after its ReLU, as the default is, or --method gradcam"
                raise RecipeError(f"layer {layer!r} has negative outputs, for which Grad-CAM++ is not defined", fix=fix)
            positive = nn.functional.relu(gradient)
            gradient = positive / (2 + features.sum(axis=[2, 3], keepdim=True) * positive)
        weights = gradient.mean(axis=[2, 3], keepdim=True)  # (N, channels, 1, 1)
        maps = nn.functional.relu((weights * features).sum(axis=1, keepdim=True))  # (N, 1, h, w)
        maps = nn.functional.interpolate(maps, size=list(x.shape[2:]), mode="bilinear", align_corners=False)
        heat = maps.squeeze(1).astype("float32").numpy()
    largest = heat.max(axis=(1, 2), keepdims=True)
    return np.divide(heat, largest, out=np.zeros_like(heat), where=largest > 0)


def _logits_of(logits, classes: np.ndarray):
    """(N,) the logit of each image's class."""
    outputs = max(2, logits.shape[1])
    if classes.min() < 0 or classes.max() >= outputs:
        raise RecipeError(f"class {classes.min()} to {classes.max()} of a network with {outputs} classes")
    if logits.shape[1] == 1:
        return logits[:, 0] * paddle.to_tensor(np.where(classes == 1, 1, -1).astype(np.float32))
    one_hot = np.eye(outputs, dtype=np.float32)[classes]
    return (logits * paddle.to_tensor(one_hot)).sum(axis=1)


def layer_shapes(model, x: np.ndarray) -> dict[str, tuple[int, int, int]]:
    """Layers whose output is a map of more than one cell: name -> (channels, h, w), in the order of the network.

    Args:
        x: a batch (N, C, H, W) float32; one image of zeros is enough.
    """
    found = _map_shapes(model, x)
    return {name: found[name] for name, _ in model.named_sublayers() if name in found and found[name][1:] != (1, 1)}


def _map_shapes(model, x: np.ndarray) -> dict[str, tuple[int, int, int]]:
    """Layers whose output is a map: name -> (channels, h, w), in the order in which they are computed."""
    found: dict[str, tuple[int, int, int]] = {}

    def remember(name: str):
        def look(_, __, output) -> None:
            shape = tuple(getattr(output, "shape", ()))  # GoogLeNet gives several tensors
            found.pop(name, None)  # a layer that is used twice counts where it is used last
            if len(shape) == 4:
                found[name] = shape[1:]

        return look

    names, layers = zip(*model.named_sublayers())
    with _evaluating(model), _hooks(layers, [remember(name) for name in names]), paddle.no_grad():
        model(paddle.to_tensor(x))
    return found


def default_layer(model, x: np.ndarray) -> str:
    """The layer or block that computes the last maps of 4 x 4 cells or more, pooling left out.

    At 224 pixels that is `block.15` of ResNet-50, `features.29` of VGG-16, `backbone.batch_norm` of DenseNet-121.

    Args:
        x: a batch (N, C, H, W) float32 of the size that the network is used with.

    Raises:
        RecipeError: no layer has such maps.
    """
    layers, shapes = dict(model.named_sublayers()), _map_shapes(model, x)
    fine = {name: min(height, width) >= MIN_SIDE for name, (_, height, width) in shapes.items()}
    # What is inside a block that makes maps smaller is not the end of anything.
    coarse = tuple(f"{name}." for name in fine if not fine[name] and not isinstance(layers[name], nn.Sequential))
    names = [
        name for name in fine if fine[name] and not name.startswith(coarse) and not isinstance(layers[name], _PASSING)
    ]
    if not names:
        raise RecipeError(
            f"no layer of this {type(model).__name__} suits a heat map of {x.shape[3]} x {x.shape[2]} pixels",
            fix="choose one with --layer; --list-layers names them",
        )
    return names[-1]


@contextlib.contextmanager
def _evaluating(model):
    """Evaluation mode; afterwards each layer's own mode is restored."""
    modes = [(layer, layer.training) for layer in model.sublayers(include_self=True)]
    model.eval()
    try:
        yield
    finally:
        for layer, training in modes:
            layer.training = training


@contextlib.contextmanager
def _hooks(layers, functions):
    """Registers functions that receive the outputs of layers, and may replace them."""
    handles = [layer.register_forward_post_hook(function) for layer, function in zip(layers, functions)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
