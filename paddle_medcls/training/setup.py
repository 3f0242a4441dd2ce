"""Builds the data, network, optimizer and loss of a run."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from paddle_medcls import __version__
from paddle_medcls.core.errors import RecipeError, SetupError, did_you_mean
from paddle_medcls.core.files import remove_abandoned
from paddle_medcls.core.hardware import has_bfloat16
from paddle_medcls.core.paddle_setup import count_gpus, paddle
from paddle_medcls.data.datasets import dataset_module, default_root, is_own, load_index
from paddle_medcls.data.image_list import CSV, ImageList, read_image_list
from paddle_medcls.data.index import Index
from paddle_medcls.data.own_images import compared
from paddle_medcls.data.splits import fold_of
from paddle_medcls.evaluation import tables
from paddle_medcls.models.architectures.vision import refuse_size
from paddle_medcls.models.network import LOSSES, MODEL_RULE, Network, model_names
from paddle_medcls.models.onednn.network import obstacle
from paddle_medcls.models.pretrained import pretrained_file, published
from paddle_medcls.models.sidecar import Sidecar
from paddle_medcls.models.weights import load_pretrained
from paddle_medcls.preprocessing.image_cache import mapped, scan_cached
from paddle_medcls.preprocessing.loader import ImageDataset
from paddle_medcls.recipes.recipe import Recipe
from paddle_medcls.training.distributed import from_first, synchronised_batch_norm
from paddle_medcls.training.frozen_features import cached_features, freeze, frozen_hash, usable_folder
from paddle_medcls.training.optimization import build_loss, build_optimizer, build_schedule, class_weights
from paddle_medcls.training.session import Session


@dataclass(frozen=True)
class Data:
    """The images of both splits, and the facts that a resume compares."""

    train: Index
    val: Index
    facts: dict
    decoded: dict[str, np.ndarray | None]  # split -> its decoded and scaled images, see `image_cache`
    note: str  # printed on pictures: whether the images are synthetic


@dataclass(frozen=True)
class Learner:
    """The network with its optimizer, loss and schedule."""

    model: Any
    average: Any  # network with the moving average of the weights, or None
    trained: Any  # the layer that a batch is given to: the network, or its head where features are cached
    views: list[np.ndarray]  # cached features: one array for each augmented version of the training images
    val_features: np.ndarray | None
    schedule: Any
    optimizer: Any
    loss: Any  # (logits, labels) -> scalar
    scaler: Any
    parts: dict  # saved in the run's state
    sidecar: Sidecar  # of the weights


def check_recipe(recipe: Recipe, processes: int = 0) -> None:
    """Refuses an unknown network, and a batch too small for so many processes (0: those there are), before any work."""
    processes = processes or paddle.distributed.get_world_size()
    if processes > recipe.batch_size:
        raise SetupError(
            f"{processes} processes: a batch of {recipe.batch_size} has too few images to share",
            fix="start fewer, or enlarge --batch-size",
        )
    if recipe.model not in model_names():
        raise RecipeError(
            f"unknown model {recipe.model!r}{did_you_mean(recipe.model, model_names())}",
            expected=MODEL_RULE,
        )


def check_network(recipe: Recipe, session: Session, resume: bool) -> None:
    """Refuses sizes, kernels and ImageNet weights that there are not for the network, before images are decoded."""
    if recipe.pretrained == "imagenet":
        published(recipe.model)
    network = Network(recipe.model, 1, recipe.preprocessing.num_channels, recipe.stem)
    with paddle.utils.unique_name.guard():  # the run's own parameters keep their numbers
        model = _build_blank(network)
    choose_kernels(model.head if recipe.cache_views else model, replace(session, say=lambda line: None), resume)
    refuse_size(model, network, recipe.preprocessing.size_px)


def place_images(
    recipe: Recipe, data_root: str | Path | ImageList | None, run_dir: Path, session: Session, resume: bool
) -> Path:
    """The data root of a run; of own images their list, which is written into the run directory.

    Raises:
        DataError: images that are missing or cannot be read, unclear labels, the same image under two labels.
    """
    if not is_own(recipe.dataset):
        return Path(data_root or default_root(recipe.dataset))  # type: ignore[arg-type]

    def write() -> str:
        if resume:
            moved = isinstance(data_root, (str, Path)) and Path(data_root).is_dir()
            images = read_image_list(run_dir / CSV, data_root if moved else None)  # type: ignore[arg-type]
        else:
            root = data_root or default_root(recipe.dataset)
            images = dataset_module(recipe.dataset).open_images(recipe.dataset, root)
            images = images.fold(recipe.folds, recipe.fold) if recipe.folds else images
        images = images if images.compared else compared(images, session.options.workers)
        for remark in () if resume else images.remarks:
            session.say(str(remark))
        return str(images.write(run_dir))

    return Path(from_first(write, session.rank, session.world, session.node_first))


def read_data(recipe: Recipe, data_root: Path, cache: Path | None, session: Session) -> Data:
    """Lists the images, then decodes each once, so that a damaged one stops the run; once on each node.

    Args:
        cache: folder that the decoded and scaled images are kept in; None: nowhere.
    """
    train = load_index(recipe.dataset, data_root, "train", recipe.labels)
    if recipe.folds and not is_own(recipe.dataset):  # own images: the run's list has the fold as its splits
        train, val = fold_of(train, recipe.folds, recipe.fold)
    else:
        val = load_index(recipe.dataset, data_root, "val", recipe.labels)
    network_for(recipe, len(train.classes), train.task)  # whether the loss fits, before anything is decoded

    def scan() -> tuple[dict, dict[str, str]]:
        facts: dict[str, Any] = {"data_root": str(data_root.resolve()), "drawn": train.synthetic, "note": train.note}
        caches: dict[str, str] = {}
        say = lru_cache(session.say)  # the same line for both splits is printed once
        if cache is not None:
            remove_abandoned(cache)
        for index in (train, val):
            crops = recipe.augmentation.crop_scale and index is train  # random parts need the whole image
            folder = None if recipe.freeze or crops else cache
            scan_result, images = scan_cached(index, recipe.preprocessing, session.options.workers, folder, say)
            caches[index.split] = "" if images is None else str(images.filename)
            facts[index.split] = {
                "images": len(index),
                "fingerprint": index.fingerprint(),
                "classes": scan_result["classes"],
                # float32 is what the network computes in; rounding here keeps JSON and run the same
                "per_image": {name: scan_result["per_image"][name] for name in ("mean", "std")},
            }
        return facts, caches

    facts, caches = from_first(scan, session.rank, session.world, session.node_first)
    decoded: dict[str, np.ndarray | None] = {
        split: mapped(Path(file)) if file else None for split, file in caches.items()
    }
    return Data(train, val, facts, decoded, tables.SYNTHETIC_NOTICE if train.synthetic else "")


def build_learner(recipe: Recipe, data: Data, cache: Path, session: Session, resume: bool) -> Learner:
    """Network, optimizer and loss of a recipe, at the start of a run.

    Args:
        recipe: with its mean and std filled in.
        resume: the run's state will be restored, so weights that it holds are not loaded.
    """
    paddle.seed(recipe.seed)
    network = network_for(recipe, len(data.train.classes), data.train.task)
    model = network.build()
    if recipe.pretrained and (recipe.freeze or not resume):  # a resume has all but what is frozen
        session.say(load_pretrained(model, network, pretrained_file(recipe.pretrained, recipe.model)))
    average = _average_of(model, network) if recipe.ema_decay else None
    views: list[np.ndarray] = []
    val_features = None
    if recipe.freeze:
        freeze(model)
        views, val_features = _features(model, recipe, data, cache, session)
    else:
        model = synchronised_batch_norm(model, session.world)
    schedule = build_schedule(recipe, math.ceil(len(data.train) / recipe.batch_size))
    optimizer = build_optimizer(recipe, schedule, model)
    scaler = paddle.amp.GradScaler(enable=bool(session.options.amp) and amp_type() == "float16")
    saved = [net.head if net is not None and recipe.freeze else net for net in (model, average)]
    return Learner(
        model=model,
        average=average,
        trained=model.head if views else model,
        views=views,
        val_features=val_features,
        schedule=schedule,
        optimizer=optimizer,
        loss=build_loss(recipe, class_weights(recipe, data.train.labels, len(data.train.classes))),
        scaler=scaler,
        parts={"model": saved[0], "average": saved[1], "optimizer": optimizer, "scaler": scaler},
        sidecar=_sidecar(recipe, data, network),
    )


def _features(model, recipe: Recipe, data: Data, cache: Path, session: Session) -> tuple[list[np.ndarray], np.ndarray]:
    """The frozen part's outputs: of each version of the training images, and of the validation images."""
    frozen = data.facts["frozen_weights"] = frozen_hash(model)
    cache = usable_folder(cache, model, session.say) if session.rank == session.node_first else cache

    def features(index: Index, view: int | None) -> np.ndarray:
        def path() -> str:
            remove_abandoned(cache)
            augmentation = None if view is None else recipe.augmentation
            dataset = ImageDataset(index, recipe.preprocessing, augmentation, recipe.seed, view or 0)
            return str(cached_features(model, frozen, dataset, cache, session.options.workers))

        return mapped(Path(from_first(path, session.rank, session.world, session.node_first)))

    return [features(data.train, view) for view in range(recipe.cache_views)], features(data.val, None)


