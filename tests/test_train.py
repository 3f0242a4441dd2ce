"""The training loop: what it writes, that it repeats and resumes to the bit, and how it stops."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import fakes
import numpy as np
import pytest
import toynet
from fakes import pixels, recipe, write_image

from paddle_medcls.cli import eval as eval_command
from paddle_medcls.core import files
from paddle_medcls.core.errors import DataError, MedclsError, RecipeError, RunError, SetupError
from paddle_medcls.core.files import sha256
from paddle_medcls.data.datasets import load_index
from paddle_medcls.deployment.predictor import Predictor
from paddle_medcls.models.weights import read_weights
from paddle_medcls.recipes.recipe import Recipe
from paddle_medcls.training import run_directory
from paddle_medcls.training.checkpoint import load_state
from paddle_medcls.training.loop import Options, train
from paddle_medcls.training.session import start_session

PLAIN = {"model": "toy", "epochs": 3, "lr": 0.05}
RICH = {
    **PLAIN,
    "optimizer": "adam",
    "lr": 0.01,
    "weight_decay": 0.01,
    "warmup_epochs": 1.0,
    "flip": 0.5,
    "rotate_degrees": 20.0,
    "brightness": 0.2,
    "ema_decay": 0.9,
    "test_flips": True,
    "label_smoothing": 0.05,
    "monitor": "loss",
    "seed": 7,
}


@pytest.fixture(autouse=True)
def no_calls_left() -> object:
    yield
    toynet.ON_STEP.clear()


def go(root: Path, run_dir: Path, resume: bool = False, workers: int = 0, force: bool = False, **changes) -> dict:
    """Trains a toy recipe; a resume takes the run's own recipe, as the command does."""
    dataset = "covid" if (root / "train.txt").exists() else "palm"
    own = Recipe.from_file(run_dir / "recipe.json") if resume else recipe(dataset, **changes)
    go.said = []
    options = Options("cpu", workers, image_cache="off", force=force, say=go.said.append)
    return train(own, root, run_dir, options, resume).metrics


def outcome(run_dir: Path, weights: str = "PALM.pdparams") -> dict:
    """All of a run that must be the same to the bit."""
    groups, scalars = load_state(run_dir)
    flat: dict[str, object] = {"scalars": scalars}

    def flatten(prefix: str, value: object) -> None:
        if isinstance(value, dict):
            for key, child in value.items():
                flatten(f"{prefix}/{key}", child)
        else:
            flat[prefix] = (value.dtype.str, value.shape, value.tobytes()) if isinstance(value, np.ndarray) else value

    flatten("state", groups)
    files = ("history.csv", "steps.csv", "metrics.json", "predictions_val.csv", weights, "recipe.json")
    flat |= {name: (run_dir / name).read_bytes() for name in files}
    return flat


def table(path: Path) -> list[list[str]]:
    return list(csv.reader(path.read_text().splitlines()))


