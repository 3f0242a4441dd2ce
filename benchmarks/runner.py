"""Runs the measurements in fresh processes and compares their results."""

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
from paddle_medcls.core.errors import RunError
from paddle_medcls.core.files import python_path
from paddle_medcls.core.hardware import usable_cores
from paddle_medcls.core.progress import progress

KIND = "paddle_medcls benchmark"
PREPARED = ("inference1", "inference32", "novelty", "start", "shards")  # rows that need the files of `networks.prepare`


def run_rows(rows: Sequence[str], rounds: int, quick: bool, torch_python: str) -> Iterator[list[dict]]:
    """Measures rows, and yields the results of each row when it is finished.

    Args:
        rounds: measurements of each variant; one for the rows in `rows.ONCE`.
        quick: measures for a shorter time, with batches a quarter as large.
        torch_python: an interpreter that has PyTorch.

    Returns:
        One dictionary per variant: `row`, `variant`, `unit`, and `value` (median), `rounds` (all values), `peak_mb`
        (the largest); or `not_measured` (the reason).
    """
    with tempfile.TemporaryDirectory() as folder:
        job = Job("prepare", "", folder, 0.5 if quick else 3.0, 4 if quick else 1, torch_python)
        if set(rows) & set(PREPARED):
            print("preparing: a network and its inference graphs", file=sys.stderr)
            fresh_process(job)
        for row in rows:
            cells = [replace(job, row=row, variant=variant) for variant in ROWS[row]]
            cells *= 1 if row in ONCE else rounds
            measured: dict[str, list[dict]] = {variant: [] for variant in ROWS[row]}
            print(f"measuring {row}: {', '.join(ROWS[row])}", file=sys.stderr)
            with progress(cells, row, len(cells), "measurement") as bar:
                for cell in bar:
                    results = measured[cell.variant]
                    if not (results and "not_measured" in results[0]):
                        results.append(fresh_process(cell))
            yield [_figure(row, variant, results) for variant, results in measured.items()]


def _figure(row: str, variant: str, results: list[dict]) -> dict:
    figure = {"row": row, "variant": variant, "unit": UNITS.get(row, "images/s")}
    if "not_measured" in results[0]:
        return {**figure, "not_measured": results[0]["not_measured"]}
    values = [result["value"] for result in results]
    return {**figure, "value": median(values), "rounds": values, "peak_mb": max(r["peak_mb"] for r in results)}


def fresh_process(job: Job) -> dict:
    """Makes one measurement in a process of its own; see `measure.measure`."""
    command = [sys.executable, "-m", "benchmarks.measure", job.to_json()]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": python_path()})
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise RunError(f"benchmark {job.row}, {job.variant}: exit code {done.returncode}: {last[0]}") from None


def compare(figures: Sequence[dict]) -> list[dict]:
    """Results with their comparisons, as far as the other results are there.

    Adds `ratio` (to the row's first variant), `to_peer` (to the row's peer, see `rows.PEERS`) and `limit_share` (share
    of the speed limit set by the measured matrix product; slightly above 1 is possible).
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
    """Machine and versions; all results of one table must have the same."""
    environment = fresh_process(Job("machine", ""))
    machine = {"processor": environment["processor"], "cores": usable_cores(), "platform": environment["platform"]}
    versions = {name: environment[name] for name in ("paddle_medcls", "paddle", "python", "numpy", "opencv")}
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
    return {"machine": machine, "versions": versions, "code": environment["code"]}


def read(path: Path, about: dict) -> list[dict]:
    """Results measured before on this machine; none if there is no such file.

    Args:
        about: the dictionary of `describe`, and `quick`.

    Raises:
        RunError: not a file of this command, or of another machine, other versions or another `quick`.
    """
    if not path.exists():
        return []
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    if not isinstance(known, dict) or known.get("kind") != KIND:
        raise RunError("not a file of results of this command", path=path, fix="give another --output")
    other = [name for name in ("machine", "versions", "quick") if known.get(name) != about[name]]
    if other:
        raise RunError(
            f"the results in this file have different settings: {', '.join(other)}",
            path=path,
            fix="give another --output, or remove this file",
        )
    return known["figures"]


def merge(old: Sequence[dict], new: Sequence[dict]) -> list[dict]:
    """Both lists of results in the order of `ROWS`; all old results of a row that was measured again are dropped."""
    again = {figure["row"] for figure in new}
    together = [figure for figure in old if figure["row"] not in again and figure["row"] in ROWS] + list(new)
    return sorted(together, key=lambda figure: list(ROWS).index(figure["row"]))


def power(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """p of cost ~ size^p over the larger half of the sizes, by least squares."""
    points = [(math.log(size), math.log(cost)) for size, cost in zip(sizes, costs)][(len(sizes) - 1) // 2 :]
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points))
    above = sum((x - mean_x) * (y - mean_y) for x, y in points)
    return above / sum((x - mean_x) ** 2 for x, _ in points)
