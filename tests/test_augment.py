"""Augmentation: which values it changes, which it does not, and reproducibility."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from fakes import pixels

from paddle_medcls.data.datasets import load_index
from paddle_medcls.preprocessing.augmentation import Augmentation, augment
from paddle_medcls.recipes import get_recipe

IMAGE = pixels(0)
GEOMETRY = {"flip": 0.5, "flip_vertical": 0.5, "rotate_degrees": 180.0, "zoom": 0.3, "shift": 0.1}
INTENSITY = {"brightness": 0.9, "contrast": 0.9, "color": 0.9}


def rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng(list(seed))


def test_off_is_the_identity() -> None:
    assert not Augmentation().active
    np.testing.assert_array_equal(augment(IMAGE, Augmentation(), rng(0)), IMAGE)


@pytest.mark.parametrize("field", [*GEOMETRY, *INTENSITY])
def test_every_field_alone_does_something(field: str) -> None:
    changed = Augmentation(**{field: {**GEOMETRY, **INTENSITY}[field]})
    assert changed.active
    assert any((augment(IMAGE, changed, rng(row)) != IMAGE).any() for row in range(8))


def test_flips_are_exact() -> None:
    np.testing.assert_array_equal(augment(IMAGE, Augmentation(flip=1.0), rng(0)), IMAGE[:, ::-1])
    np.testing.assert_array_equal(augment(IMAGE, Augmentation(flip_vertical=1.0), rng(0)), IMAGE[::-1])
    both = augment(IMAGE, Augmentation(flip=1.0, flip_vertical=1.0), rng(0))
    np.testing.assert_array_equal(both, np.rot90(IMAGE, 2))


def test_a_flip_happens_as_often_as_its_probability_says() -> None:
    """Of 400 images 100 are expected at 0.25; 4 standard deviations are 35."""
    flipped = sum((augment(IMAGE, Augmentation(flip=0.25), rng(row)) != IMAGE).any() for row in range(400))
    assert 65 < flipped < 135


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("channels", [1, 3])
def test_shape_type_and_range(dtype: type, channels: int) -> None:
    image = np.ascontiguousarray(IMAGE[:, :, :channels]).astype(dtype)
    for row in range(20):
        moved = augment(image, Augmentation(**GEOMETRY), rng(row))
        assert moved.dtype == dtype and moved.shape == image.shape and moved.flags.c_contiguous
        both = augment(image, Augmentation(**GEOMETRY, **INTENSITY), rng(row))
        assert both.dtype == np.float32 and both.shape == image.shape
        assert both.min() >= 0 and both.max() <= 255


def test_the_input_is_not_changed() -> None:
    image = IMAGE.copy()
    augment(image, Augmentation(**GEOMETRY, **INTENSITY), rng(0))
    np.testing.assert_array_equal(image, IMAGE)


class Fixed:
    """A generator that always draws the upper end, so that a transform has a known answer."""

    def uniform(self, low: float, high: float, size: int | None = None) -> object:
        return high if size is None else np.full(size, high)


def slow_warp(image: np.ndarray, degrees: float, scale: float, shift: float) -> np.ndarray:
    """Rotation (counter-clockwise), zoom and shift about the centre, pixel by pixel, bilinear, black outside."""
    side = len(image)
    centre = (side - 1) / 2
    cos, sin = math.cos(math.radians(degrees)) / scale, math.sin(math.radians(degrees)) / scale
    out = np.zeros(image.shape)
    for y in range(side):
        for x in range(side):
            dx, dy = x - centre - shift * side, y - centre - shift * side
            u, v = cos * dx - sin * dy + centre, sin * dx + cos * dy + centre
            left, top = math.floor(u), math.floor(v)
            for row in (top, top + 1):
                for column in (left, left + 1):
                    if 0 <= row < side and 0 <= column < side:
                        out[y, x] += (1 - abs(u - column)) * (1 - abs(v - row)) * image[row, column]
    return out


@pytest.mark.parametrize(
    ("degrees", "zoom", "shift"),
    [(90.0, 0.0, 0.0), (30.0, 0.0, 0.0), (0.0, 0.5, 0.0), (0.0, 0.0, 0.25), (20.0, 0.2, 0.1)],
)
def test_warp_against_a_loop(degrees: float, zoom: float, shift: float) -> None:
    found = augment(IMAGE, Augmentation(rotate_degrees=degrees, zoom=zoom, shift=shift), Fixed())
    difference = np.abs(found - slow_warp(IMAGE, degrees, 1 + zoom, shift))
    assert difference.mean() < 0.5 and difference.max() < 8  # OpenCV counts in 1/32 of a pixel


def test_a_rotation_by_90_degrees_is_exact() -> None:
    found = augment(IMAGE, Augmentation(rotate_degrees=90.0), Fixed())
    np.testing.assert_allclose(found.astype(int), np.rot90(IMAGE), atol=1)


def test_intensity_by_hand() -> None:
    """(x - mean) * 1.2 + mean * 1.1, then each channel * 1.05, for draws at the upper ends."""
    image = np.full((4, 4, 3), 100, np.uint8)
    image[0, 0] = 60
    mean = (100 * 15 + 60) / 16
    found = augment(image, Augmentation(brightness=0.1, contrast=0.2, color=0.05), Fixed())
    np.testing.assert_allclose(found[1, 1], ((100 - mean) * 1.2 + mean * 1.1) * 1.05, rtol=1e-5)
    np.testing.assert_allclose(found[0, 0], ((60 - mean) * 1.2 + mean * 1.1) * 1.05, rtol=1e-5)


def test_an_image_is_a_function_of_seed_epoch_and_row(palm_root: Path) -> None:
    from paddle_medcls.preprocessing.loader import ImageDataset

    index = load_index("palm", palm_root, "train")
    toy = get_recipe("palm").replace(size_px=32)

    def item(seed: int, epoch: int, row: int) -> np.ndarray:
        return ImageDataset(index, toy.preprocessing, toy.augmentation, seed, epoch)[row][0]

    np.testing.assert_array_equal(item(1, 2, 3), item(1, 2, 3))
    for other in ((2, 2, 3), (1, 3, 3), (1, 2, 4)):
        assert (item(1, 2, 3) != item(*other)).any()
    plain = ImageDataset(index, toy.preprocessing)[3][0]
    assert (plain != item(1, 2, 3)).any()


def test_evaluation_is_not_augmented(palm_root: Path) -> None:
    from paddle_medcls.preprocessing.loader import ImageDataset
    from paddle_medcls.preprocessing.transforms import preprocess

    index = load_index("palm", palm_root, "val")
    toy = get_recipe("palm").replace(size_px=32)
    x, label = ImageDataset(index, toy.preprocessing)[2]
    np.testing.assert_array_equal(x, preprocess(index.read(2, "bgr"), toy.preprocessing))
    assert label == index.labels[2]
