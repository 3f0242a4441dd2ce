"""Recipes: every `Recipe` in a module here is found by its name.

A MedMNIST recipe serves every MedMNIST set: `get_recipe` fits it to the set and the network.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil

from paddle_medcls.data.medmnist import NAMES
from paddle_medcls.errors import RecipeError
from paddle_medcls.recipe import Recipe
from paddle_medcls.recipes import medmnist


def all_recipes() -> dict[str, Recipe]:
    """Every recipe of the project by its name."""
    found = {}
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"paddle_medcls.recipes.{info.name}")
        found.update({value.name: value for value in vars(module).values() if isinstance(value, Recipe)})
    return found


def get_recipe(name: str, dataset: str | None = None, model: str | None = None) -> Recipe:
    """The recipe of this name; a data set's own recipe has the data set's name.

    Args:
        name: of a recipe or of a data set.
        dataset: for a MedMNIST recipe, the set that it is for (default: PathMNIST).
        model: another network than the recipe's; the published figures follow it.
    """
    recipes = all_recipes()
    if name in NAMES:
        name, dataset = "medmnist", dataset or name
    if name not in recipes:
        near = difflib.get_close_matches(name, recipes, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise RecipeError(f"unknown recipe {name!r}{hint}", expected=", ".join(sorted(recipes)))
    recipe = recipes[name]
    if recipe.dataset in NAMES and (dataset is None or dataset in NAMES):
        return medmnist.for_dataset(recipe, dataset or recipe.dataset, model or recipe.model)
    return recipe.replace(model=model) if model else recipe
