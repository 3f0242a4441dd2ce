"""Cross-validation: a recipe trained once for each fold of the training images, each in its own run directory.

`DIR/fold1`, `DIR/fold2`, … are ordinary runs. A finished one is not run again, an interrupted one is resumed: the same
command continues. At the end `DIR` itself holds `predictions_val.csv` (each training image, predicted by the one model
that was not trained on it), `metrics.json`, and pictures. Commands that take a weight file take `DIR`: the average of
the models.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from paddle_medcls.core.errors import DataError, RunError, Stopped
from paddle_medcls.core.files import locked_folder, write_json
from paddle_medcls.data.datasets import default_root, is_own, load_index, weights_name
from paddle_medcls.data.image_list import CSV, ImageList, read_image_list
from paddle_medcls.data.index import Index
from paddle_medcls.evaluation import calibration, outputs, plots, tables
from paddle_medcls.evaluation.predictions import read_predictions
from paddle_medcls.models.output_head import TINY, OutputHead
from paddle_medcls.models.sidecar import Sidecar, sidecar_of
from paddle_medcls.recipes import get_recipe
from paddle_medcls.recipes.recipe import Recipe
from paddle_medcls.training import run_directory
from paddle_medcls.training.checkpoint import FILE
from paddle_medcls.training.distributed import from_first, join
from paddle_medcls.training.interruption import resume_command
from paddle_medcls.training.jobs import LOCK, Job, options_of_job
from paddle_medcls.training.loop import Options, Run, train
from paddle_medcls.training.parallel import Parallel, run_jobs
from paddle_medcls.training.resume import refuse_other_recipe


@dataclass(frozen=True)
class CrossValidation:
    """A finished cross-validation.

    Attributes:
        directory: holds the folds' run directories; `load_predictor`, `evaluate` and `export` take it as one model.
        runs: of the folds, in order.
        metrics: of the out-of-fold predictions of all training images, as in `metrics.json`; also `folds`: the metrics
            of each fold on its own images, with their `mean` and `sd`; `chosen`: see `choice`. Empty in all processes
            but the first.
    """

    directory: Path
    runs: list[Run]
    metrics: dict

    def table(self) -> str:
        """The metrics of each fold, their mean and standard deviation, and those of all images together."""
        return tables.fold_table(self.metrics)


def train_folds(
    recipe: Recipe | str,
    folds: int,
    data_root: str | Path | ImageList | None = None,
    output: str | Path | None = None,
    options: Options = Options(),  # noqa: B008  it is frozen
    parallel: Parallel | None = None,
) -> CrossValidation:
    """Trains a recipe on each fold of a cross-validation of the training images, or continues an interrupted one.

    The folds are stratified, and images of one patient are in one fold; they do not depend on the recipe's seed. The
    data set's own validation and test images are not used; of own images all but a given test split are.

    Args:
        recipe: what to train, or its name.
        folds: their number, 2 to 100.
        data_root: see `train`.
        options: see `train`.
        output: directory of the cross-validation. None: a new one below `runs/`.
        parallel: trains several folds at a time; None: one after the other, in this process. A program of your own
            that uses it needs `if __name__ == "__main__":` around its work: other processes import it.

    Raises:
        MedclsError: see `train`; a class with too few images or patients; a directory that holds another run or folds
            of another recipe.
    """
    recipe = get_recipe(recipe) if isinstance(recipe, str) else recipe
    root = data_root or default_root(recipe.dataset)
    recipes = [recipe.unfitted().replace(folds=folds, fold=fold) for fold in range(1, folds + 1)]
    rank, world = join()
    directory = Path(from_first(lambda: str(output or run_directory.new_run_directory(recipe)), rank, world))
    if (directory / "recipe.json").exists():
        raise RunError(f"{directory} already holds a run", fix="give another --output")
    for one in recipes:
        refuse_other_recipe(_fold_directory(directory, one), one, options)
    again = resume_command(directory)
    if parallel:
        if world > 1:
            raise RunError("several folds at a time cannot have several processes each", fix="leave --processes out")
        there, images = options_of_job(options), root.folder if isinstance(root, ImageList) else Path(root)
        jobs = [
            Job(run_dir, images, recipe.epochs, _train_fold, (one, root, run_dir, there, (rank, world)))
            for one in recipes
            if not run_directory.is_finished(run_dir := _fold_directory(directory, one))
        ]
        _train_at_once(jobs, parallel, options, directory, again)
        options = replace(options, say=lambda line: None)  # all are finished now, and only read
    runs = []
    for one in recipes:
        try:
            runs.append(_train_fold(one, root, _fold_directory(directory, one), options, (rank, world)))
        except Stopped:
            raise Stopped(f"interrupted in fold {one.fold} of {folds}; state saved; resume with: {again}") from None
    metrics = _summarise(directory, recipe, root, runs) if rank == 0 else {}
    return CrossValidation(directory, runs, metrics)


def _fold_directory(directory: Path, recipe: Recipe) -> Path:
    return directory / f"fold{recipe.fold}"


def _train_at_once(jobs: list[Job], parallel: Parallel, options: Options, directory: Path, again: str) -> None:
    """Trains folds, several at a time; those that do not fail are finished, and then the first error is raised."""
    errors = {}
    with locked_folder(directory, "trains these folds", LOCK):
        try:
            for job, error in run_jobs(jobs, parallel, options, directory) if jobs else ():
                errors[job.name] = error
        except Stopped as stopped:
            raise Stopped(f"{stopped.what}; resume with: {again}") from None
    failures = [f"{name}: {error}" for name, error in errors.items() if error]
    if failures:
        lines = [line for failure in failures for line in failure.splitlines()]
        raise RunError(f"{len(failures)} fold(s) failed", items=lines, fix=f"correct the cause, then: {again}")
    if len(errors) < len(jobs):
        raise Stopped(f"the time is over; the state is saved; resume with: {again}")


def _train_fold(
    recipe: Recipe, root: str | Path | ImageList, run_dir: Path, options: Options, process: tuple[int, int]
) -> Run:
    """Trains or resumes a fold; a finished one is read."""
    rank, world = process
    state = from_first(
        lambda: "finished" if run_directory.is_finished(run_dir) else "begun" * (run_dir / FILE).is_file(), rank, world
    )
    if state == "finished":
        if rank == 0:
            options.say(f"fold {recipe.fold} of {recipe.folds}: finished earlier")
        weights = run_dir / f"{weights_name(recipe.dataset)}.pdparams"
        return Run(run_dir, weights, run_directory.read_metrics(run_dir), run_directory.read_history(run_dir))
    if rank == 0:
        options.say(f"fold {recipe.fold} of {recipe.folds}")
    if state == "begun":
        return train(Recipe.from_file(run_dir / "recipe.json"), root, run_dir, options, resume=True)
    return train(recipe, root, run_dir, options)


def _summarise(directory: Path, recipe: Recipe, root: str | Path | ImageList, runs: list[Run]) -> dict:
    """Writes the out-of-fold predictions of all images, their metrics and pictures; returns the metrics."""
    if is_own(recipe.dataset):
        root = read_image_list(runs[0].directory / CSV).for_folds()
    index = replace(load_index(recipe.dataset, root, "train", recipe.labels), split="val")
    probs, folds = _out_of_fold(index, runs)
    sidecars = [Sidecar.read(sidecar_of(run.weights)) for run in runs]
    threshold = statistics.mean(sidecar.threshold for sidecar in sidecars)
    head = OutputHead(index.task, recipe.loss, index.classes, threshold=threshold)
    metrics = outputs.score_split(head.logits_of(probs), index, head)
    metrics |= {"split": "out-of-fold", "monitor": recipe.monitor, **_spread(runs)}
    metrics |= {"chosen": choice(probs, index.labels, head)}
    note = tables.SYNTHETIC_NOTICE if index.synthetic else ""
    title = f"{index.dataset}, out-of-fold: {len(index)} images"
    tables.write_predictions(directory / "predictions_val.csv", index, probs, head.decide(probs), folds)
    if "confusion" in metrics:
        plots.confusion(directory / "confusion_val.png", metrics["confusion"], index.classes, title, note)
    plots.roc(directory / "roc_val.png", probs, index.labels, index.classes, index.task, note)
    plots.fold_curves(directory / "curves.png", [run.history for run in runs], note)
    write_json(directory / "metrics.json", metrics)
    return metrics


def choice(probs: np.ndarray, labels: np.ndarray, head: OutputHead) -> dict:
    """The recipe's `temperature` and, of two classes, `threshold` that fit out-of-fold predictions best.

    Two classes: logistic regression of the label on the logit, see `calibration.fit_logistic`; more classes or labels:
    `calibration.fit_temperature`. A model trained with them on all images has chosen nothing on the images that it is
    evaluated on.

    Args:
        probs: (N, C) at temperature 1.
        labels: (N,), or (N, C) for several labels an image.
    """
    if head.task != "binary":
        return {"temperature": calibration.fit_temperature(head.logits_of(probs), labels, head.loss)}
    (margins,) = np.diff(np.log(probs + TINY)).T
    temperature, threshold = calibration.fit_logistic(margins, labels)
    return {"temperature": temperature, "threshold": threshold}


def _out_of_fold(index: Index, runs: list[Run]) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities (N, C) of all images by the model that was not trained on them, and that model's fold (N,)."""
    row_of = {name: row for row, name in enumerate(index.ids)}
    probs = np.zeros((len(index), len(index.classes)))
    folds = np.zeros(len(index), np.int64)
    for number, run in enumerate(runs, 1):
        found = read_predictions(run.directory / "predictions_val.csv")
        rows = [row_of.get(name, -1) for name in found.ids]
        changed = min(rows) < 0 or found.classes != index.classes or folds[rows].any()
        if changed or not np.array_equal(found.labels, index.labels[rows]):
            raise DataError(
                f"fold {number} was trained on other images or labels than those in the data root now",
                path=found.path,
                fix="restore the images, or train again with another --output",
            )
        probs[rows], folds[rows] = found.probs, number
    if not folds.all():
        missing = [name for name, fold in zip(index.ids, folds) if not fold]
        raise DataError(
            f"{len(missing)} training image(s) are in no fold: they were added later",
            items=missing,
            fix="remove them, or train again with another --output",
        )
    return probs, folds


def _spread(runs: list[Run]) -> dict:
    """`folds`: the metrics of each fold; `mean` and `sd` of them."""
    names = ("loss", *tables.SUMMARY, "calibration_error")
    rows = [
        {"fold": number, "n": run.metrics["n"], "epoch": run.metrics.get("epoch")}
        | {name: run.metrics[name] for name in names if name in run.metrics}
        for number, run in enumerate(runs, 1)
    ]
    columns = {name: [row[name] for row in rows] for name in names if name in rows[0]}
    return {
        "folds": rows,
        "mean": {name: float(np.mean(values)) for name, values in columns.items()},
        "sd": {name: float(np.std(values, ddof=1)) for name, values in columns.items()},
    }
