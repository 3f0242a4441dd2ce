"""`Training`: a run with its data, network and progress; how it is opened."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from paddle_medcls import __version__
from paddle_medcls.core.errors import RunError
from paddle_medcls.core.hardware import has_bfloat16
from paddle_medcls.core.paddle_setup import environment, paddle
from paddle_medcls.data.datasets import weights_name
from paddle_medcls.evaluation import model_facts
from paddle_medcls.models.onednn.network import Accelerated
from paddle_medcls.models.onednn.operators import Operators
from paddle_medcls.preprocessing.loader import cut, epoch_order
from paddle_medcls.recipes.recipe import Recipe
from paddle_medcls.training import run_directory
from paddle_medcls.training.distributed import from_all
from paddle_medcls.training.resume import refuse_changes, restore
from paddle_medcls.training.run_directory import State
from paddle_medcls.training.session import Session
from paddle_medcls.training.setup import Data, Learner, build_learner, choose_kernels
from paddle_medcls.training.watch import process_name


@dataclass
class Training:
    """A run that is being trained."""

    directory: Path
    weights: Path  # file of the best weights so far
    recipe: Recipe
    data: Data
    learner: Learner
    network: Any  # `learner.trained` as it is called in a step: with oneDNN's kernels or DataParallel around it
    inference_kernels: Operators | None  # oneDNN's, for validation in float32; None: Paddle's
    state: State
    suggest_bf16: bool = False  # tell the user what bfloat16 would gain, if the run turns out to be long
    drawn_at: float = -math.inf  # when the curves were drawn
    epoch_started_at: float = 0.0
    seconds: float = 0.0  # training time of the epoch
    loading_seconds: float = 0.0  # of these, waiting for images

    @property
    def validated(self):
        """The network that is validated and kept: the averaged one where the recipe has an average."""
        return self.learner.model if self.learner.average is None else self.learner.average

    @property
    def batches(self) -> list[np.ndarray]:
        """Rows of each batch of the current epoch."""
        order = epoch_order(len(self.data.train), self.recipe.seed, self.state.epoch)
        return cut(order, self.recipe.batch_size)

    @property
    def stopped_early(self) -> bool:
        epochs = self.state.epoch - self.state.best_epoch  # without an improvement
        return bool(self.recipe.patience) and epochs >= self.recipe.patience and self.state.batch == 0

    @property
    def finished(self) -> bool:
        return self.state.epoch >= self.recipe.epochs or self.stopped_early


def open_run(run_dir: Path, recipe: Recipe, data: Data, session: Session, resume: bool) -> Training:
    """Builds network, optimizer and loss of a new run, or restores those of an interrupted one."""
    if recipe.statistics == "train" and not resume:
        recipe = recipe.replace(**{name: tuple(of) for name, of in data.facts["train"]["per_image"].items()})
    say = session.say
    counts = f"{len(data.train)} training and {len(data.val)} validation images"
    say(f"{recipe.name}: {counts}, {recipe.model}, {session.device}")
    for line in filter(None, (data.note, data.train.note)):
        say(line)

    learner = build_learner(recipe, data, run_dir.parent / "features", session, resume)
    kernels = choose_kernels(learner.trained, session, resume)
    network, inference_kernels = learner.trained, None
    if kernels != "paddle":
        network = Accelerated(learner.model, Operators(bf16=kernels == "onednn bf16"))
        inference_kernels = Operators()
    weights = run_dir / f"{weights_name(recipe.dataset)}.pdparams"
    state = State()
    if resume:
        refuse_changes(run_dir, recipe, data.facts, session)
        state = restore(run_dir, recipe, learner.parts, weights)
        say(f"resumed after {state.epoch} of {recipe.epochs} epochs and {state.batch} batches")
    if session.world > 1:
        _refuse_differences(recipe, data.facts, kernels, state, session)
        norm = "each process's own" if session.device == "cpu" else "those of the whole batch"
        say(f"{session.world} processes share each batch of {recipe.batch_size}; batch-norm statistics are {norm}")
        network = paddle.DataParallel(network)
    if session.first and not resume:
        options = session.options
        run_environment = environment(session.device) | {"processes": session.world, "kernels": kernels}
        run_environment |= {"amp": bool(options.amp), "deterministic": bool(options.deterministic)}
        run_environment["overrides"] = model_facts.recipe_changes(learner.sidecar, recipe)
        run_directory.describe(run_dir, recipe, data.facts, run_environment)
    suggest_bf16 = session.first and not resume and kernels == "onednn f32" and has_bfloat16()
    return Training(run_dir, weights, recipe, data, learner, network, inference_kernels, state, suggest_bf16)


def _refuse_differences(recipe: Recipe, facts: dict, kernels: str, state: State, session: Session) -> None:
    """Refuses processes that do not begin with the images, settings and resumed state of process 0, before any step.

    Raises:
        RunError: in all processes; names those that differ, their machines, and in what.
    """
    own: dict[str, Any] = {"paddle_medcls": __version__, "paddle": paddle.__version__, "kernels": kernels}
    own |= {"device": session.device.partition(":")[0], "amp": session.options.amp}
    own |= {
        "resumed state": [state.epoch, state.step, *state.steps[-1:]],
        "frozen weights": facts.get("frozen_weights"),
    }
    for split in ("train", "val"):
        own[f"{split} split"] = f"{facts[split]['images']} images, fingerprint {facts[split]['fingerprint'][:12]}"
        digest = hashlib.sha256(json.dumps(facts[split]["per_image"]).encode()).hexdigest()
        own[f"{split} pixels"] = f"fingerprint {digest[:12]}"
    own |= {name: value for name, value in recipe.to_json().items() if name not in ("mean", "std")}
    first, *others = from_all(own, session.rank, session.world)
    differences = [
        f"{process_name(rank)}: {name}: {other.get(name)}, not {first[name]}"
        for rank, other in enumerate(others, 1)
        for name in first
        if other.get(name) != first[name]
    ]
    if differences:
        raise RunError(
            "the processes of this run do not begin with the same as process 0",
            items=differences,
            expected="the same images, versions, options and, with --resume, run directory on every node",
            fix="copy them from the node of process 0, or put them on storage that all nodes share",
        )
