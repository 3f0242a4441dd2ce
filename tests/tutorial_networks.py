"""The networks of the PALM and COVID-19 tutorials, written again from their structure and parameter names.

They share no code with the library: the tests ask that its networks give the same logits. Batch
normalisation is `paddle.nn.BatchNorm`, the class that the PALM myopia tutorial's became in Paddle 2.
"""

from __future__ import annotations

import paddle_medcls.core.paddle_setup  # noqa: F401  prepares Paddle

import paddle  # isort: skip

nn = paddle.nn
F = nn.functional

DEPTHS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


class Unit001(nn.Layer):
    """`_conv` and `_batch_norm`."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, act: str | None = None) -> None:
        super().__init__()
        self._conv = nn.Conv2D(inputs, outputs, kernel, stride, (kernel - 1) // 2, bias_attr=False)
        self._batch_norm = nn.BatchNorm(outputs, act=act)

    def forward(self, x):
        return self._batch_norm(self._conv(x))


class Block001(nn.Layer):
    def __init__(self, inputs: int, width: int, stride: int, project: bool) -> None:
        super().__init__()
        self.conv0 = Unit001(inputs, width, 1, act="relu")
        self.conv1 = Unit001(width, width, 3, stride, act="relu")
        self.conv2 = Unit001(width, 4 * width, 1)
        if project:
            self.short = Unit001(inputs, 4 * width, 1, stride)
        self.project = project

    def forward(self, x):
        return F.relu((self.short(x) if self.project else x) + self.conv2(self.conv1(self.conv0(x))))


class Net001(nn.Layer):
    """PALM: `conv`, `bb_<stage>_<i>`, `out`."""

    def __init__(self, depth: int = 50, outputs: int = 1) -> None:
        super().__init__()
        self.conv = Unit001(3, 64, 7, 2, act="relu")
        self.blocks = []
        inputs = 64
        for stage, count in enumerate(DEPTHS[depth]):
            for i in range(count):
                block = Block001(inputs, 64 << stage, 2 if stage and not i else 1, project=i == 0)
                self.blocks.append(self.add_sublayer(f"bb_{stage}_{i}", block))
                inputs = 256 << stage
        self.out = nn.Linear(inputs, outputs)

    def forward(self, x):
        x = F.max_pool2d(self.conv(x), 3, 2, 1)
        for block in self.blocks:
            x = block(x)
        return self.out(x.mean(axis=[2, 3]))


def unit003(inputs: int, outputs: int, kernel: int, stride: int, act: bool) -> nn.Sequential:
    """`0` a convolution, `1` its batch norm, and a ReLU."""
    conv = nn.Conv2D(inputs, outputs, kernel, stride, kernel // 2, bias_attr=False)
    return nn.Sequential(conv, nn.BatchNorm2D(outputs), *([nn.ReLU()] if act else []))


class Block003(nn.Layer):
    def __init__(self, inputs: int, outputs: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        width = outputs // 4 if bottleneck else outputs
        if bottleneck:
            self.conv1 = unit003(inputs, width, 1, 1, True)
            self.conv2 = unit003(width, width, 3, stride, True)
            self.conv3 = unit003(width, outputs, 1, 1, False)
        else:
            self.conv1 = unit003(inputs, outputs, 3, stride, True)
            self.conv2 = unit003(outputs, outputs, 3, 1, False)
        project = stride != 1 or inputs != outputs
        self.shortcut = unit003(inputs, outputs, 1, stride, False) if project else nn.Sequential()

    def forward(self, x):
        y = self.conv2(self.conv1(x))
        if hasattr(self, "conv3"):
            y = self.conv3(y)
        return F.relu(y + self.shortcut(x))


class Net003(nn.Layer):
    """COVID: `conv`, `block.<k>`, `fc`."""

    def __init__(self, depth: int = 50, outputs: int = 4) -> None:
        super().__init__()
        bottleneck = depth >= 50
        self.conv = unit003(3, 64, 7, 2, True)
        blocks, inputs = [], 64
        for stage, count in enumerate(DEPTHS[depth]):
            outs = (256 if bottleneck else 64) << stage
            for i in range(count):
                blocks.append(Block003(inputs, outs, 2 if stage and not i else 1, bottleneck))
                inputs = outs
        self.block = nn.Sequential(*blocks)
        self.fc = nn.Linear(inputs, outputs)

    def forward(self, x):
        x = self.block(F.max_pool2d(self.conv(x), 3, 2, 1))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def trained(model: nn.Layer, seed: int = 0) -> nn.Layer:
    """A model whose batch-norm parameters and statistics have moved, as training moves them."""
    paddle.seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and parameter.trainable:
            noise = paddle.rand(parameter.shape) * 0.4
            parameter.set_value(noise + 0.8 if name.endswith("weight") else noise - 0.2)
    for _ in range(2):
        model(paddle.randn([4, 3, 64, 64]) * 2 + 0.5)
    model.eval()
    return model
