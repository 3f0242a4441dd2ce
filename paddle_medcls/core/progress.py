"""Progress on standard error: a bar on a terminal; elsewhere, in logs and pipes, a plain line every 30 seconds."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from tqdm import tqdm

LINE_SECONDS = 30


def progress(iterable: Iterable | None, what: str, total: int, unit: str, show: bool = True) -> tqdm:
    """A progress bar with rate and remaining time, removed at the end.

    Use it in a `with` statement, which removes the bar before the message of an error or of Ctrl-C is printed.

    Args:
        iterable: iterated by the bar; None: the caller calls `update`.
        unit: name of a unit, such as "batch".
        show: False prints nothing.
    """
    if not show or sys.stderr is None:
        return tqdm(iterable, what, total, disable=True)
    if sys.stderr.isatty():
        return tqdm(iterable, what, total, unit=unit, leave=False, dynamic_ncols=True)
    return tqdm(
        iterable,
        what,
        total,
        unit=unit,
        file=_Lines(),
        leave=False,
        delay=LINE_SECONDS,
        mininterval=LINE_SECONDS,
        miniters=1,
        bar_format="{desc}: {percentage:.0f}%, {n_fmt} of {total_fmt}, {elapsed} passed, {remaining} left, "
        "{rate_fmt}{postfix}",
    )


def say_line(line: str) -> None:
    """Prints a line about the work above the bars: to standard error; in a notebook, where that is red, to stdout."""
    in_notebook = type(sys.stderr).__module__.startswith("ipykernel.")
    tqdm.write(line, file=sys.stdout if in_notebook else sys.stderr)


class _Lines:
    """A file for tqdm that prints its output as log lines, without carriage returns and padding."""

    def write(self, text: str) -> None:
        line = text.strip("\r\n ")
        if line:
            say_line(line)

    def flush(self) -> None:
        sys.stderr.flush()
