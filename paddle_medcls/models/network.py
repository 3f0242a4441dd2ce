"""The networks by name, and the record from which one is built."""

from __future__ import annotations

import importlib
import reprlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from paddle_medcls.core.errors import WeightsError, did_you_mean

if TYPE_CHECKING:
    from paddle.nn import Layer

PARAMETERS = {
    "alexnet": 61_100_840,
    "densenet121": 7_978_856,
    "densenet161": 28_681_000,
    "densenet169": 14_149_480,
    "densenet201": 20_013_928,
    "densenet264": 33_337_704,
    "googlenet": 6_991_272,
    "inception_v3": 23_834_568,
    "mobilenet_v1": 4_231_976,
    "mobilenet_v2": 3_504_872,
    "mobilenet_v3_large": 5_483_032,
    "mobilenet_v3_small": 2_542_856,
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "resnext50_32x4d": 25_028_904,
    "resnext50_64x4d": 45_192_488,
    "resnext101_32x4d": 44_177_704,
    "resnext101_64x4d": 83_455_272,
    "resnext152_32x4d": 59_951_400,
    "resnext152_64x4d": 114_971_944,
    "shufflenet_v2_swish": 2_278_604,
    "shufflenet_v2_x0_5": 1_366_792,
    "shufflenet_v2_x0_25": 603_688,
    "shufflenet_v2_x0_33": 647_272,
    "shufflenet_v2_x1_0": 2_278_604,
    "shufflenet_v2_x1_5": 3_503_624,
    "shufflenet_v2_x2_0": 7_366_536,
    "squeezenet1_0": 1_248_424,
    "squeezenet1_1": 1_235_496,
    "vgg11": 132_863_336,
    "vgg13": 133_047_848,
    "vgg16": 135_566_376,
    "vgg19": 143_667_240,
    "wide_resnet50_2": 68_883_240,
    "wide_resnet101_2": 126_886_696,
}
"""Name of each network -> its trainable parameters with 1000 outputs.

The names are listed here so that a sidecar can be checked without importing Paddle.
"""
_OWN = {**dict.fromkeys(("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"), "resnet"), "vgg16": "vgg"}
MODELS = {name: _OWN.get(name, "vision") for name in PARAMETERS}
"""Name of each network -> its architecture, the module in `architectures/` that builds it.

"vision" builds those of paddle.vision.models; the others have a function of the network's name.
"""

MODEL_RULE = "a name that train --model list prints"
STEMS = ("imagenet", "small")
MAX_OUTPUTS = 30_000  # ImageNet-22k has 21,841 classes
_OUTPUTS = f"a number of 1 to {MAX_OUTPUTS}"
LOSSES = {
    "binary": ("softmax", "sigmoid"),
    "multi-class": ("softmax",),
    "ordinal": ("softmax",),
    "multi-label": ("sigmoid",),
}
"""Task -> the losses that fit it, see `recipe.Recipe`."""


@dataclass(frozen=True)
class Network:
    """The arguments that a network is built from; the sidecar of a weight file has them.

    Attributes:
        model: one of `MODELS`.
        num_outputs: number of logits, 1 to 30,000.
        in_channels: 1 or 3.
        stem: "imagenet" (the network's own) or, of a ResNet, "small" (3x3, stride 1, no max-pool).
        project_first: PaddleClas's variant of ResNet-18 and -34, see `resnet.ResNet`.

    Raises:
        WeightsError: an unknown model or a value out of range.
    """

    model: str
    num_outputs: int
    in_channels: int = 3
    stem: str = "imagenet"
    project_first: bool = False

    def __post_init__(self) -> None:
        hint = did_you_mean(self.model[:100], MODELS) if isinstance(self.model, str) else ""
        for name, ok, expected in (
            ("model", isinstance(self.model, str) and self.model in MODELS, MODEL_RULE + hint),
            ("num_outputs", type(self.num_outputs) is int and 1 <= self.num_outputs <= MAX_OUTPUTS, _OUTPUTS),
            ("in_channels", type(self.in_channels) is int and self.in_channels in (1, 3), "1 or 3"),
            ("stem", self.stem in STEMS, " or ".join(STEMS)),
            ("project_first", type(self.project_first) is bool, "true or false"),
        ):
            if not ok:
                raise WeightsError(f"network {name}: {reprlib.repr(getattr(self, name))}; expected {expected}")
        if self.stem == "small" and MODELS[self.model] != "resnet":
            raise WeightsError(f"network stem: 'small'; expected imagenet for {self.model}: only a ResNet has another")

    def build(self) -> Layer:
        """Builds the network with random weights: x (N, in_channels, H, W) float32 -> logits (N, num_outputs)."""
        return builder(self.model)(self)

    def to_json(self) -> dict:
        """Returns the fields as a dictionary."""
        return asdict(self)


def model_names() -> list[str]:
    """Returns the names that `--model` accepts, sorted."""
    return sorted(MODELS)


def builder(model: str) -> Callable[[Network], Layer]:
    """Returns the function that builds a network, by its name in `MODELS`; imports Paddle."""
    module = importlib.import_module(f"paddle_medcls.models.architectures.{MODELS[model]}")
    return module.VisionNetwork if MODELS[model] == "vision" else getattr(module, model)
