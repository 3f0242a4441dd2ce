"""What the commands share: the argument parser, the common options, and how errors end a command."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from paddle_medcls.core.errors import command, describe


def parser(name: str, text: str) -> argparse.ArgumentParser:
    """The argument parser of a command, with the options that all commands share."""
    for stream in (sys.stdout, sys.stderr):  # a character that the terminal cannot show must not raise an error
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    result = argparse.ArgumentParser(
        prog=command(name),
        description=text,
        epilog="For research and teaching; not a medical device, not for diagnosis.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    result.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return result


def named(kind: str, convert: Callable[[str], Any] = str) -> Callable[[str], Any]:
    """The `type` of an option that takes a name: "list" prints all names and ends the command.

    Args:
        kind: "recipe", "model", "dataset" or "field".
    """

    def value(text: str) -> Any:
        if text != "list":
            return convert(text)
        from paddle_medcls.cli.listing import show

        raise SystemExit(run(lambda _: show(kind), argparse.Namespace(debug=False)))

    return value


def boolean(text: str) -> bool:
    """The `type` of a flag that may be followed by True or False, in any case."""
    known = {"true": True, "false": False}
    if text.lower() not in known:
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return known[text.lower()]


def add_recipe_option(p: argparse.ArgumentParser) -> None:
    """--recipe of the commands that use a trained model."""
    text = "for a file without a sidecar: the recipe it was trained with"
    p.add_argument("--recipe", type=named("recipe"), metavar="NAME", help=text)


def add_weights_option(p: argparse._ActionsContainer, default: str = " (default: the newest run's)") -> None:
    """--weights of the commands that use a trained model."""
    text = f"weight file, export or run{default}; several, or the folder of a cross-validation: their average"
    p.add_argument("--weights", type=Path, nargs="+", metavar="FILE", help=text)


def images_behind_weights(args: argparse.Namespace) -> list[str]:
    """The images of a command line; those behind --weights, as in `--weights FILE image.png`, are taken from there."""
    from paddle_medcls.models.sidecar import is_model

    count = next((k for k, path in enumerate(args.weights or ()) if k and not is_model(path)), None)
    if count is None:
        return args.images
    images = [*args.images, *map(str, args.weights[count:])]
    args.weights = args.weights[:count]
    return images


def add_engine_options(p: argparse.ArgumentParser) -> None:
    """--device, --engine and --precision of the commands that use a trained model."""
    p.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto", help="auto: a GPU if there is one")
    p.add_argument(
        "--engine",
        choices=("auto", "paddle", "openvino", "onnxruntime"),
        default="auto",
        help="inference backend; auto: OpenVINO, else ONNX Runtime, else Paddle",
    )
    p.add_argument(
        "--precision",
        choices=("f32", "bf16", "auto"),
        default="f32",
        help="bf16: faster and less exact; not in every engine; auto: bf16 where engine and processor have it",
    )
    p.add_argument(
        "--allow-program",
        action="store_true",
        help="open an export in Paddle's own format: a program that can write any file of yours; only for your own",
    )


def add_parallel_options(p: argparse.ArgumentParser, what: str) -> None:
    """--parallel and --cluster of the commands that train several networks."""
    text = f"{what} at a time, each in a process: with a GPU each, or with a share of the cores"
    p.add_argument("--parallel", type=count_of, metavar="N", help=text)
    text = f"{what} in this Ray cluster, by default one at a time on each GPU, else on each node; needs shared storage"
    p.add_argument("--cluster", metavar="auto|HOST:PORT", help=text)


def count_of(text: str) -> int:
    """An argument's value: a number of 1 or more."""
    if text.isdigit() and int(text) >= 1:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no number of 1 or more")


def add_own_options(p: argparse.ArgumentParser) -> None:
    """The options for own images, of the data sets `folder` and `table`; their file is --labels."""
    p.add_argument(
        "--columns", nargs="+", metavar="MEANING=NAME", help="table: its columns path, label, patient, split, by name"
    )
    p.add_argument("--ordinal", metavar="A,B,C", help="own images: the classes in their order, for an ordinal task")
    p.add_argument(
        "--patient-pattern",
        metavar="REGEX",
        help="own images: found in each path; its first group is the patient, as '[A-Z]-(\\d+)-'",
    )


def list_own_images(args: argparse.Namespace, seed: int | None, again: bool = False):
    """The `ImageList` that the options name; None for other data sets.

    Args:
        seed: of the splits; None: all images are for evaluation.
        again: whether a list in the folder of the images is made again.
    """
    from paddle_medcls.core.errors import DataError
    from paddle_medcls.data.datasets import default_root, is_own
    from paddle_medcls.data.datasets.own import refuse_two_splits
    from paddle_medcls.data.image_list import read_image_list
    from paddle_medcls.data.own_images import own_images

    own = bool(args.dataset) and is_own(args.dataset)
    names = ("labels", "columns", "ordinal", "patient_pattern", "split_seed")
    given = [name for name in names if getattr(args, name, None)]
    root = (args.data_root or default_root(args.dataset)) if own else Path()
    if own and root.is_file() and not given:
        return read_image_list(root)
    if given and (not own or root.is_file()):
        options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise DataError(f"{options}: for a folder of own images", fix="--dataset folder or table, --data-root FOLDER")
    if not own:
        return None
    if (args.dataset == "table") != ("labels" in given):
        fix = "--dataset table takes --labels FILE, --dataset folder takes the names of the folders"
        raise DataError(
            f"--dataset {args.dataset} {'without' if args.dataset == 'table' else 'with'} --labels", fix=fix
        )
    if not again:
        refuse_two_splits(root)
    columns = {meaning: name for meaning, _, name in (text.partition("=") for text in args.columns or ())}
    ordinal = [name.strip() for name in (args.ordinal or "").split(",") if name.strip()]
    return own_images(root, args.labels, columns, ordinal, args.patient_pattern, seed)


def open_predictor(weights: list[Path], args: argparse.Namespace):
    """The predictor of a weight file or export, as --recipe, --device, --engine and --precision want it."""
    from paddle_medcls.deployment.predictor import load_predictor

    return load_predictor(weights, args.recipe, args.engine, args.precision, args.device, args.allow_program)


def run(work: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """Runs a command and returns its exit code; an error is one message and code 1, or with --debug a traceback."""
    try:
        code = work(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        sys.stderr.close()  # the program that read our output has ended; no message can reach it
        return 1
    except (Exception, KeyboardInterrupt) as error:
        if args.debug and not isinstance(error, KeyboardInterrupt):
            raise
        print(describe(error), file=sys.stderr)
        return 1
