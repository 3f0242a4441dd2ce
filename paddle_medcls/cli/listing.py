"""Lists of names: `--recipe list`, `--model list`, `--dataset list`, `--set list`."""

from __future__ import annotations

import sys


def show(kind: str) -> int:
    """Prints all names of a kind, one per line, and returns the exit code: 1 if a recipe file is faulty.

    Args:
        kind: "recipe", "model", "dataset" or "field".
    """
    lines = {"recipe": _recipes, "model": _models, "dataset": _datasets, "field": _fields}[kind]()
    width = max(len(name) for name, _ in lines)
    for name, text in lines:
        print(f"{name:<{width}}  {text}")
    if kind != "recipe":
        return 0
    from paddle_medcls.recipes import read_recipes

    _, faults = read_recipes()
    for fault in faults:
        print(f"{type(fault).__name__}: {fault}", file=sys.stderr)
    return 1 if faults else 0


def _recipes() -> list[tuple[str, str]]:
    from paddle_medcls.recipes import read_recipes

    recipes, _ = read_recipes()
    return [(name, f"{one.dataset}, {one.model}: {one.source}") for name, one in sorted(recipes.items())]


def _models() -> list[tuple[str, str]]:
    from paddle_medcls.models.network import MODELS, PARAMETERS

    origin = {"vision": "paddle.vision"}
    return [
        (name, f"{count / 1e6:5.1f} million parameters, {origin.get(MODELS[name], 'this package')}")
        for name, count in PARAMETERS.items()
    ]


def _datasets() -> list[tuple[str, str]]:
    from paddle_medcls.data.datasets import dataset_module, dataset_names

    return [(name, _of_dataset(name, dataset_module(name))) for name in dataset_names()]


def _of_dataset(name: str, module) -> str:
    if not hasattr(module, "card_of"):
        return _first_line(module)
    dataset_card, side = module.card_of(name)
    return f"{dataset_card.what}, {side} x {side} pixels, {dataset_card.task}"


def _fields() -> list[tuple[str, str]]:
    """Type, default and allowed values of each field of a recipe, in the order of the record."""
    from dataclasses import MISSING, fields

    from paddle_medcls.recipes.recipe import CHOICES, Recipe

    lines = []
    for field in fields(Recipe):
        default = "required" if field.default is MISSING else f"default {field.default!r}"
        allowed = f"; one of {', '.join(CHOICES[field.name])}" if field.name in CHOICES else ""
        lines.append((field.name, f"{field.type}; {default}{allowed}"))
    return lines


def _first_line(thing) -> str:
    return (thing.__doc__ or "").strip().split("\n")[0]
