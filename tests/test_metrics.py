"""Figures: hand-solved tables, scikit-learn, and slow second implementations."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn import metrics as sk

from paddle_medcls.core.errors import WeightsError
from paddle_medcls.evaluation import metrics
from paddle_medcls.evaluation.tables import summary
from paddle_medcls.models.output_head import OutputHead, check_finite, sigmoid, softmax


def random_case(n: int = 60, classes: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    logits = rng.normal(size=(n, classes)) + 1.2 * np.eye(classes)[labels]
    return logits.astype(np.float32), labels


# --- probabilities ---------------------------------------------------------------------------------


def test_softmax_and_sigmoid_by_hand() -> None:
    """ln 1, ln 2, ln 5 -> 1/8, 2/8, 5/8; sigmoid(ln 3) = 3/4."""
    logits = np.log([[1.0, 2.0, 5.0]])
    np.testing.assert_allclose(softmax(logits), [[0.125, 0.25, 0.625]])
    np.testing.assert_allclose(sigmoid(np.array([0.0, math.log(3), -math.log(3)])), [0.5, 0.75, 0.25])


def test_large_logits_do_not_overflow() -> None:
    big = np.array([[1e4, -1e4, 0.0]])
    np.testing.assert_array_equal(softmax(big), [[1, 0, 0]])
    np.testing.assert_array_equal(sigmoid(big), [[1, 0, 0.5]])
    assert metrics.loss_value(big, np.array([1]), "softmax") == 2e4
    assert metrics.loss_value(np.array([[-1e4]]), np.array([1]), "sigmoid") == 1e4


def test_the_temperature_divides_logits_before_anything_else() -> None:
    """sigmoid(2 ln 3 / 2) = 3/4; softmax(4 ln (1, 2, 5) / 4) as above."""
    binary = OutputHead("binary", "sigmoid", ("no", "yes"), temperature=2.0)
    np.testing.assert_allclose(binary.probabilities(np.array([[2 * math.log(3)]])), [[0.25, 0.75]])
    many = OutputHead("multi-class", "softmax", ("a", "b", "c"), temperature=4.0)
    np.testing.assert_allclose(many.probabilities(4 * np.log([[1.0, 2.0, 5.0]])), [[0.125, 0.25, 0.625]])


def test_the_decision_for_one_image() -> None:
    binary = OutputHead("binary", "sigmoid", ("no", "yes"), threshold=0.7)
    assert binary.decide_one(np.array([0.4, 0.6])) == ([0], 0.4)
    labels = OutputHead("multi-label", "sigmoid", ("a", "b", "c"))
    assert labels.decide_one(np.array([0.6, 0.2, 0.9])) == ([0, 2], 0.9)
    assert labels.decide_one(np.array([0.1, 0.2, 0.3])) == ([], 0.3)  # none of them
    assert labels.explained(np.array([[0.1, 0.2, 0.3]])).tolist() == [2]
    assert binary.explained(np.array([[0.4, 0.6]])).tolist() == [0]


@pytest.mark.parametrize(
    ("head", "shape"),
    [
        (OutputHead("binary", "sigmoid", ("no", "yes")), (3, 2)),
        (OutputHead("multi-class", "softmax", ("a", "b", "c")), (3, 1)),
        (OutputHead("multi-label", "sigmoid", ("a", "b", "c")), (3,)),
    ],
)
def test_logits_that_do_not_fit_the_classes_are_refused(head: OutputHead, shape: tuple[int, ...]) -> None:
    with pytest.raises(WeightsError, match="gives logits of shape"):
        head.probabilities(np.zeros(shape))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_refused_by_name(bad: float) -> None:
    """Nothing is decided from them: nan would be class 0 with the exit code of success."""
    logits = np.array([[1.0, 2.0], [3.0, bad], [5.0, 6.0]], np.float32)
    with pytest.raises(WeightsError, match=r"for 1 of 3 image\(s\)\n  b.png: logits 3, ") as caught:
        check_finite(logits, ["a.png", "b.png", "c.png"])
    assert "a.png" not in str(caught.value) and "c.png" not in str(caught.value)
    head = OutputHead("binary", "softmax", ("no", "yes"))
    with pytest.raises(WeightsError, match=r"\n  image 1: logits 3, "):
        head.probabilities(logits)
    good = logits[[0, 2]]
    assert check_finite(good, ["a.png", "c.png"]) is good


def test_columns_of_each_task() -> None:
    z = np.array([[math.log(3)]])
    np.testing.assert_allclose(OutputHead("binary", "sigmoid", ("no", "yes")).probabilities(z), [[0.25, 0.75]])
    many = np.array([[math.log(3), 0.0]])
    np.testing.assert_allclose(OutputHead("multi-label", "sigmoid", ("a", "b")).probabilities(many), [[0.75, 0.5]])
    np.testing.assert_allclose(OutputHead("binary", "softmax", ("no", "yes")).probabilities(many), [[0.75, 0.25]])


def test_thresholds() -> None:
    probs = np.array([[0.5, 0.5], [0.4, 0.6], [0.2, 0.8]])
    assert OutputHead("binary", "softmax", ("no", "yes")).decide(probs).tolist() == [
        0,
        1,
        1,
    ]  # exactly one half is class 0
    assert OutputHead("binary", "softmax", ("no", "yes"), threshold=0.7).decide(probs).tolist() == [0, 0, 1]
    assert OutputHead("multi-class", "softmax", ("a", "b")).decide(probs).tolist() == [0, 1, 1]
    assert OutputHead("multi-label", "sigmoid", ("a", "b")).decide(probs).tolist() == [[0, 0], [0, 1], [0, 1]]


def test_loss_against_scikit_learn() -> None:
    logits, labels = random_case()
    assert metrics.loss_value(logits, labels, "softmax") == pytest.approx(sk.log_loss(labels, softmax(logits)))
    binary = (labels > 1).astype(int)
    p = sigmoid(logits[:, :1])[:, 0]
    assert metrics.loss_value(logits[:, :1], binary, "sigmoid") == pytest.approx(sk.log_loss(binary, p))
    many = np.eye(4, dtype=int)[labels]
    mean = np.mean([sk.log_loss(many[:, k], sigmoid(logits[:, k])) for k in range(4)])
    assert metrics.loss_value(logits, many, "sigmoid") == pytest.approx(mean)


# --- AUC -------------------------------------------------------------------------------------------


def slow_auc(truth: np.ndarray, scores: np.ndarray) -> float:
    """All pairs of a positive and a negative; ties count one half."""
    wins = [1.0 if p > n else 0.5 if p == n else 0.0 for p in scores[truth == 1] for n in scores[truth == 0]]
    return sum(wins) / len(wins) if wins else math.nan


def test_auc_by_hand() -> None:
    """The example of scikit-learn's manual: 0.75."""
    assert metrics.roc_auc(np.array([0, 0, 1, 1]), np.array([0.1, 0.4, 0.35, 0.8])) == 0.75
    assert metrics.roc_auc(np.array([0, 1, 0, 1]), np.full(4, 0.3)) == 0.5
    assert metrics.roc_auc(np.array([1, 0]), np.array([0.0, 1.0])) == 0


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("ties", [False, True])
def test_auc_against_pairs_and_scikit_learn(seed: int, ties: bool) -> None:
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 2, 40)
    scores = rng.integers(0, 5, 40) / 4 if ties else rng.random(40)
    found = metrics.roc_auc(truth, scores)
    assert found == pytest.approx(slow_auc(truth, scores), abs=1e-12)
    assert found == pytest.approx(sk.roc_auc_score(truth, scores), abs=1e-12)


