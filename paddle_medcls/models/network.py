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

MODELS = {
    **dict.fromkeys(("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"), "resnet"),
    "vgg16": "vgg",
}
"""Name of each network -> its architecture: the module in `architectures/` whose `__all__` has a function of that name.

The names are listed here so that a sidecar can be checked without importing Paddle.
"""

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
        stem: "imagenet" (7x7, stride 2, max-pool) or "small" (3x3, stride 1).
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
            ("model", isinstance(self.model, str) and self.model in MODELS, ", ".join(sorted(MODELS)) + hint),
            ("num_outputs", type(self.num_outputs) is int and 1 <= self.num_outputs <= MAX_OUTPUTS, _OUTPUTS),
            ("in_channels", type(self.in_channels) is int and self.in_channels in (1, 3), "1 or 3"),
            ("stem", self.stem in STEMS, " or ".join(STEMS)),
            ("project_first", type(self.project_first) is bool, "true or false"),
        ):
            if not ok:
                raise WeightsError(f"network {name}: {reprlib.repr(getattr(self, name))}; expected {expected}")

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
    return getattr(importlib.import_module(f"paddle_medcls.models.architectures.{MODELS[model]}"), model)
