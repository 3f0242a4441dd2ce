"""Reproduces published results: trains recipes with several seeds and writes a table beside the published one.

A cell is one recipe with one seed, in its own folder below the output. A finished cell holds `cell.json` and
is not run again; an interrupted one is resumed from its `last/`. `results.csv` and `table.md` are rewritten
after every cell, from the `cell.json` files.
"""

from __future__ import annotations

import contextlib
import csv
import statistics
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from paddle_medcls.core.errors import DataError, MedclsError, RecipeError, RunError, SetupError, Stopped, did_you_mean
from paddle_medcls.core.files import locked_folder, read_json, write_csv, write_json, write_text
from paddle_medcls.core.progress import progress, say_line
from paddle_medcls.data.datasets import dataset_module, default_root, load_index
from paddle_medcls.data.datasets.medmnist import NAMES, file_in, file_of
from paddle_medcls.data.datasets.medmnist_cards import CARDS
from paddle_medcls.data.duplicates import not_leaked
from paddle_medcls.evaluation.evaluate import evaluate_split
from paddle_medcls.evaluation.metrics import auc
from paddle_medcls.evaluation.outputs import score_split, write_outputs
from paddle_medcls.evaluation.predictions import read_predictions
from paddle_medcls.models.network import model_names
from paddle_medcls.models.sidecar import Sidecar, sidecar_of
from paddle_medcls.models.weights import load_strict, read_weights
from paddle_medcls.preprocessing.loader import ImageDataset
from paddle_medcls.recipes import get_recipe
from paddle_medcls.recipes.recipe import Recipe
from paddle_medcls.training.checkpoint import FILE
from paddle_medcls.training.jobs import LOCK, Job, options_of_job
from paddle_medcls.training.loop import Options, train
from paddle_medcls.training.parallel import Parallel, interrupted_in, run_jobs
from paddle_medcls.training.reproduction_table import Row, table
from paddle_medcls.training.resume import refuse_other_recipe

SUITES: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "medmnist": (("medmnist",), tuple(CARDS), ("resnet18", "resnet50")),
    "palm": (("palm_tutorial", "palm"), (), ()),
    "covid": (("covid", "covid_best"), (), ()),
    "oct": (("oct",), (), ()),
}
"""Recipes, sets and networks of each suite; an empty tuple: the recipe's own."""

WITHOUT = "without_"
"""Begins the name of the data root of a split without a source, see `covid.hold_out_source`: another training."""

RESULTS: tuple[str, ...] = ("recipe", "dataset", "model", "seed", "epochs", "best_epoch", "split", "n", "auc")
RESULTS += ("accuracy", "n_clean", "auc_clean", "accuracy_clean", "parameters", "minutes", "note")


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


def run_grid(
    cells: Sequence[Cell], output: Path, options: Options, parallel: Parallel | None = None
) -> tuple[list[Cell], dict[str, str]]:
    """Runs the cells that are not finished; stops after `options.deadline`.

    A cell that fails does not stop the others, unless the fault is the machine's, such as a full disk.

    Args:
        parallel: runs several at a time; None: one after the other, in this process.

    Returns:
        The cells that remain, and the error of each that failed, by its name.

    Raises:
        MedclsError: data or a recipe that cannot be used; another command runs this grid; interrupted (`Stopped`).
    """
    for cell in cells:
        refuse_other_recipe(cell.folder, cell.recipe, options)
    for root, dataset in dict.fromkeys((cell.data_root, cell.recipe.dataset) for cell in cells if not cell.result()):
        load_index(dataset, root, dataset_module(dataset).SPLITS[-1])  # unreadable data stop the grid at once
    failures: dict[str, str] = {}
    with locked_folder(output, "runs this grid", LOCK):
        remaining = [cell for cell in cells if cell.result() is None]
        try:
            with contextlib.closing(_ends(tuple(remaining), len(cells), output, options, parallel)) as ends:
                for cell, error in ends:
                    if error:
                        failures[cell.name] = error
                        say_line(f"{cell.name}: {error}")
                    else:
                        remaining.remove(cell)
                        write_tables(cells, output)
        except Stopped:
            write_tables(cells, output)
            raise
        write_tables(cells, output)
    return remaining, failures


