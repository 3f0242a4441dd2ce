"""What every measurement shares: its job, and how something is timed."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from paddle_medcls.errors import RunError


@dataclass(frozen=True)
class Job:
    """What a fresh process is to measure; `to_json` goes to it.

    Attributes:
        row, variant: see `rows.ROWS`.
        folder: shared by the variants of a call; it holds what `networks.prepare` wrote.
        seconds: a figure is measured for at least this long, and over one call.
        divide: batches are this many times smaller than they should be, to be done sooner.
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
    """Images a second of `call`, after `warm_up` (default: `call`), for at least this long and one call."""
    (warm_up or call)()
    count, start = 0, time.perf_counter()
    while count == 0 or time.perf_counter() - start < seconds:
        call()
        count += 1
    return count * images / (time.perf_counter() - start)


def medcls(*arguments: str, before: str = "") -> list[str]:
    """A command line of this package's commands; `before` is run ahead of it, in the same process."""
    return [sys.executable, "-c", f"{before}from paddle_medcls.commands import main; exit(main())", *arguments]


def run(command: Sequence[str], environment: Mapping[str, str] | None = None) -> float:
    """Runs a command, in this process's environment unless another is given; returns its wall time in seconds.

    Raises:
        RunError: it failed; the last line that it said.
    """
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    seconds = time.perf_counter() - start
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise RunError(f"exit code {done.returncode}: {last[0]}")
    return seconds


def train_command(run_dir: Path, *arguments: str) -> dict[str, float]:
    """Trains with `train.py`; returns the last row of the run's timing.csv."""
    run(medcls("train", *arguments, "--device", "cpu", "--output", str(run_dir)))
    with open(run_dir / "timing.csv", encoding="utf-8") as file:
        return {name: float(figure) for name, figure in list(csv.DictReader(file))[-1].items()}


def peak_mb() -> float:
    """The most memory that this process, or one that it started, has held, in MB."""
    try:
        import resource
    except ImportError:
        return float("nan")  # not on Windows
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    most = max(resource.getrusage(kind).ru_maxrss for kind in kinds)
    return most / (1e6 if sys.platform == "darwin" else 1e3 / 1.024)
