"""The command line: each module has `main(argv) -> exit code`, which `medcls` and `tools/*.py` call through `main`.

Exit codes: 0 done, 1 failed (with one message on standard error), 2 wrong usage.
Paddle, NumPy and other slow imports are made after the arguments are parsed, so that `--help` is fast.
"""

from __future__ import annotations

import importlib
import platform
import signal
import sys
from collections.abc import Sequence

from paddle_medcls import __version__
from paddle_medcls.core.errors import did_you_mean, printable
from paddle_medcls.core.hardware import installed_version

PADDLES = ("paddlepaddle", "paddlepaddle-gpu")
COMMANDS = {
    "prepare": "unpack, split, count and check a data set",
    "train": "train a recipe",
    "eval": "evaluate a trained model on a split",
    "predict": "predict images with a trained model",
    "export": "export a trained model for other programs",
    "app": "show the web page",
    "serve": "answer over HTTP",
    "gradcam": "draw Grad-CAM heat maps and measure their faithfulness",
    "reproduce": "train recipes with several seeds and write a table",
    "benchmark": "measure speed and memory",
}
COMPLETION = """The TAB key completes commands and options after: eval "$(medcls completion bash)"
(zsh, fish: medcls completion --help)"""


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point of `medcls` and of the files in `tools/`; see `medcls`."""
    try:
        return medcls(argv)
    except KeyboardInterrupt:  # before or after `run`
        print("interrupted", file=sys.stderr)
        return 1
    finally:
        # Python waits for threads at exit, and Ctrl-C would then show a traceback.
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def medcls(argv: Sequence[str] | None = None) -> int:
    """Runs `medcls COMMAND …`, the same commands as `python tools/COMMAND.py …`, and returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    lines = "\n".join(f"  {name:<10} {text}" for name, text in COMMANDS.items())
    usage = f"usage: medcls COMMAND [options]\n       medcls --version\n\n{lines}\n\n{COMPLETION}"
    if argv and argv[0] in ("-h", "--help"):
        print(usage)
        return 0
    if argv and argv[0] == "--version":
        print(_versions())
        return 0
    if not argv or argv[0] not in (*COMMANDS, "completion"):
        fault = f"unknown command {argv[0]!r}{did_you_mean(argv[0], COMMANDS)}" if argv else "a command is needed"
        print(f"{usage}\n\nmedcls: error: {printable(fault)}", file=sys.stderr)
        return 2
    return importlib.import_module(f"paddle_medcls.cli.{argv[0]}").main(argv[1:])


def _versions() -> str:
    """Versions of the package, of Paddle without importing it, and of Python."""
    parts = [f"paddle_medcls {__version__}"]
    parts += [f"{name} {text}" for name in PADDLES if (text := installed_version(name))]
    return ", ".join([*parts, *(["no Paddle"] if len(parts) == 1 else []), f"Python {platform.python_version()}"])
