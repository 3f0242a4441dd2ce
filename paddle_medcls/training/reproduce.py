"""Reproduces published results: trains recipes with several seeds and writes a table beside the published one.

A finished cell (see `grid`) holds `cell.json` and
is not run again; an interrupted one is resumed from its `last/`. `results.csv` and `table.md` are rewritten
after every cell, from the `cell.json` files.
"""

from __future__ import annotations

import contextlib
import csv
import json
import statistics
import time
from collections.abc import Generator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from paddle_medcls.core.errors import DataError, MedclsError, SetupError, Stopped
from paddle_medcls.core.files import locked_folder, write_csv, write_json, write_text
from paddle_medcls.core.progress import progress, say_line
from paddle_medcls.data.datasets import dataset_module, load_index
from paddle_medcls.data.duplicates import not_leaked
from paddle_medcls.evaluation.evaluate import evaluate_split
from paddle_medcls.evaluation.metrics import auc
from paddle_medcls.evaluation.outputs import score_split, write_outputs
from paddle_medcls.evaluation.predictions import read_predictions
from paddle_medcls.models.sidecar import Sidecar, sidecar_of
from paddle_medcls.models.weights import load_strict, read_weights
from paddle_medcls.preprocessing.loader import ImageDataset
from paddle_medcls.recipes.recipe import Recipe
from paddle_medcls.training.checkpoint import FILE
from paddle_medcls.training.grid import Cell
from paddle_medcls.training.jobs import LOCK, Job, options_of_job
from paddle_medcls.training.loop import Options, train
from paddle_medcls.training.parallel import Parallel, interrupted_in, run_jobs
from paddle_medcls.training.reproduction_table import Row, table
from paddle_medcls.training.resume import read_facts, refuse_other_recipe

TRAINED = ("train", "val")
"""Splits that a training reads."""

RESULTS: tuple[str, ...] = ("recipe", "dataset", "model", "seed", "epochs", "best_epoch", "split", "n", "auc")
RESULTS += ("accuracy", "n_clean", "auc_clean", "accuracy_clean", "parameters", "minutes", "note")


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
        refuse_mixed_images(cells)
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


def refuse_mixed_images(cells: Sequence[Cell]) -> None:
    """Refuses a mean over seeds whose runs had different images, as on machines with copies of their own.

    Raises:
        DataError: names the runs.
    """
    groups: dict[tuple, dict[str, list[str]]] = {}
    for cell in cells:
        if cell.result() is not None and (cell.folder / "data.json").is_file():
            facts = read_facts(cell.folder)
            images = json.dumps([[facts[split][name] for name in ("fingerprint", "per_image")] for split in TRAINED])
            group = groups.setdefault((cell.recipe.name, cell.recipe.dataset, cell.recipe.model), {})
            group.setdefault(images, []).append(cell.name)
    for group in groups.values():
        if len(group) > 1:
            raise DataError(
                "runs of one row of the table had different images",
                items=[", ".join(names) for names in group.values()],
                fix="compare the images of the machines, remove the runs with wrong ones, and run the command again",
            )


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
