"""Cross-validation: how images are divided into folds, what a run of folds writes, and that it continues to the bit."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import toynet
from fakes import palm_tree, pixels, recipe, write_image
from test_train import assert_same

from paddle_medcls.cli import train as command
from paddle_medcls.core.errors import DataError, RecipeError, RunError, Stopped
from paddle_medcls.core.files import sha256
from paddle_medcls.data.datasets import load_index
from paddle_medcls.data.image_list import read_image_list
from paddle_medcls.data.index import Index
from paddle_medcls.data.own_images import own_images
from paddle_medcls.data.splits import FOLD_SEED, fold_of
from paddle_medcls.evaluation.calibration import fit_logistic, fit_temperature
from paddle_medcls.evaluation.metrics import auc
from paddle_medcls.evaluation.predictions import read_predictions
from paddle_medcls.models.output_head import OutputHead
from paddle_medcls.models.sidecar import Sidecar, sidecar_of
from paddle_medcls.training.folds import CrossValidation, choice, train_folds
from paddle_medcls.training.loop import Options, train

CLASSES = ("a", "b", "c")


@pytest.fixture(autouse=True)
def no_calls_left() -> object:
    yield
    toynet.ON_STEP.clear()


# --- the folds -------------------------------------------------------------------------------------


def an_index(labels: np.ndarray, groups: Sequence[object] = ()) -> Index:
    ids = tuple(f"{k:04}.png" for k in range(len(labels)))
    task = "multi-label" if labels.ndim == 2 else "multi-class"
    return Index("own", "train", ids, [Path(name) for name in ids], labels, CLASSES, task, tuple(map(str, groups)))


def fold_by_row(index: Index, count: int) -> np.ndarray:
    """The fold of each image; each is for validation once and for training in all other folds."""
    folds = np.zeros(len(index), int)
    for fold in range(1, count + 1):
        train, val = fold_of(index, count, fold)
        assert (train.split, val.split) == ("train", "val")
        assert sorted((*train.ids, *val.ids)) == list(index.ids)
        rows = [index.ids.index(name) for name in val.ids]
        assert not folds[rows].any() and val.labels.tolist() == index.labels[rows].tolist()
        folds[rows] = fold
    assert folds.all()
    return folds


def slow_folds(index: Index, count: int) -> list[int]:
    """Iterative stratification with fractions and lists, a patient at a time."""
    if index.labels.ndim == 2:
        members = [{k for k, one in enumerate(row) if one} or {"none"} for row in index.labels.tolist()]
    else:
        members = [{label} for label in index.labels.tolist()]
    units = index.groups or index.ids
    names = sorted(set(units))
    rows_of = {name: [row for row, unit in enumerate(units) if unit == name] for name in names}
    waiting = [names[k] for k in np.random.default_rng(FOLD_SEED).permutation(len(names))]
    folds: list[list[str]] = [[] for _ in range(count)]

    def images(units: list[str], label: object = None) -> int:
        return sum(label is None or label in members[row] for name in units for row in rows_of[name])

    while waiting:
        labels = sorted({label for name in waiting for row in rows_of[name] for label in members[row]}, key=str)
        rarest = min(labels, key=lambda label: images(waiting, label))
        for name in [name for name in waiting if images([name], rarest)]:
            shares = Fraction(images(names, rarest), count), Fraction(sum(map(len, members)), count)
            held = [
                (images(fold, rarest), sum(len(members[row]) for one in fold for row in rows_of[one])) for fold in folds
            ]
            best = max(
                range(count),
                key=lambda k, held=held, shares=shares: (shares[0] - held[k][0], shares[1] - held[k][1], -k),
            )
            folds[best].append(name)
            waiting.remove(name)
    number = {name: k for k, fold in enumerate(folds, 1) for name in fold}
    return [number[unit] for unit in units]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", ["images", "patients", "labels", "labels of patients"])
def test_folds_are_those_of_the_slow_rule(kind: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    count, n = int(rng.integers(2, 5)), 60
    labels = (rng.random((n, 3)) < 0.4).astype(int) if "labels" in kind else np.arange(n) % 7 % 3
    index = an_index(labels, rng.integers(0, 25, n) if "patients" in kind else ())
    folds = fold_by_row(index, count)
    assert folds.tolist() == slow_folds(index, count)
    for patient in set(index.groups):
        assert len({fold for fold, other in zip(folds, index.groups) if other == patient}) == 1


@pytest.mark.parametrize("count", [2, 5, 10])
def test_single_images_are_spread_evenly(count: int) -> None:
    index = an_index(np.repeat([0, 1, 2], (201, 57, 13)))
    folds = fold_by_row(index, count)
    counts = np.array([np.bincount(index.labels[folds == k], minlength=3) for k in range(1, count + 1)])
    assert (np.ptp(counts, axis=0) <= 1).all() and np.ptp(counts.sum(axis=1)) <= 1


def test_folds_do_not_depend_on_the_order_of_the_images() -> None:
    index = an_index(np.arange(30) % 3)
    other = index.subset(np.random.default_rng(0).permutation(30).tolist())
    assert {*fold_of(index, 3, 2)[1].ids} == {*fold_of(other, 3, 2)[1].ids}


@pytest.mark.parametrize("labels", [[0, 0, 0, 1, 1, 1, 2, 2], [0, 0, 0, 1, 1, 1]], ids=["too few", "none"])
def test_a_class_with_too_few_images(labels: list[int]) -> None:
    message = rf"own: not each of 3 folds has images of every class\n  c: {labels.count(2)} image\(s\)\n"
    with pytest.raises(DataError, match=message):
        fold_of(an_index(np.array(labels)), 3, 1)


def test_a_class_with_too_few_patients() -> None:
    with pytest.raises(
        DataError, match=r"c: 4 image\(s\) of 2 patient\(s\)\n  expected   images of 3 or more patients"
    ):
        fold_of(an_index(np.array([0] * 9 + [1] * 9 + [2] * 4), [*range(18), 18, 18, 19, 19]), 3, 1)


@pytest.mark.parametrize(
    "changes", [{"folds": 1, "fold": 1}, {"folds": 3}, {"folds": 3, "fold": 4}, {"fold": 1}, {"folds": 101, "fold": 1}]
)
def test_faulty_fields(changes: dict) -> None:
    with pytest.raises(RecipeError, match="fold"):
        recipe(**changes)


def test_wrong_numbers_of_folds(capsys: pytest.CaptureFixture[str]) -> None:
    for count in ("1", "0", "-1", "101"):
        with pytest.raises(SystemExit):
            command.main(["--dataset", "palm", "--folds", count])
        assert "--folds is 2 to 100" in capsys.readouterr().err


# --- training --------------------------------------------------------------------------------------


def go(root: Path, output: Path, **changes: object) -> CrossValidation:
    options = Options("cpu", 0, image_cache="off", say=lambda line: None)
    return train_folds(
        recipe(**{"epochs": 2, "lr": 0.05, "test_flips": True, "flip": 0.5, **changes}), 3, root, output, options
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training images alone: a cross-validation must not need the official validation images."""
    root = palm_tree(tmp_path_factory.mktemp("data"))
    shutil.rmtree(root / "PALM-Validation400")
    (root / "labels.csv").unlink()
    return root


