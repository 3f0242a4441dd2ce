"""`Training`: a run with its data, network and progress; how it is opened."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from paddle_medcls.core.hardware import has_bfloat16
from paddle_medcls.core.paddle_setup import environment, paddle
from paddle_medcls.data.datasets import weights_name
from paddle_medcls.evaluation import model_facts
from paddle_medcls.models.onednn.network import Accelerated
from paddle_medcls.models.onednn.operators import Operators
from paddle_medcls.preprocessing.loader import cut, epoch_order
from paddle_medcls.recipes.recipe import Recipe
from paddle_medcls.training import run_directory
from paddle_medcls.training.resume import refuse_changes, restore
from paddle_medcls.training.run_directory import State
from paddle_medcls.training.session import Session
from paddle_medcls.training.setup import Data, Learner, build_learner, choose_kernels


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
    if session.world > 1:
        network = paddle.DataParallel(network)

    weights = run_dir / f"{weights_name(recipe.dataset)}.pdparams"
    state = State()
    if resume:
        refuse_changes(run_dir, recipe, data.facts, session)
        state = restore(run_dir, recipe, learner.parts, weights)
        say(f"resumed after {state.epoch} of {recipe.epochs} epochs and {state.batch} batches")
    elif session.first:
        options = session.options
        run_environment = environment(session.device) | {"processes": session.world, "kernels": kernels}
        run_environment |= {"amp": bool(options.amp), "deterministic": bool(options.deterministic)}
        run_environment["overrides"] = model_facts.recipe_changes(learner.sidecar, recipe)
        run_directory.describe(run_dir, recipe, data.facts, run_environment)
    suggest_bf16 = session.first and not resume and kernels == "onednn f32" and has_bfloat16()
    return Training(run_dir, weights, recipe, data, learner, network, inference_kernels, state, suggest_bf16)
