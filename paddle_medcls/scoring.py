"""Evaluates a trained model on a split: all that `eval` prints and writes, as one function."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from paddle_medcls.calibration import threshold_for
from paddle_medcls.data import dataset_module, default_root, load_index
from paddle_medcls.data.check import not_leaked
from paddle_medcls.data.index import Index
from paddle_medcls.data.statistics import scan
from paddle_medcls.errorpage import write_error_page
from paddle_medcls.errors import DataError, RecipeError, RunError
from paddle_medcls.modelcard import known_recipe, overrides
from paddle_medcls.outputs import calibrate, score_split, write_outputs
from paddle_medcls.predict import Predictor
from paddle_medcls.recipe import Recipe
from paddle_medcls.report import DRAWN_NOTICE, class_table, confusion_table, summary
from paddle_medcls.sidecar import Sidecar, find_model


@dataclass(frozen=True)
class EvalOptions:
    """What is done in an evaluation.

    Attributes:
        batch_size, workers: images at a time, and threads that read them.
        calibrate: first fit the temperature on the validation split, and keep it in the sidecar.
        sensitivity: with `calibrate`, two classes: also choose the threshold that reaches it there, in (0, 1].
        prevalence: two classes: also PPV and NPV at this prevalence, in (0, 1).
        without_leaks: also the metrics without images that the training split has, exactly or nearly.
        output: folder for metrics.json, predictions and pictures; None: nothing is written.
        errors: with `output`: errors.html with so many images a section; 0: no such page.
    """

    batch_size: int = 32
    workers: int = 2
    calibrate: bool = False
    sensitivity: float | None = None
    prevalence: float | None = None
    without_leaks: bool = False
    output: Path | None = None
    errors: int = 0


@dataclass(frozen=True)
class Evaluation:
    """A model's answers for a split.

    Attributes:
        weights: the file.
        card: its sidecar, after a calibration the new one.
        index: the split; logits: (N, outputs) of its images.
        clean: rows that the training split does not have, if that was asked for.
        prevalence: for PPV and NPV.
    """

    weights: Path
    card: Sidecar
    index: Index
    logits: np.ndarray
    clean: tuple[int, ...] | None = None
    prevalence: float | None = None

    @cached_property
    def metrics(self) -> dict:
        """As in `metrics.json`, see `metrics.evaluate_logits`."""
        return score_split(self.logits, self.index, self.card.head)

    @cached_property
    def metrics_without_leaks(self) -> dict | None:
        """The same for the images that the training split does not have; None if that was not asked for."""
        if self.clean is None:
            return None
        return score_split(self.logits[list(self.clean)], self.index.subset(self.clean), self.card.head)

    def table(self) -> str:
        """The metrics as people read them, beside the published ones."""
        recipe = known_recipe(self.card)
        targets = recipe.targets if recipe else ()
        parts = [DRAWN_NOTICE] if self.index.drawn or self.card.drawn else []
        parts.append(class_table(self.metrics))
        if "confusion" in self.metrics:
            parts.append(confusion_table(self.metrics))
        parts.append(summary(self.metrics, targets, self.prevalence))
        if changes := _recipe_changes(self.weights, self.card):
            parts.append(f"differs from recipe {self.card.recipe}: {'; '.join(changes)}")
        if self.clean is not None and self.metrics_without_leaks is not None:
            left_out = len(self.index) - len(self.clean)
            parts.append(f"without the {left_out} images that are in the training split as well:")
            parts.append(summary(self.metrics_without_leaks, targets, self.prevalence))
        return "\n".join(parts)

    def write(self, folder: Path, errors: int = 0) -> None:
        """Writes metrics.json, the predictions and pictures; with `errors` above 0 also errors.html."""
        card, index = self.card, self.index
        write_outputs(folder, self.logits, index, card, self.metrics)
        if errors:
            title = f"Errors of {card.recipe} ({card.network.model}) on {card.dataset}, {index.split}"
            write_error_page(
                folder / "errors.html", index, card.head.probabilities(self.logits), card.head, title, errors
            )


def evaluate(
    model: str | Path | Predictor,
    split: str | None = None,
    data_root: str | Path | None = None,
    options: EvalOptions | None = None,
    weights: Path | None = None,
) -> Evaluation:
    """Evaluates a model on a split.

    Args:
        model: a weight file, an export, a folder that holds one, or an opened Predictor.
        split: "train", "val" or "test"; None: test where the data set has one, else val.
        data_root: folder of the images; None: the run's that the weights lie in, else the data set's default.
        options: see `EvalOptions`.
        weights: the file that a Predictor was opened from.

    Raises:
        RunError: options that do not fit the model; found before any image is read.
        DataError: images or lists that cannot be read; no positive image to choose a threshold with.
        WeightsError: see `Predictor.from_weights`; logits that are not finite.
    """
    options = options or EvalOptions()
    if not isinstance(model, Predictor):
        weights = find_model(Path(model))
        model = Predictor.from_weights(weights)
    weights = weights or Path()
    card = model.card
    check_options(card, options)
    root = Path(data_root) if data_root else _run_data_root(weights) or default_root(card.dataset)
    split = split or dataset_module(card.dataset).SPLITS[-1]
    needed = {split} | ({"val"} if options.calibrate else set()) | ({"train"} if options.without_leaks else set())
    lists = {name: load_index(card.dataset, root, name, card.labels) for name in sorted(needed)}
    if options.sensitivity is not None:
        labels = lists["val"].labels
        threshold_for(np.zeros(len(labels)), labels, options.sensitivity)  # without positives there is none
    logits = {name: _logits(model, lists[name], options) for name in sorted({split} | (needed - {"train"}))}
    if options.calibrate:
        card = calibrate(weights, card, logits["val"], lists["val"], options.sensitivity, options.output)
    clean = None
    if options.without_leaks:
        clean = tuple(int(row) for row in not_leaked(lists["train"], lists[split], options.workers))
    found = Evaluation(weights, card, lists[split], logits[split], clean, options.prevalence)
    if options.output is not None:
        found.write(options.output, options.errors)
    return found


def check_options(card: Sidecar, options: EvalOptions) -> None:
    """Refuses options that do not fit a model, before work begins.

    Raises:
        RunError: a sensitivity or a prevalence for other than two classes, or a calibration of an export.
    """
    for name in ("sensitivity", "prevalence"):
        if getattr(options, name) is not None and card.task != "binary":
            raise RunError(
                f"--{name} needs two classes",
                expected=f"a binary model; this one is {card.task}: {', '.join(card.classes)}",
                do=f"leave --{name} out",
            )
    if options.sensitivity is not None and not options.calibrate:
        raise RunError("a sensitivity is reached by calibration alone", do="give --calibrate too")
    if options.calibrate and card.form:
        raise RunError("an export has a model card of its own", do="calibrate the weights, export again")


def _logits(model: Predictor, index: Index, options: EvalOptions) -> np.ndarray:
    try:
        return model.split_logits(index, options.batch_size, options.workers)
    except DataError:
        scan(index, max(1, options.workers), model.card.preprocessing.channels)  # names all unreadable images at once
        raise


def _recipe_changes(weights: Path, card: Sidecar) -> list[str]:
    """Where the run that the weights lie in left the recipe that their sidecar names."""
    try:
        recipe = Recipe.from_file(weights.parent / "recipe.json")
    except RecipeError:
        return []
    try:
        environment = dict(json.loads((weights.parent / "environment.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        environment = {}
    return overrides(card, recipe, environment) if recipe.name == card.recipe else []


def _run_data_root(weights: Path) -> Path | None:
    """The data root of the run directory that the weights lie in, if it is one."""
    try:
        return Path(json.loads((weights.parent / "data.json").read_text(encoding="utf-8"))["data_root"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
