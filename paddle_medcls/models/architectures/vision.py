"""Every network of `paddle.vision.models`, with a last layer for the task.

The network's own last layer, of 1000 outputs, is replaced by `Identity`, so that the network gives the features (N, D)
that this layer would get; `fc` makes the logits of them. An image with one channel is repeated three times, so that
networks and ImageNet weights stay as they are. Parameter names are those of paddle.vision, after `backbone.`.

Two networks differ from paddle.vision's: GoogLeNet is without its auxiliary classifiers, which take 224 pixels only,
and SqueezeNet without the ReLU after its last layer, which would keep a logit from being negative.
"""

from __future__ import annotations

import math

import numpy as np

from paddle_medcls.core.errors import SetupError
from paddle_medcls.core.paddle_setup import paddle
from paddle_medcls.models.network import Network

nn = paddle.nn

AUXILIARY = {"googlenet": ("_pool_o1", "_conv_o1", "_fc_o1", "_drop_o1", "_out1")}
"""Layers of an auxiliary classifier; those of the second end in 2."""
SIZES_PX = (28, 32, 48, 64, 96, 128, 192, 224, 299)
"""Sizes of which an error names those that a network takes."""


class VisionNetwork(nn.Layer):
    """A network of paddle.vision: x (N, C, H, W) -> logits (N, num_outputs)."""

    head_name = "fc"

    def __init__(self, network: Network):
        super().__init__()
        self.gray = network.in_channels == 1
        self.backbone = getattr(paddle.vision.models, network.model)(num_classes=1000)
        inside = dict(self.backbone.named_sublayers(include_self=True))
        self.last_name, last = next((name, layer) for name, layer in inside.items() if _outputs(layer) == 1000)
        parent, _, child = self.last_name.rpartition(".")
        setattr(inside[parent], child, nn.Identity())
        first = AUXILIARY.get(network.model, ())
        self.auxiliary = (*first, *(name.replace("1", "2") for name in first))
        for name in self.auxiliary:
            setattr(self.backbone, name, nn.Identity())
        features = int(np.prod(last.weight.shape)) // 1000  # SqueezeNet's last layer is a convolution of 1 x 1
        bound = 1 / math.sqrt(features)
        self.fc = nn.Linear(features, network.num_outputs, weight_attr=nn.initializer.Uniform(-bound, bound))

    @property
    def head(self):
        """The last layer; `embed` computes its input."""
        return self.fc

    def embed(self, x):  # (N, C, H, W)
        """Features (N, D) of images (N, C, H, W)."""
        found = self.backbone(x.expand([-1, 3, -1, -1]) if self.gray else x)
        return found[0] if isinstance(found, (tuple, list)) else found  # (N, D); GoogLeNet gives three outputs

    def forward(self, x):
        return self.head(self.embed(x))  # (N, num_outputs)

    def own_names(self, state: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], str]:
        """The arrays of a weight file under our names, and whose names the file has."""
        if all(key.startswith(("backbone.", "fc.")) for key in state):
            return state, "paddle_medcls"
        renamed = {}
        for key, value in state.items():
            layer, _, part = key.rpartition(".")
            if layer == self.last_name:
                renamed[f"fc.{part}"] = value
            elif key.partition(".")[0] not in self.auxiliary:
                renamed[f"backbone.{key}"] = value
        return renamed, "paddle.vision"


def _outputs(layer) -> int:
    """Length of a layer's bias; every last layer of paddle.vision has one."""
    bias = getattr(layer, "bias", None)
    return 0 if bias is None else bias.shape[0]


def refuse_size(model, network: Network, size_px: int, fix: str = "--set size_px=NUMBER, or another --model") -> None:
    """Refuses a size of images that a network cannot take; tried with an image of zeros, in evaluation mode.

    Args:
        fix: of the error.

    Raises:
        SetupError: names sizes that the network takes.
    """
    if _takes(model, network, size_px):
        return
    sizes = ", ".join(str(size) for size in SIZES_PX if _takes(model, network, size))
    raise SetupError(
        f"{network.model} cannot take images of {size_px} x {size_px} pixels",
        expected=f"a size that it takes; of the usual ones {sizes}",
        fix=fix,
    )


def _takes(model, network: Network, size_px: int) -> bool:
    """Whether one image goes through a network, no kernel is larger than its input, and every output has cells.

    Paddle would compute on, with any numbers as the result.
    """

    def check(layer, inputs, output) -> None:
        kernel = getattr(layer, "_kernel_size", getattr(layer, "ksize", 0))
        padding = getattr(layer, "_padding", getattr(layer, "padding", 0))
        fits = np.all(np.array(kernel) <= np.array(inputs[0].shape[2:]) + 2 * np.array(padding)) if kernel else True
        if not fits or 0 in getattr(output, "shape", ()):
            raise ValueError("nothing is left of the image")

    model.eval()
    hooks = [layer.register_forward_post_hook(check) for layer in model.sublayers()]
    try:
        with paddle.no_grad():
            model(paddle.zeros([1, network.in_channels, size_px, size_px]))
    except (ValueError, RuntimeError, OSError):
        return False
    finally:
        for hook in hooks:
            hook.remove()
    return True