@pytest.fixture(scope="module")
def done(data: Path, tmp_path_factory: pytest.TempPathFactory) -> CrossValidation:
    return go(data, tmp_path_factory.mktemp("folds") / "cv")


def test_out_of_fold_predictions(done: CrossValidation, data: Path) -> None:
    """Every training image once, as the model of its fold predicted it."""
    index = load_index("palm", data, "train")
    with open(done.directory / "predictions_val.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == list(index.ids)
    assert list(rows[0]) == ["id", "label", "predicted", *index.classes, "fold"]
    for number, run in enumerate(done.runs, 1):
        assert json.loads((run.directory / "recipe.json").read_text())["fold"] == number
        own = read_predictions(run.directory)
        assert own.ids == [row["id"] for row in rows if row["fold"] == str(number)]
        for name, probs in zip(own.ids, own.probs):
            row = next(row for row in rows if row["id"] == name)
            assert [float(row[one]) for one in index.classes] == probs.tolist()
    found = read_predictions(done.directory)
    assert found.classes == index.classes and found.labels.tolist() == index.labels.tolist()


def test_the_metrics_are_of_all_images(done: CrossValidation) -> None:
    found, metrics = read_predictions(done.directory), done.metrics
    assert metrics["n"] == 12 and metrics["split"] == "out-of-fold"
    assert metrics["accuracy"] == (found.guesses == found.labels).mean()
    assert metrics["auc"] == pytest.approx(float(auc(found.probs, found.labels, "binary")))
    right = found.probs[np.arange(12), found.labels]
    assert metrics["loss"] == pytest.approx(-np.log(right).mean(), rel=1e-6)
    accuracies = [json.loads((run.directory / "metrics.json").read_text())["accuracy"] for run in done.runs]
    assert [row["accuracy"] for row in metrics["folds"]] == accuracies
    assert metrics["mean"]["accuracy"] == pytest.approx(statistics.mean(accuracies))
    assert metrics["sd"]["accuracy"] == pytest.approx(statistics.stdev(accuracies))
    low, high = metrics["intervals"]["accuracy"]
    assert low < metrics["accuracy"] <= high
    assert f"{metrics['mean']['auc']:.4f} ± {metrics['sd']['auc']:.4f}" in done.table()
    assert json.loads((done.directory / "metrics.json").read_text())["mean"] == metrics["mean"]


def test_what_the_folds_choose_is_what_a_training_uses(done: CrossValidation, data: Path, tmp_path: Path) -> None:
    """Temperature and threshold of the recipe are the finished model's, and folds of such a recipe choose anew."""
    found = read_predictions(done.directory)
    margins = np.log(found.probs[:, 1]) - np.log(found.probs[:, 0])
    temperature, threshold = fit_logistic(margins, found.labels)
    chosen = done.metrics["chosen"]
    assert chosen == {"temperature": pytest.approx(temperature), "threshold": pytest.approx(threshold)}
    assert f"--set temperature={temperature:.4f} threshold={threshold:.4f}" in done.table()
    run = train(
        recipe(epochs=1, folds=3, fold=1, **chosen), data, tmp_path / "run", Options("cpu", 0, image_cache="off")
    )
    sidecar = Sidecar.read(sidecar_of(run.weights))
    assert (sidecar.temperature, sidecar.threshold) == tuple(chosen.values())
    guesses = read_predictions(run.directory)
    assert (guesses.guesses == (guesses.probs[:, 1] > threshold)).all()
    assert f"temperature {temperature:.4f}, the recipe's" in (run.directory / "README.md").read_text()
    assert go(data, done.directory, **chosen).metrics == done.metrics


def test_more_classes_have_a_temperature_alone() -> None:
    rng = np.random.default_rng(0)
    head = OutputHead("multi-class", "softmax", CLASSES)
    logits, labels = rng.normal(size=(60, 3)), rng.integers(0, 3, 60)
    assert choice(head.probabilities(logits), labels, head) == {
        "temperature": pytest.approx(fit_temperature(logits, labels, "softmax"), rel=1e-6)
    }


def test_finished_folds_are_not_run_again(done: CrossValidation, data: Path) -> None:
    def stamps() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in done.directory.glob("fold*/**/*") if path.is_file()}

    before, metrics = stamps(), (done.directory / "metrics.json").read_bytes()
    again = go(data, done.directory)
    assert stamps() == before and (done.directory / "metrics.json").read_bytes() == metrics
    assert [run.history for run in again.runs] == [run.history for run in done.runs]


