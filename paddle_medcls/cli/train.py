"""`python tools/train.py --dataset palm`: trains a recipe and writes a run directory."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from paddle_medcls.cli.common import list_own_images, run
from paddle_medcls.cli.train_options import train_parser
from paddle_medcls.core.errors import PROGRAM
from paddle_medcls.training.launcher import launch, launched


def main(argv: Sequence[str] | None = None) -> int:
    p = train_parser()
    args = p.parse_args(argv)
    args.given = list(sys.argv[1:] if argv is None else argv)
    if args.workers < 0:
        p.error("--workers must be 0 or more")
    changes = [args.dataset, args.recipe, args.model, args.epochs, args.batch_size, args.lr, args.seed, args.val]
    changes += [args.cache_views, args.kernels, args.precision]
    changes += [args.labels, args.columns, args.ordinal, args.patient_pattern, args.split_seed or None]
    changes += [args.pretrained, args.set or None, args.output, args.output_root, args.sample or None, args.folds]
    if args.resume and any(value is not None for value in changes):
        p.error("--resume takes the run's own recipe and data; leave the other options out")
    if args.folds is not None and not 2 <= args.folds <= 100:
        p.error("--folds is 2 to 100")
    if args.output and args.output_root:
        p.error("--output and --output_root are two names for one thing; give one")
    if not args.resume and not args.dataset and not args.recipe:
        p.error("--dataset or --recipe is needed")
    return run(_one_of_several if launched() else _work, args)


def _one_of_several(args: argparse.Namespace) -> int:
    """The command in a process that Paddle's launcher has started."""
    from paddle_medcls.training.watch import shared_failure

    with shared_failure():
        return _work(args)


def _work(args: argparse.Namespace) -> int:
    from paddle_medcls.core.errors import RunError
    from paddle_medcls.recipes.recipe import Recipe

    args.images = None if args.resume else _images(args)
    first = args.resume and args.resume / "fold1" / "recipe.json"
    if first and first.is_file():
        recipe = Recipe.from_file(first)
        _resume_folds(args, recipe)
    else:
        recipe = Recipe.from_file(args.resume / "recipe.json") if args.resume else _recipe(args)
    if (args.parallel or args.cluster) and not args.folds:
        raise RunError("--parallel and --cluster train the folds of a cross-validation", fix="add --folds K")
    if (args.parallel or args.cluster) and (launched() or args.processes not in (None, 1)):
        raise RunError("--parallel and --cluster train each fold in one process", fix="leave --processes out")
    if args.summary:
        return _summary(args, recipe)
    environ = dict(os.environ)  # before it is made ready for a process that has all cores
    count = _count(args)
    if count > 1:
        return _launch(args, recipe, count, environ)
    run_dir, metrics = _train(args, recipe)
    if metrics and PROGRAM not in os.environ:  # else the command that handed over prints them
        _print_result(args, recipe, run_dir, metrics)
    return 0


def _print_result(args: argparse.Namespace, recipe, run_dir: Path, metrics: dict) -> None:
    from paddle_medcls.evaluation.tables import NOTICE, choice_of_epoch, class_table, fold_table, summary

    print(class_table(metrics))
    print(summary(metrics, () if recipe.folds else recipe.targets))
    if args.folds:
        print(fold_table(metrics))
    print(f"{choice_of_epoch(metrics)}; written to {run_dir}\n{NOTICE}")


def _resume_folds(args: argparse.Namespace, recipe) -> None:
    """Takes the settings of an interrupted cross-validation from its first fold, for folds that are not begun too."""
    from paddle_medcls.training.resume import read_environment
    from paddle_medcls.training.session import run_settings

    args.folds = recipe.folds
    for name, value in run_settings(read_environment(args.resume / "fold1")).items():
        if getattr(args, name) in (None, "auto"):
            setattr(args, name, value)


def _train(args: argparse.Namespace, recipe) -> tuple[Path, dict]:
    """Trains in this process; the run directory and the metrics."""
    from paddle_medcls.core.hardware import NOTES
    from paddle_medcls.core.paddle_setup import select_device
    from paddle_medcls.training.distributed import from_first, join
    from paddle_medcls.training.loop import Options, check_recipe, train

    check_recipe(recipe)
    select_device(args.device)  # before processes meet, which they do by their devices
    rank, world = join()
    for note in NOTES if rank == 0 else ():
        print(f"set {note}", file=sys.stderr)
    run_dir = Path(from_first(lambda: str(_prepare(args, recipe)), rank, world))
    data_root = _data_root(args, recipe, run_dir)
    names = ("device", "workers", "amp", "deterministic", "force", "image_cache")
    options = {name: getattr(args, name) for name in names}
    options |= {"kernels": args.kernels or "auto", "precision": args.precision or "f32"}
    if args.folds:
        from paddle_medcls.training.folds import train_folds
        from paddle_medcls.training.parallel import chosen

        parallel = chosen(args.parallel, args.cluster)
        result = train_folds(recipe, args.folds, args.images or data_root, run_dir, Options(**options), parallel)
        return run_dir, result.metrics
    run = train(recipe, args.images or data_root, run_dir, Options(**options), resume=bool(args.resume))
    return run_dir, run.metrics


