"""A grid of trainings, and its table beside the published one.

A cell is one recipe with one seed, in a folder of its own below the output. A finished cell holds
`cell.json` and is never run again; a half-done one goes on from its `last/`. `results.csv` and
`table.md` are written anew after every cell, from the `cell.json` files alone.
"""

from __future__ import annotations

import csv
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from paddle_medcls import published
from paddle_medcls.checkpoint import FILE
from paddle_medcls.comparison import read_predictions
from paddle_medcls.data import dataset_module, default_root, load_index, weights_name
from paddle_medcls.data.check import not_leaked
from paddle_medcls.data.medmnist import NAMES, card_of
from paddle_medcls.data.medmnist_cards import CARDS
from paddle_medcls.errors import RecipeError, RunError, Stopped
from paddle_medcls.files import write_csv, write_json, write_text
from paddle_medcls.metrics import auc
from paddle_medcls.predict import Predictor
from paddle_medcls.progress import progress
from paddle_medcls.recipe import Recipe
from paddle_medcls.recipes import get_recipe
from paddle_medcls.rundir import kernels_of, score_split, write_outputs
from paddle_medcls.train import Options, train

SUITES: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "medmnist": (("medmnist",), tuple(CARDS), ("resnet18", "resnet50")),
    "palm": (("palm_tutorial", "palm"), (), ()),
    "covid": (("covid",), (), ()),
}
"""Recipes, sets and networks of each suite; an empty tuple: the recipe's own."""

RESULTS: tuple[str, ...] = ("recipe", "dataset", "model", "seed", "epochs", "best_epoch", "split", "n", "auc")
RESULTS += ("accuracy", "n_clean", "auc_clean", "accuracy_clean", "parameters", "minutes", "note")

RULE = """Verdict: a difference is inside the seed noise if it is at most 2 x sqrt(sd^2 / n + s^2 / m), where sd is
the standard deviation of our n seeds, s that of the published runs (the larger of sd and of what other runs
found, `published.SEED_NOISE`) and m their number: 3 in the paper, whose figures are means of three, else 1.
One seed of a set without known other runs gets no verdict. Differences are ours minus published."""

RUN_HERE = """Recipes beside each other, both run here: difference of the means over seeds; p is that of a permutation
test of the runs. Three seeds against three cannot go below 0.10, four against four below 0.03."""


