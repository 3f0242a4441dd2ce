"""The measures of heat maps: golden values, and networks whose evidence is known."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from fakes import pixels, write_image

from paddle_medcls.core.files import picture_names
from paddle_medcls.core.paddle_setup import paddle
from paddle_medcls.evaluation.plots import overlay
from paddle_medcls.explanation import faithfulness
from paddle_medcls.models.architectures import resnet
from paddle_medcls.models.network import MODELS, Network
from paddle_medcls.models.sidecar import Sidecar
from paddle_medcls.preprocessing.transforms import Preprocessing

nn = paddle.nn


def test_deletion_and_insertion_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """A square of ones, a quarter of the image; the score is its mean. The mean colour is 0.25."""
    x = np.zeros((1, 16, 16), np.float32)
    x[:, :8, :8] = 1
    good, bad = x[0], 1 - x[0]
    monkeypatch.setattr(faithfulness, "STEPS", 4)
    curves = faithfulness.deletion_insertion(lambda batch: batch[:, 0, :8, :8].mean(axis=(1, 2)), x, [good, bad])
    np.testing.assert_allclose(curves["deletion"], [[1, 0.25, 0.25, 0.25, 0.25], [1, 1, 1, 1, 0.25]])
    np.testing.assert_allclose(faithfulness.areas_below(curves["deletion"]), [0.34375, 0.90625])
    blurred = cv2.GaussianBlur(x[0], (0, 0), 1)[:8, :8].mean()
    np.testing.assert_allclose(curves["insertion"], [[blurred, 1, 1, 1, 1], [blurred] * 4 + [1]], rtol=1e-6)


def test_areas_of_straight_lines() -> None:
    assert faithfulness.areas_below(np.array([[0, 0.5, 1], [1, 1, 1], [1, 0, 0]])).tolist() == [0.5, 1, 0.25]


def test_rank_correlation_equals_pandas_ranks() -> None:
    rng = np.random.default_rng(0)
    one, other = rng.integers(0, 9, (20, 20)), rng.integers(0, 5, (20, 20)) + rng.integers(0, 5, (20, 20))
    ranks = [pd.Series(values.ravel()).rank() for values in (one, other)]
    assert faithfulness.rank_correlation(one, other) == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert faithfulness.rank_correlation(one, one**3) == pytest.approx(1)
    assert faithfulness.rank_correlation(one, -one) == pytest.approx(-1)
    assert np.isnan(faithfulness.rank_correlation(one, np.zeros((20, 20))))


def test_energy_inside_a_mask() -> None:
    heat = np.array([[1, 3], [0, 4]], np.float32)
    assert faithfulness.energy_inside(heat, np.array([[True, False], [True, True]])) == 5 / 8
    assert np.isnan(faithfulness.energy_inside(0 * heat, heat > 0))


def test_random_maps_are_coarse_and_repeat() -> None:
    maps = faithfulness.random_maps(4, (7, 7), 224, np.random.default_rng(5))
    assert maps.shape == (4, 224, 224) and 0 <= maps.min() and maps.max() <= 1
    assert (maps == faithfulness.random_maps(4, (7, 7), 224, np.random.default_rng(5))).all()
    assert np.abs(np.diff(maps, axis=2)).max() < 1 / 32 + 1e-6  # no steeper than two neighbouring cells
    assert abs(faithfulness.rank_correlation(maps[0], maps[1])) < 0.6


def test_masks_of_both_layouts(tmp_path: Path) -> None:
    for folder in ("COVID/images", "Normal"):
        image = write_image(tmp_path / folder / "a b.png", pixels(0))
        assert faithfulness.mask_of(image) is None
        values = np.array([[0, 127], [128, 255]], np.uint8)
        mask = write_image(tmp_path / folder.split("/")[0] / "masks" / "a b.png", values)
        assert faithfulness.mask_of(image) == mask
        expected = np.kron(values > 127, np.ones((3, 2), bool))  # enlarged, nearest pixels
        np.testing.assert_array_equal(faithfulness.read_mask(image, (6, 4)), expected)


class Bright(nn.Layer):
    """Class 1 where 4 x 4 pixels are bright; a `mirrored` one looks at the image turned by 180 degrees."""

    def __init__(self, network: Network, mirrored: bool = False) -> None:
        super().__init__()
        # a cell counts from half brightness on: the mean colour that deletion paints is no evidence
        self.cells = nn.Sequential(nn.Conv2D(3, 4, 4, 4), nn.ReLU())
        self.fc = nn.Linear(4, network.num_outputs)
        self.mirrored = mirrored

    def forward(self, x):
        return self.fc(self.cells(paddle.flip(x, [2, 3]) if self.mirrored else x).mean(axis=[2, 3]))


@pytest.mark.parametrize("mirrored", [False, True])
def test_true_maps_beat_chance_and_false_ones_do_not(mirrored: bool, monkeypatch, tmp_path: Path) -> None:
    """One bright square in one corner; maps of the mirrored network point to the opposite corner."""
    monkeypatch.setattr(resnet, "bright", Bright, raising=False)
    monkeypatch.setitem(MODELS, "bright", "resnet")
    model = Bright(Network("bright", 2), mirrored)
    model.cells[0].weight.set_value(paddle.full([4, 3, 4, 4], 1 / 48))
    model.cells[0].bias.set_value(paddle.full([4], -0.5))
    model.fc.weight.set_value(paddle.to_tensor(np.float32([[-40, 40]] * 4)))
    model.fc.bias.set_value(paddle.to_tensor(np.float32([3, -3])))
    spec = Preprocessing(32, channels="rgb", mean=(0, 0, 0), std=(255, 255, 255))
    sidecar = Sidecar("covid", "toy", ("dark", "bright"), "binary", "softmax", Network("bright", 2), spec)
    paddle.seed(8)
    expected = paddle.rand([3]).numpy()
    paddle.seed(8)
    measurement = faithfulness.Measurement(model, sidecar)
    assert (paddle.rand([3]).numpy() == expected).all()  # the generator of the caller is left alone
    assert measurement.layer == "cells.1" and measurement.grid == (8, 8)
    for number, (top, left) in enumerate([(2, 3), (20, 2), (3, 20), (19, 21)]):
        image = np.full((32, 32, 3), 5, np.uint8)
        image[top : top + 9, left : left + 9] = 250
        path = write_image(tmp_path / "bright" / f"{number}.png", image)
        write_image(tmp_path / "bright" / "masks" / f"{number}.png", (image > 100)[:, :, 0] * np.uint8(255))
        measurement.add(path, image, 1)
    for row in measurement.rows:
        if not mirrored:
            assert row["deletion"] < row["deletion_chance"] and row["insertion"] > row["insertion_chance"]
        assert row["inside"] < 0.05 if mirrored else row["inside"] > 0.5
        assert row["inside_chance"] == pytest.approx(81 / 1024)
    mean = {name: np.mean([row[name] for row in measurement.rows]) for name in measurement.rows[0] if "tion" in name}
    gains = (mean["deletion_chance"] - mean["deletion"], mean["insertion"] - mean["insertion_chance"])
    assert max(gains) < 0.05 if mirrored else min(gains) > 0.15  # 0.007 and -0.006; 0.22 and 0.32
    text = measurement.table()
    assert mirrored or text.count("4  (95% 51% to 100%)") == 3
    assert ("0  (95% 0% to 49%)" in text) == mirrored  # inside the mask
    header, rows = measurement.columns()
    assert header[:4] == ["image", "class", "deletion", "deletion_chance"] and len(rows) == 4
    assert all(len(row) == len(header) for row in rows)


def test_a_map_that_is_empty_is_counted_nowhere(monkeypatch) -> None:
    monkeypatch.setattr(resnet, "bright", Bright, raising=False)
    monkeypatch.setitem(MODELS, "bright", "resnet")
    model = Bright(Network("bright", 2))
    model.cells[0].weight.set_value(paddle.zeros([4, 3, 4, 4]))
    sidecar = Sidecar("covid", "toy", ("a", "b"), "binary", "softmax", Network("bright", 2), Preprocessing(32))
    measurement = faithfulness.Measurement(model, sidecar, "cells.1")
    measurement.add(Path("a.png"), pixels(0), 1)
    assert measurement.rows == [{"image": "a.png", "class": "b"}]
    assert len(measurement.table().splitlines()) == 4  # the header alone


def test_an_overlay_leaves_cold_parts_alone() -> None:
    """Where the map is 0 the image shows; where it is 1 it takes viridis's yellow."""
    image = np.full((2, 2, 3), 100, np.uint8)
    shown = overlay(image, np.array([[0, 1], [0.5, 0]], np.float32), opacity=1)
    assert (shown[0, 0] == 100).all() and (shown[1, 1] == 100).all()
    np.testing.assert_allclose(shown[0, 1], (253, 231, 37), atol=1)
    assert shown.dtype == np.uint8 and (image == 100).all()


def test_names_of_pictures_do_not_clash(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("x/1.png", "y/1.png", "x/1.jpg", "x/deep/2.png")]
    names = [name.as_posix() for name in picture_names(paths, "gradcam").values()]
    assert names == ["x/1_gradcam.png", "y/1_gradcam.png", "x/1.jpg_gradcam.png", "x/deep/2_gradcam.png"]
    assert list(picture_names(paths[:1], "gradcam").values()) == [Path("1_gradcam.png")]
