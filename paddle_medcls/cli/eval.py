"""`python tools/eval.py --weights COVID.pdparams`: evaluates a trained model on a split, or compares two."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from paddle_medcls.cli.common import (
    add_engine_options,
    add_own_options,
    add_recipe_option,
    add_weights_option,
    list_own_images,
    open_predictor,
    parser,
    run,
)

TEXT = """Evaluates a weight file on a split: loss, accuracy and AUC with 95% intervals, precision, recall and F1
of each class, and the published results for comparison. The sidecar beside the file says how it was trained;
without one the weight files of the PALM and COVID-19 tutorials are recognised.

--calibrate fits a temperature on the validation split, chooses the threshold there if --sensitivity is
given, and writes both to the sidecar, which every command reads. It also chooses the thresholds of prediction
sets, on one half of the evaluated split; coverage is reported on the other half.

--compare A B tests whether two models differ on the same images: two predictions_<split>.csv, or two folders
that hold one (a run directory, or what --output wrote). It needs neither weights nor images."""


def main(argv: Sequence[str] | None = None) -> int:
    p = parser("eval", TEXT)
    what = p.add_mutually_exclusive_group(required=True)
    add_weights_option(what, "")
    what.add_argument("--compare", type=Path, nargs=2, metavar=("A", "B"), help="two predictions of the same images")
    p.add_argument("--data-root", type=Path, help="folder of the images (default: the run's, else datasets/<dataset>)")
    p.add_argument(
        "--dataset",
        choices=("folder", "table"),
        help="evaluate on all images of another origin in --data-root: one sub-folder a class, or --labels FILE",
    )
    p.add_argument("--labels", type=Path, metavar="FILE", help="table: CSV or Excel file with a row for each image")
    add_own_options(p)
    p.add_argument("--split", choices=("train", "val", "test"), help="default: test where there is one, else val")
    add_recipe_option(p)
    p.add_argument("--without-leaks", action="store_true", help="also evaluate without images that training has too")
    p.add_argument("--calibrate", action="store_true", help="fit temperature (and threshold) on validation first")
    p.add_argument(
        "--sets",
        choices=("lac", "aps", "lac-by-class", "aps-by-class"),
        help="with --calibrate: how prediction sets are made (default: lac); -by-class: covers each class alone",
    )
    p.add_argument(
        "--coverage", type=float, metavar="C", help="evaluate prediction sets that hold the truth in C of images"
    )
    p.add_argument(
        "--robustness", action="store_true", help="also evaluate corrupted images: 9 kinds, 5 severities, 46 passes"
    )
    p.add_argument("--sensitivity", type=float, metavar="S", help="with --calibrate, two classes: sensitivity to reach")
    p.add_argument(
        "--prevalence", type=float, metavar="P", help="two classes: also print PPV and NPV at this prevalence"
    )
    p.add_argument("--errors", type=int, metavar="N", help="with --output: errors.html with N images a section")
    p.add_argument("--output", type=Path, help="also write metrics.json, predictions and pictures here")
    p.add_argument("--batch-size", type=int, default=32, help="images computed at once (default: 32)")
    p.add_argument("--workers", type=int, default=2, help="threads that read images")
    add_engine_options(p)
    args = p.parse_args(argv)
    if args.sensitivity is not None and not (args.calibrate and 0 < args.sensitivity <= 1):
        p.error("--sensitivity needs --calibrate and lies between 0 and 1")
    if args.sets and not args.calibrate:
        p.error("--sets needs --calibrate")
    if args.prevalence is not None and not 0 < args.prevalence < 1:
        p.error("--prevalence lies between 0 and 1")
    if args.errors is not None and not (args.output and args.errors > 0):
        p.error("--errors is above 0 and needs --output")
    if args.batch_size < 1 or args.workers < 0:
        p.error("--batch-size must be at least 1, --workers 0 or more")
    return run(_compare if args.compare else _work, args)


def _compare(args: argparse.Namespace) -> int:
    from paddle_medcls.core.files import write_json
    from paddle_medcls.evaluation.predictions import read_predictions
    from paddle_medcls.evaluation.significance import compare, verdict
    from paddle_medcls.evaluation.tables import NOTICE, comparison_table

    a, b = (read_predictions(path) for path in args.compare)
    result = compare(a, b)
    over = f" over {result['auc']['patients']} patients" if "patients" in result["auc"] else ""
    print(f"A: {a.path}\nB: {b.path}\n{len(a.ids)} images in both{over}")
    print(comparison_table(result))
    print(verdict(result))
    if args.output:
        write_json(args.output / "comparison.json", {"a": str(a.path), "b": str(b.path), "n": len(a.ids), **result})
        print(f"comparison.json written to {args.output}")
    print(NOTICE)
    return 0


def _work(args: argparse.Namespace) -> int:
    from paddle_medcls.deployment.scoring import EvalOptions, check_options, evaluate
    from paddle_medcls.evaluation.tables import NOTICE
    from paddle_medcls.models.sidecar import Sidecar, find_model, find_models, sidecar_of

    names = (
        "batch_size",
        "workers",
        "calibrate",
        "sets",
        "coverage",
        "robustness",
        "sensitivity",
        "prevalence",
        "without_leaks",
        "output",
    )
    options = EvalOptions(**{name: getattr(args, name) for name in names}, errors=args.errors or 0)
    models = [find_model(path) for path in find_models(args.weights)]
    if sidecar_of(models[0]).is_file():
        check_options(Sidecar.read(sidecar_of(models[0])), options)  # before the model is loaded
    predictor = open_predictor(models, args)
    for note in [
        f"weights: {', '.join(map(str, models))} ({predictor.engine}, {predictor.precision})",
        *predictor.notes,
    ]:
        print(note, file=sys.stderr)
    images = list_own_images(args, None, again=True)
    result = evaluate(predictor, args.split, images or args.data_root, options)
    if args.calibrate:
        sidecar = result.sidecar
        print(f"on val: temperature {sidecar.temperature:.4f}, threshold {sidecar.threshold:.4f}; kept in the sidecar")
    print(result.table())
    if args.output:
        print(f"written to {args.output}")
    print(NOTICE)
    return 0
