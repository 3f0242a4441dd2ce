"""`python tools/reproduce.py --suite medmnist --sets breast,retina --seeds 3`: reproduces published results."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from paddle_medcls.cli.common import add_parallel_options, named, parser, run

TEXT = """Trains recipes with several seeds each, evaluates each run on the test split, and writes a table with the
published results. Run the same command again after an interruption: finished runs are kept, interrupted ones are
resumed. A run that fails does not stop the others. Results that are kept in results/ are printed beside, with a
verdict; --evidence keeps those of the finished runs there: recipe, data, environment, history, metrics and
predictions."""


def main(argv: Sequence[str] | None = None) -> int:
    p = parser("reproduce", TEXT)
    p.add_argument("--suite", required=True, choices=("medmnist", "palm", "covid", "oct"), help="what to reproduce")
    p.add_argument(
        "--recipe",
        type=named("recipe", _names),
        default=(),
        help="names separated by commas (default: the suite's)",
    )
    p.add_argument(
        "--sets",
        type=named("dataset", _names),
        default=(),
        help="MedMNIST sets, as breast,retina (default: those with a file)",
    )
    p.add_argument("--download", action="store_true", help="download the missing sets (MedMNIST)")
    p.add_argument(
        "--models", type=named("model", _names), default=(), help="as resnet18,resnet50 (default: the suite's)"
    )
    p.add_argument("--seeds", type=int, default=3, help="number of seeds, from 0 (default: 3)")
    p.add_argument("--epochs", type=int, help="of each run; decay points are scaled with it")
    p.add_argument("--data-root", type=Path, help="folder of the images (default: datasets/<…>)")
    p.add_argument("--output", type=Path, help="folder of the grid (default: runs/reproduce-<suite>)")
    p.add_argument(
        "--without-leaks",
        action="store_true",
        help="also evaluate without images of which training has a copy or near copy",
    )
    p.add_argument(
        "--results",
        type=Path,
        default=Path("results"),
        metavar="DIR",
        help="kept results, which the finished runs are compared with (default: results)",
    )
    p.add_argument("--evidence", action="store_true", help="copy what the finished runs show to --results")
    p.add_argument("--budget-minutes", type=float, default=math.inf, help="time limit; the same command continues")
    add_parallel_options(p, "runs")
    p.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto", help="auto: a GPU where Paddle sees one")
    p.add_argument("--workers", type=int, default=2, help="threads that read images (default: 2)")
    p.add_argument("--kernels", choices=("auto", "paddle", "onednn"), default="auto", help="see train")
    p.add_argument("--precision", choices=("f32", "bf16"), default="f32", help="of oneDNN's operators (default: f32)")
    p.add_argument("--deterministic", action="store_true", help="deterministic algorithms, on a GPU")
    args = p.parse_args(argv)
    if args.seeds < 1 or args.workers < 0 or not args.budget_minutes > 0 or (args.epochs or 1) < 1:
        p.error("--seeds, --epochs and --budget-minutes must be above 0, --workers 0 or more")
    return run(_work, args)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _work(args: argparse.Namespace) -> int:
    started = time.monotonic()
    from paddle_medcls.core.errors import RunError
    from paddle_medcls.data.datasets import fetch
    from paddle_medcls.evaluation.tables import NOTICE
    from paddle_medcls.training.evidence import compare, read_rows, write_evidence
    from paddle_medcls.training.grid import Grid, plan, present
    from paddle_medcls.training.loop import Options
    from paddle_medcls.training.parallel import chosen
    from paddle_medcls.training.reproduce import run_grid, score_without_leaks, write_tables

    output = args.output or Path("runs") / f"reproduce-{args.suite}"
    grid = Grid(args.suite, args.seeds, args.recipe, args.sets, args.models, args.epochs)
    cells = plan(grid, output, args.data_root)
    if args.download:
        for dataset, root in dict.fromkeys((cell.recipe.dataset, cell.data_root) for cell in cells):
            print(fetch(dataset, root), file=sys.stderr)
    if args.suite == "medmnist" and not args.sets:
        cells, absent = present(cells)
        if absent:
            print(f"not run, no file: {', '.join(absent)}; --download fetches them", file=sys.stderr)
    options = Options(
        device=args.device,
        workers=args.workers,
        deterministic=args.deterministic,
        kernels=args.kernels,
        precision=args.precision,
        image_cache=str(output / "images"),
        deadline=started + 60 * args.budget_minutes,
    )
    read_rows(args.results)  # damaged evidence is found before the work
    remaining, failures = run_grid(cells, output, options, chosen(args.parallel, args.cluster))
    if args.without_leaks:
        score_without_leaks(cells, args.workers)
    print(write_tables(cells, output))
    comparison = compare(cells, args.results)
    if comparison:
        print(comparison)
    if args.evidence:
        rows = write_evidence(cells, args.results)
        print(f"{len(rows)} row(s) written to {args.results}: {', '.join(rows) or 'no run is finished'}")
    print(f"{len(cells) - len(remaining)} of {len(cells)} runs are done; written to {output}\n{NOTICE}")
    if failures:
        items = [line for name, message in failures.items() for line in f"{name}: {message}".splitlines()]
        fix = "correct the cause, and run the same command again: finished runs are kept"
        raise RunError(f"{len(failures)} of {len(cells)} runs failed", items=items, fix=fix)
    if remaining:
        print("time budget used up; rerun the same command to continue", file=sys.stderr)
    return 0
