"""The evidence behind the results: `results/<row>/seed<k>/`, copied from finished runs, and the table made from it.

A row is a recipe on a data set with a network; its folder holds one folder for each seed, with the files of FILES and
the predictions. No weights, no images, no path of a machine. `results/README.md` is made from these files alone, and
accuracy and AUC are computed again from the predictions.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from paddle_medcls.core.errors import RunError
from paddle_medcls.core.files import atomic_write, read_bounded, read_json, write_json, write_text
from paddle_medcls.data.datasets.medmnist import NAMES
from paddle_medcls.evaluation.metrics import accuracy_interval, auc, bootstrap_areas, clusters_of, percentile_interval
from paddle_medcls.evaluation.predictions import Predictions, read_predictions
from paddle_medcls.models.output_head import OutputHead
from paddle_medcls.recipes import get_recipe
from paddle_medcls.recipes.recipe import Recipe
from paddle_medcls.training.grid import WITHOUT, Cell
from paddle_medcls.training.reproduction_table import published_result, verdict

FILES = ("recipe.json", "data.json", "environment.json", "history.csv", "cell.json")
"""From the run directory; `metrics.json` and the predictions are those of the split that is reported."""
METRICS = ("AUC", "accuracy")
MAX_BYTES = 32 << 20
AGAIN = "write the row again with --evidence"
TOLERANCE = 1e-4  # between metrics.json and the predictions, which have eight digits: two logits may become equal

HEADER = """# Results

Each row is made from a folder beside this file: recipe, data (counts and fingerprints of the images), environment,
history of the epochs, metrics and predictions of every seed. Accuracy and AUC are computed from the predictions:
mean ± standard deviation over the seeds, or, for a single seed, with a 95% interval (Wilson; bootstrap of the
images, or of the patients where they are known). "Average" is one model: the mean of the seeds' probabilities.
"Chosen" says which images chose the epoch; where these are the reported ones, the result is optimistic.
Minutes are those of one training, without pauses, on the machine that `environment.json` describes.

The command of a row runs it again and prints both results with a verdict; with `--evidence` it writes the folder
and this page. A row without a folder was not run, or its evidence was not kept.

"""

RULE = """Verdict: as above, with the kept runs in place of the published ones; s of a single kept run is a quarter of
its 95% interval."""


@dataclass(frozen=True)
class Run:
    """The evidence of one training."""

    folder: Path
    recipe: Recipe
    cell: dict  # cell.json
    metrics: dict
    environment: dict
    predictions: Predictions

    @property
    def values(self) -> tuple[float, float]:
        """AUC and accuracy, from the predictions."""
        found = self.predictions
        return float(auc(found.probs, found.labels, found.task)), float((found.guesses == found.labels).mean())


def row_name(recipe: Recipe, data_root: Path) -> str:
    """Name of a row's folder: recipe, data set and network; the epochs, if not the recipe's own; a source held out."""
    parts = [recipe.name, recipe.dataset, recipe.model]
    parts += [f"{recipe.epochs}epochs"] if recipe.epochs != _original(recipe).epochs else []
    parts += [data_root.name] if data_root.name.startswith(WITHOUT) else []
    return "-".join(parts)


def _row_of(cell: Cell) -> str:
    return row_name(cell.recipe, cell.data_root)


def _root_of(row: str) -> Path:
    """The data root that a row's name tells: that of the split without a source."""
    return Path("datasets/covid", "".join(row.rpartition(f"-{WITHOUT}")[1:]).lstrip("-"))


def _original(recipe: Recipe) -> Recipe:
    return get_recipe(recipe.name, recipe.dataset if recipe.dataset in NAMES else None, recipe.model)


def write_evidence(cells: Sequence[Cell], results: Path) -> list[str]:
    """Copies the evidence of finished trainings to `results/<row>/seed<k>/`, and writes `results/README.md`.

    Returns:
        The names of the rows that were written.

    Raises:
        RunError: a row with other settings or other images is there; files that disagree.
    """
    done = [(cell, result) for cell in cells if (result := cell.result()) is not None]
    for cell, _ in done:
        _refuse_other_row(cell, results / _row_of(cell))
    for cell, result in done:
        target = results / _row_of(cell) / f"seed{cell.recipe.seed}"
        for name in FILES:
            _copy(cell.folder / name, target / name)
        split = str(result["split"])
        for name in ("metrics.json", f"predictions_{split}.csv", f"patients_{split}.csv"):
            if (cell.folder / split / name).exists():
                _copy(cell.folder / split / name, target / name)
    if done:
        write_text(results / "README.md", results_page(results))
    return sorted({_row_of(cell) for cell, _ in done})


def _copy(source: Path, target: Path) -> None:
    if source.suffix != ".json":
        try:
            return atomic_write(target, read_bounded(source, MAX_BYTES))
        except OSError as error:
            raise RunError(f"{source.name} of the run cannot be read: {error}", path=source) from None
    values = _object(source)
    values.pop("data_root", None)  # paths of this machine
    if values.get("pretrained"):
        values["pretrained"] = Path(values["pretrained"]).name
    return write_json(target, values)


