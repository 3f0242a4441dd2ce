"""Training-time augmentation: small random changes that keep an image's class.

Paddle's random transforms draw from global generators, so the outcome depends on which thread comes
first. Here each image of each epoch has its own generator, seeded by (seed, epoch, row): the same
run is the same bit for bit, with any number of workers and after any resume.
"""

from __future__ import annotations

import math

import cv2
import numpy as np

from paddle_medcls.recipe import Recipe


def augments(recipe: Recipe) -> bool:
    """Whether the recipe changes training images at all."""
    return any(
        (
            recipe.flip,
            recipe.flip_vertical,
            recipe.rotate_degrees,
            recipe.zoom,
            recipe.shift,
            recipe.brightness,
            recipe.contrast,
            recipe.color,
        )
    )


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
        x *= rng.uniform(1 - recipe.color, 1 + recipe.color, image.shape[2]).astype(np.float32)
    return np.clip(x, 0, 255)
