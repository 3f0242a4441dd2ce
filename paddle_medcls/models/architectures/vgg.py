"""VGG-16 (Simonyan and Zisserman 2014) with the head of the OCT transfer-learning tutorial.

Parameter names are those of paddle.vision (`features.<n>`, `classifier.<n>`), so its ImageNet weights load. The last
layer is replaced by Linear(4096, 256), ReLU, Dropout, Linear(256, classes): 135,310,404 parameters for four classes,
of which the head has 1,049,860.

Source: Simonyan and Zisserman, Very Deep Convolutional Networks for Large-Scale Image Recognition, arXiv:1409.1556.
"""

from __future__ import annotations

from paddle_medcls.core.paddle_setup import paddle
from paddle_medcls.models.network import Network

nn = paddle.nn

__all__ = ["vgg16"]

STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # (channels, convolutions), each ends in a max-pool


class VGG(nn.Layer):
    """Thirteen 3x3 convolutions, two hidden layers of 4096, and the head.

    `embed` computes everything before the head; with frozen features its output never changes.
    """

    head_name = "classifier.6"

    def __init__(self, network: Network):
        super().__init__()
        layers: list = []
        channels = network.in_channels
        for width, count in STAGES:
            for _ in range(count):
                layers += [nn.Conv2D(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
            layers.append(nn.MaxPool2D(2, 2))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2D(7)
        head = nn.Sequential(nn.Linear(4096, 256), nn.ReLU(), nn.Dropout(0.4), nn.Linear(256, network.num_outputs))
        self.classifier = nn.Sequential(
            nn.Linear(512 * 7 * 7, 4096),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(4096, 4096),
            nn.ReLU(),
            nn.Dropout(0.5),
            head,
        )

    @property
    def stage_channels(self) -> list[int]:
        """Channels of their output."""
        return [width for width, _ in STAGES]

    @property
    def stages(self) -> list:
        """The max-pool that ends each stage; their output describes an image at five scales."""
        return [layer for layer in self.features if isinstance(layer, nn.MaxPool2D)]

    @property
    def head(self):
        """The last layers; `embed` computes their input."""
        return self.classifier[6]

    def embed(self, x):  # (N, C, H, W)
        """Features (N, 4096) of images (N, C, H, W)."""
        x = paddle.flatten(self.avgpool(self.features(x)), 1)  # (N, 25088), in C, H, W order
        return self.classifier[:6](x)  # (N, 4096)

    def forward(self, x):
        return self.head(self.embed(x))


def vgg16(network: Network) -> VGG:
    """VGG-16; 135,310,404 parameters at 4 outputs."""
    return VGG(network)
