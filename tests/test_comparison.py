"""Two models on the same images: tests worked by hand, slow second implementations, and the command."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fakes import TOOLS

from paddle_medcls.cli import eval
from paddle_medcls.core.errors import DataError
from paddle_medcls.data.index import Index
from paddle_medcls.evaluation import significance
from paddle_medcls.evaluation.metrics import auc, bootstrap_areas, percentile_interval, wilson
from paddle_medcls.evaluation.predictions import Predictions, read_predictions
from paddle_medcls.evaluation.significance import compare, verdict
from paddle_medcls.evaluation.tables import comparison_table, write_predictions
from paddle_medcls.models.output_head import OutputHead


def model(seed: int, task: str, n: int = 60, strength: float = 1.0) -> Predictions:
    """A model of some strength on labels that depend on the task alone; scores rounded, so that some tie."""
    classes = 2 if task == "binary" else 3
    draw = np.random.default_rng(99)
    labels = draw.integers(0, 2, (n, 3)) if task == "multi-label" else draw.integers(0, classes, n)
    truth = labels if task == "multi-label" else np.eye(classes)[labels]
    raw = np.random.default_rng(seed).random((n, classes)) + strength * truth
    probs = (raw / 3 if task == "multi-label" else raw / raw.sum(axis=1, keepdims=True)).round(2)
    if task == "binary":
        probs[:, 0] = (1 - probs[:, 1]).round(2)
    names = tuple("abc"[:classes])
    guesses = OutputHead(task, "softmax", names).decide(probs)
    return Predictions(Path("x"), [f"{k}.png" for k in range(n)], labels, guesses, probs, names)


# --- the tests of significance ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("only_a", "only_b", "p"),
    [
        (0, 0, 1.0),
        (5, 5, 1.0),
        (0, 5, 2 / 32),  # by hand: 2 * (1/2)^5
        (1, 8, 20 / 512),  # 2 * (1 + 9) / 2^9
        (2, 8, 2 * (1 + 10 + 45) / 1024),
        (10, 2, 2 * (1 + 12 + 66) / 4096),
    ],
)
def test_mcnemar_by_hand(only_a: int, only_b: int, p: float) -> None:
    assert significance.mcnemar(only_a, only_b) == p == significance.mcnemar(only_b, only_a)


@pytest.mark.parametrize(("only_a", "only_b"), [(3, 17), (40, 61), (700, 600)])
def test_mcnemar_against_the_sum_of_binomials(only_a: int, only_b: int) -> None:
    n = only_a + only_b
    tail = sum(math.comb(n, k) for k in range(n + 1) if abs(2 * k - n) >= abs(only_a - only_b))  # both sides
    assert significance.mcnemar(only_a, only_b) == pytest.approx(tail / 2**n, rel=1e-12)


def test_mcnemar_of_many_images_is_quick_and_finite() -> None:
    assert 0.9 < significance.mcnemar(20_000, 20_000) <= 1 and significance.mcnemar(0, 5000) == 0


def test_interval_of_paired_proportions_by_hand() -> None:
    """6 and 18 of 98: p = 7/100, q = 19/100, half = 1.96 * sqrt((0.26 - 0.0144) / 100) = 0.0971."""
    np.testing.assert_allclose(significance.paired_interval(6, 18, 98), (0.0229, 0.2171), atol=5e-5)
    assert significance.paired_interval(0, 0, 10)[0] == -significance.paired_interval(0, 0, 10)[1]


def slow_delong(truth: np.ndarray, scores: list[np.ndarray]) -> np.ndarray:
    """Covariance (2, 2) of two AUCs from the definition: every pair of a positive and a negative."""

    def wins(s: np.ndarray) -> np.ndarray:
        return np.array([[1.0 if p > q else 0.5 if p == q else 0.0 for q in s[truth == 0]] for p in s[truth == 1]])

    tables = [wins(s) for s in scores]
    of_positives = np.cov([table.mean(axis=1) for table in tables])
    of_negatives = np.cov([table.mean(axis=0) for table in tables])
    return of_positives / (truth == 1).sum() + of_negatives / (truth == 0).sum()


@pytest.mark.parametrize("seed", range(5))
def test_delong_against_its_definition(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth = np.r_[0, 0, 1, 1, rng.integers(0, 2, 30)]
    a, b = rng.integers(0, 8, 34) / 7, rng.random(34) + truth / 2
    table = slow_delong(truth, [a, b])
    expected = table[0, 0] + table[1, 1] - 2 * table[0, 1]
    assert significance.delong_variance(truth, a, b) == pytest.approx(expected, rel=1e-12)


def test_delong_by_hand() -> None:
    """Positives 2 and 4, negatives 1 and 3; B ranks all right.

    A: placements of the positives 1/2, 1, of the negatives 1, 1/2; B: all 1. Differences 1/2, 0 and 0, 1/2:
    each has variance 1/8, so the difference of the areas, 1/4, has 1/16 + 1/16.
    """
    truth, a, b = np.array([1, 1, 0, 0]), np.array([2, 4, 1, 3]), np.array([3, 4, 1, 2])
    assert significance.delong_variance(truth, a, b) == pytest.approx(1 / 8)
    assert significance._normal(0.25, 1 / 8)["p"] == pytest.approx(0.4795, abs=5e-5)  # z = 0.7071


def test_delong_without_spread() -> None:
    truth, scores = np.array([0, 0, 1, 1]), np.arange(4.0)
    assert significance.delong_variance(truth, scores, scores) == 0
    assert significance._normal(0.0, 0.0) == {"interval": (0, 0), "p": 1}
    assert math.isnan(significance.delong_variance(np.array([0, 1, 1]), np.arange(3), np.arange(3)))


@pytest.mark.parametrize("task", ["multi-class", "multi-label"])
def test_paired_bootstrap_against_a_loop(task: str) -> None:
    """Draw the images again, score both models on the same draw, take the difference."""
    a, b = model(1, task), model(2, task, strength=0.3)
    rng = np.random.default_rng(0)
    gains = []
    for _ in range(1000):
        rows = rng.integers(0, 60, 60)
        gains.append(float(auc(b.probs[rows], a.labels[rows], task) - auc(a.probs[rows], a.labels[rows], task)))
    found = compare(a, b)["auc"]
    np.testing.assert_allclose(found["interval"], np.percentile(gains, [2.5, 97.5]), rtol=1e-9)
    rarer = min(sum(gain <= 0 for gain in gains), sum(gain >= 0 for gain in gains))
    assert found["p"] == pytest.approx(min(1, 2 * (rarer + 1) / 1001)) and found["test"] == "paired bootstrap"


def test_four_images_prove_nothing_by_delong() -> None:
    """A ties all, B ranks all right: all placements gain 1/2, so the variance is 0, which is no certainty."""
    labels, names = np.array([0, 0, 1, 1]), ("a", "b")
    ties, perfect, other = (np.stack([1 - s, s], axis=1) for s in (np.full(4, 0.5), np.arange(4) / 4, labels * 0.9))
    a, b, c = (
        Predictions(Path("x"), list("0123"), labels, (p[:, 1] > 0.4).astype(int), p, names)
        for p in (ties, perfect, other)
    )
    for one, two, difference in ((a, b, 0.5), (b, c, 0.0)):
        found = compare(one, two)["auc"]
        assert found["difference"] == difference and math.isnan(found["p"]) and math.isnan(found["interval"][0])
        said = verdict({"accuracy": found, "auc": found})
        assert "too few" in said and "better" not in said
    assert compare(b, b)["auc"]["p"] == 1  # a model and itself
    shown = comparison_table(compare(a, b))
    assert "+0.5000 (–)" in shown and "nan" not in shown


def test_three_images_prove_nothing_by_bootstrap() -> None:
    """All resamples of three images favour B: the p of the exact test of three pairs, 2 / 2^3, not 2 / 1001."""
    assert significance.bootstrap_p(np.ones(1000), units=3) == 0.25
    labels = np.array([[1, 1, 0]] * 3)
    a = Predictions(Path("x"), list("012"), labels, np.zeros((3, 3), int), np.full((3, 3), 0.4), tuple("abc"))
    b = Predictions(Path("x"), list("012"), labels, labels, labels * 0.9, tuple("abc"))
    assert math.isnan(compare(a, b)["accuracy"]["p"])  # each image gains the same: no variance to test with


def of_patients(one: Predictions, patients: list[str]) -> Predictions:
    return dataclasses.replace(one, patients=tuple(patients))


@pytest.mark.parametrize("task", ["binary", "multi-class", "multi-label"])
def test_paired_tests_of_patients_against_a_loop(task: str) -> None:
    """Draw patients, take all images of each, score both models on the same draw, take the difference."""
    a, b = model(1, task), model(2, task, strength=0.3)
    patients = [f"{k:02}" for k in np.random.default_rng(5).integers(0, 15, 60)]
    names, rng, gains = sorted(set(patients)), np.random.default_rng(0), []
    for _ in range(1000):
        drawn = [names[k] for k in rng.integers(0, len(names), len(names))]
        rows = np.array([row for name in drawn for row in range(60) if patients[row] == name])
        areas = [float(auc(one.probs[rows], a.labels[rows], task)) for one in (a, b)]
        shares = [float((one.guesses[rows] == a.labels[rows]).mean()) for one in (a, b)]
        gains.append([shares[1] - shares[0], areas[1] - areas[0]])
    gain = [(b.guesses[k] == b.labels[k]).mean() - (a.guesses[k] == a.labels[k]).mean() for k in range(60)]
    found = compare(of_patients(a, patients), b)  # one file that names them suffices
    of_all = [sum(gain[row] for row in range(60) if patients[row] == name) for name in names]
    units = [sum(abs(total) > 1e-12 for total in of_all), len(names)]
    for row, drawn, n in zip((found["accuracy"], found["auc"]), np.array(gains).T, units):
        np.testing.assert_allclose(row["interval"], np.nanpercentile(drawn, [2.5, 97.5]), rtol=1e-9)
        assert row["p"] == significance.bootstrap_p(drawn, n)
        assert (row["test"], row["patients"]) == ("paired bootstrap of patients", len(names))


def test_copies_of_each_image_make_no_difference_significant() -> None:
    """5 against 0: p = 1/16 by McNemar. With ten copies of each image and no patients it would be 2^-49."""
    labels = np.zeros(20, int)
    guesses = np.r_[np.ones(5, int), np.zeros(15, int)]
    probs = np.stack([1 - guesses * 0.9, guesses * 0.9], axis=1)
    ids = [f"{k}" for k in range(200)]
    a = Predictions(Path("x"), ids, labels.repeat(10), guesses.repeat(10), probs.repeat(10, axis=0), ("a", "b"))
    b = dataclasses.replace(a, guesses=labels.repeat(10))
    assert compare(a, b)["accuracy"]["p"] < 1e-14
    patients = [f"{k:02}" for k in range(20)]
    row = compare(of_patients(a, list(np.repeat(patients, 10))), b)["accuracy"]
    assert row["p"] == 1 / 16 and row["only_b"] == 50 and row["interval"][0] <= 0.1


def test_patients_travel_beside_the_predictions(tmp_path: Path) -> None:
    one = model(3, "binary", 6)
    index = Index("made", "test", tuple(one.ids), [Path(name) for name in one.ids], one.labels, one.classes, one.task)
    index = dataclasses.replace(index, groups=("p1", "p1", "p2", "p2", "p3", "p3"))
    write_predictions(tmp_path / "predictions_test.csv", index, one.probs, one.guesses)
    assert read_predictions(tmp_path).patients == index.groups
    file = tmp_path / "patients_test.csv"
    lines = file.read_text().splitlines()
    for text, message in (
        ("\n".join(lines[:-2]), r"2 image\(s\) of 6 without a patient"),
        ("\n".join([*lines, lines[1]]), "1 named twice"),
        ("id,name\n", "columns differ"),
        ("", "cannot be read"),
    ):
        file.write_text(text)
        with pytest.raises(DataError, match=message):
            read_predictions(tmp_path)
    a, b = of_patients(one, list(index.groups)), of_patients(one, ["x", *index.groups[1:]])
    with pytest.raises(DataError, match="1 of 6 images have another patient in B"):
        compare(a, b)


def test_bootstrap_p_by_hand() -> None:
    assert significance.bootstrap_p(np.array([1.0, 2, 3])) == 0.5  # none of 3 at or below 0: 2 * 1 / 4
    assert significance.bootstrap_p(np.array([-1.0, 1, 0, np.nan])) == 1
    assert math.isnan(significance.bootstrap_p(np.array([np.nan])))


def test_p_is_uniform_when_the_models_are_equally_good() -> None:
    """Of 200 pairs of equal models some 5% differ at p < 0.05; McNemar is exact and so never above."""
    small = {"accuracy": 0, "auc": 0}
    for seed in range(200):
        a, b = (model(start + seed, "binary", 80, 0.4) for start in (1000, 5000))
        small["accuracy"] += significance._accuracy(a, b)["p"] < 0.05
        p = significance._normal(
            float(auc(b.probs, b.labels, "binary") - auc(a.probs, a.labels, "binary")),
            significance.delong_variance(a.labels, a.probs[:, 1], b.probs[:, 1]),
        )["p"]
        small["auc"] += p < 0.05
    assert small["accuracy"] <= 16 and 2 <= small["auc"] <= 20


# --- two models ------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["binary", "multi-class", "multi-label"])
def test_figures_and_intervals_are_those_of_eval(task: str) -> None:
    a, b = model(1, task), model(2, task, strength=0.2)
    found = compare(a, b)
    for side, one in (("a", a), ("b", b)):
        accuracy = (one.guesses == one.labels).mean()
        assert found["accuracy"][side] == (pytest.approx(accuracy), pytest.approx(wilson(accuracy * 60, 60)))
        interval = percentile_interval(bootstrap_areas(one.probs, one.labels, task))
        assert found["auc"][side] == (auc(one.probs, one.labels, task), interval)
    assert found["accuracy"]["difference"] < 0 and "A is better" in verdict(found)
    back = compare(b, a)
    for name in ("accuracy", "auc"):
        assert back[name]["p"] == found[name]["p"]
        np.testing.assert_allclose(back[name]["interval"], [-x for x in found[name]["interval"][::-1]], atol=1e-12)


@pytest.mark.parametrize("task", ["binary", "multi-class", "multi-label"])
def test_a_model_does_not_differ_from_itself(task: str) -> None:
    found = compare(model(1, task), model(1, task))
    for row in found.values():
        assert row["p"] == 1 and row["difference"] == 0
    assert verdict(found) == "accuracy: no difference shown; AUC: no difference shown"


def test_images_are_matched_by_name() -> None:
    a, b = model(1, "binary"), model(2, "binary", strength=0.2)
    turned = Predictions(b.path, b.ids[::-1], b.labels[::-1], b.guesses[::-1], b.probs[::-1], b.classes)
    assert compare(a, turned) == compare(a, b)


def test_one_class_has_no_auc() -> None:
    a = model(1, "binary", 8)
    one = Predictions(a.path, a.ids, np.ones(8, int), a.guesses, a.probs, a.classes)
    found = compare(one, one)
    assert math.isnan(found["auc"]["p"]) and "AUC: not defined" in verdict(found)


def test_other_images_labels_and_classes_are_refused() -> None:
    a, b = model(1, "binary", 8), model(2, "binary", 8)
    renamed = Predictions(b.path, ["new.png", *b.ids[1:]], b.labels, b.guesses, b.probs, b.classes)
    with pytest.raises(
        DataError, match=r"not predictions of the same images[\s\S]*only in A: 0.png[\s\S]*only in B: new"
    ):
        compare(a, renamed)
    with pytest.raises(DataError, match="not predictions of the same images"):
        compare(a, model(2, "binary", 9))
    with pytest.raises(DataError, match="not predictions of the same images"):
        compare(a, Predictions(b.path, b.ids, b.labels, b.guesses, b.probs, ("b", "a")))
    other = Predictions(b.path, b.ids, 1 - b.labels, b.guesses, b.probs, b.classes)
    with pytest.raises(DataError, match="8 of 8 images have another label in B"):
        compare(a, other)


# --- files and the command -------------------------------------------------------------------------


def write(folder: Path, one: Predictions, split: str = "test") -> Path:
    index = Index("made", split, tuple(one.ids), [Path(name) for name in one.ids], one.labels, one.classes, one.task)
    write_predictions(folder / f"predictions_{split}.csv", index, one.probs, one.guesses)
    return folder / f"predictions_{split}.csv"


@pytest.mark.parametrize("task", ["binary", "multi-class", "multi-label"])
def test_predictions_survive_their_file(task: str, tmp_path: Path) -> None:
    one = model(3, task)
    for path in (write(tmp_path, one), tmp_path):
        found = read_predictions(path)
        assert (found.ids, found.classes, found.task) == (one.ids, one.classes, task)
        for name in ("labels", "guesses", "probs"):
            np.testing.assert_array_equal(getattr(found, name), getattr(one, name))


def test_eleven_classes_are_not_taken_for_labels(tmp_path: Path) -> None:
    """Class 10 is written as "10", which is no list of zeros and ones."""
    classes = tuple("abcdefghijk")
    probs = np.full((2, 11), 1 / 11).round(8)
    one = Predictions(Path("x"), ["1", "2"], np.array([10, 10]), np.array([10, 0]), probs, classes)
    assert read_predictions(write(tmp_path, one)).labels.tolist() == [10, 10]


HEADER = "id,label,predicted,a,b\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read: it is empty"),
        (b"\xff\xfe", "cannot be read"),
        (b"<html>", "not predictions .begins with '<html>'"),
        (HEADER.encode(), "not predictions"),
        (b"id,label,predicted,a,a\n1,0,0,1,0\n", "not predictions"),
        (f"{HEADER}1,0,0,0.5\n".encode(), "line 2: 4 columns, the header has 5"),
        (f"{HEADER}\n1,0,0,0.5,0.5\n".encode(), "line 2: 0 columns"),
        (f"{HEADER}1,2,0,0.5,0.5\n".encode(), "line 2: '2' is no class of 2"),
        (f"{HEADER}1,0,-1,0.5,0.5\n".encode(), "'-1' is no class"),
        (f"{HEADER}1,01,00,0.5,0.5\n1,02,00,0.5,0.5\n".encode(), "line 3: '02' is no class"),
        (f"{HEADER}1,0,0,nan,0.5\n".encode(), "'nan' is no probability"),
        (f"{HEADER}1,0,0,0.5,1.5\n".encode(), "'1.5' is no probability"),
        (f"{HEADER}1,0,0,0.5,x\n".encode(), "'x' is no probability"),
        (f"{HEADER}1,0,0,0.5,0.5\n1,1,0,0.5,0.5\n".encode(), "1 image.s. are named twice"),
        (f'{HEADER}"1,0,0,0.5,0.5\n'.encode(), "cannot be read: unexpected end of data"),
    ],
)
def test_faulty_files(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_predictions(tmp_path / "p.csv")


def test_folders_without_one_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no predictions_<split>.csv in this folder"):
        read_predictions(tmp_path)
    for split in ("val", "test"):
        write(tmp_path, model(1, "binary"), split)
    with pytest.raises(DataError, match="several predictions: predictions_test.csv, predictions_val.csv"):
        read_predictions(tmp_path)
    with pytest.raises(DataError, match="No such file"):
        read_predictions(tmp_path / "none.csv")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name, seed, strength in (("a", 1, 1.0), ("b", 2, 0.2)):
        write(tmp_path / name, model(seed, "binary", strength=strength))
    words = ["--compare", str(tmp_path / "a"), str(tmp_path / "b" / "predictions_test.csv")]
    assert eval.main([*words, "--output", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "60 images in both" in shown and "McNemar, exact" in shown and "DeLong" in shown
    assert "accuracy: A is better; AUC: A is better" in shown
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert found["n"] == 60 and found["accuracy"]["only_a"] > found["accuracy"]["only_b"]


def test_the_command_needs_neither_paddle_nor_weights(tmp_path: Path) -> None:
    for name in "ab":
        write(tmp_path / name, model(1, "multi-class"))
    (tmp_path / "paddle").mkdir()
    (tmp_path / "paddle" / "__init__.py").write_text("raise ImportError")
    command = [sys.executable, str(TOOLS / "eval.py"), "--compare", str(tmp_path / "a"), str(tmp_path / "b")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0 and "no difference shown" in done.stdout, done.stderr


@pytest.mark.parametrize("words", [["--compare", "a"], ["--compare", "a", "b", "--weights", "w"]])
def test_wrong_usage(words: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        eval.main(words)
    assert stop.value.code == 2
