"""oneDNN operators for a ResNet, called in the library inside Paddle's wheel.

Paddle's own CPU operators are slow: convolution is im2col and a matrix product, batch norm and ReLU are plain loops.
oneDNN has fast ones, also in bfloat16, but Paddle's dygraph mode does not use them. Nothing has to be installed or
compiled: `library` calls them through ctypes.

Activations are NumPy arrays (N, H, W, C), float32 or, as bit patterns in uint16, bfloat16. Weights, their gradients
and batch-norm statistics are Paddle's float32 tensors, read and written in place.
"""

from __future__ import annotations

from ctypes import c_float, c_int, c_uint, c_void_p
from typing import NamedTuple

import numpy as np

from paddle_medcls.core.paddle_setup import paddle
from paddle_medcls.models.onednn.library import BF16, DST, F32, SRC, Engine, Prepared, Shape, dims, floats

TRAINING, INFERENCE, BACKWARD = 64, 96, 128
CONVOLUTION, MAX_POOL, ADD, RELU = 0x1, 0x1FF, 0x1FFF0, 0x100  # RELU: gradient from the output
GLOBAL_STATISTICS, SCALE_AND_SHIFT, FUSED_RELU = 1, 2 | 4, 8
SRC_1, WEIGHTS, MEAN, VARIANCE, SCALE, SHIFT, WORKSPACE = 2, 33, 49, 50, 51, 52, 64
DIFF_SRC, DIFF_DST, DIFF_WEIGHTS, DIFF_SCALE, DIFF_SHIFT = 129, 145, 161, 255, 256


class NormState(NamedTuple):
    """A batch normalisation's input, layer and options, and the arrays that its backward operator reads."""

    x: np.ndarray
    norm: paddle.nn.BatchNorm2D
    relu: bool
    training: bool
    saved: dict[int, np.ndarray]


