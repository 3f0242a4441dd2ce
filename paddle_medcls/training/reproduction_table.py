"""The table of a reproduction: published results, ours with their spread over seeds, and a verdict."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from paddle_medcls.data.datasets.medmnist import NAMES, card_of
from paddle_medcls.recipes import published_results
from paddle_medcls.recipes.recipe import Recipe

RULE = """Verdict: a difference is inside the seed noise if it is at most 2 x sqrt(sd^2 / n + s^2 / m), where sd is
the standard deviation of our n seeds, s that of the published runs (the larger of sd and of what other runs
found, `published_results.SEED_NOISE`) and m their number: 3 in the paper, whose results are means of three, else 1.
One seed of a set without known other runs gets no verdict. Differences are ours minus published."""

RUN_HERE = """Recipes beside each other, both run here: difference of the means over seeds; p is that of a permutation
test of the runs. Three seeds against three cannot go below 0.10, four against four below 0.03."""


MAX_PERMUTATIONS = 100_000


@dataclass(frozen=True)
class Row:
    """One training of a grid.

    Attributes:
        name: of the training.
        recipe: of the training.
        result: its `cell.json`; None until it is finished.
    """

    name: str
    recipe: Recipe
    result: dict | None


def table(rows: Sequence[Row]) -> str:
    """Published and ours, mean and standard deviation over seeds, in Markdown; AUC / accuracy."""
    header = ["set", "network", "recipe", "published", "study", "ours", "seeds", "difference", "verdict"]
    header += ["without leaks", "parameters", "minutes"]
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    notes, missing = set(), []
    groups: dict[tuple[str, str, str], list[Row]] = {}
    finished: dict[tuple[str, str], dict[str, list[dict]]] = {}  # (set, network) -> recipe -> rows
    for row in rows:
        groups.setdefault((row.recipe.dataset, row.recipe.model, row.recipe.name), []).append(row)
    for (dataset, model, name), group in groups.items():
        results = [row.result for row in group if row.result is not None]
        missing += [row.name for row in group if row.result is None]
        if results:
            finished.setdefault((dataset, model), {})[name] = results
            lines.append(_line(group[0].recipe, results))
            notes |= {f"{dataset}: {result['note']}" for result in results if result["note"]}
            notes.add(f"{name}: {_choice(group[0].recipe, results[0]['split'])}")
    lines += ["", "Test AUC / accuracy (validation, where a set has no test split); sd over seeds.", RULE]
    lines += [f"- {note}" for note in sorted(notes)]
    comparisons = [
        line for (dataset, model), runs in finished.items() for line in _recipe_comparisons(f"{dataset}, {model}", runs)
    ]
    if comparisons:
        lines += ["", RUN_HERE, *comparisons]
    if missing:
        lines += ["", f"Not run: {', '.join(missing)}"]
    return "\n".join(lines) + "\n"


def _choice(recipe: Recipe, split: str) -> str:
    """How the epoch of a recipe's weights was chosen, and on what."""
    if recipe.monitor == "last":
        return "the last epoch, chosen on no images"
    here = "; the results on these images are optimistic" if split == "val" else ""
    return f"the best epoch by validation {recipe.monitor}{here}"


