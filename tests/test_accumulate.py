"""A batch computed in pieces is the whole batch, but for batch-norm statistics."""

from __future__ import annotations

import csv
from pathlib import Path

import fakes
import numpy as np
import pytest
import toynet  # noqa: F401  registers its networks

from paddle_medcls.core.errors import RecipeError, Stopped
from paddle_medcls.core.paddle_setup import paddle
from paddle_medcls.data.index import SYNTHETIC_MARK
from paddle_medcls.data.sample import draw_npz
from paddle_medcls.models.weights import read_weights
from paddle_medcls.recipes import get_recipe
from paddle_medcls.training.loop import Options, train

QUIET = Options("cpu", 0, image_cache="off", say=lambda line: None)


def table(run: Path) -> np.ndarray:
    rows = list(csv.reader((run / "steps.csv").read_text().splitlines()))[1:]
    return np.array(rows, float)


def weights(run: Path) -> dict[str, np.ndarray]:
    return read_weights(run / "PALM.pdparams")


# 13 images in batches of 6, 6 and 1: no number of pieces divides them all.
RECIPE = fakes.recipe(model="toy_plain", epochs=2, batch_size=6, lr=0.05, warmup_epochs=0.5, class_weights="balanced")
RECIPE = RECIPE.replace(flip=0.5, weight_decay=0.01, ema_decay=0.9)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, Path]:
    """The data, and a run with whole batches."""
    folder = tmp_path_factory.mktemp("whole")
    root = fakes.palm_tree(folder / "palm", pathologic=7, normal=4, myopic=2)
    train(RECIPE, root, folder / "run", QUIET)
    return root, folder / "run"


@pytest.mark.parametrize("accumulate", [2, 4, 100])
def test_pieces_add_up(whole, tmp_path: Path, accumulate: int) -> None:
    """Losses, accuracies, learning rates of every step, and the weights; 100 is one image a piece."""
    root, run = whole
    train(RECIPE.replace(accumulate=accumulate), root, tmp_path, QUIET)
    assert len(table(run)) == 6  # as many steps of optimizer and schedule as there are batches
    np.testing.assert_allclose(table(tmp_path), table(run), rtol=1e-4, atol=1e-6)
    for name, value in weights(run).items():
        np.testing.assert_allclose(weights(tmp_path)[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


def test_pieces_of_images_in_memory_add_up_with_augmentation(tmp_path: Path) -> None:
    """MedMNIST's images are augmented a batch at a time."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / SYNTHETIC_MARK).touch()
    draw_npz("breastmnist", tmp_path / "data", counts=(13, 12, 12))
    changes = {"model": "toy_plain", "epochs": 2, "batch_size": 6, "warmup_epochs": 0.0, "rotate_degrees": 20.0}
    own = get_recipe("medmnist_best", "breastmnist").replace(**changes, flip=0.5, brightness=0.2)
    for accumulate in (1, 3):
        run = tmp_path / f"{accumulate}"
        train(own.replace(accumulate=accumulate), tmp_path / "data", run, QUIET)
    np.testing.assert_allclose(table(tmp_path / "3"), table(tmp_path / "1"), rtol=1e-4, atol=1e-6)


def test_batch_norm_sees_the_pieces(whole, tmp_path: Path) -> None:
    """The one difference, and so a sign that the comparison above can fail."""
    root, _ = whole
    for name, accumulate in (("a", 1), ("b", 2)):
        train(RECIPE.replace(model="toy", accumulate=accumulate, epochs=1), root, tmp_path / name, QUIET)
    assert not np.allclose(table(tmp_path / "a")[:, 2], table(tmp_path / "b")[:, 2], rtol=1e-3)


class Scaler:
    """As GradScaler does with float16 on a GPU: every loss times 1024, the sum of gradients divided once."""

    def __init__(self, enable: bool) -> None:
        self.calls: list[str] = []
        Scaler.last = self

    def scale(self, loss):
        self.calls.append("scale")
        return loss * 1024.0

    def step(self, optimizer) -> None:
        self.calls.append("step")
        with paddle.no_grad():
            for group in optimizer._param_groups:
                for parameter in group["params"]:
                    parameter.grad.scale_(1 / 1024.0)
        optimizer.step()

    def update(self) -> None:
        self.calls.append("update")

    def state_dict(self) -> dict:
        return {}


def test_the_scaler_acts_once_a_batch(whole, tmp_path: Path, monkeypatch) -> None:
    root, run = whole
    monkeypatch.setattr(paddle.amp, "GradScaler", Scaler)
    train(RECIPE.replace(accumulate=2), root, tmp_path, QUIET)
    batch = ["scale", "scale", "step", "update"]
    assert Scaler.last.calls == (batch + batch + batch[1:]) * 2
    np.testing.assert_allclose(table(tmp_path), table(run), rtol=1e-4, atol=1e-6)


def test_a_run_in_pieces_is_resumed_to_the_bit(whole, tmp_path: Path) -> None:
    root, _ = whole
    recipe = RECIPE.replace(model="toy", accumulate=3)
    train(recipe, root, tmp_path / "whole", QUIET)
    stop = Options("cpu", 0, image_cache="off", deadline=-1.0, say=lambda line: None)  # stops after each step
    for resume in (False, True):
        with pytest.raises(Stopped):
            train(recipe, root, tmp_path / "parts", stop, resume)
    train(recipe, root, tmp_path / "parts", QUIET, resume=True)
    assert (tmp_path / "parts" / "steps.csv").read_bytes() == (tmp_path / "whole" / "steps.csv").read_bytes()
    for name, value in weights(tmp_path / "whole").items():
        assert np.array_equal(weights(tmp_path / "parts")[name], value), name


def test_pieces_are_at_least_one() -> None:
    with pytest.raises(RecipeError, match="accumulate: 0; expected at least 1"):
        RECIPE.replace(accumulate=0)