@dataclass(frozen=True)
class Cell:
    """One training of a grid."""

    recipe: Recipe
    data_root: Path
    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    def result(self) -> dict | None:
        """Its row of the results, once it is finished."""
        try:
            return json.loads((self.folder / "cell.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise RunError(
                f"{self.name}: cell.json cannot be read: {error}", do="remove it to score the cell again"
            ) from None


def plan(
    suite: str,
    output: Path,
    seeds: int,
    recipes: Sequence[str] = (),
    sets: Sequence[str] = (),
    models: Sequence[str] = (),
    epochs: int | None = None,
    data_root: Path | None = None,
) -> list[Cell]:
    """The cells of a grid; one seed of everything comes before the next seed.

    Args:
        suite: a name in SUITES; empty `recipes`, `sets` and `models` take the suite's.
        sets: MedMNIST sets, "breast" for short.
        epochs: shorter or longer runs; decay points keep their share.
        data_root: None: each set's default.
    """
    names, own_sets, own_models = SUITES[suite]
    if sets and not own_sets:
        raise RecipeError(f"the suite {suite} has one data set", do="leave --sets out")
    cells = []
    for seed in range(seeds):
        for name in recipes or names:
            for dataset in [_full_name(text) for text in sets] or own_sets or (None,):
                for model in models or own_models or (None,):
                    recipe = get_recipe(name, dataset, model).replace(seed=seed)
                    if dataset not in (None, recipe.dataset):
                        raise RecipeError(f"recipe {name} is for {recipe.dataset}, not for {dataset}")
                    recipe = recipe.with_epochs(epochs) if epochs else recipe
                    folder = output / f"{recipe.name}-{recipe.dataset}-{recipe.model}-seed{seed}"
                    cells.append(Cell(recipe, data_root or default_root(recipe.dataset), folder))
    return cells


def _full_name(text: str) -> str:
    flag, _, side = text.partition("_")
    longer = f"{flag}mnist_{side}" if side else f"{flag}mnist"
    return longer if text not in NAMES and longer in NAMES else text


def run_grid(cells: Sequence[Cell], output: Path, options: Options) -> list[Cell]:
    """Runs what is not finished yet; stops after `options.deadline`.

    Returns:
        The cells that remain.

    Raises:
        MedclsError: data, a recipe or a run that cannot be used; interrupted (`Stopped`).
    """
    for cell in cells:
        _refuse_other_recipe(cell, options)
    remaining = [cell for cell in cells if cell.result() is None]
    for root, dataset in dict.fromkeys((cell.data_root, cell.recipe.dataset) for cell in remaining):
        load_index(dataset, root, dataset_module(dataset).SPLITS[-1])  # faulty data stop a grid at once
    with progress(None, "grid", len(cells), "run") as bar:
        bar.update(len(cells) - len(remaining))
        for cell in list(remaining):
            bar.set_description(cell.name)
            if time.monotonic() > options.deadline:
                break
            try:
                _run_cell(cell, replace(options, say=_speaker(cell.name, bar.write)))
            except Stopped:
                if time.monotonic() > options.deadline:
                    break
                write_tables(cells, output)
                raise Stopped(f"stopped in {cell.name}; its state is saved", do="run the same command again") from None
            remaining.remove(cell)
            write_tables(cells, output)
            bar.update()
    write_tables(cells, output)
    return remaining


def _speaker(name: str, write: Callable) -> Callable[[str], None]:
    """Lines of a run, above the bars and with the run's name."""
    return lambda line: write(f"{name}: {line}", file=sys.stderr)


def _run_cell(cell: Cell, options: Options) -> None:
    """Trains, or goes on training, then scores the test split (the last one that the set has)."""
    recipe, folder = cell.recipe, cell.folder
    half_done = (folder / FILE).is_file()
    if half_done:
        recipe = Recipe.from_file(folder / "recipe.json")
    else:
        (folder / "timing.csv").unlink(missing_ok=True)  # of a run that ended before its state was saved
    trained = train(recipe, cell.data_root, folder, options, resume=half_done)
    split = dataset_module(recipe.dataset).SPLITS[-1]
    weights = folder / f"{weights_name(recipe.dataset)}.pdparams"
    predictor = Predictor.from_weights(weights)
    index = load_index(recipe.dataset, cell.data_root, split, recipe.labels)
    logits = predictor.split_logits(index, recipe.batch_size, options.workers)
    result = score_split(logits, index, predictor.card.loss, predictor.card.temperature, predictor.card.threshold)
    write_outputs(folder / split, logits, index, predictor.card, result)
    row = {
        "recipe": recipe.name,
        "dataset": recipe.dataset,
        "model": recipe.model,
        "seed": recipe.seed,
        "epochs": recipe.epochs,
        "best_epoch": trained["epoch"],
        "split": split,
        "n": result["n"],
        "auc": result["auc"],
        "accuracy": result["accuracy"],
        "parameters": sum(int(p.size) for p in predictor.model.parameters() if not p.stop_gradient),
        "minutes": _minutes(folder),
        "note": "drawn images" if index.drawn else index.note,
    }
    write_json(folder / "cell.json", row)


def _refuse_other_recipe(cell: Cell, options: Options) -> None:
    """A cell that was begun, or finished, must have been so with the recipe and precision that are asked for now."""
    if not (cell.folder / "recipe.json").exists():
        return
    begun = Recipe.from_file(cell.folder / "recipe.json")
    wanted = cell.recipe
    if wanted.statistics == "train":  # the run has put in what it computed
        wanted = wanted.replace(mean=begun.mean, std=begun.std)
    changes = begun.differences(wanted)
    if (cell.folder / "environment.json").exists():
        kernels, precision = kernels_of(cell.folder)
        if precision != options.precision or options.kernels not in ("auto", kernels):
            changes = [*changes, f"operators: {kernels} {precision} then, {options.kernels} {options.precision} now"]
    if changes:
        raise RunError(
            f"{cell.name} was run with another recipe",
            items=changes,
            where=cell.folder,
            do="go on with the options of then, or give another --output",
        )


def _minutes(folder: Path) -> float:
    """Training time: the median epoch times their number, so that pauses and restarts do not count."""
    with open(folder / "timing.csv", encoding="utf-8") as file:
        seconds = {row["epoch"]: float(row["epoch_seconds"]) for row in csv.DictReader(file)}
    return statistics.median(seconds.values()) * len(seconds) / 60


def score_without_leaks(cells: Sequence[Cell], workers: int) -> None:
    """Adds to each finished cell its figures on the images that training does not have, exactly or nearly."""
    clean: dict[tuple[Path, str, str], set[str]] = {}
    for cell in cells:
        row, recipe = cell.result(), cell.recipe
        if row is None or "n_clean" in row:
            continue
        train, scored = (
            load_index(recipe.dataset, cell.data_root, name, recipe.labels) for name in ("train", row["split"])
        )
        key = cell.data_root, recipe.dataset, recipe.labels
        if key not in clean:
            clean[key] = {scored.ids[k] for k in not_leaked(train, scored, workers)}
        found = read_predictions(cell.folder / row["split"])
        kept = [k for k, name in enumerate(found.ids) if name in clean[key]]
        row["n_clean"] = len(kept)
        row["auc_clean"] = float(auc(found.probs[kept], found.labels[kept], scored.task))
        row["accuracy_clean"] = float((found.guesses[kept] == found.labels[kept]).mean())
        write_json(cell.folder / "cell.json", row)


# --- tables --------------------------------------------------------------------------------------


def write_tables(cells: Sequence[Cell], output: Path) -> str:
    """Writes `results.csv` and `table.md`; returns the table."""
    results = [result for cell in cells if (result := cell.result()) is not None]
    write_csv(output / "results.csv", RESULTS, [[row.get(name) for name in RESULTS] for row in results])
    text = table(cells)
    write_text(output / "table.md", text)
    return text


def table(cells: Sequence[Cell]) -> str:
    """Published and ours, mean and standard deviation over seeds, in Markdown; AUC / accuracy."""
    header = ["set", "network", "recipe", "published", "document", "ours", "seeds", "difference", "verdict"]
    header += ["without leaks", "parameters", "minutes"]
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    notes, missing = set(), []
    groups: dict[tuple[str, str, str], list[Cell]] = {}
    finished: dict[tuple[str, str], dict[str, list[dict]]] = {}  # (set, network) -> recipe -> rows
    for cell in cells:
        groups.setdefault((cell.recipe.dataset, cell.recipe.model, cell.recipe.name), []).append(cell)
    for (dataset, model, name), members in groups.items():
        rows = [row for cell in members if (row := cell.result()) is not None]
        missing += [cell.name for cell in members if cell.result() is None]
        if rows:
            finished.setdefault((dataset, model), {})[name] = rows
            lines.append(_line(members[0].recipe, rows))
            notes |= {f"{dataset}: {row['note']}" for row in rows if row["note"]}
    lines += ["", "Test AUC / accuracy (validation, where a set has no test split); sd over seeds.", RULE]
    lines += [f"- {note}" for note in sorted(notes)]
    beside = [line for (dataset, model), runs in finished.items() for line in _beside(f"{dataset}, {model}", runs)]
    if beside:
        lines += ["", RUN_HERE, *beside]
    if missing:
        lines += ["", f"Not run: {', '.join(missing)}"]
    return "\n".join(lines) + "\n"


def _line(recipe: Recipe, rows: list[dict]) -> str:
    """One line of the table: all seeds of a recipe on a set."""
    split = rows[0]["split"]
    stated = _published(recipe, split)
    document = published.DOCUMENT_002.get((_flag(recipe.dataset), recipe.model)) if recipe.size_px == 28 else None
    noise = published.SEED_NOISE.get(_flag(recipe.dataset), (None, None))
    ours, differences, verdicts = [], [], []
    for metric, figure, s in zip(("auc", "accuracy"), stated, noise):
        values = [row[metric] for row in rows]
        mean = statistics.fmean(values)
        sd = statistics.stdev(values) if len(values) > 1 else None
        ours.append(_spread(values))
        differences.append("–" if figure is None else f"{mean - figure:+.3f}")
        runs = published.PAPER_RUNS if recipe.dataset in NAMES else 1
        verdicts.append(verdict(mean, sd, len(values), figure, s, runs))
    cells = [
        recipe.dataset,
        recipe.model,
        recipe.name,
        _pair(stated),
        _pair(document or (None, None)),
        " / ".join(ours),
        str(len(rows)),
        " / ".join(differences),
        " / ".join(verdicts),
        _without_leaks(rows),
        f"{rows[0]['parameters'] / 1e6:.2f} M",
        f"{statistics.fmean(row['minutes'] for row in rows):.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def _spread(values: Sequence[float]) -> str:
    mean = f"{statistics.fmean(values):.3f}"
    return f"{mean} ± {statistics.stdev(values):.3f}" if len(values) > 1 else mean


def _without_leaks(rows: list[dict]) -> str:
    """AUC / accuracy on the images that training does not have; "–" where that was not asked for."""
    if any("n_clean" not in row for row in rows):
        return "–"
    pair = " / ".join(_spread([row[f"{metric}_clean"] for row in rows]) for metric in ("auc", "accuracy"))
    return f"{pair} ({rows[0]['n_clean']} images)"


def _beside(what: str, runs: dict[str, list[dict]]) -> list[str]:
    """A line for each recipe of a set and network after the first: its difference from the first."""
    (first, base), *others = runs.items()
    lines = []
    for name, rows in others:
        parts = []
        for metric in ("auc", "accuracy"):
            ours, theirs = [row[metric] for row in rows], [row[metric] for row in base]
            difference = statistics.fmean(ours) - statistics.fmean(theirs)
            parts.append(f"{metric} {difference:+.3f} (p {permutation_p(ours, theirs):.3f})")
        lines.append(f"- {what}: {name} - {first}: {', '.join(parts)}; {len(rows)} and {len(base)} seeds")
    return lines


def permutation_p(a: Sequence[float], b: Sequence[float], most: int = 100_000) -> float:
    """Two-sided p of a difference of means: the share of ways to deal the runs that differ as much.

    Args:
        a, b: one figure a run.
        most: beyond this many ways, so many random ones stand for all.
    """
    runs = np.array([*a, *b])
    deals: Iterable = itertools.combinations(range(len(runs)), len(a))
    if math.comb(len(runs), len(a)) > most:
        rng = np.random.default_rng(0)
        deals = (rng.permutation(len(runs))[: len(a)] for _ in range(most))
    sums = np.array([runs[list(chosen)].sum() for chosen in deals])
    differences = sums / len(a) - (runs.sum() - sums) / len(b)
    observed = abs(np.mean(a) - np.mean(b))
    return float(np.mean(abs(differences) >= observed - 1e-12))  # the same runs, added in another order


def verdict(
    mean: float, sd: float | None, n: int, figure: float | None, noise: float | None, figure_runs: int = 1
) -> str:
    """ "inside", "above" or "below" by RULE; "–" where nothing can be said.

    Args:
        mean, sd, n: of our seeds; sd None for a single one.
        figure: published.
        noise: standard deviation of other runs of what was published, if known.
        figure_runs: how many runs the published figure is the mean of.
    """
    if figure is None or (sd is None and noise is None):
        return "–"
    spread = max(sd or 0.0, noise or 0.0)
    limit = 2 * ((sd or spread) ** 2 / n + spread**2 / figure_runs) ** 0.5 + 0.0005  # three digits
    return "inside" if abs(mean - figure) <= limit else "above" if mean > figure else "below"


def _published(recipe: Recipe, split: str) -> tuple[float | None, float | None]:
    """The paper's figures for a MedMNIST set; for another recipe those that it names itself."""
    if recipe.dataset in NAMES and card_of(recipe.dataset)[1] == 28:
        return published.paper(_flag(recipe.dataset), recipe.model, recipe.size_px) or (None, None)
    named = dict(recipe.targets)
    return named.get(f"{split}/auc"), named.get(f"{split}/accuracy")


def _flag(dataset: str) -> str:
    return card_of(dataset)[0].flag if dataset in NAMES else dataset


def _pair(figures: Sequence[float | None]) -> str:
    if all(figure is None for figure in figures):
        return "–"
    return " / ".join("–" if figure is None else f"{figure:.3f}" for figure in figures)
