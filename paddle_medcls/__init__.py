"""Medical image classification in PaddlePaddle: five published tutorials, reproduced, and your trained model in use.

    import paddle_medcls as medcls

    run = medcls.train("palm", data_root="datasets/palm", output="runs/palm")
    print(medcls.evaluate(run.weights).table())
    print(medcls.load_predictor(run.weights).predict("eye.jpg").label)

The public names are those of `__all__`. Each is imported when it is first used, so `import paddle_medcls` itself loads
neither NumPy nor Paddle.

For research and teaching. Not a medical device; not for diagnosis.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what an editor completes
    from paddle_medcls.core.errors import MedclsError as MedclsError
    from paddle_medcls.data.datasets import dataset_names as dataset_names
    from paddle_medcls.data.datasets import load_dataset as load_dataset
    from paddle_medcls.data.duplicates import check_images as check_images
    from paddle_medcls.data.own_images import own_images as own_images
    from paddle_medcls.deployment.export import export as export
    from paddle_medcls.deployment.heatmaps import heat_maps as heat_maps
    from paddle_medcls.deployment.predictor import load_predictor as load_predictor
    from paddle_medcls.deployment.scoring import EvalOptions as EvalOptions
    from paddle_medcls.deployment.scoring import evaluate as evaluate
    from paddle_medcls.models.create import create_model as create_model
    from paddle_medcls.models.network import model_names as model_names
    from paddle_medcls.preprocessing.statistics import image_statistics as image_statistics
    from paddle_medcls.recipes import all_recipes as all_recipes
    from paddle_medcls.recipes import get_recipe as get_recipe
    from paddle_medcls.recipes.recipe import Recipe as Recipe
    from paddle_medcls.training.folds import train_folds as train_folds
    from paddle_medcls.training.loop import train as train
    from paddle_medcls.training.session import Options as Options

__version__ = "0.2.0"

_SOURCES = {
    # data
    "dataset_names": "data.datasets",
    "load_dataset": "data.datasets",
    "own_images": "data.own_images",
    "check_images": "data.duplicates",
    "image_statistics": "preprocessing.statistics",
    # networks and recipes
    "model_names": "models.network",
    "create_model": "models.create",
    "all_recipes": "recipes",
    "get_recipe": "recipes",
    "Recipe": "recipes.recipe",
    # training and evaluation
    "train": "training.loop",
    "train_folds": "training.folds",
    "Options": "training.session",
    "evaluate": "deployment.scoring",
    "EvalOptions": "deployment.scoring",
    # a trained model in use
    "load_predictor": "deployment.predictor",
    "heat_maps": "deployment.heatmaps",
    "export": "deployment.export",
    "MedclsError": "core.errors",
}
"""Public name -> the module that defines it."""

__all__ = [*_SOURCES]  # noqa: PLE0604


def __getattr__(name: str) -> object:
    if name not in _SOURCES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_SOURCES[name]}"), name)
    globals()[name] = value  # the next use is an ordinary one
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