def test_auc_of_logits_is_that_of_probabilities() -> None:
    logits, labels = random_case(classes=2)
    truth = labels
    z = logits[:, 1] - logits[:, 0]
    assert metrics.roc_auc(truth, z) == metrics.roc_auc(truth, softmax(logits)[:, 1])


def test_weights_count_images() -> None:
    rng = np.random.default_rng(0)
    truth, scores = rng.integers(0, 2, 30), rng.integers(0, 6, 30) / 5
    weights = rng.integers(0, 4, (7, 30))
    found = metrics.roc_auc(truth, scores, weights)
    expected = [slow_auc(np.repeat(truth, row), np.repeat(scores, row)) for row in weights]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_auc_of_one_class_is_not_defined() -> None:
    assert math.isnan(metrics.roc_auc(np.ones(3, int), np.arange(3.0)))
    assert math.isnan(metrics.roc_auc(np.zeros(3, int), np.arange(3.0)))
    probs = np.full((3, 2), 0.5)
    assert math.isnan(metrics.auc(probs, np.zeros(3, int), "binary"))


def test_auc_of_several_classes_is_the_average_over_those_that_occur() -> None:
    logits, labels = random_case(classes=4)
    probs = softmax(logits)
    expected = sk.roc_auc_score(labels, probs, multi_class="ovr", average="macro")
    assert metrics.auc(probs, labels, "multi-class") == pytest.approx(expected, abs=1e-12)
    kept = labels < 3  # class 3 has no image: it counts in no average
    areas = [slow_auc((labels[kept] == k).astype(int), probs[kept, k]) for k in range(3)]
    assert metrics.auc(probs[kept], labels[kept], "multi-class") == pytest.approx(np.mean(areas), abs=1e-12)