def _ends(
    cells: Sequence[Cell], total: int, output: Path, options: Options, parallel: Parallel | None
) -> Generator[tuple[Cell, str], None, None]:
    """Runs cells; gives each that has ended, with the message of its error or ""."""
    if parallel and cells:
        there = options_of_job(options)
        cell_of = {
            Job(cell.folder, cell.data_root, cell.recipe.epochs, _run_cell, (cell, there)): cell for cell in cells
        }
        for job, error in run_jobs(tuple(cell_of), parallel, options, output):
            yield cell_of[job], error
        return
    with progress(None, "grid", total, "run") as bar:
        bar.update(total - len(cells))
        for cell in cells:
            bar.set_description(cell.name)
            if time.monotonic() > options.deadline:
                return
            error = ""
            try:
                _run_cell(cell, replace(options, say=partial(_say, cell.name)))
            except Stopped:
                if time.monotonic() > options.deadline:
                    return
                raise interrupted_in([cell.name]) from None
            except SetupError:
                raise  # the others would meet it too
            except MedclsError as fault:
                error = f"{type(fault).__name__}: {fault}"
            bar.update()
            yield cell, error


def _say(name: str, line: str) -> None:
    """Prints a run's line above the progress bars, with the run's name."""
    say_line(f"{name}: {line}")


def _run_cell(cell: Cell, options: Options) -> None:
    """Trains or resumes a cell, then scores the data set's last split (test, where there is one)."""
    recipe, folder = cell.recipe, cell.folder
    interrupted = (folder / FILE).is_file()
    if interrupted:
        recipe = Recipe.from_file(folder / "recipe.json")
    trained = train(recipe, cell.data_root, folder, options, resume=interrupted)
    split = dataset_module(recipe.dataset).SPLITS[-1]
    sidecar = Sidecar.read(sidecar_of(trained.weights))
    model = sidecar.network.build()
    load_strict(model, read_weights(trained.weights), trained.weights)
    index = load_index(recipe.dataset, cell.data_root, split, recipe.labels)
    images = ImageDataset(index, sidecar.preprocessing)
    logits = evaluate_split(model, images, recipe.batch_size, options.workers, sidecar.flips)
    result = score_split(logits, index, sidecar.head)
    write_outputs(folder / split, logits, index, sidecar, result)
    row = {
        "recipe": recipe.name,
        "dataset": recipe.dataset,
        "model": recipe.model,
        "seed": recipe.seed,
        "epochs": recipe.epochs,
        "best_epoch": trained.metrics["epoch"],
        "split": split,
        "n": result["n"],
        "auc": result["auc"],
        "accuracy": result["accuracy"],
        "parameters": sum(int(p.size) for p in model.parameters() if not p.stop_gradient),
        "minutes": _minutes(folder),
        "note": "synthetic images" if index.synthetic else index.note,
    }
    write_json(folder / "cell.json", row)


def _minutes(folder: Path) -> float:
    """Training time: the median epoch times their number, so that pauses and restarts do not count."""
    with open(folder / "timing.csv", encoding="utf-8") as file:
        seconds = {row["epoch"]: float(row["epoch_seconds"]) for row in csv.DictReader(file)}
    return statistics.median(seconds.values()) * len(seconds) / 60


def score_without_leaks(cells: Sequence[Cell], workers: int) -> None:
    """Adds to each finished cell its metrics without images of which training has a copy or near copy.

    Args:
        cells: of the grid; those that have these metrics are left as they are.
    """
    clean_ids: dict[tuple[Path, str, str], set[str]] = {}
    for cell in cells:
        row, recipe = cell.result(), cell.recipe
        if row is None or "n_clean" in row:
            continue
        key = cell.data_root, recipe.dataset, recipe.labels
        if key not in clean_ids:
            train, scored = (
                load_index(recipe.dataset, cell.data_root, name, recipe.labels) for name in ("train", row["split"])
            )
            clean_ids[key] = {scored.ids[k] for k in not_leaked(train, scored, workers)}
        predictions = read_predictions(cell.folder / row["split"])
        rows = [k for k, name in enumerate(predictions.ids) if name in clean_ids[key]]
        row["n_clean"] = len(rows)
        row["auc_clean"] = float(auc(predictions.probs[rows], predictions.labels[rows], predictions.task))
        row["accuracy_clean"] = float((predictions.guesses[rows] == predictions.labels[rows]).mean())
        write_json(cell.folder / "cell.json", row)


def write_tables(cells: Sequence[Cell], output: Path) -> str:
    """Writes `results.csv` and `table.md`; returns the table."""
    results = [result for cell in cells if (result := cell.result()) is not None]
    write_csv(output / "results.csv", RESULTS, [[row.get(name) for name in RESULTS] for row in results])
    text = table([Row(cell.name, cell.recipe, cell.result()) for cell in cells])
    write_text(output / "table.md", text)
    return text
