"""Networks: every function in the `__all__` of a module here is one, called by its name."""

from __future__ import annotations

import importlib
import pkgutil
import re
import reprlib
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from paddle_medcls.errors import RecipeError, WeightsError, did_you_mean
from paddle_medcls.recipe import CHOICES, Recipe

if TYPE_CHECKING:
    from paddle.nn import Layer

_HELPERS = {"accelerate", "dnnl", "layouts", "onednn", "pretrained", "weights"}


MAX_OUTPUTS = 30_000  # ImageNet-22k has 21,841 classes
_OUTPUTS = f"a number of 1 to {MAX_OUTPUTS}"
LOSSES = {
    "binary": ("softmax", "sigmoid"),
    "multi-class": ("softmax",),
    "ordinal": ("softmax",),
    "multi-label": ("sigmoid",),
}
"""Task -> the losses that fit it."""


@dataclass(frozen=True)
class Network:
    """What must be known to build a network again; it travels with the weights.

    Attributes:
        model: "resnet18" … "resnet152".
        num_outputs: logits.
        in_channels: 1 or 3.
        stem: "imagenet" (7x7, stride 2, max-pool) or "small" (3x3, stride 1).
        project_first: PaddleClas's variant of ResNet-18 and -34, see `resnet.ResNet`.
    """

    model: str
    num_outputs: int
    in_channels: int = 3
    stem: str = "imagenet"
    project_first: bool = False

    def __post_init__(self) -> None:
        for name, ok, expected in (
            ("model", type(self.model) is str and re.fullmatch("[a-z][a-z0-9_]{0,49}", self.model), "a model's name"),
            ("num_outputs", type(self.num_outputs) is int and 1 <= self.num_outputs <= MAX_OUTPUTS, _OUTPUTS),
            ("in_channels", type(self.in_channels) is int and self.in_channels in (1, 3), "1 or 3"),
            ("stem", self.stem in CHOICES["stem"], " or ".join(CHOICES["stem"])),
            ("project_first", type(self.project_first) is bool, "true or false"),
        ):
            if not ok:
                raise WeightsError(f"network {name}: {reprlib.repr(getattr(self, name))}; expected {expected}")

    def build(self) -> Layer:
        """The network with random weights: x (N, in_channels, H, W) float32 -> logits (N, num_outputs)."""
        known = builders()
        if self.model not in known:
            hint = did_you_mean(self.model, known)
            raise RecipeError(f"unknown model {self.model!r}{hint}", expected=", ".join(sorted(known)))
        return known[self.model](self)

    def to_json(self) -> dict:
        return asdict(self)


def model_names() -> list[str]:
    """Names that `--model` takes."""
    return sorted(builders())


def builders() -> dict:
    """Name of each model -> the function that makes it of a `Network`."""
    found: dict = {}
    for info in pkgutil.iter_modules(__path__):
        if info.name not in _HELPERS:
            module = importlib.import_module(f"paddle_medcls.models.{info.name}")
            found.update({name: getattr(module, name) for name in module.__all__})
    return found


def network_for(recipe: Recipe, num_classes: int, task: str) -> Network:
    """The network of a recipe: a sigmoid binary task has one output, every other one a class."""
    fitting = LOSSES[task]
    if recipe.loss not in fitting:
        fault = f"{recipe.name}: loss={recipe.loss} does not fit a {task} task"
        raise RecipeError(fault, expected=" or ".join(fitting))
    one = recipe.loss == "sigmoid" and task == "binary"
    return Network(recipe.model, 1 if one else num_classes, recipe.preprocessing.num_channels, recipe.stem)
