"""`python tools/train.py --dataset palm`: trains a recipe and writes a run directory."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from paddle_medcls.commands import boolean, named, parser, run

TEXT = """Trains a recipe and writes a run directory: best weights and their sidecar, history,
metrics, predictions, pictures, and the state to resume from."""


def main(argv: Sequence[str] | None = None) -> int:
    p = parser("train", TEXT)
    p.add_argument(
        "--dataset",
        type=named("dataset"),
        help="palm, covid, … or a MedMNIST set (breastmnist, …), or list: names them; trains the set's own recipe",
    )
    p.add_argument("--data_name", dest="dataset", type=str.lower, help="--dataset, as in the MedMNIST tutorial")
    p.add_argument("--recipe", type=named("recipe"), help="another recipe, by name or as a JSON file; list: names them")
    p.add_argument(
        "--data-root", "--input_root", type=Path, help="folder of the images (default: datasets/<dataset or medmnist>)"
    )
    p.add_argument(
        "--download",
        type=boolean,
        nargs="?",
        const=True,
        default=False,
        metavar="True|False",
        help="fetch the set first, if it is not there (MedMNIST)",
    )
    p.add_argument("--sample", action="store_true", help="train on sample images that the project draws")
    p.add_argument("--model", type=named("model"), help="resnet18, 34, 50, 101, 152 or vgg16; list: names them")
    p.add_argument("--epochs", "--num_epoch", type=int, help="warm-up and decay points keep their share of the run")
    p.add_argument("--batch-size", type=int)
    p.add_argument("--lr", type=float, help="peak learning rate")
    p.add_argument("--seed", type=int)
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
    p.add_argument("--output", type=Path, help="run directory (default: runs/<recipe>-<time>)")
    p.add_argument(
        "--output_root", type=Path, metavar="DIR", help="run directory DIR/<dataset>, as document 000 has it"
    )
    p.add_argument("--resume", type=Path, metavar="DIR", help="go on with an interrupted run; needs nothing else")
    p.add_argument("--force", action="store_true", help="with --resume: although data or versions have changed")
    p.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto")
    p.add_argument("--workers", type=int, default=2, help="threads that read images (default: 2)")
    p.add_argument(
        "--processes",
        type=_processes,
        metavar="N|auto",
        help="processes that share each batch, on the CPU or one a GPU (default: 1); auto: several where it is faster",
    )
    p.add_argument(
        "--image-cache",
        metavar="DIR|off",
        help="keep the decoded, scaled images for later epochs and runs (default: the folder images beside the run)",
    )
    p.add_argument("--kernels", choices=("auto", "paddle", "onednn"), help="on a CPU, whose operators (default: auto)")
    p.add_argument("--precision", choices=("f32", "bf16"), help="of oneDNN's operators (default: f32)")
    p.add_argument("--amp", action="store_true", help="mixed precision, on a GPU")
    p.add_argument("--deterministic", action="store_true", help="deterministic algorithms, on a GPU")
    p.add_argument("--visualdl", action="store_true", help="also log to <run>/visualdl")
    p.add_argument("--summary", action="store_true", help="print the network's layers and stop")
    args = p.parse_args(argv)
    if args.workers < 0:
        p.error("--workers must be 0 or more")
    changes = [args.dataset, args.recipe, args.model, args.epochs, args.batch_size, args.lr, args.seed, args.val]
    changes += [args.cache_views, args.kernels, args.precision]
    changes += [args.pretrained, args.set or None, args.output, args.output_root, args.sample or None]
    if args.resume and any(value is not None for value in changes):
        p.error("--resume goes on with the run's own recipe and data; leave the other options out")
    if args.output and args.output_root:
        p.error("--output and --output_root are two names for one thing; give one")
    if not args.resume and not args.dataset and not args.recipe:
        p.error("--dataset or --recipe is needed")
    return run(_work, args)


def _work(args: argparse.Namespace) -> int:
    from paddle_medcls.recipe import Recipe

    recipe = Recipe.from_file(args.resume / "recipe.json") if args.resume else _recipe(args)
    if args.summary:
        return _summary(recipe)
    run_dir, data_root = _places(args, recipe)
    from paddle_medcls.report import NOTICE, class_table, summary

    result = _train(args, recipe, data_root, run_dir)
    if result:  # process 0 alone
        print(class_table(result))
        print(summary(result, recipe.targets))
        print(f"best epoch {result['epoch']}; written to {run_dir}\n{NOTICE}")
    return 0


def _train(args: argparse.Namespace, recipe, data_root: Path, run_dir: Path) -> dict:
    names = ("device", "workers", "amp", "deterministic", "visualdl", "force")
    options = {name: getattr(args, name) for name in names}
    options |= {"kernels": args.kernels or "auto", "precision": args.precision or "f32"}
    options["image_cache"] = "" if args.image_cache == "off" else args.image_cache or str(run_dir.parent / "images")
    environ = dict(os.environ)  # before it is made ready for a process that has all cores
    count, gpus = _count(args, recipe)
    if count > 1:
        from paddle_medcls.processes import run_processes

        norm = "those of the whole batch" if gpus else "each process's own, so the run differs from one process's"
        print(
            f"{count} processes share each batch of {recipe.batch_size}; batch-norm statistics are {norm}",
            file=sys.stderr,
        )
        job = {"recipe": recipe.to_json(), "data_root": str(data_root), "run_dir": str(run_dir), "options": options}
        return run_processes({**job, "resume": bool(args.resume), "debug": args.debug}, count, gpus, environ)
    from paddle_medcls.cpu import NOTES
    from paddle_medcls.train import Options, train

    for note in NOTES:
        print(f"set {note}", file=sys.stderr)
    return train(recipe, data_root, run_dir, Options(**options), resume=bool(args.resume))


def _processes(text: str) -> int | str:
    """An argument's value: "auto", or a number of 1 or more."""
    if text == "auto" or (text.isdigit() and int(text) >= 1):
        return text if text == "auto" else int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is neither auto nor a number of 1 or more")


