"""What a run is made of: its data, and what learns from them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from paddle_medcls import __version__, report
from paddle_medcls.cpu import has_bfloat16
from paddle_medcls.data import load_index
from paddle_medcls.data.cache import mapped, scan_cached
from paddle_medcls.data.index import Index
from paddle_medcls.distributed import from_first, whole_batch_norm
from paddle_medcls.errors import SetupError
from paddle_medcls.frozen import cached_features, freeze, frozen_hash, usable_folder
from paddle_medcls.graph import flips_of
from paddle_medcls.models import Network, network_for
from paddle_medcls.models.accelerate import obstacle
from paddle_medcls.models.pretrained import pretrained_file
from paddle_medcls.models.weights import load_pretrained
from paddle_medcls.optim import build_loss, build_optimizer, build_schedule, class_weights
from paddle_medcls.recipe import Recipe
from paddle_medcls.runtime import count_gpus, paddle
from paddle_medcls.sidecar import Sidecar


@dataclass(frozen=True)
class Data:
    """Both lists of images, and the facts by which a resume knows them again."""

    train: Index
    val: Index
    facts: dict
    fitted: dict[str, np.ndarray | None]  # split -> its images decoded and scaled, see `data.cache`
    note: str  # what pictures of these data must say


@dataclass(frozen=True)
class Learner:
    """The network, and what trains it."""

    model: Any
    average: Any  # of the weights over the steps, or None
    fed: Any  # what a batch goes through: the model, or its head where features are cached
    views: list[np.ndarray]  # with cached features: one array a version of the training images
    val_features: np.ndarray | None
    schedule: Any
    optimizer: Any
    loss: Any  # (logits, labels) -> scalar
    scaler: Any
    parts: dict  # what a save of the run holds
    card: Sidecar  # goes with the weights


def read_data(
    recipe: Recipe,
    data_root: Path,
    workers: int,
    image_cache: str,
    say: Callable[[str], None],
    rank: int = 0,
    world: int = 1,
) -> Data:
    """Lists the images, then decodes each once, so that a damaged one stops the run here.

    Args:
        image_cache: folder that the decoded and scaled images are kept in; "": nowhere.
        rank, world: process 0 reads for all.
    """
    train_index = load_index(recipe.dataset, data_root, "train", recipe.labels)
    val_index = load_index(recipe.dataset, data_root, "val", recipe.labels)

    def read() -> tuple[dict, dict[str, str]]:
        return _facts(recipe, data_root, train_index, val_index, workers, image_cache, say)

    facts, caches = from_first(read, rank, world)
    fitted: dict[str, np.ndarray | None] = {
        split: mapped(Path(file)) if file else None for split, file in caches.items()
    }
    return Data(train_index, val_index, facts, fitted, report.DRAWN_NOTICE if train_index.drawn else "")


def _facts(
    recipe: Recipe,
    data_root: Path,
    train_index: Index,
    val_index: Index,
    workers: int,
    image_cache: str,
    say: Callable[[str], None],
) -> tuple[dict, dict[str, str]]:
    """Counts, figures and fingerprints of both lists, and the file of each one's cached images, if any."""
    caches: dict[str, str] = {}
    facts: dict[str, Any] = {"data_root": str(Path(data_root).resolve()), "drawn": train_index.drawn}
    facts["note"] = train_index.note
    for index in (train_index, val_index):
        parts = recipe.augmentation.crop_scale and index is train_index  # random parts need the whole image
        folder = Path(image_cache) if image_cache and not (recipe.freeze or parts) else None
        found, images = scan_cached(index, recipe.preprocessing, workers, folder, say)
        caches[index.split] = "" if images is None else str(images.filename)
        facts[index.split] = {
            "images": len(index),
            "fingerprint": index.fingerprint(),
            "classes": found["classes"],
            # float32 is what the network computes in; rounding here keeps JSON and run the same
            "per_image": {name: found["per_image"][name] for name in ("mean", "std")},
        }
    return facts, caches