def _sidecar(recipe: Recipe, data: Data, network: Network) -> Sidecar:
    return Sidecar(
        dataset=recipe.dataset,
        recipe=recipe.name,
        classes=data.train.classes,
        task=data.train.task,
        loss=recipe.loss,
        network=network,
        preprocessing=recipe.preprocessing,
        flips=recipe.evaluation_flips,
        labels=recipe.labels,
        drawn=data.train.synthetic,
        temperature=recipe.temperature,
        threshold=recipe.threshold,
        versions={"paddle_medcls": __version__, "paddle": paddle.__version__},
    )


def choose_kernels(trained, session: Session, resume: bool) -> str:
    """ "paddle", "onednn f32" or "onednn bf16"; a resumed run keeps its own, since others round differently.

    Args:
        trained: the layer that batches go through.

    Raises:
        SetupError: the requested kernels, or those of the resumed run, are not available here.
    """
    kernels, precision = session.options.kernels, session.options.precision
    if kernels == "paddle":
        return "paddle"
    fault = obstacle(trained, session.device)
    if not fault:
        if precision == "auto":
            precision = "bf16" if has_bfloat16() else "f32"
        precise = "float32" if precision == "f32" else "bfloat16; validation in float32"
        session.say(f"kernels: oneDNN's, in {precise}")
        return f"onednn {precision}"
    if (kernels == "onednn" or precision == "bf16") and not (resume and session.options.force):
        context = "the run began with " if resume else ""
        fix = "resume on a machine that has them, or pass --force" if resume else "leave --kernels and --precision out"
        raise SetupError(f"{context}oneDNN's kernels, {precision}: {fault}", fix=fix)
    if session.device == "cpu":
        session.say(f"kernels: Paddle's own, not oneDNN's, which are faster: {fault}")
    return "paddle"