def _object(path: Path) -> dict:
    try:
        values = read_json(path)
        if not isinstance(values, dict):
            raise ValueError("not an object")
        return values
    except (OSError, ValueError) as error:
        raise RunError(f"{path.name} cannot be read: {error}", path=path) from None


def _refuse_other_row(cell: Cell, row: Path) -> None:
    """All seeds of a row are of one recipe, on the same images."""
    for folder in sorted(row.glob("seed*")):
        there, here = (_settings(path) for path in (folder, cell.folder))
        if there != here:
            names = [name for name in there if there[name] != here.get(name)]
            raise RunError(
                f"{row.name}: {folder.name} has other settings or other images",
                items=names,
                path=row,
                fix="remove this folder, or choose another one with --results",
            )


def _settings(folder: Path) -> dict:
    recipe, data = Recipe.from_file(folder / "recipe.json").to_json(), _object(folder / "data.json")
    prints = {f"images of {name}": of["fingerprint"] for name, of in data.items() if isinstance(of, dict)}
    ignored = ("seed", "source", "targets", "pretrained")
    kernels = _object(folder / "environment.json").get("kernels")
    return {name: value for name, value in recipe.items() if name not in ignored} | prints | {"kernels": kernels}


def read_rows(results: Path) -> dict[str, list[Run]]:
    """The rows of a folder of results, each with its runs in the order of their seeds.

    Raises:
        RunError: files that are missing or damaged, or metrics that the predictions do not give.
    """
    rows: dict[str, list[Run]] = {}
    folders = [folder for folder in results.glob("*/seed*") if folder.name[4:].isdigit()]
    for folder in sorted(folders, key=lambda path: (path.parent.name, int(path.name[4:]))):
        cell, metrics, environment = (_object(folder / f"{name}.json") for name in ("cell", "metrics", "environment"))
        recipe = Recipe.from_file(folder / "recipe.json")
        run = Run(folder, recipe, cell, metrics, environment, read_predictions(folder))
        kept = [of.get(name) for of in (cell, metrics) for name in ("auc", "accuracy")]
        agree = all(isinstance(value, float) for value in kept) and np.allclose(kept, run.values * 2, atol=TOLERANCE)
        name = row_name(run.recipe, _root_of(folder.parent.name))
        if not agree or name != folder.parent.name or folder.name != f"seed{run.recipe.seed}":
            raise RunError(
                f"{folder.parent.name}/{folder.name}: its files disagree",
                items=[
                    f"AUC and accuracy of the predictions {run.values}, of cell.json and metrics.json {kept}",
                    f"row and seed by recipe.json: {name}, {run.recipe.seed}",
                ],
                path=folder,
                fix=AGAIN,
            )
        rows.setdefault(folder.parent.name, []).append(run)
    return rows


def result_text(runs: Sequence[Run]) -> str:
    """ "AUC 0.908 ± 0.008, accuracy 0.851 ± 0.010", or with 95% intervals for a single run."""
    values = list(zip(*(run.values for run in runs)))
    if len(runs) > 1:
        parts = [f"{statistics.fmean(of):.3f} ± {statistics.stdev(of):.3f}" for of in values]
    else:
        parts = [f"{of[0]:.3f} ({low:.3f} to {high:.3f})" for of, (low, high) in zip(values, _intervals(runs[0]))]
    return ", ".join(f"{name} {part}" for name, part in zip(METRICS, parts))


def _intervals(run: Run) -> list[tuple[float, float]]:
    """95% intervals of AUC and accuracy."""
    found = run.predictions
    clusters = clusters_of(found.patients)
    hits = (found.guesses == found.labels).reshape(len(found.labels), -1).mean(axis=1)
    areas = bootstrap_areas(found.probs, found.labels, found.task, clusters)
    return [percentile_interval(areas), accuracy_interval(hits, clusters)]


def average_text(runs: Sequence[Run]) -> str:
    """AUC and accuracy of the mean of the runs' probabilities; "–" for a single run or other images."""
    first = runs[0].predictions
    if len(runs) < 2 or any(run.predictions.ids != first.ids for run in runs):
        return "–"
    probs = np.mean([run.predictions.probs for run in runs], axis=0)
    recipe = runs[0].recipe
    guesses = OutputHead(first.task, recipe.loss, tuple(first.classes), threshold=recipe.threshold).decide(probs)
    values = float(auc(probs, first.labels, first.task)), float((guesses == first.labels).mean())
    return ", ".join(f"{name} {value:.3f}" for name, value in zip(METRICS, values))