def test_auc_of_labels() -> None:
    rng = np.random.default_rng(1)
    labels, scores = rng.integers(0, 2, (50, 3)), rng.random((50, 3))
    assert metrics.auc(scores, labels, "multi-label") == pytest.approx(sk.roc_auc_score(labels, scores), abs=1e-12)
    labels[:, 1] = 0
    expected = np.mean([slow_auc(labels[:, k], scores[:, k]) for k in (0, 2)])
    assert metrics.auc(scores, labels, "multi-label") == pytest.approx(expected, abs=1e-12)


# --- intervals -------------------------------------------------------------------------------------


def wilson_by_search(correct: int, total: int) -> list[float]:
    """Wilson's definition itself: the p at which |correct/total - p| is 1.96 standard errors of p."""

    def excess(p: float) -> float:
        return abs(correct / total - p) - 1.959963984540054 * math.sqrt(p * (1 - p) / total)

    ends = []
    for outside, inside in ((0.0, correct / total), (1.0, correct / total)):
        if outside == inside:
            ends.append(outside)
            continue
        for _ in range(200):
            middle = (outside + inside) / 2
            outside, inside = (middle, inside) if excess(middle) > 0 else (outside, middle)
        ends.append(outside)
    return ends


@pytest.mark.parametrize(("correct", "total"), [(97, 100), (0, 10), (10, 10), (1, 2), (2045, 2119)])
def test_wilson_against_its_definition(correct: int, total: int) -> None:
    np.testing.assert_allclose(metrics.wilson(correct, total), wilson_by_search(correct, total), atol=1e-9)


def test_wilson_known_value() -> None:
    """97 of 100: 0.9155 to 0.9897 (the formula worked by hand)."""
    np.testing.assert_allclose(metrics.wilson(97, 100), (0.9155, 0.9897), atol=5e-5)


def test_wilson_stays_within_0_and_1() -> None:
    """The formula's rounding gave -1e-17 for 0 of 259, which a sidecar refuses."""
    for total in range(1, 400):
        assert metrics.wilson(0, total)[0] >= 0 and metrics.wilson(total, total)[1] <= 1


def slow_bootstrap(probs: np.ndarray, labels: np.ndarray, task: str, resamples: int, seed: int) -> list[float]:
    """Draw the images again, and compute each area from the drawn list itself."""
    rng = np.random.default_rng(seed)
    areas = []
    for _ in range(resamples):
        rows = rng.integers(0, len(labels), len(labels))
        if task == "binary":
            areas.append(slow_auc(labels[rows], probs[rows, 1]))
        else:
            truth = labels if labels.ndim == 2 else np.eye(probs.shape[1], dtype=int)[labels]
            each = [slow_auc(truth[rows, k], probs[rows, k]) for k in range(probs.shape[1])]
            areas.append(np.mean([area for area in each if not math.isnan(area)] or [math.nan]))
    areas = [area for area in areas if not math.isnan(area)]
    return [float(np.percentile(areas, q)) for q in (2.5, 97.5)]


