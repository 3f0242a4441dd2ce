"""Corruptions that images of a clinic have: nine kinds, five severities each, for images of the network's size.

The kinds follow MedMNIST-C (Di Salvo, Doerrich and Ledig 2024, arXiv:2406.17536), which has them for each of its data
sets; its package needs PyTorch and versions of other packages that current Pythons do not have, so these are our own.
"""

from __future__ import annotations

import cv2
import numpy as np

SEVERITIES = (1, 2, 3, 4, 5)


def corrupt(image: np.ndarray, kind: str, severity: int, seed: int = 0) -> np.ndarray:
    """A corrupted copy of an image.

    Args:
        image: uint8 (H, W, C), C 1 or 3.
        kind: one of KINDS.
        severity: 1 to 5.
        seed: of the noise, such as the image's row.
    """
    strength = KINDS[kind][severity - 1]
    made = _CORRUPTIONS[kind](image, strength, np.random.default_rng([seed, severity]))
    return np.clip(np.round(made), 0, 255).astype(np.uint8).reshape(image.shape)


def _jpeg(image: np.ndarray, quality: float, _: np.random.Generator) -> np.ndarray:
    data = cv2.imencode(
        ".jpg", image[..., ::-1] if image.shape[2] == 3 else image, [cv2.IMWRITE_JPEG_QUALITY, int(quality)]
    )[1]
    decoded = cv2.imdecode(data, cv2.IMREAD_COLOR if image.shape[2] == 3 else cv2.IMREAD_GRAYSCALE)
    assert decoded is not None, "it was just encoded"
    return decoded[..., ::-1] if image.shape[2] == 3 else decoded


def _resolution(image: np.ndarray, share: float, _: np.random.Generator) -> np.ndarray:
    height, width = image.shape[:2]
    small = cv2.resize(
        image, (max(1, round(width * share)), max(1, round(height * share))), interpolation=cv2.INTER_AREA
    )
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR)


def _rotation(image: np.ndarray, degrees: float, _: np.random.Generator) -> np.ndarray:
    height, width = image.shape[:2]
    turn = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), degrees, 1)
    return cv2.warpAffine(image, turn, (width, height))


def _marks(image: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """White bars, as burnt-in text, in a corner."""
    made, side = image.astype(np.float32), min(image.shape[:2])
    size, thick = max(2, round(side * share)), max(1, round(side * share / 6))
    top, left = (rng.integers(0, 2) * (length - size) for length in image.shape[:2])
    for row in range(top, top + size, 2 * thick):
        made[row : row + thick, left : left + size] = 255
    return made


def _border(image: np.ndarray, share: float, _: np.random.Generator) -> np.ndarray:
    """The border is cut off and the rest enlarged."""
    height, width = image.shape[:2]
    y, x = int(height * share), int(width * share)
    return cv2.resize(image[y : height - y, x : width - x], (width, height), interpolation=cv2.INTER_LINEAR)


_CORRUPTIONS = {
    "jpeg": _jpeg,
    "resolution": _resolution,
    "brightness": lambda image, change, _: image + 255.0 * change,
    "contrast": lambda image, factor, _: (image - image.mean()) * factor + image.mean(),
    "noise": lambda image, sd, rng: image + rng.normal(0, 255 * sd, image.shape),
    "blur": lambda image, share, _: cv2.GaussianBlur(image, (0, 0), share * min(image.shape[:2])),
    "rotation": _rotation,
    "marks": _marks,
    "border": _border,
}
KINDS: dict[str, tuple[float, ...]] = {
    "jpeg": (50, 30, 18, 12, 7),  # quality
    "resolution": (0.7, 0.5, 0.35, 0.25, 0.18),  # share of the pixels of a side that remain
    "brightness": (0.08, 0.16, 0.24, 0.32, 0.4),  # added, of the full range
    "contrast": (0.8, 0.65, 0.5, 0.35, 0.2),  # factor
    "noise": (0.03, 0.06, 0.1, 0.15, 0.22),  # standard deviation, of the full range
    "blur": (0.008, 0.014, 0.02, 0.03, 0.045),  # standard deviation, of a side
    "rotation": (5, 10, 20, 35, 60),  # degrees
    "marks": (0.08, 0.13, 0.18, 0.25, 0.35),  # of a side
    "border": (0.04, 0.08, 0.12, 0.17, 0.23),  # cut off at each side
}
"""Kind -> strength at each severity."""
