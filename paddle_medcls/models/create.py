"""`create_model`: a network by its name, with random or pretrained weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from paddle_medcls.models.network import Network
from paddle_medcls.models.pretrained import pretrained_file
from paddle_medcls.models.weights import load_pretrained

if TYPE_CHECKING:
    from paddle.nn import Layer


def create_model(
    name: str, num_classes: int, pretrained: bool | str | Path = False, in_channels: int = 3, stem: str = "imagenet"
) -> Layer:
    """Builds a network: x (N, in_channels, H, W) float32 -> logits (N, num_classes).

    Args:
        name: "resnet18", "vgg16", "densenet121", …; `model_names()` has them all.
        num_classes: number of logits.
        pretrained: True: the ImageNet weights that Paddle publishes (they want RGB with ImageNet's mean and
            standard deviation); a path: a weight file; the last layer may differ. False: random weights.
        in_channels: 1 or 3.
        stem: "imagenet" (the network's own) or, of a ResNet, "small" (3x3, stride 1, for images of 28 pixels).

    Raises:
        WeightsError: an unknown name, a value out of range, or weights that do not fit.
        DataError: the ImageNet weights could not be downloaded.
    """
    network = Network(name, num_classes, in_channels, stem)
    model = network.build()
    if pretrained is not False:
        load_pretrained(model, network, pretrained_file("imagenet" if pretrained is True else str(pretrained), name))
    return model