def _count(args: argparse.Namespace, recipe) -> tuple[int, bool]:
    """Number of processes, and whether each takes a GPU; a resumed run has as many as it began with."""
    wanted = args.processes
    if wanted is None and args.resume:
        wanted = _processes_of(args.resume)
    if wanted in (None, 1) or _launched():
        return 1, False
    from paddle_medcls.cpu import usable_cores
    from paddle_medcls.processes import choose

    gpus = 0
    if args.device != "cpu":
        from paddle_medcls.runtime import count_gpus

        gpus = count_gpus()
    onednn = wanted == "auto" and not gpus and _onednn_computes(args, recipe)
    count = choose(wanted, gpus, usable_cores(), recipe.batch_size, onednn)
    if wanted == "auto" and count == 1:
        why = "with oneDNN's operators it is the fastest" if onednn else "one core or GPU, or a small batch"
        print(f"one process: {why}", file=sys.stderr)
    return count, gpus > 0


def _onednn_computes(args: argparse.Namespace, recipe) -> bool:
    from paddle_medcls.errors import SetupError
    from paddle_medcls.models.dnnl import open_library

    if args.kernels == "paddle" or recipe.freeze or not recipe.model.startswith("resnet"):
        return False
    try:
        open_library()
    except SetupError:
        return False
    return True


def _processes_of(run_dir: Path) -> int:
    try:
        return int(json.loads((run_dir / "environment.json").read_text(encoding="utf-8")).get("processes", 1))
    except (OSError, ValueError):
        return 1  # what is wrong with the run directory is said by what needs the file


def _recipe(args: argparse.Namespace):
    from paddle_medcls.data import dataset_module
    from paddle_medcls.errors import RecipeError
    from paddle_medcls.recipe import Recipe
    from paddle_medcls.recipes import get_recipe

    if args.dataset:
        dataset_module(args.dataset)  # unknown as a data set, not as a recipe
    name = args.recipe or args.dataset
    recipe = Recipe.from_file(name) if name.endswith(".json") else get_recipe(name, args.dataset, args.model)
    if args.dataset and recipe.dataset != args.dataset:
        raise RecipeError(f"recipe {recipe.name} is for {recipe.dataset}, not for --dataset {args.dataset}")
    given = {
        "model": args.model,
        "batch_size": args.batch_size,
        "lr": args.lr,
        "seed": args.seed,
        "cache_views": args.cache_views,
        "pretrained": args.pretrained,
    }
    if args.val:
        given["labels"] = args.val
    assignments = [f"{field}={value}" for field, value in given.items() if value is not None]
    if args.epochs is not None:
        recipe = recipe.with_epochs(args.epochs) if args.epochs > 0 else recipe.replace(epochs=args.epochs)
    recipe = recipe.override(assignments + args.set)
    if recipe.pretrained != "imagenet":
        return recipe
    print("pretrained on ImageNet: RGB, ImageNet's mean and standard deviation", file=sys.stderr)
    return recipe


def _places(args: argparse.Namespace, recipe) -> tuple[Path, Path]:
    """Run directory and data root; a run directory that is in use is an error."""
    from paddle_medcls.data import default_root, fetch
    from paddle_medcls.errors import RunError

    if args.resume:
        try:
            facts = json.loads((args.resume / "data.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RunError(f"{args.resume} cannot be resumed: data.json: {error}") from None
        return args.resume, args.data_root or Path(facts["data_root"])
    stem = recipe.name if recipe.name.startswith(recipe.dataset) else f"{recipe.name}-{recipe.dataset}"
    run_dir = args.output or Path("runs") / f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    if args.output_root:
        run_dir = args.output_root / recipe.dataset
    if (run_dir / "recipe.json").exists() and not _launched():
        do = f"go on with it (--resume {run_dir}), or remove it, or give another --output"
        raise RunError(f"{run_dir} already holds a run", do=do)
    if not args.sample:
        root = args.data_root or default_root(recipe.dataset)
        if args.download:
            print(fetch(recipe.dataset, root), file=sys.stderr)
        return run_dir, root
    from paddle_medcls.data.sample import draw

    root = args.data_root or run_dir / "sample"
    draw(recipe.dataset, root, recipe.seed)
    return run_dir, root


def _launched() -> bool:
    """Whether paddle.distributed.launch started this process, one of several on the same run directory."""
    return int(os.environ.get("PADDLE_TRAINERS_NUM", "1")) > 1


def _summary(recipe) -> int:
    from paddle_medcls.data import dataset_classes
    from paddle_medcls.models import network_for
    from paddle_medcls.runtime import paddle

    classes, task = dataset_classes(recipe.dataset, recipe.labels)
    network = network_for(recipe, len(classes), task)
    size = recipe.preprocessing.size_px
    paddle.summary(network.build(), (1, network.in_channels, size, size))
    return 0