def command_of(runs: Sequence[Run]) -> str:
    """The command that runs a row again."""
    recipe, kernels = runs[0].recipe, str(runs[0].environment.get("kernels", ""))
    original = _original(recipe)
    words = ["tools/reproduce.py --suite", "medmnist" if recipe.dataset in NAMES else recipe.dataset]
    words += ["--recipe", recipe.name]
    if recipe.dataset in NAMES:
        words += ["--sets", recipe.dataset, "--models", recipe.model]
    elif recipe.model != get_recipe(recipe.name).model:
        words += ["--models", recipe.model]
    words += ["--seeds", str(len(runs))]
    words += ["--epochs", str(recipe.epochs)] if recipe.epochs != original.epochs else []
    words += ["--precision bf16"] if kernels.endswith("bf16") else []
    words += ["--kernels paddle"] if kernels == "paddle" and runs[0].environment.get("device") == "cpu" else []
    if WITHOUT in (row := runs[0].folder.parent.name):
        words += ["--data-root", _root_of(row).as_posix()]
    return " ".join(words)


def _chosen(runs: Sequence[Run]) -> str:
    """What the epoch was chosen on."""
    recipe, split = runs[0].recipe, runs[0].cell["split"]
    if recipe.monitor == "last":
        fitted = recipe != recipe.unfitted()
        return "nothing: the last epoch" + "; temperature and threshold on the training images" * fitted
    epochs = ", ".join(str(run.cell["best_epoch"]) for run in runs)
    where = "the reported images" if split == "val" else "validation images"
    return f"epoch {epochs} of {recipe.epochs}, by {recipe.monitor} on {where}"


def results_page(results: Path) -> str:
    """The text of `results/README.md`."""
    rows = read_rows(results)
    lines = ["| system | published | ours | average | chosen | minutes | command |", "|" + "---|" * 7]
    for name, runs in rows.items():
        recipe, cell = runs[0].recipe, runs[0].cell
        count = "1 seed" if len(runs) == 1 else f"{len(runs)} seeds"
        about = (
            f"{recipe.preprocessing.size_px} px, {recipe.epochs} epochs, {count}, {cell['n']} {cell['split']} images"
        )
        note = f"; {cell['note']}" if cell.get("note") else ""
        stated = [f"{metric} {value:.3f}" for metric, value in zip(METRICS, _published(runs)) if value is not None]
        minutes = statistics.fmean(run.cell["minutes"] for run in runs)
        cells = [f"[{name}]({name}): {about}{note}", ", ".join(stated) or "–", result_text(runs), average_text(runs)]
        lines.append(f"| {' | '.join([*cells, _chosen(runs), f'{minutes:.0f}', f'`{command_of(runs)}`'])} |")
    return HEADER + "\n".join([*lines, *_by_source(rows)]) + "\n"


def _by_source(rows: dict[str, list[Run]]) -> list[str]:
    """The metrics of each source of images, of the rows where sources are known."""
    lines = []
    for name, (run, *_) in rows.items():
        try:
            for source, row in run.metrics.get("by_source", {}).items():
                low, high = row["intervals"]["accuracy"]
                recalls = ", ".join(f"{one['class']} {one['recall']:.3f} of {one['support']}" for one in row["recall"])
                cells = [f"{name}, seed {run.recipe.seed}", source, f"{row['accuracy']:.3f} ({low:.3f} to {high:.3f})"]
                lines.append(f"| {' | '.join([*cells, recalls])} |")
        except (AttributeError, KeyError, TypeError, ValueError):
            raise RunError("metrics.json: by_source is damaged", path=run.folder, fix=AGAIN) from None
    head = ["", "By source of the images, accuracy with its 95% interval:", ""]
    head += ["| row | source | accuracy | recall of each class |", "|" + "---|" * 4]
    return [*head, *lines] if lines else []


def _published(runs: Sequence[Run]) -> tuple[float | None, float | None]:
    return published_result(runs[0].recipe, runs[0].cell["split"])


def compare(cells: Sequence[Cell], results: Path) -> str:
    """The kept results and those of finished trainings beside each other, with a verdict; "" without any in both."""
    kept = read_rows(results)
    here: dict[str, list[Run]] = {}
    for cell in cells:
        if _row_of(cell) in kept and (result := cell.result()) is not None:
            predictions = read_predictions(cell.folder / str(result["split"]))
            here.setdefault(_row_of(cell), []).append(Run(cell.folder, cell.recipe, result, {}, {}, predictions))
    lines = []
    for name, runs in here.items():
        verdicts = [_verdict(runs, kept[name], metric) for metric in range(2)]
        lines.append(f"| {name} | {result_text(kept[name])} | {result_text(runs)} | {' / '.join(verdicts)} |")
    if not lines:
        return ""
    head = [f"| row | kept in {results} | run here | verdict: AUC / accuracy |", "|" + "---|" * 4]
    return "\n".join([*head, *lines, "", RULE]) + "\n"


def _verdict(here: Sequence[Run], kept: Sequence[Run], metric: int) -> str:
    ours, theirs = ([run.values[metric] for run in runs] for runs in (here, kept))
    if ours == theirs:
        return "the same"
    low, high = _intervals(kept[0])[metric]
    noise = statistics.stdev(theirs) if len(theirs) > 1 else (high - low) / 4
    sd = statistics.stdev(ours) if len(ours) > 1 else None
    return verdict(statistics.fmean(ours), sd, len(ours), statistics.fmean(theirs), noise, len(theirs))
