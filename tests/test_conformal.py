"""Prediction sets and selective prediction, beside slow second implementations and MAPIE."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from paddle_medcls.core.errors import RunError, WeightsError
from paddle_medcls.data.index import Index
from paddle_medcls.evaluation import conformal, selective
from paddle_medcls.models.network import Network
from paddle_medcls.models.output_head import OutputHead
from paddle_medcls.models.sidecar import Sidecar
from paddle_medcls.models.sidecar_checks import COVERAGES, SET_METHODS
from paddle_medcls.preprocessing.transforms import Preprocessing

SIDECAR = Sidecar("covid", "covid", ("a", "b", "c"), "multi-class", "softmax", Network("toy", 3), Preprocessing(32))


def sample(n: int, classes: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities (N, C), and labels drawn from them: a calibrated network."""
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet(np.full(classes, 0.4), n)
    return probs, (rng.random((n, 1)) > probs.cumsum(axis=1)).sum(axis=1)


def index_of(labels: np.ndarray, split: str = "test", classes: int = 3) -> Index:
    names = tuple(f"{split}{k}" for k in range(len(labels)))
    images = np.zeros((len(labels), 1, 1), np.uint8)
    return Index("covid", split, names, images, labels, tuple("abcdefgh"[:classes]), "multi-class")


def slow_set(probs: np.ndarray, record: dict, coverage: float) -> list[bool]:
    """The definition, class by class."""
    level, inside = round(100 * coverage) - 50, []
    for k, p in enumerate(probs):
        score = 1 - p
        if record["method"].startswith("aps"):
            score = p + sum(q for j, q in enumerate(probs) if q > p or (q == p and j < k))
        row = record["thresholds"][k if "by-class" in record["method"] else 0]
        most_probable = record["method"].startswith("aps") and k == int(probs.argmax())
        inside.append(min(score, 1) <= row[level] or most_probable)
    return inside


@pytest.mark.parametrize("method", SET_METHODS)
def test_sets_are_those_of_the_definition(method: str) -> None:
    probs, labels = sample(300)
    record = conformal.calibrate_sets(probs, index_of(labels), method)
    for coverage in (0.5, 0.8, 0.99):
        fast = conformal.prediction_sets(probs[:40], record, coverage)
        assert fast.tolist() == [slow_set(row, record, coverage) for row in probs[:40]]


def test_the_threshold_is_the_rank_that_the_correction_asks_for() -> None:
    scores = np.arange(1, 20) / 100  # 19 images: 0.95 needs the 19th, more than that no threshold can promise
    assert conformal._threshold(scores, 0.9) == 0.18 and conformal._threshold(scores, 0.95) == 0.19
    assert conformal._threshold(scores, 0.96) == 1.0 and conformal._threshold(scores[:0], 0.5) == 1.0


@pytest.mark.parametrize("method", ("lac", "aps"))
def test_sets_are_those_of_mapie(method: str) -> None:
    classification = pytest.importorskip("mapie.classification", reason="MAPIE needs Python 3.10")
    from sklearn.base import BaseEstimator, ClassifierMixin

    class Known(ClassifierMixin, BaseEstimator):
        """A fitted classifier whose input are the probabilities."""

        classes_ = np.arange(3)
        fitted_ = True

        def fit(self, x, y):
            return self

        def predict_proba(self, x):
            return x

        def predict(self, x):
            return x.argmax(axis=1)

        def __sklearn_is_fitted__(self) -> bool:
            return True

    probs, labels = sample(1000)
    index, coverage = index_of(labels), 0.9
    rows = conformal.calibration_rows(index)
    record = conformal.calibrate_sets(probs, index, method)
    assert math.ceil((len(rows) + 1) * coverage) == (len(rows) + 1) * coverage // 1 + 1  # else MAPIE takes the next one

    class NotRandom(np.random.RandomState):
        """Ours is the same every time; MAPIE subtracts a random part of the true class from a score."""

        def uniform(self, *args, size=None, **_):
            return np.zeros(size)

    reference = classification.SplitConformalClassifier(
        Known(), confidence_level=coverage, conformity_score=method, prefit=True, random_state=NotRandom(0)
    )
    reference.conformalize(probs[rows], labels[rows])
    new, _ = sample(200, seed=1)
    options = {"conformity_score_params": {"include_last_label": False}} if method == "aps" else {}
    _, sets = reference.predict_set(new, **options)
    assert (conformal.prediction_sets(new, record, coverage) == sets[:, :, 0]).mean() > 0.998  # equal but for rounding


@pytest.mark.parametrize("method", SET_METHODS)
def test_coverage_is_as_promised_on_average(method: str) -> None:
    """Mean coverage over many draws lies in [c, c + 1 / (n + 1)] for exact scores; by class each class is covered."""
    coverage, shares, rare = 0.8, [], []
    for seed in range(25):
        probs, labels = sample(240, seed=seed)
        report = conformal.coverage_report(
            probs, index_of(labels), conformal.calibrate_sets(probs, index_of(labels), method), coverage
        )
        shares.append(report["coverage"])
        rare.append(report["by_class"][2]["coverage"])
        assert 110 <= report["images"] <= 130 and sum(report["sizes"]) == report["images"]
    assert np.mean(shares) > coverage - 0.02
    if method == "lac":
        assert np.mean(shares) < coverage + 0.03
    if method.endswith("by-class"):
        assert np.mean(rare) > coverage - 0.02


