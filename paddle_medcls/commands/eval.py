"""`python tools/eval.py --weights COVID.pdparams`: scores a weight file on a split."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from paddle_medcls.commands import add_engine_options, named, open_predictor, parser, run

TEXT = """Scores a weight file on a whole split: loss, accuracy and AUC with 95% intervals, precision,
recall and F1 of each class, the published figure beside ours. The file's sidecar says how it was
trained; without one the layout of the two notebooks' files is recognised.

--calibrate fits a temperature on the validation split, chooses the threshold there if --sensitivity is
given, and writes both to the sidecar, from where every command takes them.

--compare A B tells two models apart on the same images: two predictions_<split>.csv, or two folders
that hold one (a run directory, or what --output wrote). It needs neither weights nor images."""


def main(argv: Sequence[str] | None = None) -> int:
    p = parser("eval", TEXT)
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--weights", type=Path, help="weight file or export")
    what.add_argument("--compare", type=Path, nargs=2, metavar=("A", "B"), help="two predictions of the same images")
    p.add_argument("--data-root", type=Path, help="folder of the images (default: the run's, else datasets/<dataset>)")
    p.add_argument("--split", choices=("train", "val", "test"), help="default: test where there is one, else val")
    p.add_argument(
        "--recipe", type=named("recipe"), help="for a file without a sidecar: the recipe it was trained with"
    )
    p.add_argument("--without-leaks", action="store_true", help="score again without images that training has too")
    p.add_argument("--calibrate", action="store_true", help="fit temperature (and threshold) on validation first")
    p.add_argument("--sensitivity", type=float, metavar="S", help="with --calibrate, two classes: wanted sensitivity")
    p.add_argument(
        "--prevalence", type=float, metavar="P", help="two classes: also PPV and NPV where this share is ill"
    )
    p.add_argument("--errors", type=int, metavar="N", help="with --output: errors.html, the N most telling mistakes")
    p.add_argument("--output", type=Path, help="also write metrics.json, predictions and pictures here")
    p.add_argument("--batch-size", type=int, default=32)
    p.add_argument("--workers", type=int, default=2, help="threads that read images")
    add_engine_options(p)
    args = p.parse_args(argv)
    if args.sensitivity is not None and not (args.calibrate and 0 < args.sensitivity <= 1):
        p.error("--sensitivity needs --calibrate and lies between 0 and 1")
    if args.prevalence is not None and not 0 < args.prevalence < 1:
        p.error("--prevalence lies between 0 and 1")
    if args.errors is not None and not (args.output and args.errors > 0):
        p.error("--errors is above 0 and needs --output")
    return run(_compare if args.compare else _work, args)


def _compare(args: argparse.Namespace) -> int:
    from paddle_medcls.comparison import compare, read_predictions, verdict
    from paddle_medcls.files import write_json
    from paddle_medcls.report import NOTICE, comparison_table

    a, b = (read_predictions(path) for path in args.compare)
    found = compare(a, b)
    print(f"A: {a.path}\nB: {b.path}\n{len(a.ids)} images in both")
    print(comparison_table(found))
    print(verdict(found))
    if args.output:
        write_json(args.output / "comparison.json", {"a": str(a.path), "b": str(b.path), "n": len(a.ids), **found})
        print(f"comparison.json written to {args.output}")
    print(NOTICE)
    return 0


def _work(args: argparse.Namespace) -> int:
    from paddle_medcls import errorpage, rundir
    from paddle_medcls.data import dataset_module, default_root, load_index
    from paddle_medcls.data.check import not_leaked
    from paddle_medcls.data.statistics import scan
    from paddle_medcls.errors import DataError
    from paddle_medcls.modelcard import known_recipe
    from paddle_medcls.report import DRAWN_NOTICE, NOTICE, class_table, confusion_table, summary
    from paddle_medcls.sidecar import find_model

    args.weights = find_model(args.weights)
    predictor = open_predictor(args.weights, args)
    for note in [f"weights: {args.weights} ({predictor.engine}, {predictor.precision})", *predictor.notes]:
        print(note, file=sys.stderr)
    card = predictor.card
    recipe = known_recipe(card)
    root = args.data_root or _run_data_root(args.weights) or default_root(card.dataset)

    def listed(split: str):
        return load_index(card.dataset, root, split, card.labels)

    def logits_of(index):
        try:
            return predictor.split_logits(index, args.batch_size, args.workers)
        except DataError:
            scan(index, max(1, args.workers), card.preprocessing.channels)  # names all unreadable images at once
            raise

    if args.calibrate:
        val = listed("val")
        predictor.card = card = rundir.calibrate(args.weights, card, logits_of(val), val, args.sensitivity, args.output)
        print(
            f"on {val.split}: temperature {card.temperature:.4f}, threshold {card.threshold:.4f}; kept in the sidecar"
        )
    index = listed(args.split or dataset_module(card.dataset).SPLITS[-1])
    logits = logits_of(index)
    result = rundir.score_split(logits, index, card.head)
    targets = recipe.targets if recipe else ()
    if index.drawn or card.drawn:
        print(DRAWN_NOTICE)
    print(class_table(result))
    if "confusion" in result:
        print(confusion_table(result))
    print(summary(result, targets, args.prevalence))
    if changes := _recipe_changes(args.weights, card):
        print(f"trained otherwise than recipe {card.recipe}: {'; '.join(changes)}")
    if args.without_leaks:
        rows = not_leaked(listed("train"), index, args.workers)
        clean = index.subset(rows)
        print(f"without the {len(index) - len(clean)} images that are in the training split as well:")
        again = rundir.score_split(logits[rows], clean, card.head)
        print(summary(again, targets, args.prevalence))
    if args.output:
        rundir.write_outputs(args.output, logits, index, card, result)
        if args.errors:
            probs = card.head.probabilities(logits)
            guesses = card.head.decide(probs)
            title = f"Errors of {card.recipe} ({card.network.model}) on {card.dataset}, {index.split}"
            errorpage.write_error_page(args.output / "errors.html", index, probs, guesses, result, title, args.errors)
        print(f"written to {args.output}")
    print(NOTICE)
    return 0


def _recipe_changes(weights: Path, card) -> list[str]:
    """Where the run that the weights lie in left the recipe that their sidecar names."""
    from paddle_medcls.errors import RecipeError
    from paddle_medcls.modelcard import recipe_changes
    from paddle_medcls.recipe import Recipe

    try:
        recipe = Recipe.from_file(weights.parent / "recipe.json")
    except RecipeError:
        return []
    return recipe_changes(card, recipe) if recipe.name == card.recipe else []


def _run_data_root(weights: Path) -> Path | None:
    """The data root of the run directory that the weights lie in, if it is one."""
    try:
        return Path(json.loads((weights.parent / "data.json").read_text(encoding="utf-8"))["data_root"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