def auc_interval(*args, **kwargs) -> tuple[float, float]:
    return metrics.percentile_interval(metrics.bootstrap_areas(*args, **kwargs))


@pytest.mark.parametrize("task", ["binary", "multi-class", "multi-label"])
def test_bootstrap_against_a_loop(task: str) -> None:
    rng = np.random.default_rng(2)
    probs = np.round(rng.random((25, 3 if task != "binary" else 2)), 1)  # rounded: with ties
    labels = rng.integers(0, 2, (25, 3)) if task == "multi-label" else rng.integers(0, probs.shape[1], 25)
    found = auc_interval(probs, labels, task, resamples=60)
    np.testing.assert_allclose(found, slow_bootstrap(probs, labels, task, 60, 0), rtol=1e-12)


def slow_patients(probs: np.ndarray, labels: np.ndarray, patients: list[str], resamples: int) -> list[np.ndarray]:
    """Draw patients, list all images of each drawn one, and compute AUC and accuracy from the list itself."""
    rng = np.random.default_rng(0)
    names = sorted(set(patients))
    figures = []
    for _ in range(resamples):
        drawn = [names[k] for k in rng.integers(0, len(names), len(names))]
        rows = np.array([row for name in drawn for row, patient in enumerate(patients) if patient == name])
        guesses = probs[rows, 1] > 0.5
        figures.append([slow_auc(labels[rows], probs[rows, 1]), (guesses == labels[rows]).mean()])
    return [np.array(column) for column in zip(*figures)]


def test_bootstrap_of_patients_against_a_loop() -> None:
    rng = np.random.default_rng(3)
    labels, scores = rng.integers(0, 2, 40), np.round(rng.random(40), 1)
    patients = [f"p{k}" for k in rng.integers(0, 9, 40)]
    probs = np.stack([1 - scores, scores], axis=1)
    clusters = metrics.clusters_of(patients)
    areas, shares = slow_patients(probs, labels, patients, 1000)
    np.testing.assert_allclose(metrics.bootstrap_areas(probs, labels, "binary", clusters=clusters), areas, rtol=1e-12)
    hits = ((scores > 0.5) == labels).astype(float)
    np.testing.assert_allclose(metrics.bootstrap_means(hits, clusters), shares, rtol=1e-12)
    head = OutputHead("binary", "softmax", ("no", "yes"))
    found = metrics.evaluate_logits(np.log(np.clip(probs, 1e-9, 1)), labels, head, groups=patients)
    assert found["patients"] == len(set(patients))
    np.testing.assert_allclose(found["intervals"]["accuracy"], np.percentile(shares, [2.5, 97.5]), rtol=1e-9)
    kept = areas[np.isfinite(areas)]
    np.testing.assert_allclose(found["intervals"]["auc"], np.percentile(kept, [2.5, 97.5]), rtol=1e-9)


def test_copies_of_each_image_add_no_certainty() -> None:
    """Ten copies of each patient's image: the interval is that of the patients, not of ten times as many images."""
    logits, labels = random_case(40, 2)
    head, names = OutputHead("binary", "softmax", ("no", "yes")), [f"{k:02}" for k in range(40)]
    once = auc_interval(head.probabilities(logits), labels, "binary")
    ten = metrics.evaluate_logits(logits.repeat(10, axis=0), labels.repeat(10), head, groups=np.repeat(names, 10))
    np.testing.assert_allclose(ten["intervals"]["auc"], once, rtol=1e-12)
    blind = metrics.evaluate_logits(logits.repeat(10, axis=0), labels.repeat(10), head)
    for name in ("auc", "accuracy"):  # sqrt(10) = 3.2 times as wide
        wide, narrow = (np.diff(one["intervals"][name])[0] for one in (ten, blind))
        assert 2.5 < wide / narrow < 4.5, name


