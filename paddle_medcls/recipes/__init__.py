"""The recipes of the project, found by name: every `Recipe` in a module of this folder.

A recipe's name begins with its module's name, so a fault in one module disables only the recipes of that module. A
MedMNIST recipe serves every MedMNIST data set: `get_recipe` adapts it to the data set and the network.
"""

from __future__ import annotations

import importlib
import pkgutil

from paddle_medcls.core.errors import RecipeError, did_you_mean
from paddle_medcls.data.datasets import own as own_data
from paddle_medcls.data.datasets.medmnist import NAMES
from paddle_medcls.data.image_list import ImageList
from paddle_medcls.recipes.recipe import Recipe


def all_recipes() -> dict[str, Recipe]:
    """All recipes of the project, by name.

    Raises:
        RecipeError: a module cannot be imported.
    """
    recipes, faults = read_recipes()
    if faults:
        raise faults[0]
    return recipes


def read_recipes() -> tuple[dict[str, Recipe], list[RecipeError]]:
    """The recipes of all modules that can be imported, by name, and the faults of the others."""
    recipes: dict[str, Recipe] = {}
    faults = []
    for module in _modules():
        try:
            recipes |= _recipes_of(module)
        except RecipeError as error:
            faults.append(error)
    return recipes, faults


def find_recipe(name: str) -> Recipe | None:
    """The recipe of this name as its module defines it, or None.

    Raises:
        RecipeError: the module that the name begins with cannot be imported.
    """
    for module in _modules():
        if name == module or name.startswith(f"{module}_"):
            recipes = _recipes_of(module)
            if name in recipes:
                return recipes[name]
    return None


def get_recipe(name: str, dataset: str | ImageList | None = None, model: str | None = None) -> Recipe:
    """The recipe of this name; a data set's default recipe has the data set's name.

    Args:
        name: a recipe or a data set.
        dataset: for a MedMNIST recipe, the data set to adapt it to (default: PathMNIST); "folder" or "table": any
            recipe for own images; for the recipe `own` also the images, to adapt it to them.
        model: another network than the recipe's; the published results follow it.

    Raises:
        RecipeError: there is no such recipe, or its module cannot be imported.
    """
    if isinstance(dataset, ImageList):
        from paddle_medcls.recipes import own

        adapted = get_recipe(name, "folder", model)
        return own.for_images(adapted, dataset.index("train")) if adapted.name == own.OWN.name else adapted
    if name in NAMES:
        name, dataset = "medmnist", dataset or name
    if name in own_data.NAMES:
        name, dataset = "own", dataset or name
    recipe = find_recipe(name)
    if recipe is None:
        recipes, faults = read_recipes()
        raise RecipeError(
            f"unknown recipe {name!r}{did_you_mean(name, recipes)}",
            expected=", ".join(sorted(recipes)),
            items=[fault.what for fault in faults],
        )
    if recipe.dataset in NAMES and (dataset is None or dataset in NAMES):
        from paddle_medcls.recipes import medmnist

        return medmnist.for_dataset(recipe, dataset or recipe.dataset, model or recipe.model)
    if dataset in own_data.NAMES:  # the settings of any recipe serve own images; its published results do not
        recipe = recipe.unfitted().replace(dataset=dataset, labels="default", targets=())
    return recipe.unfitted().replace(model=model) if model and model != recipe.model else recipe


def _modules() -> list[str]:
    return [info.name for info in pkgutil.iter_modules(__path__)]


def _recipes_of(module: str) -> dict[str, Recipe]:
    try:
        values = vars(importlib.import_module(f"{__name__}.{module}")).values()
    except RecipeError as error:
        raise RecipeError(f"recipes/{module}.py: {error.what}", fix="correct this file") from error
    except Exception as error:  # the file is code: it can raise any error
        raise RecipeError(f"recipes/{module}.py: {type(error).__name__}: {error}", fix="correct this file") from error
    return {value.name: value for value in values if isinstance(value, Recipe)}