@pytest.mark.parametrize("step", [1, 5, 9])
def test_an_interrupted_cross_validation_is_resumed_to_the_bit(
    step: int, done: CrossValidation, data: Path, tmp_path: Path
) -> None:
    steps = iter(range(1, 100))
    toynet.ON_STEP.append(lambda: os.kill(os.getpid(), signal.SIGINT) if next(steps) == step else None)
    output = tmp_path / "cv"
    with pytest.raises(Stopped, match=rf"interrupted in fold {(step + 3) // 4} of 3; .* --resume {output}$"):
        go(data, output)
    toynet.ON_STEP.clear()
    assert not (output / "metrics.json").exists()
    go(data, output)
    for number in (1, 2, 3):
        assert_same(done.directory / f"fold{number}", output / f"fold{number}")
    for name in ("metrics.json", "predictions_val.csv"):
        assert sha256(output / name) == sha256(done.directory / name)


def test_the_command_and_its_resume(
    done: CrossValidation, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--folds` as a user gives it; `--resume DIR` needs nothing else."""
    (tmp_path / "r.json").write_text(json.dumps(recipe(epochs=1, lr=0.05).to_json()))
    options = ["--recipe", str(tmp_path / "r.json"), "--data-root", str(data), "--folds", "2", "--device", "cpu"]
    options += ["--workers", "0", "--image-cache", "off"]
    steps = iter(range(1, 100))
    toynet.ON_STEP.append(lambda: os.kill(os.getpid(), signal.SIGINT) if next(steps) == 3 else None)
    assert command.main([*options, "--output", str(tmp_path / "cv")]) == 1
    toynet.ON_STEP.clear()
    assert f"--resume {tmp_path / 'cv'}" in capsys.readouterr().err
    assert command.main(["--resume", str(tmp_path / "cv"), "--workers", "0"]) == 0
    out = capsys.readouterr().out
    assert "out-of-fold: 12 images" in out and "mean ± sd" in out and "published" not in out
    assert "best epoch of each fold by accuracy on the fold's own images" in out
    assert command.main([*options, "--output", str(tmp_path / "other")]) == 0
    names = ["metrics.json", "predictions_val.csv", "fold1/PALM.pdparams", "fold2/PALM.pdparams"]
    assert [name for name in names if sha256(tmp_path / "cv" / name) != sha256(tmp_path / "other" / name)] == []


def test_own_images(tmp_path: Path) -> None:
    """All images but a given test split; each fold's list has the fold as its validation split."""
    for label, level in (("a", 60), ("b", 190)):
        for number in range(6):
            write_image(tmp_path / "data" / label / f"{number}.png", pixels(level + number, level))
    images = own_images(tmp_path / "data")
    images = replace(
        images, splits=tuple("test" if path.endswith("5.png") else "train" for path in images.paths), made=()
    )
    options = Options("cpu", 0, image_cache="off", say=lambda line: None)
    result = train_folds(recipe("folder", epochs=1), 2, images, tmp_path / "cv", options)
    lists = [read_image_list(run.directory / "images.csv") for run in result.runs]
    for one in lists:
        assert Counter(one.splits)["test"] == 2 and 4 <= Counter(one.splits)["val"] <= 6
    found = read_predictions(result.directory)
    assert sorted(found.ids) == sorted(path for path in images.paths if not path.endswith("5.png"))
    for run, one in zip(result.runs, lists):
        assert read_predictions(run.directory).ids == list(one.index("val").ids)
    again = train_folds(
        recipe("folder", epochs=1), 2, tmp_path / "cv" / "fold1" / "images.csv", tmp_path / "again", options
    )
    assert again.metrics == result.metrics  # the list of a fold gives the same folds


@pytest.mark.pictures
def test_the_curves_of_all_folds(done: CrossValidation, data: Path, tmp_path: Path) -> None:
    shutil.copytree(done.directory, tmp_path / "cv")
    (tmp_path / "cv" / "metrics.json").unlink()
    go(data, tmp_path / "cv")
    for name in ("curves.png", "confusion_val.png", "roc_val.png"):
        assert (tmp_path / "cv" / name).read_bytes().startswith(b"\x89PNG")


def test_other_recipes_and_runs_are_refused(done: CrossValidation, data: Path) -> None:
    with pytest.raises(RunError, match=r"fold1 was run with another recipe\n  lr: 0.05 -> 0.5"):
        go(data, done.directory, lr=0.5)
    with pytest.raises(RunError, match="already holds a run"):
        go(data, done.runs[0].directory)


def test_changed_images_are_refused(done: CrossValidation, data: Path, tmp_path: Path) -> None:
    root = shutil.copytree(data, tmp_path / "data")
    (root / "PALM-Training400" / "P0001.jpg").rename(root / "PALM-Training400" / "N0009.jpg")
    with pytest.raises(DataError, match="other images or labels than those in the data root now"):
        go(root, shutil.copytree(done.directory, tmp_path / "cv"))
    root = shutil.copytree(data, tmp_path / "more")
    shutil.copy(root / "PALM-Training400" / "P0001.jpg", root / "PALM-Training400" / "P0009.jpg")
    with pytest.raises(DataError, match=r"1 training image\(s\) are in no fold"):
        go(root, tmp_path / "cv")


# --- the last epoch --------------------------------------------------------------------------------


def test_the_last_epoch_is_kept(data: Path, tmp_path: Path) -> None:
    """`monitor=last` keeps the last epoch's weights, whatever validation says, and the model card says so."""
    options = Options("cpu", 0, image_cache="off", say=lambda line: None)
    last, best = (
        train(recipe(folds=3, fold=2, lr=0.3, epochs=3, monitor=name), data, tmp_path / name, options)
        for name in ("last", "accuracy")
    )
    accuracies = [row["val_accuracy"] for row in best.history]
    assert last.history == best.history and best.metrics["epoch"] == accuracies.index(max(accuracies)) + 1 < 3
    assert last.metrics["epoch"] == 3
    text = (last.directory / "README.md").read_text()
    assert "the last epoch, chosen on no images, is kept: 3" in text and "also chose the epoch" not in text
    assert "images of fold 2 of the training images." in text
    assert "which also chose the epoch: these results are optimistic" in (best.directory / "README.md").read_text()


def test_the_last_epoch_and_patience_exclude_each_other() -> None:
    with pytest.raises(RecipeError, match="patience: 3; expected 0 with monitor=last"):
        recipe(monitor="last", patience=3)
