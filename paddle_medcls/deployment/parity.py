"""How well all ways to run a trained model agree: engines of a weight file, and exports."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from paddle_medcls.core.errors import SetupError
from paddle_medcls.deployment.export import comparison_images, export, weight_files
from paddle_medcls.deployment.inference_engines import FASTEST_FIRST, FORMS, WITHOUT_BFLOAT16
from paddle_medcls.deployment.predictor import AnyImage, Predictor
from paddle_medcls.recipes.recipe import Recipe

PRECISIONS = ("f32", "bf16")
BATCH = 10


class Way(NamedTuple):
    """One way to run a model.

    Attributes:
        name: the engine of a weight file, or the form of an export and its engine.
        precision: "f32" or "bf16".
        difference: largest of a probability, to the network in Paddle; NaN where it cannot be run.
        same_labels: share of images decided alike, in [0, 1].
        reason: why it cannot be run here; "" if it can.
    """

    name: str
    precision: str
    difference: float = float("nan")
    same_labels: float = float("nan")
    reason: str = ""


def all_ways(
    weights: str | Path | Sequence[str | Path], images: Sequence[AnyImage] = (), recipe: Recipe | None = None
) -> Iterator[Way]:
    """Compares every way to run a trained model with its network in Paddle, and yields each when it is done.

    Exports are compared on pixels rounded after resizing, as they take them; they are written to a temporary folder.

    Args:
        weights: a weight file, or a folder that holds one; several, or the folder of a cross-validation: their average.
        images: five or more, as for `Predictor.logits`; none: synthetic ones.
        recipe: see `Predictor.from_weights`.

    Raises:
        MedclsError: see `export`.
    """
    paths = weight_files(weights)
    network = Predictor.from_weights(paths, recipe)
    images = comparison_images(network.sidecar, images)
    expected = _probabilities(network, images)
    decided = network.head.decide(expected)
    for precision in PRECISIONS:
        lacking = WITHOUT_BFLOAT16 if precision == "bf16" else ()
        for engine in (name for name in FASTEST_FIRST if name not in lacking):
            name = f"weights in {engine}"
            try:
                served = Predictor.from_weights(paths, recipe, engine, precision)
                found = _probabilities(served, images)
            except SetupError as error:
                yield Way(name, precision, reason=error.what)
                continue
            same = (network.head.decide(found) == decided).reshape(len(images), -1).all(axis=1).mean()
            yield Way(name, precision, float(np.abs(found - expected).max()), float(same))
        for form, engine in ((form, engine) for form, engine in FORMS.items() if engine not in lacking):
            name = f"{form} export in {engine}"
            try:
                with tempfile.TemporaryDirectory() as folder:
                    agreement = export(network, form, Path(folder) / "export", images, precision)
            except SetupError as error:
                yield Way(name, precision, reason=error.what)
                continue
            yield Way(name, precision, agreement.difference, agreement.same_labels)


def _probabilities(predictor: Predictor, images: Sequence[AnyImage]) -> np.ndarray:
    """(N, classes), computed in batches of BATCH."""
    groups = [images[start : start + BATCH] for start in range(0, len(images), BATCH)]
    return np.concatenate([predictor.head.probabilities(predictor.logits(group)) for group in groups])