def build_learner(
    recipe: Recipe,
    data: Data,
    cache: Path,
    workers: int,
    amp: bool,
    resume: bool,
    say: Callable[[str], None],
    rank: int = 0,
    world: int = 1,
) -> Learner:
    """Network, optimizer and loss of a recipe, at the start of a run.

    Args:
        recipe: with its mean and std filled in.
        cache: folder of the cached features, which process 0 computes.
        workers: threads that read images for these.
        amp: mixed precision, which float16 needs a scaler for.
        resume: the run's state will be restored, so weights that it holds are not loaded.
        say: takes a line on what was loaded.
        rank, world: this process and the number of all.
    """
    paddle.seed(recipe.seed)
    network = network_for(recipe, len(data.train.classes), data.train.task)
    model = network.build()
    if recipe.pretrained and (recipe.freeze or not resume):  # a resume has all but what is frozen
        say(load_pretrained(model, network, pretrained_file(recipe.pretrained, recipe.model)))
    average = _average_of(model, network) if recipe.ema_decay else None
    views: list[np.ndarray] = []
    val_features = None
    if not recipe.freeze:
        model = whole_batch_norm(model, world)
    else:
        freeze(model)
        frozen = data.facts["frozen_weights"] = frozen_hash(model)
        cache = usable_folder(cache, model, say) if rank == 0 else cache

        def features(index: Index, view: int | None) -> np.ndarray:
            def path() -> str:
                return str(cached_features(model, frozen, index, recipe, view, cache, workers))

            return mapped(Path(from_first(path, rank, world)))

        views = [features(data.train, view) for view in range(recipe.cache_views)]
        val_features = features(data.val, None)
    schedule = build_schedule(recipe, math.ceil(len(data.train) / recipe.batch_size))
    optimizer = build_optimizer(recipe, schedule, model)
    scaler = paddle.amp.GradScaler(enable=amp and amp_type() == "float16")
    kept = [whole.head if whole is not None and recipe.freeze else whole for whole in (model, average)]
    card = Sidecar(
        dataset=recipe.dataset,
        recipe=recipe.name,
        classes=data.train.classes,
        task=data.train.task,
        loss=recipe.loss,
        network=network,
        preprocessing=recipe.preprocessing,
        flips=flips_of(recipe),
        labels=recipe.labels,
        drawn=data.train.drawn,
        versions={"paddle_medcls": __version__, "paddle": paddle.__version__},
    )
    return Learner(
        model=model,
        average=average,
        fed=model.head if views else model,
        views=views,
        val_features=val_features,
        schedule=schedule,
        optimizer=optimizer,
        loss=build_loss(recipe, class_weights(recipe, data.train.labels, len(data.train.classes))),
        scaler=scaler,
        parts={"model": kept[0], "average": kept[1], "optimizer": optimizer, "scaler": scaler},
        card=card,
    )


def choose_kernels(
    kernels: str,
    precision: str,
    began_with: tuple[str, str] | None,
    force: bool,
    fed,
    device: str,
    say: Callable[[str], None],
) -> str:
    """ "paddle", "onednn f32" or "onednn bf16"; a resumed run keeps its own, since others round differently.

    Args:
        kernels: whose operators: "paddle", "onednn", or "auto": oneDNN's where they can be had.
        precision: "f32" or "bf16".
        began_with: both, of a run that goes on; others are used only with `force`.
        fed: the layer that batches go through.

    Raises:
        SetupError: what was asked for, or what the run began with, cannot be had here.
    """
    kernels, precision = began_with or (kernels, precision)
    if kernels == "paddle":
        if precision != "f32":
            raise SetupError(f"--precision {precision} needs --kernels onednn; Paddle's own compute in float32")
        return "paddle"
    fault = obstacle(fed, device)
    if not fault and precision == "bf16" and not has_bfloat16():
        fault = "this processor has no instructions for bfloat16"
    if not fault:
        say(f"operators: oneDNN's, in {'float32' if precision == 'f32' else 'bfloat16; validation in float32'}")
        return f"onednn {precision}"
    if (kernels == "onednn" or precision == "bf16") and not (began_with and force):
        asked = (
            f"the run began with oneDNN's operators, {precision}" if began_with else f"oneDNN's operators, {precision}"
        )
        do = "go on where it began, or with --force" if began_with else "leave --kernels and --precision out"
        raise SetupError(f"{asked}: {fault}", do=do)
    if device == "cpu":
        say(f"operators: Paddle's own, not oneDNN's, which are faster: {fault}")
    return "paddle"


def amp_type() -> str:
    """bfloat16 where the card has it (no scaler needed), else float16."""
    if not count_gpus():
        return "bfloat16"
    return "bfloat16" if paddle.device.cuda.get_device_capability()[0] >= 8 else "float16"


def _average_of(model, network: Network):
    average = network.build()
    average.set_state_dict(model.state_dict())
    average.eval()
    return average