class Operators(Engine):
    """Forward and backward operators of a ResNet; prepared operators and the memory of activations are reused.

    Args:
        bf16: activations and the products of convolutions are bfloat16; sums, statistics and the gradients of
            parameters are float32.
    """

    # --- operators -------------------------------------------------------------------------------

    def to_nhwc(self, x) -> np.ndarray:
        """Tensor (N, C, H, W) -> activation (N, H, W, C)."""
        x = x.astype("float32").contiguous()  # oneDNN reads its memory
        n, c, h, w = x.shape
        y = self._array((n, h, w, c))
        return self._reorder(x, self._layout((n, c, h, w), F32, (c * h * w, h * w, w, 1)), y, self._nhwc(y.shape))

    def mean(self, x: np.ndarray) -> np.ndarray:
        """The mean over H and W: (N, H, W, C) -> (N, C) float32."""
        if self.type == BF16:
            x = (x.astype(np.uint32) << 16).view(np.float32)
        return x.mean(axis=(1, 2))

    def mean_backward(self, dy: np.ndarray, shape: Shape) -> np.ndarray:
        """Gradient of `mean`: (N, C) float32 -> (N, H, W, C)."""
        n, h, w, c = shape
        spread = np.ascontiguousarray(np.broadcast_to((dy / (h * w))[:, None, None], shape), np.float32)
        return self._reorder(spread, self._nhwc(shape, F32), self._array(shape), self._nhwc(shape))

    def conv(self, x: np.ndarray, weight, stride: int, padding: int) -> np.ndarray:
        """Convolution of x (N, H, W, C) with weight (O, C, K, K) -> (N, H', W', O)."""
        operator = self._conv("forward", x.shape, tuple(weight.shape), stride, padding)
        y = self._array(_output_shape(x.shape, weight.shape[0], weight.shape[2], stride, padding))
        operator({SRC: x, WEIGHTS: self._blocked(weight, operator), DST: y})
        return y

    def conv_data_gradient(self, dy: np.ndarray, shape: Shape, weight, stride: int, padding: int) -> np.ndarray:
        """The gradient of x, which has this shape."""
        operator = self._conv("data", shape, tuple(weight.shape), stride, padding)
        dx = self._array(shape)
        operator({DIFF_DST: dy, WEIGHTS: self._blocked(weight, operator), DIFF_SRC: dx})
        return dx

    def conv_weight_gradient(self, dy: np.ndarray, x: np.ndarray, dw, stride: int, padding: int) -> None:
        """The gradient of the weight, written to the float32 tensor `dw` (O, C, K, K)."""
        operator = self._conv("weights", x.shape, tuple(dw.shape), stride, padding)
        blocked = self._bytes(operator.size(DIFF_WEIGHTS))
        operator({SRC: x, DIFF_DST: dy, DIFF_WEIGHTS: blocked})
        self._reorder(blocked, operator.layouts[DIFF_WEIGHTS], dw, self._oihw(tuple(dw.shape)))

    def batch_norm(self, x: np.ndarray, norm, relu: bool, training: bool, keep: bool) -> tuple[np.ndarray, NormState]:
        """Batch normalisation and, if `relu`, ReLU.

        In training it updates the running statistics of `norm`, with the biased variance like Paddle.

        Args:
            norm: paddle.nn.BatchNorm2D.
            training: normalise by the batch's statistics.
            keep: prepare for `batch_norm_backward`.

        Returns:
            (N, H, W, C), and the argument `state` of `batch_norm_backward`.
        """
        operator = self._batch_norm("forward", x.shape, norm._epsilon, relu, training, keep)
        y = self._array(x.shape)
        running = norm._mean, norm._variance
        mean, variance = (np.empty(x.shape[3], np.float32) for _ in running) if training else map(floats, running)
        mask = self._bytes(operator.size(WORKSPACE))
        saved = {MEAN: mean, VARIANCE: variance, WORKSPACE: mask}
        operator({SRC: x, SCALE: norm.weight, SHIFT: norm.bias, DST: y, **saved})
        if training:
            for old, new in zip(map(floats, running), (mean, variance)):
                old[:] = old * np.float32(norm._momentum) + new * np.float32(1 - norm._momentum)
        return y, NormState(x, norm, relu, training, saved)

    def batch_norm_backward(self, dy: np.ndarray, state: NormState, dscale, dshift) -> np.ndarray:
        """The gradient of x; those of scale and shift are written to the float32 tensors (C,)."""
        x, norm = state.x, state.norm
        operator = self._batch_norm("backward", x.shape, norm._epsilon, state.relu, state.training, True)
        dx = self._array(x.shape)
        inputs = {SRC: x, SCALE: norm.weight, DIFF_DST: dy, **state.saved}
        operator({**inputs, DIFF_SRC: dx, DIFF_SCALE: dscale, DIFF_SHIFT: dshift})
        return dx

    def add(self, a: np.ndarray, b: np.ndarray, relu: bool = False) -> np.ndarray:
        """a + b and, if `relu`, ReLU; written to `a`."""
        self._add(a.shape, relu)({SRC: a, SRC_1: b, DST: a})
        return a

    def relu_backward(self, dy: np.ndarray, y: np.ndarray) -> np.ndarray:
        """The gradient of ReLU's input, written to `dy`; y is its output."""
        self._relu("backward", y.shape)({DST: y, DIFF_DST: dy, DIFF_SRC: dy})
        return dy

    def max_pool(self, x: np.ndarray, kernel: int, stride: int, padding: int) -> tuple[np.ndarray, np.ndarray]:
        """The pooled activation, and the argument `workspace` of `max_pool_backward`."""
        operator = self._max_pool("forward", x.shape, kernel, stride, padding)
        y = self._array(_output_shape(x.shape, x.shape[3], kernel, stride, padding))
        workspace = self._bytes(operator.size(WORKSPACE))
        operator({SRC: x, DST: y, WORKSPACE: workspace})
        return y, workspace

    def max_pool_backward(
        self, dy: np.ndarray, shape: Shape, kernel: int, stride: int, padding: int, workspace: np.ndarray
    ) -> np.ndarray:
        """The gradient of x, which has this shape."""
        operator = self._max_pool("backward", shape, kernel, stride, padding)
        dx = self._array(shape)
        operator({DIFF_DST: dy, DIFF_SRC: dx, WORKSPACE: workspace})
        return dx

    # --- operators prepared for a shape ----------------------------------------------------------

    def _conv(self, part: str, shape: Shape, weight: Shape, stride: int, padding: int) -> Prepared:
        key = ("conv", part, shape, weight, stride, padding)
        if key in self._prepared:
            return self._prepared[key]
        x, y = self._nhwc(shape), self._nhwc(_output_shape(shape, weight[0], weight[2], stride, padding))
        w = self._layout(weight, self.type)
        sizes = dims(stride, stride), dims(), dims(padding, padding), dims(padding, padding)
        name = "dnnl_convolution_{}_primitive_desc_create".format
        if part == "forward":
            desc = self._describe(name("forward"), c_int(TRAINING), c_int(CONVOLUTION), x, w, None, y, *sizes, None)
            arguments = {SRC: x, WEIGHTS: None, DST: y}
        else:
            hint = self._conv("forward", shape, weight, stride, padding).description
            if part == "data":
                desc = self._describe(name("backward_data"), c_int(CONVOLUTION), x, w, y, *sizes, hint, None)
                arguments = {DIFF_DST: y, WEIGHTS: None, DIFF_SRC: x}
            else:
                desc = self._describe(name("backward_weights"), c_int(CONVOLUTION), x, w, None, y, *sizes, hint, None)
                arguments = {SRC: x, DIFF_DST: y, DIFF_WEIGHTS: None}
        self._prepared[key] = Prepared(self, desc, arguments)
        return self._prepared[key]

    def _batch_norm(self, part: str, shape: Shape, epsilon: float, relu: bool, training: bool, keep: bool) -> Prepared:
        key = ("batch_norm", part, shape, epsilon, relu, training, keep)
        if key in self._prepared:
            return self._prepared[key]
        x, c = self._nhwc(shape), self._layout((shape[3],), F32, (1,))
        flags = SCALE_AND_SHIFT | (FUSED_RELU if relu else 0) | (0 if training else GLOBAL_STATISTICS)
        numbers = c_float(epsilon), c_uint(flags)
        name = "dnnl_batch_normalization_{}_primitive_desc_create".format
        arguments = {SRC: x, MEAN: c, VARIANCE: c, SCALE: c, WORKSPACE: None}
        if part == "forward":
            kind = TRAINING if training or keep else INFERENCE
            desc = self._describe(name("forward"), c_int(kind), x, x, *numbers, None)
            arguments |= {SHIFT: c, DST: x}
        else:
            hint = self._batch_norm("forward", shape, epsilon, relu, training, keep).description
            desc = self._describe(name("backward"), c_int(BACKWARD), x, x, x, *numbers, hint, None)
            arguments |= {DIFF_DST: x, DIFF_SRC: x, DIFF_SCALE: c, DIFF_SHIFT: c}
        self._prepared[key] = Prepared(self, desc, arguments)
        return self._prepared[key]

    def _add(self, shape: Shape, relu: bool) -> Prepared:
        key = ("add", shape, relu)
        if key not in self._prepared:
            x, attributes, post_ops = self._nhwc(shape), c_void_p(), c_void_p()
            self.create("primitive_attr", "dnnl_primitive_attr_create", attributes)
            self.create("post_ops", "dnnl_post_ops_create", post_ops)
            if relu:
                self.call("dnnl_post_ops_append_eltwise", post_ops, c_int(RELU), c_float(0), c_float(0))
            self.call("dnnl_primitive_attr_set_post_ops", attributes, post_ops)
            desc = self._describe("dnnl_binary_primitive_desc_create", c_int(ADD), x, x, x, attributes)
            self._prepared[key] = Prepared(self, desc, {SRC: x, SRC_1: x, DST: x})
        return self._prepared[key]

    def _relu(self, part: str, shape: Shape) -> Prepared:
        key = ("relu", part, shape)
        if key in self._prepared:
            return self._prepared[key]
        x, numbers = self._nhwc(shape), (c_float(0), c_float(0))
        name = "dnnl_eltwise_{}_primitive_desc_create".format
        if part == "forward":
            desc = self._describe(name("forward"), c_int(TRAINING), c_int(RELU), x, x, *numbers, None)
            arguments = {SRC: x, DST: x}
        else:
            hint = self._relu("forward", shape).description
            desc = self._describe(name("backward"), c_int(RELU), x, x, x, *numbers, hint, None)
            arguments = {DST: x, DIFF_DST: x, DIFF_SRC: x}
        self._prepared[key] = Prepared(self, desc, arguments)
        return self._prepared[key]

    def _max_pool(self, part: str, shape: Shape, kernel: int, stride: int, padding: int) -> Prepared:
        key = ("max_pool", part, shape, kernel, stride, padding)
        if key in self._prepared:
            return self._prepared[key]
        x, y = self._nhwc(shape), self._nhwc(_output_shape(shape, shape[3], kernel, stride, padding))
        pads = dims(padding, padding)
        sizes = dims(stride, stride), dims(kernel, kernel), dims(), pads, pads
        name = "dnnl_pooling_{}_primitive_desc_create".format
        if part == "forward":
            desc = self._describe(name("forward"), c_int(TRAINING), c_int(MAX_POOL), x, y, *sizes, None)
            arguments = {SRC: x, DST: y, WORKSPACE: None}
        else:
            hint = self._max_pool("forward", shape, kernel, stride, padding).description
            desc = self._describe(name("backward"), c_int(MAX_POOL), x, y, *sizes, hint, None)
            arguments = {DIFF_DST: y, DIFF_SRC: x, WORKSPACE: None}
        self._prepared[key] = Prepared(self, desc, arguments)
        return self._prepared[key]

    def _blocked(self, weight, operator: Prepared) -> np.ndarray:
        """A weight in the layout and type that the convolution has chosen."""
        blocked = self._bytes(operator.size(WEIGHTS))
        return self._reorder(weight, self._oihw(tuple(weight.shape)), blocked, operator.layouts[WEIGHTS])


def _output_shape(shape: Shape, channels: int, kernel: int, stride: int, padding: int) -> Shape:
    """Output shape (N, H', W', channels) of a sliding window over (N, H, W, C)."""
    n, h, w, _ = shape
    return (n, *((side + 2 * padding - kernel) // stride + 1 for side in (h, w)), channels)
