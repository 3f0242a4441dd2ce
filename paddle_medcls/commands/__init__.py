"""The commands. Each module has `main(argv) -> exit code`; `tools/*.py` and `medcls` call it.

Exit codes: 0 done, 1 the run failed (one message on standard error), 2 wrong usage.
Nothing heavy is imported before the arguments are parsed, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

COMMANDS = {
    "prepare": "unpack, list, count and check a data set",
    "train": "train a recipe",
    "eval": "score a weight file on a split",
    "predict": "predict images",
    "export": "a trained model for other programs",
    "app": "the web page",
    "gradcam": "heat maps of images, and whether they are true",
    "reproduce": "run a grid of recipes and seeds, and its table",
    "benchmark": "measure speed, side by side",
}


def medcls(argv: Sequence[str] | None = None) -> int:
    """`medcls COMMAND …`: the same commands as `python tools/COMMAND.py …`."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] not in COMMANDS:
        lines = "\n".join(f"  {name:<10} {text}" for name, text in COMMANDS.items())
        wanted_help = bool(argv) and argv[0] in ("-h", "--help")
        print(f"usage: medcls COMMAND [options]\n\n{lines}", file=sys.stdout if wanted_help else sys.stderr)
        return 0 if wanted_help else 2
    return importlib.import_module(f"paddle_medcls.commands.{argv[0]}").main(argv[1:])


def parser(name: str, text: str) -> argparse.ArgumentParser:
    """A parser with what all commands share."""
    result = argparse.ArgumentParser(
        prog=name,
        description=text,
        epilog="For research and teaching; not a medical device, not for diagnosis.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    result.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return result


def add_engine_options(p: argparse.ArgumentParser) -> None:
    """--device, --engine and --precision of the commands that use a trained model."""
    p.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto")
    p.add_argument(
        "--engine",
        choices=("auto", "paddle", "onednn", "onnxruntime", "openvino"),
        default="auto",
        help="what computes; auto: the fastest on this machine that agrees with the network",
    )
    p.add_argument("--precision", choices=("f32", "bf16"), default="f32", help="bf16: faster, rounded (some engines)")


def open_predictor(weights: Path, args: argparse.Namespace):
    """The predictor of a weight file or export, as --recipe, --device, --engine and --precision want it."""
    from paddle_medcls.predict import Predictor
    from paddle_medcls.recipes import get_recipe

    engine = args.engine
    if args.device == "gpu" or _has_gpu_build():  # else Paddle, slow to import, need not be asked
        from paddle_medcls.runtime import select_device

        if select_device(args.device) != "cpu" and engine == "auto":
            engine = None  # on a GPU the network itself
    recipe = get_recipe(args.recipe) if args.recipe else None
    return Predictor.from_weights(weights, recipe, engine, args.precision, lambda line: print(line, file=sys.stderr))


def _has_gpu_build() -> bool:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return bool(version("paddlepaddle-gpu"))
    except PackageNotFoundError:
        return False


def run(work: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """Calls a command's work and turns its errors into one message and exit code 1."""
    try:
        return work(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 1
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has gone; nothing more to say to it
        return 1
    except Exception as error:
        if args.debug:
            raise
        from paddle_medcls.errors import MedclsError

        if isinstance(error, MedclsError):
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        else:
            print(f"unexpected {type(error).__name__}: {error}\n  fix        run again with --debug", file=sys.stderr)
        return 1
