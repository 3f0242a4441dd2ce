"""Runs the measurements in fresh processes and compares their figures."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

from benchmarks.cell import Job
from benchmarks.rows import GFLOP, LIMITS, ONCE, PEERS, ROWS, UNITS
from paddle_medcls.cpu import usable_cores
from paddle_medcls.errors import RunError
from paddle_medcls.files import python_path
from paddle_medcls.progress import progress

KIND = "paddle_medcls benchmark"
PREPARED = ("inference1", "inference32", "start")  # rows that take the exported network


def run_rows(rows: Sequence[str], rounds: int, quick: bool, torch_python: str) -> Iterator[list[dict]]:
    """Measures rows, and yields the figures of each as it is done.

    Args:
        quick: shorter, with batches a quarter as large.

    Returns:
        One dict a variant: `row`, `variant`, `unit`, and `value` (median), `rounds` (each), `peak_mb` (most of
        them); or `not_measured` (why).
    """
    with tempfile.TemporaryDirectory() as folder:
        job = Job("prepare", "", folder, 0.5 if quick else 3.0, 4 if quick else 1, torch_python)
        if set(rows) & set(PREPARED):
            print("preparing: a network and its exports", file=sys.stderr)
            fresh_process(job)
        for row in rows:
            cells = [replace(job, row=row, variant=variant) for variant in ROWS[row]]
            cells *= 1 if row in ONCE else rounds
            found: dict[str, list[dict]] = {variant: [] for variant in ROWS[row]}
            print(f"measuring {row}: {', '.join(ROWS[row])}", file=sys.stderr)
            with progress(cells, row, len(cells), "figure") as bar:
                for cell in bar:
                    results = found[cell.variant]
                    if not (results and "not_measured" in results[0]):
                        results.append(fresh_process(cell))
            yield [_figure(row, variant, results) for variant, results in found.items()]


def _figure(row: str, variant: str, results: list[dict]) -> dict:
    figure = {"row": row, "variant": variant, "unit": UNITS.get(row, "images/s")}
    if "not_measured" in results[0]:
        return {**figure, "not_measured": results[0]["not_measured"]}
    values = [result["value"] for result in results]
    return {**figure, "value": median(values), "rounds": values, "peak_mb": max(r["peak_mb"] for r in results)}


def fresh_process(job: Job) -> dict:
    """What a process of its own finds; see `measure.measure`."""
    command = [sys.executable, "-m", "benchmarks.measure", job.to_json()]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": python_path()})
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise RunError(f"benchmark {job.row}, {job.variant}: exit code {done.returncode}: {last[0]}") from None


def compare(figures: Sequence[dict]) -> list[dict]:
    """Figures with their comparisons, where they can be made.

    Adds `ratio` (to the row's first variant), `to_peer` (to the row's peer, see `rows.PEERS`) and `limit_share` (of
    what the measured matrix product would allow; a little above 1 is possible).
    """
    known = {(figure["row"], figure["variant"]): figure.get("value") for figure in figures}
    compared = []
    for figure in figures:
        row, value = figure["row"], figure.get("value")
        if value is not None:
            precision = "bf16" if "bf16" in figure["variant"] else "f32"
            limit = known.get(("limit", LIMITS[precision]))
            others = {
                "ratio": known.get((row, next(iter(ROWS[row])))),
                "to_peer": known.get((row, PEERS.get(row))),
                "limit_share": limit / GFLOP[row] if limit and row in GFLOP else None,
            }
            figure = {**figure, **{name: value / other for name, other in others.items() if other}}
        compared.append(figure)
    return compared


def describe(torch_python: str) -> dict:
    """Machine and versions, which figures must share to stand in one table."""
    found = fresh_process(Job("machine", ""))
    machine = {"processor": found["processor"], "cores": usable_cores(), "platform": found["platform"]}
    versions = {name: found[name] for name in ("paddle_medcls", "paddle", "python", "numpy", "opencv")}
    for name in ("onnxruntime", "openvino"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    code = "import torch; print(torch.__version__)"
    try:
        done = subprocess.run([torch_python, "-I", "-c", code], capture_output=True, text=True)
        versions["torch"] = done.stdout.strip() or "not installed"
    except OSError:
        versions["torch"] = "not installed"
    return {"machine": machine, "versions": versions, "code": found["code"]}


def read(path: Path, about: dict) -> list[dict]:
    """Figures measured before on this machine; none if there is no such file.

    Args:
        about: of `describe`, and `quick`.

    Raises:
        RunError: another kind of file, or of another machine, other versions or another length.
    """
    if not path.exists():
        return []
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    if not isinstance(known, dict) or known.get("kind") != KIND:
        raise RunError(f"{path} holds something else than figures of this command", do="give another file")
    other = [name for name in ("machine", "versions", "quick") if known.get(name) != about[name]]
    if other:
        raise RunError(
            f"{path} was measured otherwise: {', '.join(other)} differ", do="give another file, or remove this one"
        )
    return known["figures"]


def merge(old: Sequence[dict], new: Sequence[dict]) -> list[dict]:
    """Figures of both; a row that was measured again is replaced as a whole. In the order of `ROWS`."""
    again = {figure["row"] for figure in new}
    together = [figure for figure in old if figure["row"] not in again and figure["row"] in ROWS] + list(new)
    return sorted(together, key=lambda figure: list(ROWS).index(figure["row"]))


def power(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """p of cost ~ size^p over the larger half of the sizes, by least squares."""
    points = [(math.log(size), math.log(cost)) for size, cost in zip(sizes, costs)][(len(sizes) - 1) // 2 :]
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points))
    above = sum((x - mean_x) * (y - mean_y) for x, y in points)
    return above / sum((x - mean_x) ** 2 for x, _ in points)
