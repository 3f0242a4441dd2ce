"""What a Predictor says of one image: `Prediction` and `HeatMap`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from paddle_medcls.data.decode import write_png
from paddle_medcls.models.output_head import OutputHead


class Disagreement(NamedTuple):
    """How far the models of an average disagree on an image.

    Attributes:
        sd: standard deviation, among the models, of the probability that the prediction shows.
        same_label: number of models that decide as the average does.
        models: their number.
    """

    sd: float
    same_label: int
    models: int


@dataclass(frozen=True)
class Prediction:
    """The prediction for one image.

    Attributes:
        label: the decided class; for a multi-label task the decided labels as "a; b", "" for none.
        probability: of the decided class; for a multi-label task the largest one. In [0, 1].
        probabilities: class name -> probability, in the order of the classes.
        notes: remarks on the model, such as what was assumed about a weight file without a sidecar.
        disagreement: of the models of an average; None for one model.
        novelty: how unlike the training images the image is, see `models.novelty`; None: the model has no such score.
        in_distribution: whether that is at most the model's limit.
        prediction_set: the classes that are possible at the coverage that was given; None: none was given.
    """

    label: str
    probability: float
    probabilities: dict[str, float]
    notes: tuple[str, ...] = ()
    disagreement: Disagreement | None = None
    novelty: float | None = None
    in_distribution: bool | None = None
    prediction_set: tuple[str, ...] | None = None

    @property
    def probs(self) -> np.ndarray:
        """The probabilities (C,), in the order of the classes."""
        return np.array(list(self.probabilities.values()))

    @staticmethod
    def of(
        probs: np.ndarray, head: OutputHead, notes: tuple[str, ...] = (), disagreement: Disagreement | None = None
    ) -> Prediction:
        """The prediction that probabilities (C,) lead to."""
        decided, probability = head.decide_one(probs)
        label = "; ".join(head.classes[k] for k in decided)
        return Prediction(label, probability, dict(zip(head.classes, probs.tolist())), notes, disagreement)


@dataclass(frozen=True)
class HeatMap:
    """A Grad-CAM heat map.

    Attributes:
        values: (H, W) float32 in [0, 1], of the size of the image; 0 everywhere: no positive evidence for the class.
        image: uint8 RGB (H, W, 3).
        label: the class that is explained.
    """

    values: np.ndarray = field(repr=False)
    image: np.ndarray = field(repr=False)
    label: str

    def overlay(self) -> np.ndarray:
        """The map over its image: uint8 RGB (H, W, 3)."""
        from paddle_medcls.evaluation.plots import overlay  # matplotlib takes half a second to import

        return overlay(self.image, self.values)

    def save(self, path: str | Path) -> None:
        """Writes the overlay as a PNG file."""
        write_png(Path(path), self.overlay())
