"""The plan of a grid: which trainings a suite of recipes, sets, networks and seeds has, and where each is.

A cell is one recipe with one seed, in its own folder below the output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from paddle_medcls.core.errors import DataError, RecipeError, RunError, did_you_mean
from paddle_medcls.core.files import read_json
from paddle_medcls.data.datasets import default_root
from paddle_medcls.data.datasets.medmnist import NAMES, file_in, file_of
from paddle_medcls.data.datasets.medmnist_cards import CARDS
from paddle_medcls.models.network import model_names
from paddle_medcls.recipes import get_recipe
from paddle_medcls.recipes.recipe import Recipe

SUITES: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "medmnist": (("medmnist",), tuple(CARDS), ("resnet18", "resnet50")),
    "palm": (("palm_tutorial", "palm"), (), ()),
    "covid": (("covid", "covid_best"), (), ()),
    "oct": (("oct",), (), ()),
}
"""Recipes, sets and networks of each suite; an empty tuple: the recipe's own."""

WITHOUT = "without_"
"""Begins the name of the data root of a split without a source, see `covid.hold_out_source`: another training."""


@dataclass(frozen=True)
class Cell:
    """One training of a grid; `folder` is its run directory."""

    recipe: Recipe
    data_root: Path
    folder: Path

    @property
    def name(self) -> str:
        """The folder's name, as messages and the table use it."""
        return self.folder.name

    def result(self) -> dict | None:
        """Its `cell.json`; None until it is finished."""
        try:
            row = read_json(self.folder / "cell.json")
            if not isinstance(row, dict):
                raise ValueError("not an object")
            return row
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise RunError(
                f"{self.name}: cell.json cannot be read: {error}", fix="remove it to score the cell again"
            ) from None


@dataclass(frozen=True)
class Grid:
    """The trainings of a grid.

    Attributes:
        suite: a name in SUITES.
        seeds: number of seeds, from 0.
        recipes: names; empty: the suite's.
        sets: MedMNIST sets, also in short form ("breast"); empty: the suite's.
        models: networks; empty: the suite's.
        epochs: shorter or longer runs; decay points keep their share. None: the recipe's.
    """

    suite: str
    seeds: int = 3
    recipes: Sequence[str] = ()
    sets: Sequence[str] = ()
    models: Sequence[str] = ()
    epochs: int | None = None


def plan(grid: Grid, output: Path, data_root: Path | None = None) -> list[Cell]:
    """The cells of a grid: first all with seed 0, then all with seed 1, and so on.

    Args:
        output: folder below which each cell has its own.
        data_root: None: each set's default.

    Raises:
        RecipeError: an unknown recipe, set or network, or sets for a suite that has one.
    """
    names, own_sets, own_models = SUITES[grid.suite]
    for name in grid.models:
        if name not in model_names():
            hint = did_you_mean(name, model_names())
            raise RecipeError(f"unknown model {name!r}{hint}", expected=", ".join(model_names()))
    if grid.sets and not own_sets:
        raise RecipeError(f"the suite {grid.suite} has one data set", fix="leave --sets out")
    cells = []
    for seed in range(grid.seeds):
        for name in grid.recipes or names:
            for dataset in [_full_name(text) for text in grid.sets] or own_sets or (None,):
                for model in grid.models or own_models or (None,):
                    recipe = get_recipe(name, dataset, model).replace(seed=seed)
                    if dataset not in (None, recipe.dataset):
                        raise RecipeError(f"recipe {name} is for {recipe.dataset}, not for {dataset}")
                    recipe = recipe.with_epochs(grid.epochs) if grid.epochs else recipe
                    root = data_root or default_root(recipe.dataset)
                    split = f"-{root.name}" if root.name.startswith(WITHOUT) else ""
                    folder = output / f"{recipe.name}-{recipe.dataset}-{recipe.model}{split}-seed{seed}"
                    cells.append(Cell(recipe, root, folder))
    return cells


def _full_name(text: str) -> str:
    flag, _, side = text.partition("_")
    longer = f"{flag}mnist_{side}" if side else f"{flag}mnist"
    return longer if text not in NAMES and longer in NAMES else text


def present(cells: Sequence[Cell]) -> tuple[list[Cell], list[str]]:
    """The cells whose MedMNIST file exists or that are finished, and the sets without a file.

    Raises:
        DataError: there is no file at all.
    """
    sets = {cell.recipe.dataset: cell.data_root for cell in cells}
    absent = [name for name, root in sets.items() if not file_in(root, name).exists()]
    available = [cell for cell in cells if cell.recipe.dataset not in absent or cell.result() is not None]
    if not available:
        raise DataError(
            f"no file of {len(absent)} MedMNIST set(s)",
            path=next(iter(sets.values())),
            items=[file_of(name) for name in absent],
            fix="add --download, which fetches them; or --sets breast,retina for some of them, or --data-root",
        )
    return available, absent
