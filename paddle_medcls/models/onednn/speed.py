"""What bfloat16 gains on this processor."""

from __future__ import annotations

import time

import numpy as np

from paddle_medcls.models.onednn.operators import Operators

REPEATS = 5


def bf16_speedup() -> float:
    """How many times as fast a convolution of a ResNet is in bfloat16 as in float32, measured; takes about 0.2 s.

    Needs a processor that has bfloat16. Other operators gain less, so a training gains less than this.
    """
    return _convolution_seconds(bf16=False) / _convolution_seconds(bf16=True)


def _convolution_seconds(bf16: bool) -> float:
    """Seconds of a 3x3 convolution of 8 images, 56 pixels wide, 64 channels: the shortest of REPEATS."""
    operators = Operators(bf16)
    weight = np.zeros((64, 64, 3, 3), np.float32)
    x = np.zeros((8, 56, 56, 64), np.uint16 if bf16 else np.float32)
    seconds = []
    for _ in range(1 + REPEATS):  # the first call prepares the operator
        started = time.perf_counter()
        operators.conv(x, weight, 1, 1)
        seconds.append(time.perf_counter() - started)
    operators.close()
    return min(seconds[1:])