def _launch(args: argparse.Namespace, recipe, count: int, environ: dict[str, str]) -> int:
    """Trains in several processes, which get this command's own arguments; returns the exit code."""
    from paddle_medcls.core.errors import SetupError
    from paddle_medcls.core.paddle_setup import count_gpus
    from paddle_medcls.training.loop import check_recipe
    from paddle_medcls.training.run_directory import read_metrics

    check_recipe(recipe, count)
    gpus = 0 if args.device == "cpu" else count_gpus()
    if gpus and count > gpus:
        fix = f"--processes {gpus}, or --device cpu"
        raise SetupError(f"--processes {count}: each needs a GPU, and there are {gpus}", fix=fix)
    run_dir = args.resume or _run_dir(args, recipe)
    place = [] if args.resume or args.output or args.output_root else ["--output", str(run_dir)]
    code = launch([*args.given, *place], count, environ, on_cpu=not gpus)
    if not code:
        _print_result(args, recipe, run_dir, read_metrics(run_dir))
    return code


def _count(args: argparse.Namespace) -> int:
    """Number of processes to start; a resumed run has as many as it began with, and one of several starts none."""
    if launched():
        return 1
    if args.processes is None and args.resume:
        from paddle_medcls.training.resume import read_environment

        return read_environment(args.resume / "fold1" if args.folds else args.resume).get("processes", 1)
    if args.processes == "auto":
        from paddle_medcls.core.paddle_setup import count_gpus

        return 1 if args.device == "cpu" else max(1, count_gpus())
    return args.processes or 1


def _images(args: argparse.Namespace):
    """The list of own images; None for other data sets."""
    from paddle_medcls.core.errors import DataError
    from paddle_medcls.data.datasets import dataset_module

    if not args.dataset and args.recipe == "own":
        args.dataset = "table" if args.labels else "folder"
    if args.dataset:
        dataset_module(args.dataset)  # unknown as a data set, not as a recipe
    images = list_own_images(args, args.split_seed)
    if images is not None and (args.sample or args.download):
        raise DataError("--sample and --download are for published data sets", fix="leave them out")
    return images


def _recipe(args: argparse.Namespace):
    from paddle_medcls.core.errors import RecipeError
    from paddle_medcls.recipes import get_recipe, own
    from paddle_medcls.recipes.recipe import Recipe

    name = args.recipe or args.dataset
    recipe = Recipe.from_file(name) if name.endswith(".json") else get_recipe(name, args.dataset, args.model)
    if args.dataset and recipe.dataset != args.dataset:
        raise RecipeError(f"recipe {recipe.name} is for {recipe.dataset}, not for --dataset {args.dataset}")
    if args.images is not None and recipe.name == own.OWN.name:
        images = args.images.fold(args.folds, 1) if args.folds else args.images
        recipe = own.for_images(recipe, images.index("train"))
    options = {name: getattr(args, name) for name in ("model", "batch_size", "lr", "seed", "cache_views", "pretrained")}
    options["labels"] = args.val
    assignments = [f"{field}={value}" for field, value in options.items() if value is not None]
    if args.epochs is not None:
        recipe = recipe.with_epochs(args.epochs) if args.epochs > 0 else recipe.replace(epochs=args.epochs)
    recipe = recipe.override(assignments + args.set)
    if recipe.pretrained == "imagenet":
        print("pretrained on ImageNet: RGB, ImageNet's mean and standard deviation", file=sys.stderr)
    return recipe


def _run_dir(args: argparse.Namespace, recipe) -> Path:
    """The directory of a new run."""
    if args.output or args.output_root:
        return args.output or args.output_root / recipe.dataset
    from paddle_medcls.training.run_directory import new_run_directory

    return new_run_directory(recipe)


def _prepare(args: argparse.Namespace, recipe) -> Path:
    """The run directory; downloads the data, or writes synthetic ones, if an option says so."""
    from paddle_medcls.data.datasets import fetch
    from paddle_medcls.data.sample import draw
    from paddle_medcls.training.resume import refuse_taken

    if args.resume:
        return args.resume
    run_dir = _run_dir(args, recipe)
    if not args.folds:  # else the same command continues
        refuse_taken(run_dir)
    if args.sample:
        draw(recipe.dataset, _data_root(args, recipe, run_dir), recipe.seed)
    elif args.download:
        print(fetch(recipe.dataset, _data_root(args, recipe, run_dir)), file=sys.stderr)
    return run_dir


def _data_root(args: argparse.Namespace, recipe, run_dir: Path) -> Path:
    from paddle_medcls.data.datasets import default_root
    from paddle_medcls.training.resume import read_facts

    if args.resume:
        return args.data_root or Path(read_facts(run_dir / "fold1" if args.folds else run_dir)["data_root"])
    if args.images is not None:
        return args.images.folder
    return args.data_root or (run_dir / "sample" if args.sample else default_root(recipe.dataset))


def _summary(args: argparse.Namespace, recipe) -> int:
    from paddle_medcls.core.paddle_setup import paddle
    from paddle_medcls.data.datasets import dataset_classes
    from paddle_medcls.models.architectures.vision import refuse_size
    from paddle_medcls.training.setup import network_for

    images = args.images
    classes, task = (images.classes, images.task) if images else dataset_classes(recipe.dataset, recipe.labels)
    network = network_for(recipe, len(classes), task)
    size, model = recipe.preprocessing.size_px, network.build()
    refuse_size(model, network, size)
    paddle.summary(model, (1, network.in_channels, size, size))
    return 0


if __name__ == "__main__":
    sys.exit(main())