def test_resamples_of_two_patients_by_hand() -> None:
    """One with three right images, one with a wrong one: accuracy 0, 3/4 and 1 with odds 1 : 2 : 1."""
    shares = metrics.bootstrap_means(np.array([1.0, 1, 1, 0]), metrics.clusters_of(["a", "a", "a", "b"]))
    values, counts = np.unique(shares, return_counts=True)
    assert values.tolist() == [0, 0.75, 1]
    np.testing.assert_allclose(counts / 1000, [0.25, 0.5, 0.25], atol=0.05)


def test_patients_who_are_all_alike_prove_no_certainty() -> None:
    """Twelve right images of three patients: Wilson's interval of three trials, not 1 to 1."""
    clusters = metrics.clusters_of(["a", "b", "c"] * 4)
    np.testing.assert_allclose(metrics.accuracy_interval(np.ones(12), clusters), metrics.wilson(3, 3))


def test_one_image_a_patient_is_as_no_patients() -> None:
    assert metrics.clusters_of(["b", "a"]) is None and metrics.clusters_of([]) is None
    assert metrics.clusters_of(["b", "a", "b"]).tolist() == [1, 0, 1]


def test_bootstrap_is_cut_into_rounds_without_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """The counts of one round are kept under 2,000,000: with 800,000 images two resamples a round."""
    rounds: list[int] = []
    whole = metrics.auc
    monkeypatch.setattr(metrics, "auc", lambda p, y, t, w: rounds.append(len(w)) or whole(p, y, t, w))
    rng = np.random.default_rng(0)
    labels, probs = rng.integers(0, 2, 800_000), rng.random((800_000, 2))
    low, high = auc_interval(probs, labels, "binary", resamples=3)
    assert rounds == [2, 1] and low <= high


def test_bootstrap_of_one_class_is_nan() -> None:
    assert all(map(math.isnan, auc_interval(np.full((5, 2), 0.5), np.zeros(5, int), "binary", resamples=20)))


def test_bootstrap_of_the_size_of_chestmnist() -> None:
    """22,433 images and 14 labels (its test split); the full 1000 resamples take seconds, here 5."""
    rng = np.random.default_rng(0)
    labels = (rng.random((22433, 14)) < 0.1).astype(int)
    scores = rng.random((22433, 14)) + 0.3 * labels
    low, high = auc_interval(scores, labels, "multi-label", resamples=5)
    assert low <= high and abs(metrics.auc(scores, labels, "multi-label") - (low + high) / 2) < 0.01


# --- tables ----------------------------------------------------------------------------------------


def test_a_hand_solved_table() -> None:
    """Of 4 positives 3 found, of 6 negatives 5: P 3/4, R 3/4, specificity 5/6, F1 3/4, accuracy 8/10."""
    labels = np.array([1, 1, 1, 1, 0, 0, 0, 0, 0, 0])
    guesses = np.array([1, 1, 1, 0, 1, 0, 0, 0, 0, 0])
    assert metrics.confusion(labels, guesses, 2).tolist() == [[5, 1], [1, 3]]
    negative, positive = metrics.per_class(labels, guesses, ("no", "yes"))
    assert positive == {
        "class": "yes",
        "precision": 0.75,
        "recall": 0.75,
        "f1": 0.75,
        "specificity": 5 / 6,
        "support": 4,
        "predicted": 4,
    }
    assert (negative["precision"], negative["recall"], negative["support"]) == (5 / 6, 5 / 6, 6)


def test_tables_against_scikit_learn() -> None:
    logits, labels = random_case(80)
    guesses = logits.argmax(axis=1)
    np.testing.assert_array_equal(metrics.confusion(labels, guesses, 4), sk.confusion_matrix(labels, guesses))
    expected = sk.precision_recall_fscore_support(labels, guesses)
    rows = metrics.per_class(labels, guesses, "abcd")
    for name, values in zip(("precision", "recall", "f1", "support"), expected):
        np.testing.assert_allclose([row[name] for row in rows], values, err_msg=name)


