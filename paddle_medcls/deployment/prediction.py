"""What a Predictor says of one image: `Prediction` and `HeatMap`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from paddle_medcls.core.errors import RunError
from paddle_medcls.data.decode import write_png
from paddle_medcls.models.output_head import OutputHead
from paddle_medcls.models.sidecar import Sidecar

if TYPE_CHECKING:
    from paddle_medcls.deployment.predictor import Predictor


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
    def of(probs: np.ndarray, head: OutputHead, notes: tuple[str, ...] = ()) -> Prediction:
        """The prediction that probabilities (C,) lead to."""
        decided, probability = head.decide_one(probs)
        label = "; ".join(head.classes[k] for k in decided)
        return Prediction(label, probability, dict(zip(head.classes, probs.tolist())), notes)


def prediction_row(
    image: object, prediction: Prediction, sidecar: Sidecar, topk: int = 1, refuse: bool = False
) -> dict:
    """A prediction as an object of JSON, as `predict --json` prints it.

    Args:
        image: its name.
        topk: the number of most probable classes to list.
        refuse: an image that is unlike the training images gets the label None.

    Returns:
        `image`, `label` (of a multi-label task a list), `probability` and `topk`; `prediction_set`, `in_distribution`
        and `novelty`, `drawn`, and `disagreement` where the prediction or the model has them.
    """
    probs = prediction.probs
    labels, largest = sidecar.head.decide_one(probs)
    names = [sidecar.classes[k] for k in labels]
    most = [{"label": sidecar.classes[k], "probability": round(float(probs[k]), 6)} for k in probs.argsort()[::-1]]
    label = names if sidecar.task == "multi-label" else names[0]
    row: dict = {"image": str(image), "label": label, "probability": round(largest, 6), "topk": most[:topk]}
    if prediction.prediction_set is not None:
        row["prediction_set"] = list(prediction.prediction_set)
    if prediction.novelty is not None:
        row |= {"in_distribution": prediction.in_distribution, "novelty": round(prediction.novelty, 4)}
        if refuse and not prediction.in_distribution:
            row["label"] = None
    if sidecar.drawn:
        row["drawn"] = True  # trained on synthetic images: the probabilities say nothing about patients
    if prediction.disagreement:
        disagreement = prediction.disagreement._asdict()
        row["disagreement"] = {**disagreement, "sd": round(disagreement["sd"], 6)}
    return row


def check_options(predictor: Predictor, coverage: float | None, refuse: bool) -> None:
    """Refuses options of a prediction that the model cannot serve, before any image is read.

    Args:
        coverage: of prediction sets; None: there are none.
        refuse: whether images that are unlike the training images get no label.

    Raises:
        RunError: see `Predictor.possible_classes`; a model without a novelty score has nothing to refuse by.
    """
    if coverage is not None:
        from paddle_medcls.evaluation.conformal import check_coverage, require_calibration

        check_coverage(coverage)
        require_calibration(predictor.sidecar.prediction_sets)
    if refuse and predictor.novelty is None:
        raise RunError(
            "--refuse: this model cannot tell which images are unlike its training images",
            expected="weights with their .novelty.safetensors file, or their ONNX or OpenVINO export",
            fix="leave --refuse out, or train again with this version",
        )


def table_columns(predictor: Predictor, with_set: bool) -> list[tuple[str, type]]:
    """The columns of a table of predictions, with prediction sets or without: (name, type of its values)."""
    columns: list[tuple[str, type]] = [("image", str), ("label", str)]
    columns += [(name, float) for name in predictor.sidecar.classes]
    columns += [("prediction_set", str)] if with_set else []
    columns += [("in_distribution", bool), ("novelty", float)] if predictor.novelty is not None else []
    return columns + ([("sd", float), ("same_label", int), ("models", int)] if predictor.members else [])


def table_row(image: object, prediction: Prediction, refuse: bool = False) -> list:
    """The values of an image for `table_columns`; several labels are "a; b", a refused label is None."""
    refused = refuse and not prediction.in_distribution
    row: list = [str(image), None if refused else prediction.label]
    row += [round(p, 8) for p in prediction.probabilities.values()]
    if prediction.prediction_set is not None:
        row.append("; ".join(prediction.prediction_set))
    if prediction.novelty is not None:
        row += [prediction.in_distribution, round(prediction.novelty, 4)]
    if prediction.disagreement is not None:
        row += [round(prediction.disagreement.sd, 6), *prediction.disagreement[1:]]
    return row


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

    def show(self):
        """A matplotlib figure of the image beside its map, which a notebook displays."""
        from paddle_medcls.data.contact_sheet import contact_sheet

        return contact_sheet([(self.label, [self.image, self.overlay()])])

    def save(self, path: str | Path) -> None:
        """Writes the overlay as a PNG file."""
        write_png(Path(path), self.overlay())
