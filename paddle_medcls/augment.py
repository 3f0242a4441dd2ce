"""Training-time augmentation: small random changes that keep an image's class.

Paddle's random transforms draw from global generators, so the outcome depends on which thread comes
first. Here each image of each epoch has its own generator, seeded by (seed, epoch, row): the same
run is the same bit for bit, with any number of workers and after any resume. Small images that are
in memory are changed a batch at a time, from one generator a batch, seeded by (seed, epoch, first row).
"""

from __future__ import annotations

import math
from dataclasses import replace

import cv2
import numpy as np

from paddle_medcls.images import Preprocessing, fit
from paddle_medcls.recipe import AUGMENTATION, Recipe


def augments(recipe: Recipe) -> bool:
    """Whether the recipe changes training images at all."""
    return any(getattr(recipe, name) for name in AUGMENTATION)


def random_version(image: np.ndarray, spec: Preprocessing, recipe: Recipe, rng: np.random.Generator) -> np.ndarray:
    """A decoded image, scaled to the network's size and changed at random.

    With `crop_scale` as in document 004: a random part of the image, scaled to `resize_px` square, changed,
    and cropped to `size_px` in the centre.

    Args:
        image: (H, W, C) uint8.
        rng: this image's own generator.

    Returns:
        (size_px, size_px, C), values 0..255.
    """
    if not recipe.crop_scale:
        return augment(fit(image, spec), recipe, rng)
    top, left, height, width = _random_part(image.shape[0], image.shape[1], recipe.crop_scale, rng)
    square = replace(spec, fit="stretch", size_px=spec.resize_px)
    changed = augment(fit(image[top : top + height, left : left + width], square), recipe, rng)
    start = (spec.resize_px - spec.size_px) // 2
    return changed[start : start + spec.size_px, start : start + spec.size_px]


def _random_part(height: int, width: int, scale: float, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Top, left, height, width of a part with `scale` to 1 of the area and an aspect of 3:4 to 4:3.

    As torchvision's RandomResizedCrop, which document 004 uses: ten tries, then the whole image.
    """
    for _ in range(10):
        area = height * width * rng.uniform(scale, 1)
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1)), h, w
    return 0, 0, height, width


def augment(image: np.ndarray, recipe: Recipe, rng: np.random.Generator) -> np.ndarray:
    """One random version of an image, by the recipe's strengths.

    Args:
        image: (S, S, C), values 0..255, uint8 or float32.
        rng: this image's own generator.

    Returns:
        The same shape; uint8 stays uint8 unless intensities change, then float32 in 0..255.
    """
    if recipe.flip and rng.random() < recipe.flip:
        image = image[:, ::-1]
    if recipe.flip_vertical and rng.random() < recipe.flip_vertical:
        image = image[::-1]
    if recipe.rotate_degrees or recipe.zoom or recipe.shift:
        image = _warp(image, recipe, rng)
    if recipe.brightness or recipe.contrast or recipe.color:
        image = _intensity(image, recipe, rng)
    return np.ascontiguousarray(image)


def _warp(image: np.ndarray, recipe: Recipe, rng: np.random.Generator) -> np.ndarray:
    """Rotation, zoom and shift about the centre, in one interpolation; what comes in is black."""
    side = image.shape[0]
    centre = (side / 2 - 0.5, side / 2 - 0.5)
    angle = rng.uniform(-recipe.rotate_degrees, recipe.rotate_degrees)
    scale = math.exp(rng.uniform(-1, 1) * math.log1p(recipe.zoom))
    matrix = cv2.getRotationMatrix2D(centre, angle, scale)
    matrix[:, 2] += rng.uniform(-recipe.shift, recipe.shift, 2) * side
    warped = cv2.warpAffine(np.ascontiguousarray(image), matrix, (side, side), flags=cv2.INTER_LINEAR)
    return warped.reshape(image.shape)  # OpenCV drops a single channel


def _intensity(image: np.ndarray, recipe: Recipe, rng: np.random.Generator) -> np.ndarray:
    """Brightness and contrast of the whole image, and gain of each channel (`color`)."""
    x = image.astype(np.float32)
    mean = float(x.mean())
    brightness = rng.uniform(1 - recipe.brightness, 1 + recipe.brightness)
    contrast = rng.uniform(1 - recipe.contrast, 1 + recipe.contrast)
    x = (x - mean) * np.float32(contrast) + np.float32(mean * brightness)
    if recipe.color:
        x *= np.float32(rng.uniform(1 - recipe.color, 1 + recipe.color, image.shape[2]))
    return np.clip(x, 0, 255)


# --- a batch at a time ---------------------------------------------------------------------------


def augment_batch(images: np.ndarray, recipe: Recipe, rng: np.random.Generator) -> np.ndarray:
    """One random version of each image of a batch; the same operations as `augment`.

    Args:
        images: (N, S, S, C), values 0..255, uint8 or float32.
        rng: this batch's own generator.

    Returns:
        (N, S, S, C), uint8 or float32 as in `augment`.
    """
    count = len(images)
    if recipe.flip:
        chosen = rng.random(count) < recipe.flip
        images = np.where(chosen[:, None, None, None], images[:, :, ::-1], images)
    if recipe.flip_vertical:
        chosen = rng.random(count) < recipe.flip_vertical
        images = np.where(chosen[:, None, None, None], images[:, ::-1], images)
    if recipe.rotate_degrees or recipe.zoom or recipe.shift:
        images = _warp_batch(images, recipe, rng)
    if recipe.brightness or recipe.contrast or recipe.color:
        images = _intensity_batch(images, recipe, rng)
    return images


def _warp_batch(images: np.ndarray, recipe: Recipe, rng: np.random.Generator) -> np.ndarray:
    """Rotation, zoom and shift about the centre, bilinear; what comes in is black."""
    count, side = images.shape[:2]
    angle = np.radians(rng.uniform(-recipe.rotate_degrees, recipe.rotate_degrees, count))
    scale = np.exp(rng.uniform(-1, 1, count) * math.log1p(recipe.zoom))
    shift = rng.uniform(-recipe.shift, recipe.shift, (2, count)) * side
    # Each output pixel asks where it comes from: the inverse turn and zoom of its place, in a frame one
    # pixel wider on every side, black, in which everything outside ends.
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
    framed = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    pixels = framed.reshape(-1, images.shape[3])
    width = side + 2
    corner = (np.arange(count)[:, None, None] * width + top) * width + left
    upper = pixels.take(corner, 0) * (1 - along) + pixels.take(corner + 1, 0) * along
    lower = pixels.take(corner + width, 0) * (1 - along) + pixels.take(corner + width + 1, 0) * along
    warped = upper * (1 - down) + lower * down
    return np.rint(warped).astype(np.uint8) if images.dtype == np.uint8 else warped


def _intensity_batch(images: np.ndarray, recipe: Recipe, rng: np.random.Generator) -> np.ndarray:
    """Brightness, contrast and gain of each channel, drawn for each image."""

    def factor(strength: float, columns: int) -> np.ndarray:
        return rng.uniform(1 - strength, 1 + strength, (len(images), 1, 1, columns)).astype(np.float32)

    x = images.astype(np.float32)
    mean = x.mean(axis=(1, 2, 3), keepdims=True)
    brightness, contrast = factor(recipe.brightness, 1), factor(recipe.contrast, 1)
    x = (x - mean) * contrast + mean * brightness
    if recipe.color:
        x *= factor(recipe.color, images.shape[3])
    return np.clip(x, 0, 255)
