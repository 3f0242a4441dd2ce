"""`python tools/benchmark.py`: runs the benchmark, which is in the repository and is not installed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `benchmarks.command` of the clone that this file is in."""
    root = Path(__file__).parents[2]
    if not (root / "benchmarks/command.py").is_file():
        print(
            "the benchmark is not installed; run it in a clone of the repository: python tools/benchmark.py",
            file=sys.stderr,
        )
        return 1
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    from benchmarks.command import main as measure

    return measure(argv)
