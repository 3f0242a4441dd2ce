"""The options of the command `train`."""

from __future__ import annotations

import argparse
from pathlib import Path

from paddle_medcls.cli.common import add_own_options, add_parallel_options, boolean, named, parser

TEXT = """Trains a recipe and writes a run directory: best weights and their sidecar, history,
metrics, predictions, pictures, and the state to resume from."""


def train_parser() -> argparse.ArgumentParser:
    """The options of `train`: what is trained, then how it is run."""
    p = parser("train", TEXT)
    p.add_argument(
        "--dataset",
        type=named("dataset"),
        help="palm, covid, … or a MedMNIST set (breastmnist, …), or list: names them; trains the set's own recipe",
    )
    p.add_argument("--data_name", dest="dataset", type=str.lower, help="--dataset, as in the MedMNIST baseline")
    p.add_argument("--recipe", type=named("recipe"), help="another recipe, by name or as a JSON file; list: names them")
    p.add_argument(
        "--data-root", "--input_root", type=Path, help="folder of the images (default: datasets/<dataset or medmnist>)"
    )
    p.add_argument("--labels", type=Path, metavar="FILE", help="table: CSV or Excel file with a row for each image")
    add_own_options(p)
    p.add_argument("--split-seed", type=int, default=0, metavar="N", help="own images: seed of the splits (default: 0)")
    p.add_argument(
        "--download",
        type=boolean,
        nargs="?",
        const=True,
        default=False,
        metavar="True|False",
        help="fetch the set first, if it is not there (MedMNIST)",
    )
    p.add_argument("--sample", action="store_true", help="train on synthetic sample images")
    p.add_argument("--model", type=named("model"), help="resnet18, densenet121, …; list: names them")
    p.add_argument("--epochs", "--num_epoch", type=int, help="warm-up and decay points keep their share of the run")
    p.add_argument("--batch-size", type=int, help="images in a step (default: the recipe's)")
    p.add_argument("--lr", type=float, help="peak learning rate")
    p.add_argument("--seed", type=int, help="of weights, order and augmentation (default: the recipe's)")
    p.add_argument(
        "--folds",
        type=int,
        metavar="K",
        help="cross-validation of the training images: K models, in DIR/fold1, …; the same command continues it",
    )
    add_parallel_options(p, "folds")
    p.add_argument("--pretrained", metavar="FILE|imagenet", help="start from these weights; imagenet: Paddle's own")
    p.add_argument("--cache-views", type=int, metavar="K", help="frozen features: versions of each image to keep")
    p.add_argument("--val", choices=("shipped",), help="oct: validate on the shipped folder, as the tutorial does")
    p.add_argument(
        "--set",
        type=named("field"),
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="any field of the recipe; list: names them",
    )
    _add_run_options(p)
    return p


def _add_run_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--output", type=Path, help="run directory (default: runs/<recipe>-<time>)")
    p.add_argument(
        "--output_root",
        type=Path,
        metavar="DIR",
        help="run directory DIR/<dataset>, as in the MedMNIST baseline",
    )
    p.add_argument("--resume", type=Path, metavar="DIR", help="resume an interrupted run; needs nothing else")
    p.add_argument(
        "--force", action="store_true", help="with --resume: although data, versions or settings have changed"
    )
    p.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto", help="auto: a GPU where Paddle sees one")
    p.add_argument("--workers", type=int, default=2, help="threads that read images (default: 2)")
    p.add_argument(
        "--processes",
        type=_processes,
        metavar="N|auto",
        help="processes that share each batch, on the CPU or one a GPU (default: 1); auto: one for each GPU",
    )
    p.add_argument(
        "--image-cache",
        metavar="DIR|off",
        help="keep the decoded, scaled images for later epochs and runs (default: the folder images beside the run)",
    )
    p.add_argument("--kernels", choices=("auto", "paddle", "onednn"), help="CPU kernels to use (default: auto)")
    p.add_argument(
        "--precision",
        choices=("f32", "bf16", "auto"),
        help="of oneDNN's kernels (default: f32); auto: bf16 where they and the processor have it",
    )
    p.add_argument("--amp", action="store_true", default=None, help="mixed precision, on a GPU")
    p.add_argument("--deterministic", action="store_true", default=None, help="deterministic algorithms, on a GPU")
    p.add_argument("--summary", action="store_true", help="print the network's layers and stop")


def _processes(text: str) -> int | str:
    """An argument's value: "auto", or a number of 1 or more."""
    if text == "auto" or (text.isdigit() and int(text) >= 1):
        return text if text == "auto" else int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is neither auto nor a number of 1 or more")
