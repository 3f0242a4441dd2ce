"""Networks: every function in the `__all__` of a module here is one, called by its name."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from paddle_medcls.errors import RecipeError, did_you_mean
from paddle_medcls.recipe import Recipe

if TYPE_CHECKING:
    from paddle.nn import Layer

_HELPERS = {"accelerate", "dnnl", "layouts", "onednn", "pretrained", "weights"}


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
    fitting = {"binary": ("softmax", "sigmoid"), "multi-label": ("sigmoid",)}.get(task, ("softmax",))
    if recipe.loss not in fitting:
        fault = f"{recipe.name}: loss={recipe.loss} does not fit a {task} task"
        raise RecipeError(fault, expected=" or ".join(fitting))
    one = recipe.loss == "sigmoid" and task == "binary"
    return Network(recipe.model, 1 if one else num_classes, recipe.preprocessing.num_channels, recipe.stem)