def _line(recipe: Recipe, rows: list[dict]) -> str:
    """One line of the table: all seeds of a recipe on a set."""
    split = rows[0]["split"]
    published = published_result(recipe, split)
    study = (
        published_results.MEDMNIST_STUDY.get((_flag(recipe.dataset), recipe.model))
        if recipe.preprocessing.size_px == 28
        else None
    )
    noise = published_results.SEED_NOISE.get(_flag(recipe.dataset), (None, None))
    means, differences, verdicts = [], [], []
    for metric, target, noise_sd in zip(("auc", "accuracy"), published, noise):
        values = [row[metric] for row in rows]
        mean = statistics.fmean(values)
        sd = statistics.stdev(values) if len(values) > 1 else None
        means.append(_spread(values))
        differences.append("–" if target is None else f"{mean - target:+.3f}")
        runs = published_results.PAPER_RUNS if recipe.dataset in NAMES else 1
        verdicts.append(verdict(mean, sd, len(values), target, noise_sd, runs))
    cells = [
        recipe.dataset,
        recipe.model,
        recipe.name,
        _pair(published),
        _pair(study or (None, None)),
        " / ".join(means),
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
    """AUC / accuracy without images that the training split has too; "–" where that was not asked for."""
    if any("n_clean" not in row for row in rows):
        return "–"
    pair = " / ".join(_spread([row[f"{metric}_clean"] for row in rows]) for metric in ("auc", "accuracy"))
    return f"{pair} ({rows[0]['n_clean']} images)"


def _recipe_comparisons(title: str, runs: dict[str, list[dict]]) -> list[str]:
    """A line for each recipe of a set and network after the first: its difference from the first."""
    (base_name, base_rows), *other_runs = runs.items()
    lines = []
    for name, rows in other_runs:
        parts = []
        for metric in ("auc", "accuracy"):
            values, base_values = [row[metric] for row in rows], [row[metric] for row in base_rows]
            difference = statistics.fmean(values) - statistics.fmean(base_values)
            parts.append(f"{metric} {difference:+.3f} (p {permutation_p(values, base_values):.3f})")
        lines.append(f"- {title}: {name} - {base_name}: {', '.join(parts)}; {len(rows)} and {len(base_rows)} seeds")
    return lines


def permutation_p(a: Sequence[float], b: Sequence[float]) -> float:
    """Two-sided p of a permutation test of a difference of means.

    Of more than MAX_PERMUTATIONS that many random ones are used; the observed one counts among them, so that p is
    never 0 (Phipson and Smyth 2010).

    Args:
        a, b: one value a run.
    """
    runs = np.array([*a, *b])
    choices: Iterable = itertools.combinations(range(len(runs)), len(a))
    sampled = math.comb(len(runs), len(a)) > MAX_PERMUTATIONS
    if sampled:
        rng = np.random.default_rng(0)
        choices = (rng.permutation(len(runs))[: len(a)] for _ in range(MAX_PERMUTATIONS))
    sums = np.array([runs[list(rows)].sum() for rows in choices])
    differences = sums / len(a) - (runs.sum() - sums) / len(b)
    observed = abs(np.mean(a) - np.mean(b))
    at_least = int((abs(differences) >= observed - 1e-12).sum())  # the same runs, added in another order
    return (at_least + sampled) / (len(sums) + sampled)


def verdict(
    mean: float, sd: float | None, n: int, target: float | None, noise: float | None, target_runs: int = 1
) -> str:
    """ "inside", "above" or "below" by RULE; "–" without a target, or without any known spread.

    Args:
        mean, sd, n: of our seeds; sd None for a single one.
        target: the published result.
        noise: standard deviation of other runs of what was published, if known.
        target_runs: number of runs that the published result is the mean of.
    """
    if target is None or (sd is None and noise is None):
        return "–"
    spread = max(sd or 0.0, noise or 0.0)
    limit = 2 * ((sd or spread) ** 2 / n + spread**2 / target_runs) ** 0.5 + 0.0005  # three digits
    return "inside" if abs(mean - target) <= limit else "above" if mean > target else "below"


def published_result(recipe: Recipe, split: str) -> tuple[float | None, float | None]:
    """(AUC, accuracy) of the paper for a MedMNIST set; for other data sets the recipe's targets."""
    if recipe.dataset in NAMES and card_of(recipe.dataset)[1] == 28:
        return published_results.paper(_flag(recipe.dataset), recipe.model, recipe.preprocessing.size_px) or (
            None,
            None,
        )
    targets = dict(recipe.targets)
    return targets.get(f"{split}/auc"), targets.get(f"{split}/accuracy")


def _flag(dataset: str) -> str:
    return card_of(dataset)[0].flag if dataset in NAMES else dataset


def _pair(values: Sequence[float | None]) -> str:
    if all(value is None for value in values):
        return "–"
    return " / ".join("–" if value is None else f"{value:.3f}" for value in values)
