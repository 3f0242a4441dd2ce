"""Calibration figures against slow, obvious computations."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from paddle_medcls.evaluation import calibration, metrics
from paddle_medcls.models.output_head import sigmoid, softmax


def test_expected_calibration_error_by_hand():
    # two bins of 10: 0.95 claimed, 3 of 4 right; 0.55 claimed, 1 of 1 right
    confidence = np.array([0.95, 0.95, 0.95, 0.95, 0.55])
    hits = np.array([True, True, True, False, True])
    expected = 4 / 5 * abs(0.95 - 0.75) + 1 / 5 * abs(0.55 - 1.0)
    assert calibration.expected_calibration_error(confidence, hits, bins=10) == pytest.approx(expected)
    rows = calibration.reliability(confidence, hits, bins=10)
    assert [(row["low"], row["count"]) for row in rows] == [(0.5, 1), (0.9, 4)]


def test_confidence_one_lies_in_the_last_bin():
    assert calibration.reliability(np.array([1.0]), np.array([True]), bins=5)[0]["high"] == 1.0


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_temperature_is_the_minimum_of_a_fine_grid(loss):
    rng = np.random.default_rng(0)
    outputs = 3 if loss == "softmax" else 1
    logits = rng.normal(0, 4, (400, outputs))
    if loss == "softmax":
        p = softmax(logits / 2.5)  # the labels follow a temperature of 2.5
        labels = (p.cumsum(axis=1) > rng.random((400, 1))).argmax(axis=1)
    else:
        labels = (sigmoid(logits / 2.5)[:, 0] > rng.random(400)).astype(int)
    grid = np.exp(np.linspace(np.log(0.05), np.log(20), 4001))
    best = grid[np.argmin([metrics.loss_value(logits / t, labels, loss) for t in grid])]
    found = calibration.fit_temperature(logits, labels, loss)
    assert found == pytest.approx(best, rel=2e-3)
    assert 1.8 < found < 3.5


def test_threshold_reaches_the_sensitivity_and_no_larger_one_does():
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 2, 300)
    scores = np.clip(rng.normal(0.4 + 0.2 * labels, 0.2), 0, 1)
    for wanted in (0.5, 0.9, 0.95, 1.0):
        threshold = calibration.threshold_for(scores, labels, wanted)
        positives = scores[labels == 1]
        assert (positives > threshold).mean() >= wanted
        above = np.unique(scores[scores > threshold])[0]  # the next larger threshold that changes anything
        assert (positives > above).mean() < wanted


def test_threshold_when_every_score_is_positive():
    assert 0 < calibration.threshold_for(np.array([0.6, 0.8]), np.array([1, 1]), 1.0) < 0.6


def test_predictive_values_by_counting_people():
    # 1000 people, prevalence 2%: 20 ill (19 found), 980 healthy (98 false alarms)
    positive, negative = calibration.predictive_values(0.95, 0.9, 0.02)
    assert positive == pytest.approx(19 / (19 + 98))
    assert negative == pytest.approx(882 / (882 + 1))
    assert np.isnan(calibration.predictive_values(0.0, 1.0, 0.5)[0])


def test_logistic_calibration_is_sklearns():
    rng = np.random.default_rng(1)
    margins = rng.normal(1, 3, 300)
    labels = (sigmoid((margins - 1.5) / 2) > rng.random(300)).astype(int)
    temperature, threshold = calibration.fit_logistic(margins, labels)
    high, low = labels.sum(), 300 - labels.sum()
    twice, truth = np.r_[margins, margins], np.repeat([1, 0], 300)  # soft targets as weighted copies
    target = np.where(labels == 1, (high + 1) / (high + 2), 1 / (low + 2))
    fitted = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000).fit(
        twice[:, None], truth, np.r_[target, 1 - target]
    )
    assert 1 / temperature == pytest.approx(fitted.coef_[0, 0], rel=1e-4)
    assert threshold == pytest.approx(sigmoid(-fitted.intercept_)[0], rel=1e-4)
    decided = sigmoid(margins / temperature) > threshold
    assert (decided == (fitted.predict_proba(margins[:, None])[:, 1] > 0.5)).all()
    assert 1.5 < temperature < 2.7 and 0.6 < threshold < 0.75


@pytest.mark.parametrize("sign", [1, -1])
def test_logistic_calibration_of_separable_and_of_contrary_margins_is_finite(sign):
    margins = sign * np.array([-30.0, -20, -10, 10, 20, 30])
    temperature, threshold = calibration.fit_logistic(margins, np.repeat([0, 1], 3))
    assert 0.05 <= temperature <= 20 and 0 < threshold < 1
