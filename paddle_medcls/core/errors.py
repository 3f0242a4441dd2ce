"""Errors with a message for the user: what happened, where, what was expected, how to fix it."""

from __future__ import annotations

import difflib
import os
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

PROGRAM = "MEDCLS_PROGRAM"
"""In the environment of processes that a command has started: the program that the user called."""
_UNPRINTABLE = ("Cc", "Cf", "Cs", "Zl", "Zp")  # control, format (writing direction), bytes outside UTF-8, line ends


def printable(text: object) -> str:
    """Text from outside, such as a file name, as one line without control characters.

    Escape sequences, line ends and bytes that are not UTF-8 become escapes such as `\\x1b`; the rest is unchanged.
    """
    return "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c) in _UNPRINTABLE else c for c in str(text)
    )


def did_you_mean(name: str, known: Iterable[str], n: int = 1) -> str:
    """The end of a message about an unknown name, "; did you mean 'palm'?", or "" if no known name is similar."""
    by_lower = {other.lower(): other for other in known}
    near = [by_lower[lower] for lower in difflib.get_close_matches(name.lower(), by_lower, n=n, cutoff=0.5)]
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""


def command(name: str) -> str:
    """The start of a command line, as the user called this process: "python tools/train.py" or "medcls train"."""
    program = Path(os.environ.get(PROGRAM, sys.argv[0]))
    return (
        f"python tools/{name}.py"
        if program.suffix == ".py" and program.resolve().parent.name == "tools"
        else f"medcls {name}"
    )


class MedclsError(Exception):
    """Base of all errors that the commands print as one message, without a traceback.

    Args:
        what: the fault in one line, with the faulty value.
        path: the file, folder or field with the fault.
        expected: a description of correct input.
        fix: how to fix it.
        items: further lines, such as one per faulty file; the first 20 are shown.
    """

    def __init__(
        self,
        what: str,
        *,
        path: object = None,
        expected: str | None = None,
        fix: str | None = None,
        items: Sequence[str] = (),
    ) -> None:
        lines = [printable(what)]
        lines += [f"  {printable(item)}" for item in items[:20]]
        if len(items) > 20:
            lines.append(f"  … and {len(items) - 20} more")
        for label, text in (("path", path), ("expected", expected), ("fix", fix)):
            if text is not None:
                lines.append(f"  {label:<10} {printable(text)}")
        super().__init__("\n".join(lines))
        self.what = lines[0]


class DataError(MedclsError):
    """An image, label file or folder is missing or faulty."""


class RecipeError(MedclsError):
    """A recipe is unknown, or has an unknown field or a value out of range."""


class WeightsError(MedclsError):
    """A weight file cannot be read safely or does not fit the network."""


class SetupError(MedclsError):
    """Something is missing on this machine: Paddle, a library, a device, disk space."""


class RunError(MedclsError):
    """A training run cannot be started, continued or resumed."""


class Stopped(RunError):
    """Work was stopped by the user or by its time budget; its state is saved."""


def describe(error: BaseException) -> str:
    """The message of an error, as the commands print it."""
    if isinstance(error, (KeyboardInterrupt, SystemExit)):
        return "interrupted"
    if isinstance(error, Stopped):
        return str(error)
    if isinstance(error, MedclsError):
        return f"{type(error).__name__}: {error}"
    return printable(f"unexpected {type(error).__name__}: {error}") + "\n  fix        run again with --debug"
