"""ResNet (He et al. 2015) of ConvBNLayer, BasicBlock and BottleneckBlock.

Parameter names are those of the COVID-19 radiography tutorial (`conv.0`, `block.<k>.conv<j>.0`, `fc`), so its weight
files load unchanged; other layouts are renamed in `weights`. The stride is in the 3x3 convolution, as in the
tutorials and in paddle.vision.

Source: He et al., Deep Residual Learning for Image Recognition, arXiv:1512.03385.
"""

from __future__ import annotations

import math

from paddle_medcls.core.paddle_setup import paddle
from paddle_medcls.models.network import Network

nn = paddle.nn

__all__ = ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]


class ConvBNLayer(nn.Sequential):
    """Convolution without bias, batch normalisation and, if `act`, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, act: bool = True):
        layers = [
            nn.Conv2D(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias_attr=False),
            nn.BatchNorm2D(out_channels),
        ]
        super().__init__(*layers, *([nn.ReLU()] if act else []))


class BasicBlock(nn.Layer):
    """Two 3x3 convolutions and a shortcut: (N, in, H, W) -> (N, out, H/stride, W/stride)."""

    expansion = 1

    def __init__(self, in_channels: int, out_channels: int, stride: int, project: bool):
        super().__init__()
        self.conv1 = ConvBNLayer(in_channels, out_channels, 3, stride)
        self.conv2 = ConvBNLayer(out_channels, out_channels, 3, act=False)
        self.shortcut = ConvBNLayer(in_channels, out_channels, 1, stride, act=False) if project else nn.Sequential()
        self.relu = nn.ReLU()

    def forward(self, x):
        return self.relu(self.conv2(self.conv1(x)) + self.shortcut(x))


class BottleneckBlock(nn.Layer):
    """1x1 down, 3x3, 1x1 up by four, and a shortcut: (N, in, H, W) -> (N, out, H/stride, W/stride)."""

    expansion = 4

    def __init__(self, in_channels: int, out_channels: int, stride: int, project: bool):
        super().__init__()
        width = out_channels // self.expansion
        self.conv1 = ConvBNLayer(in_channels, width, 1)
        self.conv2 = ConvBNLayer(width, width, 3, stride)
        self.conv3 = ConvBNLayer(width, out_channels, 1, act=False)
        self.shortcut = ConvBNLayer(in_channels, out_channels, 1, stride, act=False) if project else nn.Sequential()
        self.relu = nn.ReLU()

    def forward(self, x):
        return self.relu(self.conv3(self.conv2(self.conv1(x))) + self.shortcut(x))


class ResNet(nn.Layer):
    """Four stages of residual blocks, global average pool, linear.

    Args:
        depths: blocks of each stage.
        block: BasicBlock or BottleneckBlock.
        network: outputs, input channels and stem. `project_first` puts a projection in the first block even
            if the shapes agree, like PaddleClas in its ResNet-18 and -34 (11,693,736 parameters instead of
            11,689,512 at 1000 classes).
    """

    head_name = "fc"

    def __init__(self, depths: tuple[int, ...], block: type[BasicBlock] | type[BottleneckBlock], network: Network):
        super().__init__()
        small = network.stem == "small"
        self.conv = ConvBNLayer(network.in_channels, 64, 3 if small else 7, 1 if small else 2)
        self.max_pool = nn.Sequential() if small else nn.MaxPool2D(kernel_size=3, stride=2, padding=1)
        blocks: list[nn.Layer] = []
        channels = 64
        for stage, depth in enumerate(depths):
            out_channels = 64 * 2**stage * block.expansion
            for order in range(depth):
                stride = 2 if order == 0 and stage > 0 else 1
                project = stride != 1 or channels != out_channels or (network.project_first and not blocks)
                blocks.append(block(channels, out_channels, stride, project))
                channels = out_channels
        self.block = nn.Sequential(*blocks)
        self.depths, self.expansion = depths, block.expansion
        self.avg_pool = nn.AdaptiveAvgPool2D(1)
        bound = 1 / math.sqrt(channels)  # last layer of the PALM myopia tutorial: Uniform(-1/sqrt(2048), 1/sqrt(2048))
        self.fc = nn.Linear(channels, network.num_outputs, weight_attr=nn.initializer.Uniform(-bound, bound))

    @property
    def stage_channels(self) -> list[int]:
        """Channels of their output."""
        return [64 * 2**stage * self.expansion for stage in range(len(self.depths))]

    @property
    def stages(self) -> list:
        """The last block of each stage; their output describes an image at four scales."""
        return [self.block[sum(self.depths[: k + 1]) - 1] for k in range(len(self.depths))]

    @property
    def head(self):
        """The last layer; `embed` computes its input."""
        return self.fc

    def embed(self, x):  # (N, C, H, W)
        """Features (N, 512 or 2048) of images (N, C, H, W)."""
        x = self.max_pool(self.conv(x))  # (N, 64, H/4, W/4); the small stem keeps H, W
        x = self.block(x)  # (N, 512 or 2048, H/32, W/32)
        return paddle.flatten(self.avg_pool(x), 1)  # (N, 512 or 2048)

    def forward(self, x):
        return self.head(self.embed(x))  # (N, num_outputs)


def resnet18(network: Network) -> ResNet:
    """ResNet-18; 11,689,512 trainable parameters at 1000 outputs."""
    return ResNet((2, 2, 2, 2), BasicBlock, network)


def resnet34(network: Network) -> ResNet:
    """ResNet-34; 21,797,672 trainable parameters at 1000 outputs."""
    return ResNet((3, 4, 6, 3), BasicBlock, network)


def resnet50(network: Network) -> ResNet:
    """ResNet-50; 25,557,032 trainable parameters at 1000 outputs."""
    return ResNet((3, 4, 6, 3), BottleneckBlock, network)


def resnet101(network: Network) -> ResNet:
    """ResNet-101; 44,549,160 trainable parameters at 1000 outputs."""
    return ResNet((3, 4, 23, 3), BottleneckBlock, network)


def resnet152(network: Network) -> ResNet:
    """ResNet-152; 60,192,808 trainable parameters at 1000 outputs."""
    return ResNet((3, 8, 36, 3), BottleneckBlock, network)
