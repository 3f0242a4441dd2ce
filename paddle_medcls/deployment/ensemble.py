"""Several trained models as one: the average of their probabilities.

Each model has its own temperature, mean, std and flips, as the models of a cross-validation have; all else must agree.
The threshold of the average is the mean of the models' thresholds. Its novelty is the mean of the models' novelties,
each as a share of that model's limit, so that the limit of the average is 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from paddle_medcls.core.errors import WeightsError
from paddle_medcls.core.files import sha256
from paddle_medcls.deployment.opening import Opened, open_trained
from paddle_medcls.deployment.prediction import Disagreement
from paddle_medcls.models.output_head import TINY, OutputHead
from paddle_medcls.models.sidecar import Sidecar, without_scale

if TYPE_CHECKING:
    from paddle_medcls.recipes.recipe import Recipe

COMMON = ("dataset", "labels", "classes", "task", "loss")
"""Fields of a sidecar that must be equal; of the preprocessing all but mean and std must."""


class Ensemble:
    """The inference backend that averages the probabilities of several models.

    Attributes:
        members: the models.
        engine, precision: of the models' backends.
        has_novelty: whether all models have a novelty score.
    """

    def __init__(self, members: Sequence[Opened], head: OutputHead) -> None:
        self.members = tuple(members)
        self.engine: str = ", ".join(dict.fromkeys(one.backend.engine for one in members))
        self.precision: str = ", ".join(dict.fromkeys(one.backend.precision for one in members))
        self.has_novelty = all(one.novelty for one in members)
        self._head = head

    def logits(self, x: np.ndarray) -> np.ndarray:
        """x (N, C, S, S) float32, pixel values -> the average's logits (N, outputs) float32."""
        return self.outputs(x)["logits"]

    def outputs(self, x: np.ndarray, names: Sequence[object] = ()) -> dict[str, np.ndarray]:
        """The outputs for images x (N, C, S, S) float32, pixel values.

        Args:
            names: of the images, for messages.

        Returns:
            `probabilities` of each model (models, N, classes); `logits` (N, outputs) float32, whose probabilities are
            their mean; and, where all models have one, `novelty` (N,).

        Raises:
            WeightsError: logits that are not finite.
        """
        probs, shares = [], []
        for one in self.members:
            spec = one.sidecar.preprocessing
            mean, std = (np.array(values, np.float32).reshape(-1, 1, 1) for values in (spec.mean, spec.std))
            scaled = (x - mean) / std
            logits, novelty = one.logits_and_novelty(scaled)
            probs.append(one.sidecar.head.probabilities(logits, names))
            if novelty is not None:
                shares.append(novelty / max(one.sidecar.novelty["limit"], TINY))
        each = np.stack(probs)
        found = {"probabilities": each, "logits": self._head.logits_of(each.mean(axis=0)).astype(np.float32)}
        return found | ({"novelty": np.mean(shares, axis=0)} if self.has_novelty else {})

    def disagreement(self, probs: np.ndarray, average: np.ndarray) -> Disagreement:
        """How far the models disagree on an image.

        Args:
            probs: (models, classes), of each model.
            average: (classes,), of the average.
        """
        labels, _ = self._head.decide_one(average)
        own = [one.sidecar.head.decide_one(p)[0] for one, p in zip(self.members, probs)]
        shown = int(np.argmax(average)) if self._head.task == "multi-label" else labels[0]
        return Disagreement(float(probs[:, shown].std(ddof=1)), own.count(labels), len(own))


def open_ensemble(
    paths: Sequence[Path],
    recipe: Recipe | None,
    engine_and_precision: tuple[str | None, str],
    say: Callable[[str], None],
    allow_program: bool,
) -> Opened:
    """Opens several models as one; arguments as of `opening.open_trained`.

    Raises:
        WeightsError: see `Predictor.from_weights`; models that do not fit together, or one that is named twice.
    """
    members = [open_trained(path, recipe, engine_and_precision, say, allow_program) for path in paths]
    sidecar = average_sidecar([one.sidecar for one in members], [one.path or path for one, path in zip(members, paths)])
    notes = [f"average of {len(members)} models"]
    notes += [f"{one.path}: {note}" for one in members for note in one.notes]
    backend = Ensemble(members, sidecar.head)
    if not backend.has_novelty:
        return Opened(sidecar, backend, notes)
    return Opened(replace(sidecar, novelty={"limit": 1.0}), backend, notes, novelty=lambda outputs: outputs["novelty"])


def average_sidecar(sidecars: Sequence[Sidecar], paths: Sequence[Path]) -> Sidecar:
    """The sidecar of an average: pixel values in, temperature 1, the mean threshold, and the models' sha256.

    Args:
        sidecars: of the models.
        paths: of their files.

    Raises:
        WeightsError: names all values that differ.
    """
    first = sidecars[0]
    specs = [without_scale(one.preprocessing) for one in sidecars]
    faults = []
    for sidecar, spec, path in zip(sidecars, specs, paths):
        pairs = [(name, getattr(first, name), getattr(sidecar, name)) for name in COMMON]
        pairs += [(name, getattr(specs[0], name), getattr(spec, name)) for name in spec.to_json()]
        faults += [f"{path}: {name} {other!r}, not {value!r}" for name, value, other in pairs if value != other]
    if faults:
        raise WeightsError(
            f"{len(paths)} models do not fit together",
            items=faults,
            path=paths[0],
            expected="the same data set, classes, task, loss and preprocessing; mean and std may differ",
        )
    members = {one.sha256 or sha256(path): one.network.model for one, path in zip(sidecars, paths)}
    if len(members) < len(paths):
        raise WeightsError("the same weights are named twice", items=[str(path) for path in paths])
    return replace(
        first,
        preprocessing=specs[0],
        flips=(),
        temperature=1.0,
        threshold=float(np.mean([one.threshold for one in sidecars])),
        metrics={},
        drawn=any(one.drawn for one in sidecars),
        sha256="",
        form="",
        precision="f32",
        files={},
        members=members,
        prediction_sets={},  # thresholds and scores of a member are not those of the average
        novelty={},
    )
