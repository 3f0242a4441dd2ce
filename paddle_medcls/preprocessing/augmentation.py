"""Random augmentation of training images.

Paddle's random transforms draw from global generators, so their result depends on the order of the threads. Here each
image of each epoch has its own generator, seeded by (seed, epoch, row): a run is reproducible bit for bit with any
number of workers and after any resume. Small images in memory are augmented a batch at a time, with random numbers
drawn for all rows of an epoch at once; the result does not depend on how the rows are divided into batches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace

import cv2
import numpy as np

from paddle_medcls.preprocessing.transforms import Preprocessing, fit

FLIPS = {"flip": 3, "flip_vertical": 2}
"""Flips of `Augmentation` -> the axis of (N, C, H, W) that each reverses."""


@dataclass(frozen=True)
class Augmentation:
    """Strengths of the random changes of training images; 0 turns a change off. `Recipe` checks the values.

    Attributes:
        crop_scale: with `fit="crop"`: random crop of at least this fraction of the image's area.
        flip, flip_vertical: probability of a left-right and of a top-bottom flip.
        rotate_degrees: the angle is uniform in +- this.
        zoom: the scale is between 1/(1+zoom) and 1+zoom.
        shift: along x and y, uniform in +- this fraction of the side.
        brightness, contrast: factor of the full image, uniform in 1 +- this.
        color: gain of each channel, uniform in 1 +- this.
    """

    crop_scale: float = 0.0
    flip: float = 0.0
    flip_vertical: float = 0.0
    rotate_degrees: float = 0.0
    zoom: float = 0.0
    shift: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    color: float = 0.0

    @property
    def active(self) -> bool:
        """Whether any change is on."""
        return any(astuple(self))


def flip_axes(flips: Sequence[str]) -> list[tuple[int, ...]]:
    """Axes of (N, C, H, W) to reverse for each version of an image that is averaged; the first: none.

    Args:
        flips: names in FLIPS; both together add the image turned by 180 degrees as well.
    """
    axes: list[tuple[int, ...]] = [()]
    for name in flips:
        axes += [(*earlier, FLIPS[name]) for earlier in axes]
    return axes


def random_version(
    image: np.ndarray, spec: Preprocessing, augmentation: Augmentation, rng: np.random.Generator
) -> np.ndarray:
    """A decoded image, scaled to the network's size and changed at random.

    With `crop_scale` as in the OCT transfer-learning tutorial: a random crop, scaled to `resize_px` square, changed,
    and cropped to `size_px` in the centre.

    Args:
        image: uint8 (H, W, C).

    Returns:
        (size_px, size_px, C), values 0..255.
    """
    if not augmentation.crop_scale:
        return augment(fit(image, spec), augmentation, rng)
    top, left, height, width = _random_crop(image.shape[0], image.shape[1], augmentation.crop_scale, rng)
    square = replace(spec, fit="stretch", size_px=spec.resize_px)
    changed = augment(fit(image[top : top + height, left : left + width], square), augmentation, rng)
    start = (spec.resize_px - spec.size_px) // 2
    return changed[start : start + spec.size_px, start : start + spec.size_px]


def _random_crop(height: int, width: int, scale: float, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Top, left, height, width of a crop with `scale` to 1 of the area and an aspect ratio of 3:4 to 4:3.

    Like torchvision's RandomResizedCrop, which the OCT transfer-learning tutorial uses: ten tries, then the full image.
    """
    for _ in range(10):
        area = height * width * rng.uniform(scale, 1)
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1)), h, w
    return 0, 0, height, width


def augment(image: np.ndarray, augmentation: Augmentation, rng: np.random.Generator) -> np.ndarray:
    """One random version of an image.

    Args:
        image: (S, S, C), values 0..255, uint8 or float32.

    Returns:
        The same shape; uint8 stays uint8 unless intensities change, then float32 in 0..255.
    """
    if augmentation.flip and rng.random() < augmentation.flip:
        image = image[:, ::-1]
    if augmentation.flip_vertical and rng.random() < augmentation.flip_vertical:
        image = image[::-1]
    if augmentation.rotate_degrees or augmentation.zoom or augmentation.shift:
        image = _warp(image, augmentation, rng)
    if augmentation.brightness or augmentation.contrast or augmentation.color:
        image = _intensity(image, augmentation, rng)
    return np.ascontiguousarray(image)


def _warp(image: np.ndarray, augmentation: Augmentation, rng: np.random.Generator) -> np.ndarray:
    """Rotation, zoom and shift about the centre, in one interpolation; pixels from outside are black."""
    side = image.shape[0]
    centre = (side / 2 - 0.5, side / 2 - 0.5)
    angle = rng.uniform(-augmentation.rotate_degrees, augmentation.rotate_degrees)
    scale = math.exp(rng.uniform(-1, 1) * math.log1p(augmentation.zoom))
    matrix = cv2.getRotationMatrix2D(centre, angle, scale)
    matrix[:, 2] += rng.uniform(-augmentation.shift, augmentation.shift, 2) * side
    warped = cv2.warpAffine(np.ascontiguousarray(image), matrix, (side, side), flags=cv2.INTER_LINEAR)
    return warped.reshape(image.shape)  # OpenCV drops a single channel


