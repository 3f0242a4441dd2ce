"""Runs a ResNet on oneDNN's operators: the same parameters, running statistics and gradients, computed faster.

The network remains the one that `resnet` builds, so names, weight files, optimizer state and Grad-CAM are unaffected.
Only the forward and backward passes of its convolutional part run here. Every operator returns its output and its
backward function: gradient of the output -> gradient of the input.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from paddle_medcls.core.errors import SetupError
from paddle_medcls.core.paddle_setup import paddle
from paddle_medcls.models.architectures.resnet import ResNet
from paddle_medcls.models.onednn.library import open_library
from paddle_medcls.models.onednn.operators import Operators

Backward = Callable[[np.ndarray], np.ndarray]


def obstacle(model, device: str) -> str:
    """Why oneDNN's operators cannot be used; "" if they can."""
    if not device.startswith("cpu"):
        return f"they need a CPU; this run is on the {device}"
    if not isinstance(model, ResNet):
        return f"they support complete ResNets only, not {type(model).__name__}"
    try:
        open_library()
    except SetupError as error:
        return error.what
    return ""


class Accelerated(paddle.nn.Layer):
    """The network on oneDNN's operators: x (N, C, H, W) float32 -> logits (N, outputs).

    Args:
        model: a ResNet on the CPU.
        operators: float32 or bfloat16; several networks may share them.
    """

    def __init__(self, model: ResNet, operators: Operators) -> None:
        super().__init__()
        self.model = model
        self.operators = operators
        self.training = model.training

    def forward(self, x):
        head = {id(parameter) for parameter in self.model.head.parameters()}
        trainable = [p for p in self.model.parameters() if not p.stop_gradient and id(p) not in head]
        if trainable and paddle.is_grad_enabled():
            return self.model.head(_Features.apply(self, x, *trainable))
        return self.model.head(paddle.to_tensor(_Pass(self, keep=False).forward(x)))

    def features(self, x: np.ndarray) -> np.ndarray:
        """x (N, C, H, W) -> features of all stages (N, channels), see `evaluate.predict_features`."""
        means: list[np.ndarray] = []
        _Pass(self, keep=False).forward(paddle.to_tensor(np.ascontiguousarray(x)), means)
        return np.concatenate(means, axis=1)


class _Features(paddle.autograd.PyLayer):
    """Everything before the head, as one differentiable function of x and the trainable parameters."""

    @staticmethod
    def forward(ctx, layer: Accelerated, x, *trainable):
        ctx.batch, ctx.trainable = _Pass(layer, keep=True), trainable
        return paddle.to_tensor(ctx.batch.forward(x))

    @staticmethod
    def backward(ctx, dy):
        batch, ctx.batch = ctx.batch, None  # frees the activations: one backward pass consumes them
        batch.backward(dy.numpy())
        return (None, *(batch.gradients[id(parameter)] for parameter in ctx.trainable))


class _Pass:
    """Forward and backward pass of one batch.

    Args:
        keep: whether to keep activations for the backward pass.
    """

    def __init__(self, layer: Accelerated, keep: bool) -> None:
        self.model, self.operators, self.keep = layer.model, layer.operators, keep
        self.backwards: list[Backward] = []
        self.gradients: dict[int, object] = {}

    def forward(self, x, stage_means: list[np.ndarray] | None = None) -> np.ndarray:
        """x (N, C, H, W), a tensor -> features (N, channels) float32; those of each stage are added to a list."""
        self.operators.set_batch_shape(tuple(x.shape))
        y = self.operators.to_nhwc(x)
        steps = [(self.conv_bn, self.model.conv), (self.max_pool, self.model.max_pool)]
        steps += [(self.block, block) for block in self.model.block]
        for step, layer in steps:
            y, back = step(layer, y)
            if stage_means is not None and any(layer is end for end in self.model.stages):
                stage_means.append(self.operators.mean(y))
            if self.keep:
                self.backwards.append(back)
        shape = y.shape
        self.backwards.append(lambda dy: self.operators.mean_backward(dy, shape))
        return self.operators.mean(y)

    def backward(self, dy: np.ndarray) -> None:
        """Gradient of the features (N, channels) -> `gradients` of the parameters."""
        while self.backwards:
            dy = self.backwards.pop()(dy)

    def conv_bn(self, layer, x: np.ndarray) -> tuple[np.ndarray, Backward]:
        """ConvBNLayer: convolution, batch normalisation and, if it has one, ReLU."""
        operators, conv, norm, relu = self.operators, layer[0], layer[1], len(layer) == 3
        weight, window, training = conv.weight, (conv._stride[0], conv._padding), norm.training
        z = operators.conv(x, weight, *window)
        y, state = operators.batch_norm(z, norm, relu, training, self.keep)

        def back(dy):
            scale, shift = self.gradient_of(norm.weight), self.gradient_of(norm.bias)
            dz = operators.batch_norm_backward(dy, state, scale, shift)
            if not weight.stop_gradient:
                operators.conv_weight_gradient(dz, x, self.gradient_of(weight), *window)
            return dz if layer is self.model.conv else operators.conv_data_gradient(dz, x.shape, weight, *window)

        return y, back

    def max_pool(self, layer, x: np.ndarray) -> tuple[np.ndarray, Backward]:
        """The stem's max-pool; the small stem has none."""
        if isinstance(layer, paddle.nn.Sequential):
            return x, lambda dy: dy
        y, workspace = self.operators.max_pool(x, 3, 2, 1)
        shape = x.shape
        return y, lambda dy: self.operators.max_pool_backward(dy, shape, 3, 2, 1, workspace)

    def block(self, layer, x: np.ndarray) -> tuple[np.ndarray, Backward]:
        """BasicBlock or BottleneckBlock."""
        branch, shortcut, y, z = [], [], x, x
        for name in ("conv1", "conv2", "conv3"):
            if hasattr(layer, name):
                y, step_back = self.conv_bn(getattr(layer, name), y)
                branch.append(step_back)
        if len(layer.shortcut):
            z, step_back = self.conv_bn(layer.shortcut, x)
            shortcut.append(step_back)
        total = self.operators.add(y, z, relu=True)

        def back(dy):
            dy = dx = self.operators.relu_backward(dy, total)
            for shortcut_back in shortcut:
                dx = shortcut_back(dx)
            while branch:
                dy = branch.pop()(dy)
            return self.operators.add(dy, dx)

        return total, back

    def gradient_of(self, parameter):
        """An empty tensor for the gradient of a parameter."""
        return self.gradients.setdefault(id(parameter), paddle.empty(parameter.shape))