def amp_type() -> str:
    """bfloat16 where the GPU has it (no scaler needed), else float16."""
    if not count_gpus():
        return "bfloat16"
    return "bfloat16" if paddle.device.cuda.get_device_capability()[0] >= 8 else "float16"


def _average_of(model, network: Network):
    average = _build_blank(network)
    average.set_state_dict(model.state_dict())
    average.eval()
    return average


def _build_blank(network: Network):
    """The network with weights of 0, where they do not matter or are set next: drawing random ones takes a while."""
    initializer = paddle.nn.initializer
    zero = initializer.Constant(0.0)
    initializer.set_global_initializer(zero, zero)
    try:
        return network.build()
    finally:
        initializer.set_global_initializer(None)


def network_for(recipe: Recipe, num_classes: int, task: str) -> Network:
    """Returns the network of a recipe: one output for a binary task with a sigmoid, else one a class.

    Raises:
        RecipeError: the recipe's loss does not fit the task.
    """
    losses = LOSSES[task]
    if recipe.loss not in losses:
        raise RecipeError(
            f"{recipe.name}: loss={recipe.loss} does not fit a {task} task",
            expected=" or ".join(losses),
            fix=f"--set loss={losses[0]}",
        )
    single_output = recipe.loss == "sigmoid" and task == "binary"
    return Network(recipe.model, 1 if single_output else num_classes, recipe.preprocessing.num_channels, recipe.stem)
