"""The shortcut audit: made images that differ in one place, a second implementation, the command, real images."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from fakes import covid_tree, pixels, write_image
from sklearn.linear_model import LogisticRegression

from paddle_medcls.cli import prepare
from paddle_medcls.core.errors import DataError
from paddle_medcls.data.datasets import load_index
from paddle_medcls.data.index import Index
from paddle_medcls.evaluation import shortcut_audit
from paddle_medcls.evaluation.metrics import wilson
from paddle_medcls.evaluation.shortcut_audit import SIZE_ALONE, audit, softmax_regression, standardise
from paddle_medcls.evaluation.tables import audit_table


def made(split: str, place: str, n: int = 120) -> Index:
    """Noise of 60 px in two classes; class 1 is brighter in one place and nowhere else."""
    rng = np.random.default_rng(split == "test")
    labels = np.arange(n) % 2
    images = rng.integers(60, 180, (n, 60, 60))
    where = np.zeros((60, 60), bool)
    if place == "border":
        where[:6], where[-6:], where[:, :6], where[:, -6:] = True, True, True, True
    elif place == "centre":
        where[20:40, 20:40] = True
    images[labels == 1] += 15 * where
    ids = tuple(map(str, range(n)))
    return Index("made", split, ids, images.astype(np.uint8), labels, ("a", "b"), "binary")


@pytest.mark.parametrize(
    ("place", "finds", "does_not"),
    [
        ("border", ("border", "centre masked", "whole"), ("centre alone",)),
        ("centre", ("centre alone", "thumbnail", "whole"), ("border", "centre masked")),
        ("nowhere", (), ("border", "centre masked", "centre alone", "thumbnail", "whole")),
    ],
)
def test_what_differs_in_one_place_is_found_there(place: str, finds: tuple, does_not: tuple) -> None:
    found = audit(made("train", place), made("test", place), 1)
    views = {name: view for name, view in found["views"].items()}
    for start in finds:
        (view,) = (view for name, view in views.items() if name.startswith(start))
        assert view["accuracy"] > 0.95 and view["auc"] > 0.99, start
    for start in does_not:
        (view,) = (view for name, view in views.items() if name.startswith(start))
        low, high = view["intervals"]["accuracy"]
        assert low < 0.5 < high, start
    assert (found["majority"], found["n"], found["scored"]) == (0.5, 120, "test")


def test_views_and_intervals() -> None:
    """40 px: a frame of 4 leaves 32 x 32, the centre is 24 x 24."""
    found = audit(made("train", "border"), made("test", "border"), 1)["views"]
    assert [view["pixels"] for view in found.values()] == [0, 1600 - 1024, 1600 - 576, 576, 256, 1600]
    for view in found.values():
        assert view["intervals"]["accuracy"] == wilson(round(view["accuracy"] * 120), 120)


def test_intervals_are_over_whole_patients() -> None:
    """Ten copies of each of 20 images, one patient each: the interval of 20 cases, not of 200."""
    train, one = made("train", "border"), made("test", "nowhere", 20)
    rows = np.repeat(np.arange(20), 10)
    many = dataclasses.replace(one.subset(rows), ids=tuple(map(str, range(200))))
    patients = dataclasses.replace(many, groups=tuple(f"p{row}" for row in rows))
    found = audit(train, patients, 1)
    assert (found["n"], found["patients"]) == (200, 20) and "over 20 patients" in audit_table(found)
    of_one, of_many = (audit(train, index, 1) for index in (one, many))
    assert "patients" not in of_many
    whole = of_one["views"], of_many["views"]
    for name, view in found["views"].items():
        if name == SIZE_ALONE:
            continue  # all are alike: an interval of width 0
        alone, copied = (views[name] for views in whole)
        for metric in ("accuracy", "auc"):
            assert view[metric] == pytest.approx(alone[metric])
            width, few, most = (np.ptp(row["intervals"][metric]) for row in (view, alone, copied))
            assert abs(width - few) < 0.3 * few and width > 2 * most


def test_the_size_of_the_file_alone(tmp_path: Path) -> None:
    """Class 1 has 40 px and is colour: the size gives it away; where all are alike it tells nothing."""

    def index(split: str, px: int, channels: int) -> Index:
        paths = []
        for row in range(12):
            side = px if row % 2 else 60
            image = np.full((side, side, channels if row % 2 else 1), 100, np.uint8)
            paths.append(write_image(tmp_path / f"{split}{px}{channels}" / f"{row}.png", image.squeeze()))
        labels = np.arange(12) % 2
        return Index("made", split, tuple(map(str, range(12))), paths, labels, ("a", "b"), "binary")

    for px, channels, tells in ((40, 1, True), (60, 3, True), (60, 1, False)):
        found = audit(index("train", px, channels), index("test", px, channels), 1)["views"][SIZE_ALONE]
        assert found["accuracy"] == (1 if tells else 0.5) and found["pixels"] == 0
    one, other = index("train", 60, 1), index("test", 60, 3)  # a mode that training lacks is no evidence
    assert audit(one, other, 1)["views"][SIZE_ALONE]["accuracy"] == 0.5


def test_the_majority_is_that_of_training() -> None:
    """Always naming class 0, the commonest in training, is right for 1 of 4 here."""
    train, scored = made("train", "nowhere", 6).subset([0, 2, 4, 1]), made("test", "nowhere", 8).subset([0, 1, 3, 5])
    assert audit(train, scored, 1)["majority"] == 0.25


@pytest.mark.parametrize("classes", [2, 4])
def test_regression_against_scikit_learn(classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shortcut_audit, "L2", 0.001)
    monkeypatch.setattr(shortcut_audit, "STEPS", 3000)
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, 80)
    x = rng.normal(size=(80, 12)) + 0.8 * rng.normal(size=(classes, 12))[labels]
    x, _ = standardise(x, x)
    weights, biases = softmax_regression(x, labels, classes)
    assert weights.shape == (12, classes) and biases.shape == (classes,)
    # scikit-learn's loss is the sum; for two classes it fits one column of weights, half of the squares each
    reference = LogisticRegression(C=(2 if classes == 2 else 1) / (80 * 0.001), tol=1e-10, max_iter=5000).fit(x, labels)
    ours = np.exp(x @ weights + biases)
    np.testing.assert_allclose(ours / ours.sum(axis=1, keepdims=True), reference.predict_proba(x), atol=1e-4)


def test_regression_is_at_its_minimum_and_the_same_twice() -> None:
    """With the steps that the audit takes, the loss has no slope left."""
    train = made("train", "border")
    small = train.images[:, ::2, ::2].reshape(120, -1) / 255
    x, _ = standardise(small, small)
    weights, biases = softmax_regression(x, train.labels, 2)
    logits = x @ weights + biases
    probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    slope = x.T @ (probs - np.eye(2)[train.labels]) / 120 + 1e-4 * weights
    assert abs(slope).max() < 1e-6
    np.testing.assert_array_equal(softmax_regression(x, train.labels, 2)[0], weights)


def test_a_constant_pixel_does_no_harm() -> None:
    train = made("train", "border")
    train.images[:, :10] = 0
    assert audit(train, made("test", "border"), 1)["views"]["whole image 40x40"]["accuracy"] > 0.9


def test_several_labels_and_unreadable_images_are_refused(tmp_path: Path) -> None:
    one = made("train", "border", 4)
    many = Index("made", "train", one.ids, one.images, np.eye(4, 2, dtype=int), ("a", "b"), "multi-label")
    with pytest.raises(DataError, match="one label an image"):
        audit(many, many, 1)
    good = write_image(tmp_path / "a.png", pixels(0))
    (tmp_path / "b.png").write_bytes(b"<html>")
    files = Index("made", "train", ("a", "b"), [good, tmp_path / "b.png"], np.array([0, 1]), ("a", "b"), "binary")
    with pytest.raises(DataError, match=r"1 of 2 train image.s. cannot be read[\s\S]*b.png: not an image"):
        audit(files, files, 1)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root = covid_tree(tmp_path / "covid")
    words = ["--dataset", "covid", "--data-root", str(root), "--audit", "--output", str(tmp_path / "out")]
    assert prepare.main([*words, "--workers", "1"]) == 0
    shown = capsys.readouterr().out
    assert "covid: trained on train, scored on 4 images of test" in shown and "border alone, outer 10%" in shown
    found = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert found["majority"] == 0.25 and len(found["views"]) == 6
    assert not (root / "audit.json").exists()


@pytest.mark.data
def test_palm_real(real_data: Path) -> None:
    """The results in the README of PALM, on the images at 224 px."""
    found = audit(*(load_index("palm", real_data / "palm", split) for split in ("train", "val")), 2)
    border, whole = (found["views"][name] for name in ("border alone, outer 10%", "whole image 40x40"))
    assert found["majority"] == 0.5275
    assert abs(border["accuracy"] - 0.8725) <= 0.005 and abs(whole["accuracy"] - 0.9075) <= 0.005