def records(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def assert_same(first: Path, second: Path) -> None:
    one, two = outcome(first), outcome(second)
    assert one.keys() == two.keys()
    assert [name for name in one if one[name] != two[name]] == []


# --- what a run writes -----------------------------------------------------------------------------


@pytest.mark.pictures
@pytest.mark.parametrize("dataset", ["palm", "covid"])
def test_the_run_directory(dataset: str, palm_root: Path, covid_root: Path, tmp_path: Path) -> None:
    """Every file of the contract; PALM's from a ResNet."""
    root, name = (palm_root, "PALM") if dataset == "palm" else (covid_root, "COVID")
    run_dir = tmp_path / "run"
    changes = (
        {"model": "toy_resnet"}
        if dataset == "palm"
        else {"statistics": "train", "resize_dtype": "float32", "channels": "bgr"}
    )
    result = go(root, run_dir, workers=2, epochs=2, **changes)

    files = {path.relative_to(run_dir).as_posix() for path in run_dir.rglob("*") if path.is_file()}
    assert files == {
        f"{name}.pdparams",
        f"{name}.json",
        "last/state.safetensors",
        "recipe.json",
        "data.json",
        "environment.json",
        "history.csv",
        "steps.csv",
        "timing.csv",
        "metrics.json",
        "README.md",
        "predictions_val.csv",
        "curves.png",
        "confusion_val.png",
        "roc_val.png",
        "risk_coverage_val.png",
        f"{name}.novelty.safetensors",
    }
    for picture in ("curves.png", "confusion_val.png", "roc_val.png"):
        assert (run_dir / picture).read_bytes().startswith(b"\x89PNG")

    metrics = json.loads((run_dir / "metrics.json").read_text())
    assert {"split", "n", "loss", "accuracy", "auc", "per_class", "confusion", "intervals"} <= metrics.keys()
    val = load_index(dataset, root, "val")
    assert (metrics["split"], metrics["n"]) == ("val", len(val)) and metrics["accuracy"] == result["accuracy"]
    assert set(metrics["intervals"]) == {"accuracy", "auc"}
    low, high = metrics["intervals"]["accuracy"]
    assert 0 <= low <= metrics["accuracy"] <= high <= 1
    assert [row["class"] for row in metrics["per_class"]] == list(val.classes)
    assert {"precision", "recall", "f1", "support"} <= metrics["per_class"][0].keys()
    assert np.sum(metrics["confusion"], axis=1).tolist() == [row["support"] for row in metrics["per_class"]]

    history = records(run_dir / "history.csv")
    columns = ["epoch", "step", "lr", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "val_auc"]
    assert list(history[0]) == columns and [row["epoch"] for row in history] == ["1", "2"]
    steps = records(run_dir / "steps.csv")
    per_epoch = -(-len(load_index(dataset, root, "train")) // 5)
    assert [int(row["step"]) for row in steps] == list(range(2 * per_epoch))
    assert records(run_dir / "timing.csv")[1]["epoch"] == "2"

    rows = table(run_dir / "predictions_val.csv")
    assert rows[0] == ["id", "label", "predicted", *val.classes]
    assert [row[0] for row in rows[1:]] == list(val.ids) and [int(row[1]) for row in rows[1:]] == val.labels.tolist()
    for row in rows[1:]:
        assert sum(map(float, row[3:])) == pytest.approx(1, abs=1e-6)
    guesses = [int(row[2]) for row in rows[1:]]
    assert np.mean(np.array(guesses) == val.labels) == pytest.approx(metrics["accuracy"])

    sidecar = json.loads((run_dir / f"{name}.json").read_text())
    assert sidecar["sha256"] == sha256(run_dir / f"{name}.pdparams") and sidecar["classes"] == list(val.classes)
    own = Recipe.from_file(run_dir / "recipe.json")
    assert own.name == "toy" and sidecar["preprocessing"]["mean"] == list(own.preprocessing.mean)
    if dataset == "covid":  # the figures of the training list, not the recipe's constants
        facts = json.loads((run_dir / "data.json").read_text())
        assert list(own.preprocessing.mean) == facts["train"]["per_image"]["mean"] != [127.5] * 3
    environment = json.loads((run_dir / "environment.json").read_text())
    assert environment["threads"] == 1 and {"paddle", "numpy", "python", "code", "device"} <= environment.keys()


def test_the_kept_weights_are_the_best_epochs(palm_root: Path, tmp_path: Path) -> None:
    result = go(palm_root, tmp_path / "run", **{**RICH, "epochs": 5, "test_flips": False, "lr": 0.05})
    history = records(tmp_path / "run" / "history.csv")
    losses = [float(row["val_loss"]) for row in history]
    best = int(np.argmin(losses))
    assert result["epoch"] == best + 1
    assert result["loss"] == pytest.approx(losses[best], rel=1e-6)
    assert result["auc"] == pytest.approx(float(history[best]["val_auc"]))


def test_the_weights_alone_give_the_same_figures(palm_root: Path, tmp_path: Path) -> None:
    """Through the door of eval and predict, flips and all."""
    go(palm_root, tmp_path / "run", **RICH)
    predictor = Predictor.from_weights(tmp_path / "run" / "PALM.pdparams")
    assert predictor.sidecar.flips == ("flip",)
    val = load_index("palm", palm_root, "val")
    probs = predictor.head.probabilities(predictor.split_logits(val, 3, 1))
    rows = table(tmp_path / "run" / "predictions_val.csv")[1:]
    np.testing.assert_allclose(probs, [[float(p) for p in row[3:]] for row in rows], atol=1e-6)
    for path, _, found in predictor.predict_decoded(val.images[:3], batch_size=2):
        np.testing.assert_allclose(list(found.probabilities.values()), probs[val.images.index(path)], atol=1e-6)


def test_bright_and_dark_images_are_learned(palm_root: Path, tmp_path: Path) -> None:
    result = go(palm_root, tmp_path / "run", **{**PLAIN, "epochs": 12, "monitor": "loss"})
    assert result["accuracy"] == 1 and result["auc"] == 1 and result["loss"] < 0.3


def test_three_classes_with_balanced_weights(tmp_path: Path) -> None:
    root = fakes.palm_tree(tmp_path / "palm", pathologic=10, normal=10, myopic=5)
    three = {"labels": "three", "loss": "softmax", "class_weights": "balanced"}
    result = go(root, tmp_path / "run", **PLAIN, **three)
    assert [row["support"] for row in result["per_class"]] == [2, 1, 2]
    assert all(row["class"] in ("normal", "high myopia", "pathologic") for row in result["per_class"])


def test_a_loss_that_does_not_fit_the_task(covid_root: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="loss=sigmoid does not fit a multi-class task"):
        go(covid_root, tmp_path / "run", **PLAIN, loss="sigmoid")


def test_resume_refuses_images_that_have_changed_under_the_same_names(palm_root: Path, tmp_path: Path) -> None:
    go(palm_root, tmp_path / "run", **PLAIN)
    path = palm_root / "PALM-Training400" / "P0001.jpg"
    path.write_bytes((path.parent / "N0001.jpg").read_bytes())
    with pytest.raises(RunError, match="train images: other pixels under the same names"):
        go(palm_root, tmp_path / "run", resume=True, **PLAIN)


def test_resume_clears_what_a_killed_save_left(palm_root: Path, tmp_path: Path) -> None:
    go(palm_root, tmp_path / "run", **PLAIN)
    run = tmp_path / "run"
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    left = [run / "last" / ".state.safetensors.abc123.safetensors"]  # of version 0.1
    mark = files._MACHINE
    left += [run / place / f".medcls-{mark}-{int(dead.stdout)}-x.csv" for place in ("last", ".")]
    for file in left:
        file.write_bytes(b"half a file")
    go(palm_root, run, resume=True, **PLAIN)
    assert not any(file.exists() for file in left)


def test_the_reading_of_the_labels_travels_with_the_weights(tmp_path: Path) -> None:
    """`--set labels=three` on another recipe: evaluation reads the same validation images again."""
    root = fakes.palm_tree(tmp_path / "palm", pathologic=10, normal=10, myopic=10)
    go(root, tmp_path / "run", **PLAIN, labels="three", loss="softmax")
    assert json.loads((tmp_path / "run" / "PALM.json").read_text())["labels"] == "three"
    arguments = ["--weights", str(tmp_path / "run" / "PALM.pdparams"), "--output", str(tmp_path / "out")]
    assert eval_command.main(arguments) == 0
    again, first = (json.loads((tmp_path / k / "metrics.json").read_text()) for k in ("out", "run"))
    assert again["n"] == first["n"] == 6 and again["loss"] == pytest.approx(first["loss"])


# --- the same bits ---------------------------------------------------------------------------------


def test_two_runs_are_the_same_with_any_number_of_workers(palm_root: Path, tmp_path: Path) -> None:
    for workers in (0, 1, 2):
        go(palm_root, tmp_path / f"run{workers}", workers=workers, **RICH)
    assert_same(tmp_path / "run0", tmp_path / "run1")
    assert_same(tmp_path / "run0", tmp_path / "run2")


def test_another_seed_is_another_run(palm_root: Path, tmp_path: Path) -> None:
    """So that the tests above can fail."""
    go(palm_root, tmp_path / "a", **RICH)
    go(palm_root, tmp_path / "b", **{**RICH, "seed": 8})
    one, two = outcome(tmp_path / "a"), outcome(tmp_path / "b")
    assert one["steps.csv"] != two["steps.csv"] and one["PALM.pdparams"] != two["PALM.pdparams"]


class StopAfter:
    """Sends a signal in the training step of this number."""

    def __init__(self, step: int, number: int = signal.SIGINT, times: int = 1) -> None:
        self.left, self.number, self.times = step, number, times

    def __call__(self) -> None:
        self.left -= 1
        if self.left == 0:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)


def interrupted(root: Path, run_dir: Path, step: int, resume: bool = False, **changes) -> None:
    toynet.ON_STEP[:] = [StopAfter(step)]
    with pytest.raises(RunError, match="interrupted; state saved in") as caught:
        go(root, run_dir, resume, **changes)
    assert f"--resume {run_dir}" in str(caught.value)
    toynet.ON_STEP.clear()


@pytest.mark.parametrize("changes", [PLAIN, RICH], ids=["plain", "rich"])
def test_interrupted_anywhere_and_resumed(changes: dict, palm_root: Path, tmp_path: Path) -> None:
    """Three batches an epoch, three epochs: the first step, inside epochs, at their ends, the last step."""
    go(palm_root, tmp_path / "whole", **changes)
    for step in (1, 2, 3, 5, 7, 9):
        run_dir = tmp_path / f"stopped{step}"
        interrupted(palm_root, run_dir, step, workers=step % 3, **changes)
        assert len(load_state(run_dir)[0]["steps"]["table"]) == step
        go(palm_root, run_dir, resume=True, workers=2 - step % 3)
        assert f"resumed after {step // 3 if step % 3 else step // 3 - 1} of 3 epochs" in " ".join(go.said)
        assert_same(tmp_path / "whole", run_dir)


def test_interrupted_again_and_again(palm_root: Path, tmp_path: Path) -> None:
    go(palm_root, tmp_path / "whole", **RICH)
    interrupted(palm_root, tmp_path / "run", 2, **RICH)
    for _ in range(3):
        interrupted(palm_root, tmp_path / "run", 2, resume=True)
    go(palm_root, tmp_path / "run", resume=True)
    assert_same(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize("changes", [PLAIN, RICH], ids=["plain", "rich"])
def test_stopped_twice_without_a_step_between(changes: dict, palm_root: Path, tmp_path: Path) -> None:
    """After the last batch of an epoch, and after its validation: the optimizer must be saved unused."""
    go(palm_root, tmp_path / "whole", **changes)
    run_dir = tmp_path / "run"
    interrupted(palm_root, run_dir, 3, **changes)
    toynet.ON_STEP[:] = [lambda: pytest.fail("a step was trained")]
    own = Recipe.from_file(run_dir / "recipe.json")

    def say(line: str) -> None:
        if line.startswith("epoch   1/3"):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(RunError, match="interrupted"):
        train(own, palm_root, run_dir, Options("cpu", 0, say=say), resume=True)
    toynet.ON_STEP.clear()
    go(palm_root, run_dir, resume=True)
    assert_same(tmp_path / "whole", run_dir)


@pytest.mark.parametrize("changes", [PLAIN, RICH], ids=["plain", "rich"])
def test_stopped_between_epochs_and_resumed(changes: dict, palm_root: Path, tmp_path: Path) -> None:
    """4 epochs = 2 + resumed 2; Ctrl-C comes with the line of the second epoch."""
    changes = {**changes, "epochs": 4}
    go(palm_root, tmp_path / "whole", **changes)

    def say(line: str) -> None:
        if line.startswith("epoch   2/4"):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(RunError, match="interrupted"):
        train(recipe(**changes), palm_root, tmp_path / "run", Options("cpu", 0, say=say))
    assert len(table(tmp_path / "run" / "history.csv")) == 3
    go(palm_root, tmp_path / "run", resume=True)
    assert_same(tmp_path / "whole", tmp_path / "run")


def test_sigterm_saves_too(palm_root: Path, tmp_path: Path) -> None:
    toynet.ON_STEP[:] = [StopAfter(4, signal.SIGTERM)]
    with pytest.raises(RunError, match="interrupted"):
        go(palm_root, tmp_path / "run", **PLAIN)
    assert load_state(tmp_path / "run")[1]["batch"] == 1


def test_a_second_ctrl_c_stops_at_once_and_handlers_come_back(palm_root: Path, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    toynet.ON_STEP[:] = [StopAfter(2, times=2)]
    with pytest.raises(KeyboardInterrupt):
        go(palm_root, tmp_path / "run", **PLAIN)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert not (tmp_path / "run" / "last").exists()


def test_resuming_a_finished_run_changes_nothing(palm_root: Path, tmp_path: Path) -> None:
    go(palm_root, tmp_path / "run", **RICH)
    before = outcome(tmp_path / "run")
    go(palm_root, tmp_path / "run", resume=True)
    assert outcome(tmp_path / "run") == before


def test_covid_with_its_own_statistics_resumes(covid_root: Path, tmp_path: Path) -> None:
    changes = {**PLAIN, "statistics": "train", "batch_size": 3}
    go(covid_root, tmp_path / "whole", **changes)
    interrupted(covid_root, tmp_path / "run", 4, **changes)
    go(covid_root, tmp_path / "run", resume=True)
    one, two = (outcome(tmp_path / name, "COVID.pdparams") for name in ("whole", "run"))
    assert [name for name in one if one[name] != two[name]] == []


# --- killed ----------------------------------------------------------------------------------------


def kill_and_resume(root: Path, tmp_path: Path, kills: int, seed: int) -> None:
    """Kills a training process at random moments, resumes it each time, and compares with a whole run."""
    changes = {**RICH, "epochs": 6}
    go(root, tmp_path / "whole", **changes)
    run_dir = tmp_path / "run"
    recipe_file = tmp_path / "recipe.json"
    recipe_file.write_text(json.dumps(recipe(**changes).to_json()))
    draw = random.Random(seed)
    state = run_dir / "last" / "state.safetensors"
    environment = {**os.environ, "TOY_SECONDS_PER_STEP": "0.1"}
    for _ in range(kills):
        first = not state.exists()
        source = recipe_file if first else run_dir / "recipe.json"
        command = [
            sys.executable,
            toynet.__file__,
            str(source),
            str(root),
            str(run_dir),
            *([] if first else ["resume"]),
        ]
        mark = state.stat().st_mtime_ns if not first else 0
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        try:
            deadline = time.monotonic() + 300
            while not state.exists() or state.stat().st_mtime_ns == mark:  # one more save, then any moment
                assert time.monotonic() < deadline, "no state was saved"
                if process.poll() is not None:
                    assert process.returncode == 0, process.stderr.read()
                    break
                time.sleep(0.01)
            time.sleep(draw.uniform(0, 1.0))
        finally:
            process.kill()
            process.wait()
            process.stderr.close()
    go(root, run_dir, resume=True)
    assert_same(tmp_path / "whole", run_dir)


def test_killed_and_resumed(palm_root: Path, tmp_path: Path) -> None:
    kill_and_resume(palm_root, tmp_path, kills=1, seed=1)


MOMENTS = [("step", number) for number in (1, 2, 4, 6, 9)]  # of nine; about 33 files are written:
MOMENTS += [("half", number) for number in (7, 8, 14, 20, 29)]  # 5 to 7: what the run is; 8: the first weights
MOMENTS += [("whole", number) for number in (6, 11, 14, 27, 32)]  # 14, 20, 27: the state, at the end of each epoch
MOMENTS += [("renamed", number) for number in (5, 8, 14, 19, 28)]  # from 28: results of the finished run


@pytest.mark.slow
@pytest.mark.parametrize("moment, number", MOMENTS)
def test_killed_at_twenty_moments(moment: str, number: int, palm_root: Path, tmp_path: Path) -> None:
    """Before a step, with a file half or wholly written beside its target, or just in place; see `toynet.kill_at`."""
    go(palm_root, tmp_path / "whole", **RICH)
    (tmp_path / "recipe.json").write_text(json.dumps(recipe(**RICH).to_json()))
    run_dir = tmp_path / "run"
    command = [sys.executable, toynet.__file__, str(tmp_path / "recipe.json"), str(palm_root), str(run_dir)]
    environment = {**os.environ, "TOY_KILL": f"{moment} {number}"}
    killed = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    saved = (run_dir / "last" / "state.safetensors").exists()
    left = set(run_dir.rglob(".medcls-*"))
    assert len(left) == (moment in ("half", "whole"))
    go(palm_root, run_dir, resume=saved, **({} if saved else RICH))
    assert_same(tmp_path / "whole", run_dir)
    assert not set(run_dir.rglob(".medcls-*"))


def test_killed_while_saving(palm_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A save that dies half-way leaves the state before it, and the run goes on from there."""
    import safetensors.numpy

    go(palm_root, tmp_path / "whole", **RICH)
    whole, saves = safetensors.numpy.save_file, []

    def dies(arrays: dict, path: str, metadata: dict) -> None:
        saves.append(path)
        if len(saves) == 2:
            Path(path).write_bytes(b"half of a sta")
            raise KeyboardInterrupt  # nothing after this line runs, as nothing runs after a kill
        whole(arrays, path, metadata=metadata)

    monkeypatch.setattr(safetensors.numpy, "save_file", dies)
    with pytest.raises(KeyboardInterrupt):
        go(palm_root, tmp_path / "run", **RICH)
    assert load_state(tmp_path / "run")[1]["epoch"] == 1
    go(palm_root, tmp_path / "run", resume=True)
    assert_same(tmp_path / "whole", tmp_path / "run")


# --- what stops a run ------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_with_its_step(palm_root: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"the loss is (nan|inf) at step [1-5], epoch [12]") as caught:
        go(palm_root, tmp_path / "run", **{**PLAIN, "lr": 1e30, "schedule": "constant"})
    assert "--lr" in str(caught.value) and "rows " in str(caught.value)


def test_unreadable_images_stop_before_the_first_step(palm_root: Path, tmp_path: Path) -> None:
    train_folder = palm_root / "PALM-Training400"
    (train_folder / "N0001.jpg").write_bytes(b"<html>")
    (train_folder / "P0003.jpg").write_bytes((train_folder / "P0003.jpg").read_bytes()[:300])
    toynet.ON_STEP[:] = [lambda: pytest.fail("a step was trained")]
    with pytest.raises(DataError, match="2 of 12 train image") as caught:
        go(palm_root, tmp_path / "run", **PLAIN)
    assert "N0001.jpg" in str(caught.value) and "P0003.jpg" in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_an_unreadable_validation_image_stops_before_the_first_step(palm_root: Path, tmp_path: Path) -> None:
    (palm_root / "PALM-Validation400" / "V0003.jpg").write_bytes(b"")
    toynet.ON_STEP[:] = [lambda: pytest.fail("a step was trained")]
    with pytest.raises(DataError, match="V0003.jpg"):
        go(palm_root, tmp_path / "run", **PLAIN)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_goes_bad_during_the_run_stops_it(workers: int, palm_root: Path, tmp_path: Path) -> None:
    """Never replaced by another one, and no hang."""
    toynet.ON_STEP[:] = [lambda: (palm_root / "PALM-Training400" / "P0001.jpg").write_bytes(b"")]
    with pytest.raises(DataError, match="P0001.jpg: the file is empty"):
        go(palm_root, tmp_path / "run", workers=workers, **PLAIN)


def test_early_stopping(palm_root: Path, tmp_path: Path) -> None:
    """Accuracy cannot change at this learning rate: epoch 1 is the best, and two more are waited for."""
    changes = {**PLAIN, "lr": 1e-12, "epochs": 9, "patience": 2, "model": "toy_plain"}
    result = go(palm_root, tmp_path / "run", **changes)
    assert len(table(tmp_path / "run" / "history.csv")) == 1 + 3
    assert result["epoch"] == 1 and "stopped early" in go.said[-1]
    go(palm_root, tmp_path / "run", resume=True)
    assert len(table(tmp_path / "run" / "history.csv")) == 1 + 3


def test_a_monitor_that_is_not_defined_says_so(palm_root: Path, tmp_path: Path) -> None:
    """With one class in the validation list there is no AUC to choose an epoch by."""
    table = (palm_root / "labels.csv").read_text()
    (palm_root / "labels.csv").write_text(table.replace(".jpg,0,", ".jpg,1,"))
    with pytest.raises(RunError, match="auc is not defined"):
        go(palm_root, tmp_path / "run", **PLAIN, monitor="auc")
    assert go(palm_root, tmp_path / "run2", **PLAIN)["n"] == 7


# --- what cannot be resumed ------------------------------------------------------------------------


def test_changed_lists_are_refused(palm_root: Path, tmp_path: Path) -> None:
    interrupted(palm_root, tmp_path / "run", 2, **PLAIN)
    write_image(palm_root / "PALM-Training400" / "N0099.jpg", pixels(0))
    with pytest.raises(RunError, match="cannot resume .*: the run has changed") as caught:
        go(palm_root, tmp_path / "run", resume=True)
    assert "train split: 12 images then, 13 now" in str(caught.value) and "--force" in str(caught.value)
    assert go(palm_root, tmp_path / "run", resume=True, force=True)["n"] == 7


def test_changed_labels_are_refused(palm_root: Path, tmp_path: Path) -> None:
    interrupted(palm_root, tmp_path / "run", 2, **PLAIN)
    table = (palm_root / "labels.csv").read_text()
    (palm_root / "labels.csv").write_text(table.replace("V0001.jpg,1", "V0001.jpg,0"))
    with pytest.raises(RunError, match="val split: 7 images then, 7 now"):
        go(palm_root, tmp_path / "run", resume=True)


def test_another_version_is_refused(palm_root: Path, tmp_path: Path) -> None:
    interrupted(palm_root, tmp_path / "run", 2, **PLAIN)
    path = tmp_path / "run" / "environment.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "paddle": "1.8.5"}))
    with pytest.raises(RunError, match="paddle: 1.8.5 then"):
        go(palm_root, tmp_path / "run", resume=True)


def test_another_number_of_processes_is_refused(palm_root: Path, tmp_path: Path) -> None:
    """Batch norm and dropout would see other shares of a batch; --force allows it."""
    interrupted(palm_root, tmp_path / "run", 2, **PLAIN)
    path = tmp_path / "run" / "environment.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "processes": 4}))
    with pytest.raises(RunError, match="processes: 4 then, 1 now") as caught:
        go(palm_root, tmp_path / "run", resume=True)
    assert "--force" in str(caught.value)
    assert go(palm_root, tmp_path / "run", resume=True, force=True)["n"] == 7


@pytest.mark.parametrize("damage", ["gone", "truncated", "empty", "another file"])
def test_a_damaged_state_is_refused(damage: str, palm_root: Path, tmp_path: Path) -> None:
    interrupted(palm_root, tmp_path / "run", 2, **PLAIN)
    path = tmp_path / "run" / "last" / "state.safetensors"
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes({"truncated": path.read_bytes()[:-9], "empty": b"", "another file": b"<html>" * 9}[damage])
    with pytest.raises(RunError, match="nothing to resume|cannot be read"):
        go(palm_root, tmp_path / "run", resume=True)


def test_a_full_disk_leaves_the_state_before(palm_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors.numpy

    from paddle_medcls.core.errors import SetupError

    interrupted(palm_root, tmp_path / "run", 2, **PLAIN)
    before = (tmp_path / "run" / "last" / "state.safetensors").read_bytes()

    def full(arrays: dict, path: str, metadata: dict) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.numpy, "save_file", full)
        with pytest.raises(SetupError, match="No space left on device"):
            go(palm_root, tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "last" / "state.safetensors").read_bytes() == before
    assert [path.name for path in (tmp_path / "run" / "last").iterdir()] == ["state.safetensors"]
    go(palm_root, tmp_path / "run", resume=True)
    go(palm_root, tmp_path / "whole", **PLAIN)
    assert_same(tmp_path / "whole", tmp_path / "run")


def test_pretrained_weights_start_a_run(palm_root: Path, tmp_path: Path) -> None:
    go(palm_root, tmp_path / "a", model="resnet18", epochs=1, lr=1e-9)
    start = read_weights(tmp_path / "a" / "PALM.pdparams")
    changes = {
        "model": "resnet18",
        "epochs": 1,
        "lr": 1e-9,
        "seed": 5,
        "pretrained": str(tmp_path / "a" / "PALM.pdparams"),
    }
    go(palm_root, tmp_path / "b", **changes)
    assert any("pretrained: resnet18 (COVID-19 tutorial names)" in line for line in go.said)
    found = read_weights(tmp_path / "b" / "PALM.pdparams")
    np.testing.assert_allclose(found["fc.weight"], start["fc.weight"], atol=1e-6)
    np.testing.assert_allclose(found["conv.0.weight"], start["conv.0.weight"], atol=1e-6)


# --- what a resume keeps, and what it refuses ------------------------------------------------------


def changed(run_dir: Path, name: str, **values: object) -> None:
    """Changes values of a JSON file in a run directory; None removes one."""
    found = json.loads((run_dir / name).read_text()) | values
    (run_dir / name).write_text(json.dumps({key: value for key, value in found.items() if value is not None}))


@pytest.mark.parametrize(
    ("began", "options", "message"),
    [
        ({"amp": True}, {"amp": False}, "amp: True then, False now"),
        ({"amp": False}, {"amp": True}, "amp: False then, True now"),
        ({"deterministic": True}, {"deterministic": False}, "deterministic: True then, False now"),
        ({"device": "gpu:0"}, {"device": "cpu"}, "device: gpu then, cpu now"),
        ({"kernels": "paddle"}, {"kernels": "onednn"}, "kernels: paddle then, onednn now"),
        ({"kernels": "onednn f32"}, {"kernels": "paddle"}, "kernels: onednn then, paddle now"),
        ({"kernels": "onednn f32"}, {"precision": "bf16"}, "precision: f32 then, bf16 now"),
    ],
)
def test_other_settings_are_refused(began: dict, options: dict, message: str) -> None:
    environment = {"device": "cpu", "kernels": "paddle", "amp": False, "deterministic": False, **began}
    with pytest.raises(RunError, match="cannot be resumed with other settings") as caught:
        start_session(Options(**options), environment)
    assert message in str(caught.value) and "--force" in str(caught.value)


def test_a_resume_keeps_the_settings_it_began_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mixed precision, determinism, the kind of device, kernels and precision, without being asked."""
    monkeypatch.setattr("paddle_medcls.training.session.select_device", lambda name: {"gpu": "gpu:0"}.get(name, name))
    monkeypatch.setattr("paddle_medcls.training.session.configure_gpu", lambda deterministic, amp: None)
    environment = {"device": "gpu:0", "kernels": "paddle", "amp": True, "deterministic": True}
    session = start_session(Options(), environment)
    found = session.options
    assert (session.device, found.amp, found.deterministic, found.kernels) == ("gpu:0", True, True, "paddle")
    of_01 = {"device": "cpu", "kernels": "onednn f32"}  # version 0.1 did not write the others
    found = start_session(Options(), of_01).options
    assert (found.device, found.kernels, found.precision, found.amp) == ("cpu", "onednn", "f32", False)
    forced = start_session(Options(device="cpu", amp=False, force=True), environment).options
    assert (forced.device, forced.amp, forced.deterministic) == ("cpu", False, True)


def test_settings_are_written(palm_root: Path, tmp_path: Path) -> None:
    go(palm_root, tmp_path / "run", **PLAIN)
    found = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert (found["amp"], found["deterministic"], found["kernels"], found["overrides"]) == (False, False, "paddle", [])


def test_another_number_of_threads_is_said(palm_root: Path, tmp_path: Path) -> None:
    interrupted(palm_root, tmp_path / "run", 2, **PLAIN)
    changed(tmp_path / "run", "environment.json", threads=64)
    go(palm_root, tmp_path / "run", resume=True)
    assert any(line.startswith("threads: 64 then, 1 now") and "OMP_NUM_THREADS=64" in line for line in go.said)


def test_a_warm_up_of_version_01_before_steps_is_refused(palm_root: Path, tmp_path: Path) -> None:
    """It moved the decay points, and does no longer."""
    steps = {**PLAIN, "schedule": "step", "decay_epochs": (2.0,), "warmup_epochs": 1.0}
    interrupted(palm_root, tmp_path / "run", 2, **steps)
    go(palm_root, tmp_path / "run", resume=True)
    changed(tmp_path / "run", "environment.json", amp=None)
    with pytest.raises(RunError, match="in version 0.1 a warm-up delayed the decay points"):
        go(palm_root, tmp_path / "run", resume=True)
    go(palm_root, tmp_path / "run", resume=True, force=True)


def test_a_calibration_survives_the_resume_of_a_finished_run(palm_root: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    go(palm_root, run_dir, **PLAIN)
    words = ["--weights", str(run_dir / "PALM.pdparams"), "--calibrate", "--sensitivity", "0.95", "--split", "val"]
    assert eval_command.main(words) == 0
    before = {name: (run_dir / name).read_bytes() for name in ("PALM.json", "README.md", "metrics.json", "timing.csv")}
    assert json.loads(before["PALM.json"])["temperature"] != 1
    go(palm_root, run_dir, resume=True)
    assert {name: (run_dir / name).read_bytes() for name in before} == before


def test_a_resume_shows_no_warning_of_paddles(palm_root: Path, tmp_path: Path) -> None:
    """Warnings are errors here; a warm-up once gave one."""
    interrupted(palm_root, tmp_path / "run", 4, **RICH)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="There are some unused values")
        go(palm_root, tmp_path / "run", resume=True)


def test_the_line_of_an_interruption(palm_root: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    """One line, after the bar's has been left."""
    from paddle_medcls.cli import train as command

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    (tmp_path / "toy.json").write_text(json.dumps(recipe(**PLAIN).to_json()))
    run_dir = tmp_path / "a run"
    toynet.ON_STEP[:] = [StopAfter(2)]
    words = ["--recipe", str(tmp_path / "toy.json"), "--data-root", str(palm_root), "--output", str(run_dir)]
    assert command.main([*words, "--device", "cpu"]) == 1
    assert "image" in screen.getvalue()  # the bar was there
    last = screen.getvalue().rpartition("\n")[0].rpartition("\r")[2].splitlines()[-1]
    assert last == f"interrupted; state saved in {run_dir}; resume with: medcls train --resume '{run_dir}'"


# --- run directories that are taken or damaged -----------------------------------------------------


def test_a_run_directory_is_not_overwritten(palm_root: Path, tmp_path: Path) -> None:
    """Finished, interrupted, or with other files; a run that was killed before its first save is begun again."""
    interrupted(palm_root, tmp_path / "half", 2, **PLAIN)
    go(palm_root, tmp_path / "done", **PLAIN)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "PALM.pdparams").write_bytes(b"mine")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "metrics.json").write_text("{}")
    for name in ("half", "done", "foreign", "notes"):
        before = {path: path.read_bytes() for path in (tmp_path / name).rglob("*") if path.is_file()}
        with pytest.raises(RunError, match="already holds a run") as caught:
            go(palm_root, tmp_path / name, **PLAIN)
        assert ("--resume" in str(caught.value)) == (name in ("half", "done"))
        assert before == {path: path.read_bytes() for path in (tmp_path / name).rglob("*") if path.is_file()}
    (tmp_path / "half" / "last" / "state.safetensors").unlink()
    go(palm_root, tmp_path / "half", **PLAIN)
    assert_same(tmp_path / "half", tmp_path / "done")


def test_a_run_directory_is_trained_in_by_one(palm_root: Path, tmp_path: Path) -> None:
    """Two commands that resume the same run: the second is refused; a killed one leaves no lock."""
    run_dir = tmp_path / "run"
    interrupted(palm_root, run_dir, 2, **PLAIN)
    command = [sys.executable, toynet.__file__, str(run_dir / "recipe.json"), str(palm_root), str(run_dir), "resume"]
    slow = {**os.environ, "TOY_SECONDS_PER_STEP": "30"}
    process = subprocess.Popen(command, env=slow, stderr=subprocess.PIPE, text=True)
    try:
        for line in process.stderr:
            if line.startswith("resumed"):
                break
        with pytest.raises(RunError, match="another process is training in this run directory"):
            go(palm_root, run_dir, resume=True)
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
    go(palm_root, run_dir, resume=True)
    go(palm_root, tmp_path / "whole", **PLAIN)
    assert_same(tmp_path / "whole", run_dir)


def test_timing_has_each_epoch_once(palm_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after the time was written and before the state was: the epoch is repeated, its row replaced."""
    whole, saves = run_directory.save, []

    def dies(run_dir: Path, parts: dict, state: run_directory.State) -> None:
        saves.append(state.epoch)
        if len(saves) == 2:
            raise KeyboardInterrupt
        whole(run_dir, parts, state)

    with monkeypatch.context() as patch:
        patch.setattr(run_directory, "save", dies)
        with pytest.raises(KeyboardInterrupt):
            go(palm_root, tmp_path / "run", **PLAIN)
    assert [row["epoch"] for row in records(tmp_path / "run" / "timing.csv")] == ["1", "2"]
    go(palm_root, tmp_path / "run", resume=True)
    assert [row["epoch"] for row in records(tmp_path / "run" / "timing.csv")] == ["1", "2", "3"]


def test_the_epochs_loss_weighs_every_image_the_same(palm_root: Path, tmp_path: Path) -> None:
    """Batches of 5, 5 and 2 images."""
    go(palm_root, tmp_path / "run", **PLAIN)
    steps, rows = records(tmp_path / "run" / "steps.csv"), records(tmp_path / "run" / "history.csv")
    for epoch, row in enumerate(rows):
        for name in ("loss", "accuracy"):
            a, b, c = (float(step[name]) for step in steps[3 * epoch : 3 * epoch + 3])
            assert float(row[f"train_{name}"]) == pytest.approx((5 * a + 5 * b + 2 * c) / 12, rel=1e-6)


STATE = "last/state.safetensors"


def edited(change: Callable[[dict, dict], object]) -> Callable[[Path], None]:
    """A damage: the state with other arrays or scalars, in a file that is sound."""

    def damage(path: Path) -> None:
        import safetensors
        import safetensors.numpy

        with safetensors.safe_open(path, framework="np") as file:
            metadata = file.metadata()
        arrays, scalars = safetensors.numpy.load_file(path), json.loads(metadata["scalars"])
        change(arrays, scalars)
        safetensors.numpy.save_file(arrays, path, {**metadata, "scalars": json.dumps(scalars)})

    return damage


def poison(arrays: dict, scalars: dict) -> None:
    next(value for name, value in arrays.items() if name.startswith("optimizer/") and value.ndim).flat[0] = np.nan


def write(content: bytes | str) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content if isinstance(content, bytes) else content.encode())


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES = [
    *[
        (name, write(b"\x00\xff" * 99))
        for name in ("recipe.json", "data.json", "environment.json", "timing.csv", STATE)
    ],
    *[(name, write("[]")) for name in ("recipe.json", "data.json", "environment.json", "timing.csv", "PALM.json")],
    *[(name, write("[" * 100_000)) for name in ("recipe.json", "data.json", "environment.json")],
    *[(name, folder) for name in ("recipe.json", "data.json", "environment.json", "timing.csv", STATE, "PALM.json")],
    *[(name, Path.unlink) for name in ("recipe.json", "data.json", "environment.json", "PALM.pdparams")],
    ("data.json", write('{"train": 3, "val": {}, "data_root": "x"}')),
    ("data.json", lambda path: changed(path.parent, "data.json", data_root=3)),
    ("environment.json", lambda path: changed(path.parent, "environment.json", device=3)),
    ("environment.json", lambda path: changed(path.parent, "environment.json", device="toaster")),
    ("environment.json", lambda path: changed(path.parent, "environment.json", kernels=["paddle"])),
    ("environment.json", lambda path: changed(path.parent, "environment.json", amp="yes")),
    ("environment.json", lambda path: changed(path.parent, "environment.json", processes="2")),
    ("environment.json", lambda path: changed(path.parent, "environment.json", processes=-1)),
    ("environment.json", lambda path: changed(path.parent, "environment.json", threads="2")),
    (STATE, edited(lambda arrays, scalars: scalars.pop("epoch"))),
    (STATE, edited(lambda arrays, scalars: scalars.update(epoch="1"))),
    (STATE, edited(lambda arrays, scalars: scalars.update(epoch=99, best_epoch=1))),
    (STATE, edited(lambda arrays, scalars: scalars.update(best="good"))),
    (STATE, edited(lambda arrays, scalars: scalars.update(history=[{"epoch": 1}]))),
    (STATE, edited(lambda arrays, scalars: scalars.update(history=3))),
    (STATE, edited(lambda arrays, scalars: arrays.pop("steps/table"))),
    (STATE, edited(lambda arrays, scalars: arrays.update({"steps/table": np.zeros((2, 2))}))),
    (STATE, edited(lambda arrays, scalars: arrays.update({"model": np.zeros(2)}))),
    (STATE, edited(lambda arrays, scalars: arrays.pop("model/fc.weight"))),
    (STATE, edited(lambda arrays, scalars: [arrays.pop(name) for name in [*arrays] if name.startswith("optimizer/")])),
    (STATE, edited(poison)),
    ("PALM.pdparams", write(b"half")),
    ("PALM.pdparams", folder),
]


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run that was interrupted in its second epoch, and its images."""
    where = tmp_path_factory.mktemp("half")
    root = fakes.palm_tree(where / "palm")
    interrupted(root, where / "run", 4, **PLAIN)
    return root, where / "run"


@pytest.mark.parametrize("case", range(len(DAMAGES)), ids=lambda case: DAMAGES[case][0])
def test_a_damaged_run_directory_is_one_clear_error(
    case: int, half: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Said by the command before a step is trained; nothing is changed."""
    from paddle_medcls.cli import train as command

    name, damage = DAMAGES[case]
    run_dir = shutil.copytree(half[1], tmp_path / "run")
    damage(run_dir / name)
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    toynet.ON_STEP[:] = [lambda: pytest.fail("a step was trained")]
    assert command.main(["--resume", str(run_dir), "--data-root", str(half[0]), "--image-cache", "off"]) == 1
    said = capsys.readouterr().err
    assert "unexpected" not in said.replace("unexpected EOF", "") and "Error: " in said, said
    assert name in said or "holds nothing to resume" in said, said
    assert before == {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}


def test_a_disk_that_is_really_full(palm_root: Path, tmp_path: Path) -> None:
    """A limit of 4 kB a file: the state of a toy run does not fit, and the state before it stays."""
    interrupted(palm_root, tmp_path / "run", 2, **PLAIN)
    before = (tmp_path / "run" / STATE).read_bytes()
    code = (
        "import resource, signal, sys\n"
        "import toynet\n"
        "from paddle_medcls.cli.train import main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, 4_000))\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    words = ["--resume", str(tmp_path / "run"), "--image-cache", "off"]
    places = os.pathsep.join([str(fakes.ROOT), str(fakes.ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        env={**os.environ, "PYTHONPATH": places},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1 and "SetupError: cannot write" in done.stderr, done.stderr
    assert "unexpected" not in done.stderr and "an earlier file of this name is unchanged" in done.stderr
    assert (tmp_path / "run" / STATE).read_bytes() == before
    assert os.listdir(tmp_path / "run" / "last") == ["state.safetensors"]


# --- before any work ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "options", "error", "message"),
    [
        ({"model": "resnet19"}, {}, RecipeError, "unknown model 'resnet19'; did you mean 'resnet"),
        ({"loss": "softmax", "labels": "nonsense"}, {}, MedclsError, "nonsense"),
        ({}, {"precision": "bf16"}, SetupError, "no instructions for bfloat16"),
        ({}, {"kernels": "paddle", "precision": "bf16"}, SetupError, "needs --kernels onednn"),
        ({}, {"amp": True}, SetupError, "--amp needs a GPU"),
        ({}, {"precision": "bf61"}, SetupError, "unknown precision 'bf61'; did you mean 'bf16'?"),
    ],
)
def test_options_are_checked_before_an_image_is_decoded(
    changes: dict, options: dict, error: type, message: str, palm_root: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr("paddle_medcls.training.setup.scan_cached", lambda *_: pytest.fail("images were decoded"))
    monkeypatch.setattr("paddle_medcls.training.session.has_bfloat16", lambda: False)
    with pytest.raises(error, match=message):
        train(recipe(**changes), palm_root, tmp_path / "run", Options("cpu", say=lambda line: None, **options))
    assert not (tmp_path / "run").exists()


def test_the_defaults_of_python_are_the_commands(palm_root: Path, tmp_path: Path, monkeypatch) -> None:
    """train(recipe, data_root, run_dir) is `train --output run_dir`: kernels, cache, and what it returns."""
    from paddle_medcls.cli import train as command

    given = []

    def spy(own, data_root, run_dir, options, resume):
        given.append(options)
        return train(own, data_root, run_dir, options, resume)

    monkeypatch.setattr("paddle_medcls.training.loop.train", spy)
    (tmp_path / "toy.json").write_text(json.dumps(recipe(**PLAIN).to_json()))
    words = ["--recipe", str(tmp_path / "toy.json"), "--data-root", str(palm_root), "--output", str(tmp_path / "a")]
    assert command.main(words) == 0
    assert dataclasses.replace(given[0], say=print) == dataclasses.replace(Options(), say=print)
    assert Options().kernels == "auto" and Options().cache_folder(tmp_path / "a") == tmp_path / "images"
    name = "paddle_medcls.preprocessing.image_cache.image_statistics"
    monkeypatch.setattr(name, lambda *_: pytest.fail("decoded again"))
    run = train(recipe(**PLAIN), str(palm_root), str(tmp_path / "b"))
    assert_same(tmp_path / "a", tmp_path / "b")
    assert (run.directory, run.weights) == (tmp_path / "b", tmp_path / "b" / "PALM.pdparams")
    assert run.metrics["n"] == 7 and [row["epoch"] for row in run.history] == [1, 2, 3]
