"""`python tools/benchmark.py`: measures speed and memory, and compares them as ratios."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.rows import GFLOP, GROWTH, INSTALLED, ROWS
from paddle_medcls.cli.common import parser, run

QUICK = "quick: small batches, one round"

TEXT = """Measures speed and memory on this machine's CPU, and compares them with Paddle as installed and with the other
inference and training libraries that are installed here. Each measurement runs in a fresh process; the table
shows medians over interleaved rounds. Ratios vary less between machines than absolute results. Run nothing
else at the same time. All rows take about a quarter of an hour on two cores."""


def main(argv: Sequence[str] | None = None) -> int:
    p = parser("benchmark", TEXT)
    p.add_argument("--rows", nargs="+", choices=ROWS, metavar="ROW", help=f"rows to measure: {', '.join(ROWS)}")
    p.add_argument("--growth", action="store_true", help=f"measure how cost grows: the rows {', '.join(GROWTH)}")
    p.add_argument("--quick", action="store_true", help="a few minutes: one round, batches a quarter as large")
    p.add_argument("--rounds", type=int, help="rounds of the rows training, inference and limit (default: 2)")
    p.add_argument("--torch-python", metavar="FILE", help="a Python interpreter with PyTorch (default: this one)")
    p.add_argument(
        "--output", type=Path, metavar="FILE", help="write results as JSON; new rows are added to an existing file"
    )
    p.add_argument(
        "--picture", type=Path, metavar="FILE", help="draw the ratios, or with --growth the costs, as a PNG picture"
    )
    args = p.parse_args(argv)
    if args.rounds is not None and args.rounds < 1:
        p.error("--rounds must be at least 1")
    if args.torch_python and not shutil.which(args.torch_python):
        p.error(f"--torch-python {args.torch_python}: no such program")
    if args.picture and args.picture.suffix.lower() != ".png":
        p.error(f"--picture {args.picture}: give a name that ends in .png")
    args.torch_python = args.torch_python or sys.executable
    return run(_work, args)


def _work(args: argparse.Namespace) -> int:
    from benchmarks.runner import KIND, compare, describe, merge, read, run_rows
    from paddle_medcls.core.files import write_json

    for name in ("OMP_NUM_THREADS", "MKL_DEBUG_CPU_TYPE"):
        if name in os.environ:
            print(f"note: {name}={os.environ[name]} is set and applies to every variant", file=sys.stderr)
    rows = [*(args.rows or ()), *(GROWTH if args.growth else ())]
    rows = list(dict.fromkeys(rows or [name for name in ROWS if name not in GROWTH or name == "memory"]))
    rounds = args.rounds or (1 if args.quick else 2)
    about = {"kind": KIND, **describe(args.torch_python), "quick": args.quick}
    figures = read(args.output, about) if args.output else []
    for new in run_rows(rows, rounds, args.quick, args.torch_python):
        for figure in new:
            if "not_measured" in figure:
                print(f"{figure['row']}, {figure['variant']}: not measured: {figure['not_measured']}", file=sys.stderr)
        figures = compare(merge(figures, new))
        if args.output:  # after each row, so that an interruption keeps the others
            write_json(args.output, {**about, "figures": figures})
    print(_table(figures))
    print(_machine_line(about))
    if args.picture:
        _draw(args.picture, figures, args.growth, about)
    return 0


def _table(figures: list[dict]) -> str:
    from prettytable import PrettyTable

    table = PrettyTable(["row", "variant", "result", "unit", "to first", "to peer", "of limit", "peak MB"], align="r")
    table.align["row"] = table.align["variant"] = table.align["unit"] = "l"
    for figure in figures:
        cells = [figure["row"], figure["variant"]]
        if "not_measured" in figure:
            table.add_row([*cells, "-", "not measured", "", "", "", ""])
            continue
        cells += [f"{figure['value']:.4g}", figure["unit"]]
        cells += [f"{figure[name]:.2f}" if name in figure else "" for name in ("ratio", "to_peer", "limit_share")]
        table.add_row([*cells, f"{figure['peak_mb']:.0f}"])
    return str(table)


def _machine_line(about: dict) -> str:
    versions = ", ".join(f"{name} {text}" for name, text in about["versions"].items() if text != "not installed")
    quick = f"{QUICK}; " if about["quick"] else ""
    return f"{quick}{about['machine']['processor']}, {about['machine']['cores']} cores; {versions}"


def _draw(path: Path, figures: list[dict], growth: bool, about: dict) -> None:
    from benchmarks import pictures
    from benchmarks.runner import power

    note = QUICK if about["quick"] else ""
    place = f"{about['machine']['processor']}, {about['machine']['cores']} cores"
    measured = [figure for figure in figures if "value" in figure]
    by_row = {row: [figure for figure in measured if figure["row"] == row] for row in ROWS}
    if not growth:
        panels = [(row, [_bar(figure) for figure in by_row[row]]) for row in GFLOP if by_row[row]]
        title = (
            f"Times as fast as {INSTALLED}, on {place}\nblack: {INSTALLED}, blue: this package, orange: other libraries"
        )
        pictures.ratios(path, panels, title, note)
        return
    curves = []
    for row, name in GROWTH.items():
        sizes = [float(figure["variant"].split()[0].replace(",", "")) for figure in by_row[row]]
        costs = [figure["value"] for figure in by_row[row]]
        if len(sizes) > 1:
            text = f"grows with power {power(sizes, costs):.2f}"
            curves.append((name, by_row[row][0]["unit"], sizes, costs, text))
    pictures.growth(path, curves, f"Cost of training ResNet-50, and of evaluating images, on {place}", note)


def _bar(figure: dict) -> tuple[str, float, str, int]:
    others = ("PyTorch", "OpenVINO", "ONNX Runtime")
    color = 7 if figure["variant"] == INSTALLED else 1 if figure["variant"].startswith(others) else 0
    return figure["variant"], figure["ratio"], f"{figure['ratio']:.2f}  ({figure['value']:.3g} {figure['unit']})", color