def test_calibration_images_are_left_out_and_a_changed_split_is_refused() -> None:
    probs, labels = sample(100)
    record = conformal.calibrate_sets(probs, index_of(labels), "lac")
    assert record["images"] + conformal.coverage_report(probs, index_of(labels), record, 0.9)["images"] == 100
    other = conformal.coverage_report(probs, index_of(labels, "val"), record, 0.9)
    assert other["images"] == 100
    with pytest.raises(RunError, match="has changed since the calibration"):
        conformal.coverage_report(probs[1:], index_of(labels[1:]), record, 0.9)


def test_all_images_of_a_patient_are_on_one_side() -> None:
    _, labels = sample(60)
    index = replace(index_of(labels), groups=tuple(f"p{k // 3}" for k in range(60)))
    chosen = set(conformal.calibration_rows(index))
    assert all(len({k // 3 * 3 + j in chosen for j in range(3)}) == 1 for k in range(60)) and 20 < len(chosen) < 40


def test_val_is_not_called_unused() -> None:
    assert "also chose the temperature, and the epoch" in conformal.calibration_text({"split": "val", "images": 3})
    assert "used for nothing else" in conformal.calibration_text({"split": "test", "images": 3})


@pytest.mark.parametrize("coverage", (0.4, 1.0, 0.905, -1, float("nan")))
def test_other_coverages_are_refused(coverage: float) -> None:
    with pytest.raises(RunError, match="no prediction sets for a coverage"):
        conformal.prediction_sets(np.ones((1, 3)) / 3, {"method": "lac"}, coverage)


def good_record() -> dict:
    thresholds = [[k / 100 for k in range(50, 100)]]
    return {"method": "lac", "split": "val", "images": 3, "fingerprint": "0" * 64, "thresholds": thresholds}


@pytest.mark.parametrize(
    "change",
    (
        {"method": "best"},
        {"method": ["lac"]},
        {"split": "train"},
        {"images": -1},
        {"images": True},
        {"fingerprint": "x"},
        {"thresholds": []},
        {"thresholds": [[0.5]]},
        {"thresholds": [[2.0] * 50]},
        {"thresholds": [["0.5"] * 50]},
        {"thresholds": [[0.9] * 25 + [0.1] * 25]},
        {"thresholds": [[float("nan")] * 50]},
        {"method": "lac-by-class"},
        {"extra": 1},
    ),
)
def test_a_faulty_calibration_is_refused(change: dict) -> None:
    assert replace(SIDECAR, prediction_sets=good_record()).prediction_sets["method"] == "lac"
    with pytest.raises(WeightsError, match="prediction_sets"):
        replace(SIDECAR, prediction_sets={**good_record(), **change})


def test_several_labels_have_no_sets() -> None:
    head = {"task": "multi-label", "loss": "sigmoid"}
    with pytest.raises(WeightsError, match="prediction_sets"):
        replace(SIDECAR, **head, prediction_sets=good_record())


def test_the_record_is_written_and_read(tmp_path: Path) -> None:
    sidecar = replace(SIDECAR, prediction_sets=good_record())
    sidecar.write(tmp_path / "A.json")
    assert Sidecar.read(tmp_path / "A.json") == sidecar and len(COVERAGES) == 50


# --- selective prediction ----------------------------------------------------------------------------


def slow_area(certain: np.ndarray, errors: np.ndarray, rng: np.random.Generator) -> float:
    """Mean over random orders of equally certain answers."""
    areas = []
    for _ in range(400):
        order = np.lexsort([rng.random(len(certain)), -certain])
        areas.append(np.mean([errors[order[: k + 1]].mean() for k in range(len(errors))]))
    return float(np.mean(areas))


def test_the_area_is_that_of_the_definition() -> None:
    rng = np.random.default_rng(0)
    certain, errors = rng.integers(0, 4, 12) / 4, rng.integers(0, 2, 12).astype(float)
    assert selective.areas(certain, errors)["aurc"] == pytest.approx(slow_area(certain, errors, rng), abs=0.02)


def test_a_perfect_order_has_no_excess() -> None:
    errors = np.array([0, 0, 0, 1.0])
    assert selective.areas(np.array([4, 3, 2, 1.0]), errors) == {"aurc": 1 / 16, "excess_aurc": 0.0}
    assert selective.areas(np.array([1, 2, 3, 4.0]), errors)["excess_aurc"] > 0.4
    assert selective.areas(np.ones(4), errors)["aurc"] == pytest.approx(0.25)  # no order at all


def test_certainty_of_two_classes_is_the_distance_to_the_threshold() -> None:
    head = OutputHead("binary", "sigmoid", ("a", "b"), threshold=0.1)
    p = np.array([0.1, 0.2, 0.9])
    certain = selective.certainty(np.stack([1 - p, p], 1), head)
    assert certain[0] == pytest.approx(0) and certain[0] < certain[1] < certain[2]


def test_what_passes_is_counted() -> None:
    report = selective.passed_report(np.array([1.0, 2.0, 3.0]), 2.0, np.array([0, 0, 1.0]), None)
    assert (
        report["passed"] == pytest.approx(2 / 3) and report["accuracy_passed"] == 1 and report["accuracy_refused"] == 0
    )
    assert selective.passed_report(np.ones(2), 2.0, np.zeros(2), None)["accuracy_refused"] is None
