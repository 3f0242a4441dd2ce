"""One measurement: its description (`Job`) and the functions that time it."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from paddle_medcls.core.errors import RunError


@dataclass(frozen=True)
class Job:
    """The measurement that a fresh process makes; it receives `to_json`.

    Attributes:
        row, variant: see `rows.ROWS`.
        folder: shared by all variants; holds the files that `networks.prepare` wrote.
        seconds: a rate is measured for at least this long, and over at least one call.
        divide: batches are divided by this number, for a quick run.
        torch_python: an interpreter that has PyTorch.
    """

    row: str
    variant: str
    folder: str = ""
    seconds: float = 3.0
    divide: int = 1
    torch_python: str = sys.executable

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def rate(
    call: Callable[[], object], images: float, seconds: float, warm_up: Callable[[], object] | None = None
) -> float:
    """Images per second of a function.

    Args:
        call: processes `images` images.
        images: number of images per call.
        seconds: the least time to measure; at least one call is measured.
        warm_up: called once before, not measured (default: `call`).
    """
    (warm_up or call)()
    count, start = 0, time.perf_counter()
    while count == 0 or time.perf_counter() - start < seconds:
        call()
        count += 1
    return count * images / (time.perf_counter() - start)


def medcls(*arguments: str, before: str = "") -> list[str]:
    """The command line of one of this package's commands; the code `before` runs first, in the same process."""
    return [sys.executable, "-c", f"{before}from paddle_medcls.cli import main; exit(main())", *arguments]


def run(command: Sequence[str]) -> float:
    """Runs a command and returns its wall time in seconds.

    Raises:
        RunError: it failed; with the last line of its standard error.
    """
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise RunError(f"exit code {done.returncode}: {last[0]}")
    return seconds


def train_command(run_dir: Path, *arguments: str) -> dict[str, float]:
    """Trains with `train.py`; returns the last row of the run's timing.csv."""
    run(medcls("train", *arguments, "--device", "cpu", "--output", str(run_dir)))
    with open(run_dir / "timing.csv", encoding="utf-8") as file:
        return {name: float(value) for name, value in list(csv.DictReader(file))[-1].items()}


def peak_mb() -> float:
    """The peak memory of this process or of the largest process that it started, in MB."""
    try:
        import resource
    except ImportError:
        return float("nan")  # not on Windows
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    most = max(resource.getrusage(kind).ru_maxrss for kind in kinds)
    return most / (1e6 if sys.platform == "darwin" else 1e3 / 1.024)