def test_a_class_without_images_or_predictions_is_nan_not_zero() -> None:
    rows = metrics.per_class(np.array([0, 0, 1]), np.array([0, 0, 0]), "abc")
    assert math.isnan(rows[1]["precision"]) and rows[1]["recall"] == 0 and rows[1]["f1"] == 0
    assert math.isnan(rows[2]["precision"]) and math.isnan(rows[2]["recall"]) and math.isnan(rows[2]["f1"])
    assert rows[2]["specificity"] == 1 and rows[2]["support"] == 0


@pytest.mark.parametrize("seed", range(3))
def test_quadratic_kappa_against_scikit_learn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = np.r_[np.arange(5), rng.integers(0, 5, 50)]
    guesses = np.clip(labels + rng.integers(-1, 2, 55), 0, 4)
    expected = sk.cohen_kappa_score(labels, guesses, weights="quadratic")
    assert metrics.quadratic_kappa(labels, guesses, 5) == pytest.approx(expected)
    assert metrics.quadratic_kappa(labels, labels, 5) == 1


# --- a whole split ---------------------------------------------------------------------------------


def test_a_binary_split() -> None:
    logits = np.array([[2.0], [1.0], [-1.0], [-2.0], [0.5]])
    labels = np.array([1, 1, 1, 0, 0])
    found = metrics.evaluate_logits(logits, labels, OutputHead("binary", "sigmoid", ("no", "yes")))
    assert (found["n"], found["accuracy"], found["sensitivity"], found["specificity"]) == (5, 0.6, 2 / 3, 0.5)
    assert found["auc"] == pytest.approx(5 / 6)  # of 6 pairs only (-1, 0.5) is wrong
    assert found["confusion"] == [[1, 1], [1, 2]]
    np.testing.assert_allclose(found["intervals"]["accuracy"], wilson_by_search(3, 5), atol=1e-9)
    assert set(found["intervals"]) == {"accuracy", "auc"}
    assert found["loss"] == pytest.approx(sk.log_loss(labels, 1 / (1 + np.exp(-logits[:, 0]))))


def test_a_split_in_four_classes() -> None:
    logits, labels = random_case()
    found = metrics.evaluate_logits(
        logits, labels, OutputHead("multi-class", "softmax", tuple("abcd")), intervals=False
    )
    assert found["accuracy"] == sk.accuracy_score(labels, logits.argmax(axis=1))
    assert "intervals" not in found and "sensitivity" not in found
    assert [row["class"] for row in found["per_class"]] == list("abcd")


def test_an_ordinal_split() -> None:
    logits, labels = random_case(classes=5)
    found = metrics.evaluate_logits(logits, labels, OutputHead("ordinal", "softmax", tuple("abcde")), intervals=False)
    guesses = logits.argmax(axis=1)
    assert found["quadratic_kappa"] == pytest.approx(sk.cohen_kappa_score(labels, guesses, weights="quadratic"))
    assert found["mean_absolute_error"] == pytest.approx(sk.mean_absolute_error(labels, guesses))


def test_a_multi_label_split() -> None:
    """Accuracy is the share of right (image, label) pairs: 5 of 6."""
    logits = np.array([[1.0, -1.0, 2.0], [-1.0, -2.0, 3.0]])
    labels = np.array([[1, 0, 1], [1, 0, 1]])
    found = metrics.evaluate_logits(logits, labels, OutputHead("multi-label", "sigmoid", tuple("abc")), intervals=False)
    assert found["accuracy"] == pytest.approx(5 / 6) and "confusion" not in found
    assert [row["recall"] for row in found["per_class"]][::2] == [0.5, 1.0]
    assert math.isnan(found["auc"])  # no label has both a positive and a negative


def test_the_printed_line_names_the_patients() -> None:
    logits, labels = random_case(12, 2)
    head = OutputHead("binary", "softmax", ("no", "yes"))
    for groups, expected in ((["a", "b", "c"] * 4, ", over 3 patients)"), ((), ")")):
        found = metrics.evaluate_logits(logits, labels, head, groups=groups)
        low, high = found["intervals"]["auc"]
        assert f"(95% {low:.4f} to {high:.4f}{expected}" in summary({"split": "val", **found})
