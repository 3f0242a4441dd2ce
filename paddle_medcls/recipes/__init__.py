"""Recipes: every `Recipe` in a module here is found by its name.

A recipe's name begins with its module's, so that a fault in one module stops its own recipes alone. A MedMNIST
recipe serves every MedMNIST set: `get_recipe` fits it to the set and the network.
"""

from __future__ import annotations

import importlib
import pkgutil

from paddle_medcls.data.medmnist import NAMES
from paddle_medcls.errors import RecipeError, did_you_mean
from paddle_medcls.recipe import Recipe


def all_recipes() -> dict[str, Recipe]:
    """Every recipe of the project by its name.

    Raises:
        RecipeError: a module that cannot be imported.
    """
    found, faults = read_recipes()
    if faults:
        raise faults[0]
    return found


def read_recipes() -> tuple[dict[str, Recipe], list[RecipeError]]:
    """The recipes of all modules that can be imported, by name, and the faults of the others."""
    found: dict[str, Recipe] = {}
    faults = []
    for module in _modules():
        try:
            found |= _recipes_of(module)
        except RecipeError as error:
            faults.append(error)
    return found, faults


def find_recipe(name: str) -> Recipe | None:
    """The recipe of this name as its module has it, or None.

    Raises:
        RecipeError: the module that the name points to cannot be imported.
    """
    for module in _modules():
        if name == module or name.startswith(f"{module}_"):
            found = _recipes_of(module)
            if name in found:
                return found[name]
    return None


def get_recipe(name: str, dataset: str | None = None, model: str | None = None) -> Recipe:
    """The recipe of this name; a data set's own recipe has the data set's name.

    Args:
        name: of a recipe or of a data set.
        dataset: for a MedMNIST recipe, the set that it is for (default: PathMNIST).
        model: another network than the recipe's; the published figures follow it.
    """
    if name in NAMES:
        name, dataset = "medmnist", dataset or name
    recipe = find_recipe(name)
    if recipe is None:
        found, faults = read_recipes()
        raise RecipeError(
            f"unknown recipe {name!r}{did_you_mean(name, found)}",
            expected=", ".join(sorted(found)),
            items=[fault.what for fault in faults],
        )
    if recipe.dataset in NAMES and (dataset is None or dataset in NAMES):
        from paddle_medcls.recipes import medmnist

        return medmnist.for_dataset(recipe, dataset or recipe.dataset, model or recipe.model)
    return recipe.replace(model=model) if model else recipe


def _modules() -> list[str]:
    return [info.name for info in pkgutil.iter_modules(__path__)]


def _recipes_of(module: str) -> dict[str, Recipe]:
    try:
        values = vars(importlib.import_module(f"{__name__}.{module}")).values()
    except RecipeError as error:
        raise RecipeError(f"recipes/{module}.py: {error.what}", do="mend this file") from error
    except Exception as error:  # the file is code: a fault in it can be any
        raise RecipeError(f"recipes/{module}.py: {type(error).__name__}: {error}", do="mend this file") from error
    return {value.name: value for value in values if isinstance(value, Recipe)}