def _intensity(image: np.ndarray, augmentation: Augmentation, rng: np.random.Generator) -> np.ndarray:
    """Brightness and contrast of the full image, and gain of each channel (`color`)."""
    x = image.astype(np.float32)
    mean = float(x.mean())
    brightness = rng.uniform(1 - augmentation.brightness, 1 + augmentation.brightness)
    contrast = rng.uniform(1 - augmentation.contrast, 1 + augmentation.contrast)
    x = (x - mean) * np.float32(contrast) + np.float32(mean * brightness)
    if augmentation.color:
        x *= np.float32(rng.uniform(1 - augmentation.color, 1 + augmentation.color, image.shape[2]))
    return np.clip(x, 0, 255)


# --- a batch at a time ---------------------------------------------------------------------------


DRAWS = 11
"""Random numbers per image: two flips, angle, zoom, shift along x and y, brightness, contrast, three gains."""


def draw_epoch(count: int, seed: int, epoch: int) -> np.ndarray:
    """Random numbers for `augment_batch`, for every row of an epoch: (count, DRAWS) float64 in 0..1."""
    return np.random.default_rng([seed, epoch, 1]).random((count, DRAWS))  # `epoch_order` uses [seed, epoch]


def augment_batch(images: np.ndarray, augmentation: Augmentation, draws: np.ndarray) -> np.ndarray:
    """One random version of each image of a batch, with the same operations as `augmentation`.

    Args:
        images: (N, S, S, C), values 0..255, uint8 or float32.
        draws: (N, DRAWS), uniform in 0..1: random numbers of each image.

    Returns:
        (N, S, S, C), uint8 or float32 as in `augmentation`.
    """
    if augmentation.flip:
        flipped = draws[:, 0] < augmentation.flip
        images = np.where(flipped[:, None, None, None], images[:, :, ::-1], images)
    if augmentation.flip_vertical:
        flipped = draws[:, 1] < augmentation.flip_vertical
        images = np.where(flipped[:, None, None, None], images[:, ::-1], images)
    signed = 2 * draws[:, 2:] - 1  # in -1..1
    if augmentation.rotate_degrees or augmentation.zoom or augmentation.shift:
        images = _warp_batch(images, augmentation, signed[:, :4])
    if augmentation.brightness or augmentation.contrast or augmentation.color:
        images = _intensity_batch(images, augmentation, signed[:, 4:])
    return images


def _warp_batch(images: np.ndarray, augmentation: Augmentation, signed: np.ndarray) -> np.ndarray:
    """Rotation, zoom and shift about the centre, bilinear; pixels from outside are black. `signed`: (N, 4) in -1..1."""
    count, side = images.shape[:2]
    angle = np.radians(augmentation.rotate_degrees * signed[:, 0])
    scale = np.exp(math.log1p(augmentation.zoom) * signed[:, 1])
    shift = augmentation.shift * side * signed[:, 2:].T
    # For each output pixel: its position in the input, by the inverse rotation and zoom. The input has a black border
    # of one pixel, and positions outside the image are clipped to it.
    centre = (side - 1) / 2
    y, x = np.mgrid[:side, :side].astype(np.float32) - np.float32(centre)
    dx = x[None] - shift[0, :, None, None].astype(np.float32)
    dy = y[None] - shift[1, :, None, None].astype(np.float32)
    cos = (np.cos(angle) / scale).astype(np.float32)[:, None, None]
    sin = (np.sin(angle) / scale).astype(np.float32)[:, None, None]
    from_x = np.clip(cos * dx - sin * dy + np.float32(centre + 1), 0, side + 0.999)
    from_y = np.clip(sin * dx + cos * dy + np.float32(centre + 1), 0, side + 0.999)
    left, top = from_x.astype(np.int64), from_y.astype(np.int64)
    along, down = np.float32(from_x - left)[..., None], np.float32(from_y - top)[..., None]
    bordered = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    pixels = bordered.reshape(-1, images.shape[3])
    width = side + 2
    corner = (np.arange(count)[:, None, None] * width + top) * width + left
    upper = pixels.take(corner, 0) * (1 - along) + pixels.take(corner + 1, 0) * along
    lower = pixels.take(corner + width, 0) * (1 - along) + pixels.take(corner + width + 1, 0) * along
    warped = upper * (1 - down) + lower * down
    return np.rint(warped).astype(np.uint8) if images.dtype == np.uint8 else warped


def _intensity_batch(images: np.ndarray, augmentation: Augmentation, signed: np.ndarray) -> np.ndarray:
    """Brightness, contrast and gain of each channel of each image. `signed`: (N, 5) in -1..1."""
    signed = signed.astype(np.float32)[:, None, None]
    x = images.astype(np.float32)
    mean = x.mean(axis=(1, 2, 3), keepdims=True)
    brightness, contrast = 1 + augmentation.brightness * signed[..., :1], 1 + augmentation.contrast * signed[..., 1:2]
    x = (x - mean) * contrast + mean * brightness
    if augmentation.color:
        x *= 1 + augmentation.color * signed[..., 2 : 2 + images.shape[3]]
    return np.clip(x, 0, 255)
