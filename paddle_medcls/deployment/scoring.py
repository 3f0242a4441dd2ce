"""`evaluate`: scores a trained model on a split, as the command `eval` does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from paddle_medcls.core.errors import DataError, RecipeError, RunError
from paddle_medcls.data.datasets import default_root, is_own, load_index, splits_of
from paddle_medcls.data.duplicates import not_leaked
from paddle_medcls.data.image_list import CSV, ImageList, read_image_list
from paddle_medcls.data.index import Index
from paddle_medcls.deployment.predictor import Predictor, load_predictor
from paddle_medcls.deployment.robustness import robustness, robustness_table
from paddle_medcls.evaluation.by_source import source_table
from paddle_medcls.evaluation.calibration import threshold_for
from paddle_medcls.evaluation.conformal import (
    SET_METHODS,
    calibrate_sets,
    check_coverage,
    coverage_report,
    coverage_table,
    require_calibration,
)
from paddle_medcls.evaluation.error_report import write_error_page
from paddle_medcls.evaluation.metrics import clusters_of
from paddle_medcls.evaluation.model_facts import known_recipe, overrides, run_file
from paddle_medcls.evaluation.outputs import calibrate, keep_calibration, score_split, write_outputs
from paddle_medcls.evaluation.predictions import Predictions
from paddle_medcls.evaluation.selective import errors_of, passed_report, passed_table
from paddle_medcls.evaluation.tables import SYNTHETIC_NOTICE, choice_of_epoch, class_table, confusion_table, summary
from paddle_medcls.models.sidecar import Sidecar
from paddle_medcls.preprocessing.statistics import image_statistics
from paddle_medcls.recipes.recipe import Recipe


@dataclass(frozen=True)
class EvalOptions:
    """How a model is evaluated.

    Attributes:
        batch_size: images at a time.
        workers: threads that read images.
        calibrate: first fit the temperature on the validation split, and the thresholds of prediction sets on half of
            the evaluated split; write them to the sidecar.
        sets: with `calibrate`: how, one of `conformal.SET_METHODS`; None: "lac". Multi-label models have no sets.
        coverage: evaluate prediction sets for it, 0.5 to 0.99; None: for 0.9 after a calibration, else not.
        sensitivity: with `calibrate`, two classes: also choose the threshold that reaches it there, in (0, 1].
        prevalence: two classes: also PPV and NPV at this prevalence, in (0, 1).
        without_leaks: also the metrics without the images of which the training split has a copy or near copy.
        output: folder for metrics.json, predictions and pictures; None: nothing is written.
        robustness: also evaluate corrupted images, see `deployment.robustness`.
        errors: with `output`: errors.html with so many images a section; 0: no such page.
    """

    batch_size: int = 32
    workers: int = 2
    calibrate: bool = False
    sets: str | None = None
    coverage: float | None = None
    sensitivity: float | None = None
    prevalence: float | None = None
    without_leaks: bool = False
    output: str | Path | None = None
    errors: int = 0
    robustness: bool = False


@dataclass(frozen=True)
class Evaluation:
    """A model's results on a split.

    Attributes:
        weights: the model's file; None for a Predictor that was not opened from one.
        sidecar: of the model; after a calibration the new one.
        index: the split.
        logits: (N, outputs) of its images.
        clean_rows: rows of which the training split has no copy; None if that was not asked for.
        prevalence: for PPV and NPV.
        coverage: of the prediction sets that `metrics` describes; None: it does not.
        novelty: (N,) of the images, where the model scores it.
        robustness: of corrupted images; None if that was not asked for.
    """

    weights: Path | None
    sidecar: Sidecar
    index: Index
    logits: np.ndarray
    clean_rows: tuple[int, ...] | None = None
    prevalence: float | None = None
    coverage: float | None = None
    novelty: np.ndarray | None = None
    robustness: dict | None = None

    @cached_property
    def probs(self) -> np.ndarray:
        """Probabilities (N, C) of the images."""
        return self.sidecar.head.probabilities(self.logits)

    @cached_property
    def metrics(self) -> dict:
        """As in `metrics.json`, see `outputs.score_split`; `prediction_sets`: see `conformal.coverage_report`.

        `novelty`: see `selective.passed_report`.
        """
        result = score_split(self.logits, self.index, self.sidecar.head)
        if self.coverage is not None:
            result["prediction_sets"] = coverage_report(
                self.probs, self.index, self.sidecar.prediction_sets, self.coverage
            )
        if self.novelty is not None:
            errors = errors_of(self.index.labels, self.sidecar.head.decide(self.probs))
            limit = self.sidecar.novelty["limit"]
            result["novelty"] = passed_report(self.novelty, limit, errors, clusters_of(self.index.groups))
        if self.robustness is not None:
            result["robustness"] = self.robustness
        return result

    @cached_property
    def metrics_without_leaks(self) -> dict | None:
        """The metrics without images that the training split has too; None if that was not asked for."""
        if self.clean_rows is None:
            return None
        rows = list(self.clean_rows)
        return score_split(self.logits[rows], self.index.subset(rows), self.sidecar.head)

    @property
    def predictions(self) -> Predictions:
        """Labels, predicted classes and probabilities of the images, as `significance.compare` takes them."""
        head, index = self.sidecar.head, self.index
        path, guesses = self.weights or Path("predictions"), head.decide(self.probs)
        return Predictions(path, list(index.ids), index.labels, guesses, self.probs, tuple(index.classes), index.groups)

    def table(self) -> str:
        """The metrics as text, beside the published ones."""
        recipe = known_recipe(self.sidecar)
        targets = recipe.targets if recipe and self.index.dataset == self.sidecar.dataset else ()
        parts = [SYNTHETIC_NOTICE] if self.index.synthetic or self.sidecar.drawn else []
        parts.append(class_table(self.metrics))
        if "confusion" in self.metrics:
            parts.append(confusion_table(self.metrics))
        parts.append(summary(self.metrics, targets, self.prevalence))
        if len(self.metrics.get("by_source", ())) > 1:
            parts.append(source_table(self.metrics["by_source"]))
        if "monitor" in self.sidecar.metrics:
            parts.append(choice_of_epoch(self.sidecar.metrics))
        if "prediction_sets" in self.metrics:
            parts.append(coverage_table(self.metrics["prediction_sets"]))
        if "novelty" in self.metrics:
            parts.append(passed_table(self.metrics["novelty"]))
        if self.robustness is not None:
            parts.append(robustness_table(self.robustness))
        if self.weights and (changes := _recipe_changes(self.weights, self.sidecar)):
            parts.append(f"differs from recipe {self.sidecar.recipe}: {'; '.join(changes)}")
        if self.clean_rows is not None and self.metrics_without_leaks is not None:
            left_out = len(self.index) - len(self.clean_rows)
            parts.append(f"without the {left_out} images that are in the training split as well:")
            parts.append(summary(self.metrics_without_leaks, targets, self.prevalence))
        return "\n".join(parts)

    def write(self, folder: str | Path, errors: int = 0) -> None:
        """Writes metrics.json, the predictions and pictures.

        Args:
            errors: above 0: also errors.html, with so many images a section.
        """
        folder, sidecar, index = Path(folder), self.sidecar, self.index
        write_outputs(folder, self.logits, index, sidecar, self.metrics)
        if self.robustness is not None:
            from paddle_medcls.evaluation import plots  # here: matplotlib takes half a second to import

            title = f"{sidecar.dataset}, {index.split}: corrupted images"
            plots.robustness(folder / f"robustness_{index.split}.png", self.robustness, title)
        if errors:
            title = f"Errors of {sidecar.recipe} ({sidecar.network.model}) on {sidecar.dataset}, {index.split}"
            write_error_page(folder / "errors.html", index, self.probs, sidecar.head, title, errors)


def evaluate(
    weights: str | Path | Sequence[str | Path] | Predictor,
    split: str | None = None,
    data_root: str | Path | ImageList | None = None,
    options: EvalOptions = EvalOptions(),  # noqa: B008  it is frozen
) -> Evaluation:
    """Evaluates a model on a split.

    Args:
        weights: a weight file, an export, a folder that holds one, or an opened Predictor; several files, or the
            folder of a cross-validation: their average.
        split: "train", "val" or "test"; None: test where the data set has one, else val.
        data_root: folder of the images; None: the one that the run was trained on, else the data set's default. For
            images of another origin what `own_images` gives; their classes are found by name.

    Raises:
        RunError: options that do not fit the model; found before any image is read.
        DataError: images or split files that cannot be read; no positive image to choose a threshold with.
        WeightsError: see `load_predictor`; logits that are not finite.
    """
    predictor = weights if isinstance(weights, Predictor) else load_predictor(weights)
    path, sidecar = predictor.path, predictor.sidecar
    check_options(sidecar, options)
    if options.calibrate and predictor.members:
        raise RunError(
            "an average of models is not calibrated",
            fix="calibrate each model: the average uses their temperatures and the mean of their thresholds",
        )
    if options.calibrate and path is None:
        raise RunError("a calibration is written beside the weight file", fix="pass the file, not a Predictor")
    root = _images(data_root, predictor.members[0].path if predictor.members else path, sidecar)
    split = split or (root.names if isinstance(root, ImageList) else splits_of(sidecar.dataset, root))[-1]
    if predictor.members and data_root is None and isinstance(root, ImageList) and split != "test":
        raise RunError(
            f"the models of this average were trained on images of the split {split}",
            expected="a test split, or other images (--data-root)",
            fix="the out-of-fold predictions of all images are in predictions_val.csv of the cross-validation",
        )
    scored = {split} | ({"val"} if options.calibrate else set())
    needed = scored | ({"train"} if options.without_leaks else set())
    dataset = "folder" if isinstance(root, ImageList) and not is_own(sidecar.dataset) else sidecar.dataset
    indexes = {name: load_index(dataset, root, name, sidecar.labels) for name in sorted(needed)}
    if options.sensitivity is not None:
        labels = indexes["val"].labels
        threshold_for(np.zeros(len(labels)), labels, options.sensitivity)  # fails now if there is no positive image
    scores = {name: _outputs(predictor, indexes[name], options) for name in sorted(scored)}
    logits = {name: found[0] for name, found in scores.items()}
    output = Path(options.output) if options.output is not None else None
    if path is not None and options.calibrate:
        sidecar = calibrate(sidecar, logits["val"], indexes["val"], options.sensitivity, output)
        if sidecar.task != "multi-label" and split != "train":
            probs = sidecar.head.probabilities(logits[split])
            sidecar = replace(sidecar, prediction_sets=calibrate_sets(probs, indexes[split], options.sets or "lac"))
        sidecar = keep_calibration(path, sidecar)
    coverage = options.coverage
    if coverage is None and options.calibrate and sidecar.prediction_sets:
        coverage = 0.9
    report = None
    if options.robustness:
        report = robustness(predictor, indexes[split], sidecar.head, options.batch_size)
    clean_rows = None
    if options.without_leaks:
        clean_rows = tuple(int(row) for row in not_leaked(indexes["train"], indexes[split], options.workers))
    found = logits[split], clean_rows, options.prevalence, coverage, scores[split][1], report
    result = Evaluation(path, sidecar, indexes[split], *found)
    if output is not None:
        result.write(output, options.errors)
    return result


def check_options(sidecar: Sidecar, options: EvalOptions) -> None:
    """Refuses options that do not fit a model, before work begins.

    Raises:
        RunError: a sensitivity or a prevalence for other than two classes, a calibration of an export, prediction
            sets of several labels, of another coverage, or without a calibration.
    """
    for name in ("sensitivity", "prevalence"):
        if getattr(options, name) is not None and sidecar.task != "binary":
            raise RunError(
                f"--{name} needs two classes",
                expected=f"a binary model; this one is {sidecar.task}: {', '.join(sidecar.classes)}",
                fix=f"leave --{name} out",
            )
    if options.sensitivity is not None and not options.calibrate:
        raise RunError("a sensitivity is reached by calibration alone", fix="give --calibrate too")
    if sidecar.task == "multi-label" and (options.sets or options.coverage is not None):
        raise RunError(
            "prediction sets need images of one class each",
            expected=f"a binary, multi-class or ordinal model; this one is {sidecar.task}",
            fix="leave --sets and --coverage out",
        )
    if options.sets and not options.calibrate:
        raise RunError("the thresholds of prediction sets are chosen by calibration alone", fix="give --calibrate too")
    if options.sets and options.sets not in SET_METHODS:
        raise RunError(f"unknown prediction sets {options.sets!r}", expected=", ".join(SET_METHODS))
    if options.coverage is not None:
        check_coverage(options.coverage)
        if not options.calibrate:
            require_calibration(sidecar.prediction_sets)
    if options.calibrate and sidecar.form:
        raise RunError("an export cannot be calibrated", fix="calibrate the weights, export again")


def _outputs(predictor: Predictor, index: Index, options: EvalOptions) -> tuple[np.ndarray, np.ndarray | None]:
    try:
        return predictor.split_outputs(index, options.batch_size, options.workers)
    except DataError:
        # the reader stops at the first unreadable image; this names all of them
        image_statistics(index, max(1, options.workers), predictor.sidecar.preprocessing.channels)
        raise


def _recipe_changes(weights: Path, sidecar: Sidecar) -> list[str]:
    """Settings in which the run directory of these weights differs from the recipe that the sidecar names."""
    try:
        recipe = Recipe.from_file(weights.parent / "recipe.json")
    except RecipeError:
        return []
    return overrides(sidecar, recipe, run_file(weights, "environment")) if recipe.name == sidecar.recipe else []


def _images(data_root: str | Path | ImageList | None, path: Path | None, sidecar: Sidecar) -> Path | ImageList:
    """The data root that a model is evaluated on; of own images their list, with the classes of the model."""
    if not isinstance(data_root, ImageList) and not is_own(sidecar.dataset):
        return Path(data_root or (path and _run_data_root(path)) or default_root(sidecar.dataset))
    of_run = path.parent / CSV if path is not None and (path.parent / CSV).is_file() else None
    if not isinstance(data_root, ImageList):
        moved = data_root if data_root and Path(data_root).is_dir() else None
        source = of_run if moved or not data_root else data_root
        if source is None:
            raise DataError(
                "the images and splits of this model are not known: images.csv of its run is not beside it",
                path=path,
                fix="--data-root RUN/images.csv; to evaluate all images of a folder: --dataset folder --data-root DIR",
            )
        data_root = read_image_list(source, moved)
    return data_root.matched(sidecar.classes, sidecar.task)


def _run_data_root(weights: Path) -> Path | None:
    """The data root in the run directory of these weights; None outside a run directory."""
    root = run_file(weights, "data").get("data_root")
    return Path(root) if isinstance(root, str) else None
