"""What is known about a trained model besides its sidecar: its run directory, its recipe, the card of its data set."""

from __future__ import annotations

import contextlib
import csv
from pathlib import Path

from paddle_medcls.core.errors import DataError
from paddle_medcls.core.files import MAX_JSON_BYTES, read_bounded, read_json
from paddle_medcls.data.datasets import dataset_module, medmnist
from paddle_medcls.data.image_list import JSON, read_facts
from paddle_medcls.models.sidecar import Sidecar
from paddle_medcls.recipes import find_recipe, get_recipe, own
from paddle_medcls.recipes.recipe import Recipe


def run_facts(weights: Path, sidecar: Sidecar, parameters: int | None = None) -> dict:
    """What is known about the making of a weight file, from the run directory that it lies in.

    Args:
        parameters: of the network, where they are counted already.

    Returns:
        `parameters`: number of trainable values of the network; and, where the folder is that of the run and has them,
        `recipe`, `data`, `environment`, `metrics`, `images`: its JSON files; `seconds`: what its epochs took together.
    """
    files = {name: run_file(weights, name) for name in ("recipe", "data", "environment", "metrics")}
    facts: dict = {name: values for name, values in files.items() if values}
    try:
        timing = read_bounded(weights.parent / "timing.csv", MAX_JSON_BYTES).decode("utf-8")
        facts["seconds"] = sum(float(row["epoch_seconds"]) for row in csv.DictReader(timing.splitlines()))
    except (OSError, ValueError, TypeError, KeyError):
        pass
    with contextlib.suppress(DataError):  # not of own images, or damaged
        facts["images"] = read_facts(weights.parent / JSON)
    recipe = facts.get("recipe", {})
    if (recipe.get("name"), recipe.get("dataset")) != (sidecar.recipe, sidecar.dataset):
        facts = {}
    if parameters is None:
        parameters = sum(int(p.size) for p in sidecar.network.build().parameters() if not p.stop_gradient)
    return {"parameters": parameters, **facts}


def run_file(weights: Path, name: str) -> dict:
    """`<name>.json` of the run directory that a weight file lies in; {} if there is none that can be read."""
    try:
        values = read_json(weights.parent / f"{name}.json")
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def dataset_card(name: str) -> tuple[dict[str, str], list[str]]:
    """What is known about a data set: `title`, `what`, `licence`, … as in the table of its card, and its known faults.

    Of a MedMNIST set only its own: its line of `data.medmnist_cards`, and the faults that name it.
    Both are empty for an unknown set.
    """
    try:
        module = dataset_module(name)
    except DataError:
        return {}, []
    rows, faults = dict(getattr(module, "ABOUT", {})), list(getattr(module, "KNOWN_FAULTS", ()))
    if name not in medmnist.NAMES:
        return rows, faults
    card, side = medmnist.card_of(name)
    rows |= {"title": name, "what": f"{card.what}, {side} × {side} pixels (MedMNIST v2)", "licence": card.licence}
    rows["splits"] = "train / val / test: " + " / ".join(f"{count:,}" for count in card.counts)
    return rows, [fault for fault in faults if card.flag in fault.lower()]


def overrides(sidecar: Sidecar, recipe: Recipe, environment: dict) -> list[str]:
    """Where a run's recipe differs from the one it names: as the run wrote it; compared now for runs of version 0.1."""
    recorded = environment.get("overrides")
    return [str(line) for line in recorded] if isinstance(recorded, list) else recipe_changes(sidecar, recipe)


def recipe_changes(sidecar: Sidecar, recipe: Recipe) -> list[str]:
    """Where a run's recipe differs from the project's of the same name: "epochs: 50 → 8"."""
    known = known_recipe(sidecar)
    hidden = {"targets", "pretrained", *(("mean", "std") if recipe.statistics == "train" else ())}
    hidden |= {*own.ADAPTED} if recipe.name == own.OWN.name else set()
    facts = [] if known is None else known.differences(recipe)
    return [line.replace(" -> ", " → ") for line in facts if line.partition(":")[0] not in hidden]


def known_recipe(sidecar: Sidecar) -> Recipe | None:
    """The project's recipe that a sidecar names, for its data set and network."""
    return get_recipe(sidecar.recipe, sidecar.dataset, sidecar.network.model) if find_recipe(sidecar.recipe) else None
