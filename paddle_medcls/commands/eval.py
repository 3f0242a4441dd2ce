"""`python tools/eval.py --weights COVID.pdparams`: scores a weight file on a split."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from paddle_medcls.commands import parser, run

TEXT = """Scores a weight file on a whole split: loss, accuracy and AUC with 95% intervals, precision,
recall and F1 of each class, the published figure beside ours. The file's sidecar says how it was
trained; without one the layout of the two notebooks' files is recognised."""


def main(argv: Sequence[str] | None = None) -> int:
    p = parser("eval", TEXT)
    p.add_argument("--weights", type=Path, required=True, help=".pdparams or .safetensors")
    p.add_argument("--data-root", type=Path, help="folder of the images (default: the run's, else datasets/<dataset>)")
    p.add_argument("--split", choices=("train", "val", "test"), help="default: test where there is one, else val")
    p.add_argument("--recipe", help="for a file without a sidecar: the recipe it was trained with")
    p.add_argument("--without-leaks", action="store_true", help="score again without images that training has too")
    p.add_argument("--output", type=Path, help="also write metrics.json, predictions and pictures here")
    p.add_argument("--batch-size", type=int, default=32)
    p.add_argument("--workers", type=int, default=2, help="threads that read images")
    p.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto")
    return run(_work, p.parse_args(argv))


def _work(args: argparse.Namespace) -> int:
    from paddle_medcls.data import dataset_module, default_root, load_index
    from paddle_medcls.data.statistics import scan
    from paddle_medcls.predict import Predictor
    from paddle_medcls.recipes import all_recipes, get_recipe
    from paddle_medcls.report import DRAWN_NOTICE, NOTICE, class_table, confusion_table, summary
    from paddle_medcls.rundir import score_split, write_outputs
    from paddle_medcls.runtime import select_device

    select_device(args.device)
    predictor = Predictor.from_weights(args.weights, get_recipe(args.recipe) if args.recipe else None)
    card = predictor.card
    for note in predictor.notes:
        print(note, file=sys.stderr)
    known = card.recipe in all_recipes()
    recipe = get_recipe(card.recipe, card.dataset, card.network.model) if known else None
    split = args.split or dataset_module(card.dataset).SPLITS[-1]
    root = args.data_root or _run_data_root(args.weights) or default_root(card.dataset)
    index = load_index(card.dataset, root, split, recipe.labels if recipe else "default")
    scan(index, max(1, args.workers), card.preprocessing.channels)  # all unreadable images at once, not the first
    logits = predictor.split_logits(index, args.batch_size, args.workers)
    result = score_split(logits, index, card.loss, card.temperature, card.threshold)
    if index.drawn or card.drawn:
        print(DRAWN_NOTICE)
    print(class_table(result))
    if "confusion" in result:
        print(confusion_table(result))
    targets = recipe.targets if recipe else ()
    print(summary(result, targets))
    if args.without_leaks:
        rows = _not_leaked(load_index(card.dataset, root, "train", recipe.labels if recipe else "default"), index, args)
        clean = index.subset(rows)
        print(f"without the {len(index) - len(clean)} images that are in the training split as well:")
        print(summary(score_split(logits[rows], clean, card.loss, card.temperature, card.threshold), targets))
    if args.output:
        write_outputs(args.output, logits, index, card, result)
        print(f"written to {args.output}")
    print(NOTICE)
    return 0


def _not_leaked(train, index, args: argparse.Namespace) -> list[int]:
    """Rows of an index whose image is not, nearly or exactly, in the training split."""
    from paddle_medcls.data.check import check

    leaked = check([train, index], args.workers).leaked(index.split)
    return [row for row, name in enumerate(index.ids) if name not in leaked]


def _run_data_root(weights: Path) -> Path | None:
    """The data root of the run directory that the weights lie in, if it is one."""
    try:
        return Path(json.loads((weights.parent / "data.json").read_text(encoding="utf-8"))["data_root"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
