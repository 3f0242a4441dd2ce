"""`python tools/benchmark.py`: speed, side by side, as ratios."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from paddle_medcls.commands import parser, run

TEXT = """Measures speed on this machine's CPU: each figure in a fresh process, rounds interleaved, medians.
Ratios hold better than figures; let nothing else run meanwhile."""


def main(argv: Sequence[str] | None = None) -> int:
    p = parser("benchmark", TEXT)
    p.add_argument("--rows", nargs="+", choices=("training", "inference", "head"), metavar="ROW", help="default: all")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--output", type=Path, metavar="FILE", help="also write the figures as JSON")
    args = p.parse_args(argv)
    if args.rounds < 1:
        p.error("--rounds must be at least 1")
    return run(_work, args)


def _work(args: argparse.Namespace) -> int:
    from prettytable import PrettyTable

    from paddle_medcls.benchmark import VARIANTS, run_rows
    from paddle_medcls.cpu import usable_cores
    from paddle_medcls.files import write_json

    for name in ("OMP_NUM_THREADS", "MKL_DEBUG_CPU_TYPE"):
        if name in os.environ:
            print(f"note: {name}={os.environ[name]} is set, for every variant", file=sys.stderr)
    figures = run_rows(args.rows or list(VARIANTS), args.rounds)
    table = PrettyTable(["row", "variant", "images/s", "ratio"], align="l")
    for figure in figures:
        rate = f"{figure['images_per_second']:.2f}"
        table.add_row([figure["row"], figure["variant"], rate, f"{figure['ratio']:.2f}"])
    print(table)
    print(f"median of {args.rounds} rounds, {usable_cores()} cores")
    if args.output:
        write_json(args.output, {"cores": usable_cores(), "rounds": args.rounds, "figures": figures})
    return 0
