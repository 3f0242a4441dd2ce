"""Recipes: every `Recipe` in a module here is found by its name."""

from __future__ import annotations

import difflib
import importlib
import pkgutil

from paddle_medcls.errors import RecipeError
from paddle_medcls.recipe import Recipe


def all_recipes() -> dict[str, Recipe]:
    """Every recipe of the project by its name."""
    found = {}
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"paddle_medcls.recipes.{info.name}")
        found.update({value.name: value for value in vars(module).values() if isinstance(value, Recipe)})
    return found


def get_recipe(name: str) -> Recipe:
    """The recipe of this name; a data set's own recipe has the data set's name."""
    recipes = all_recipes()
    if name not in recipes:
        near = difflib.get_close_matches(name, recipes, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise RecipeError(f"unknown recipe {name!r}{hint}", expected=", ".join(sorted(recipes)))
    return recipes[name]
