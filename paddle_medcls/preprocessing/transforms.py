"""From decoded pixels to the input of a network: resize or crop, then normalise."""

from __future__ import annotations

import reprlib
from dataclasses import asdict, dataclass

import cv2
import numpy as np

from paddle_medcls.core.errors import DataError
from paddle_medcls.data.decode import MAX_PIXELS

MAX_SIDE_PX = 2048  # of a network's input: 16 images then take about 10 GB in a ResNet
MEAN_RANGE = (-1000, 1000)  # pixel values, with room for other conventions than 0..255
STD_RANGE = (0.001, 1000)
INTERPOLATIONS = {
    "nearest": cv2.INTER_NEAREST,
    "linear": cv2.INTER_LINEAR,
    "area": cv2.INTER_AREA,
    "cubic": cv2.INTER_CUBIC,
}
CHOICES = {
    "fit": ("stretch", "crop"),
    "channels": ("bgr", "rgb", "gray"),
    "interpolation": tuple(INTERPOLATIONS),
    "resize_dtype": ("uint8", "float32"),
    "decode": ("exact", "reduced"),
}
"""Allowed values of the text fields of `Preprocessing`."""


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes a network's input; saved with the weights.

    Attributes:
        size_px: side of the square input, in pixels.
        resize_px: with `fit="crop"`, the shorter side is scaled to this before the centre crop.
        fit: "stretch" scales both sides to `size_px`; "crop" keeps the aspect ratio.
        channels: "bgr" or "rgb" (3 channels) or "gray" (1 channel).
        interpolation: "nearest", "linear", "area" or "cubic".
        resize_dtype: "uint8" rounds after resizing; "float32" does not (COVID-19 radiography tutorial).
        mean, std: per channel, in units of pixel values (0..255), in the order of `channels`.
        decode: "exact", or "reduced": JPEGs much larger than the input are decoded at 1/2, 1/4 or 1/8 of
            their size, see `read_image`; with the area filter the input differs by less than 0.5 of 255.
    """

    size_px: int = 224
    resize_px: int = 256
    fit: str = "stretch"
    channels: str = "rgb"
    interpolation: str = "linear"
    resize_dtype: str = "uint8"
    mean: tuple[float, ...] = (127.5, 127.5, 127.5)
    std: tuple[float, ...] = (127.5, 127.5, 127.5)
    decode: str = "exact"

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"preprocessing {name}: {reprlib.repr(getattr(self, name))} is not one of {allowed}")
        for name in ("size_px", "resize_px"):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= MAX_SIDE_PX:
                raise ValueError(
                    f"preprocessing {name}: {reprlib.repr(value)} is not a number of pixels, 1 to {MAX_SIDE_PX}"
                )
        for name, (low, high) in (("mean", MEAN_RANGE), ("std", STD_RANGE)):
            values = getattr(self, name)
            if (
                type(values) is not tuple
                or len(values) != self.num_channels
                or not all(
                    isinstance(value, (int, float)) and type(value) is not bool and low <= value <= high
                    for value in values
                )
            ):
                raise ValueError(
                    f"preprocessing {name}: {reprlib.repr(values)}; expected {self.num_channels} number(s) "
                    f"of {low} to {high}, in units of pixel values"
                )

    @property
    def num_channels(self) -> int:
        """Channels of the network's input, 1 or 3."""
        return 1 if self.channels == "gray" else 3

    @property
    def least_px(self) -> int:
        """The argument `least_px` of `read_image`: twice the size that the image is scaled to; 0 for exact decoding.

        Fundus photographs then differ by under 0.4 of 255 on average; dark, speckled OCT scans by up to 1.3, and
        more pixels do not help.
        """
        if self.decode == "exact":
            return 0
        return 2 * (self.resize_px if self.fit == "crop" else self.size_px)

    def to_json(self) -> dict:
        """The fields as JSON values."""
        return asdict(self)

    @staticmethod
    def from_json(values: dict) -> Preprocessing:
        """The inverse of `to_json`. Raises TypeError, KeyError or ValueError for other fields or values."""
        return Preprocessing(**{**values, "mean": tuple(values["mean"]), "std": tuple(values["std"])})


def fit(image: np.ndarray, spec: Preprocessing) -> np.ndarray:
    """Scales (and crops) an image to the network's input size.

    Args:
        image: (H, W, C), values 0..255.

    Returns:
        (size_px, size_px, C), values 0..255, uint8 or float32 by `spec.resize_dtype`.

    Raises:
        DataError: one side is so long that the scaled image would be larger than any that is decoded.
    """
    if spec.resize_dtype == "float32":
        image = image.astype(np.float32)
    height, width, channels = image.shape
    target, top, left = _geometry(height, width, spec)
    if (width, height) != target:
        image = cv2.resize(image, target, interpolation=INTERPOLATIONS[spec.interpolation])
        image = image.reshape(target[1], target[0], channels)  # OpenCV drops a single channel
    return image[top : top + spec.size_px, left : left + spec.size_px]


def refuse_narrow(image: np.ndarray, spec: Preprocessing, name: str) -> None:
    """Raises DataError for an image (H, W, C) that `fit` would make too large, because of its one long side."""
    _geometry(image.shape[0], image.shape[1], spec, name)


def _geometry(height: int, width: int, spec: Preprocessing, name: str = "image") -> tuple[tuple[int, int], int, int]:
    """Size (width, height) after scaling, and top and left of the crop, in pixels."""
    target = (spec.size_px, spec.size_px)
    if spec.fit == "crop":
        scale = spec.resize_px / min(height, width)
        target = (max(spec.size_px, round(width * scale)), max(spec.size_px, round(height * scale)))
    if target[0] * target[1] > MAX_PIXELS:
        raise DataError(
            f"{name}: {width} x {height} pixels are too narrow: scaled, they would be {target[0]} x {target[1]}",
            expected=f"at most {MAX_PIXELS:,} pixels after scaling",
            fix="crop it first",
        )
    return target, (target[1] - spec.size_px) // 2, (target[0] - spec.size_px) // 2


def unfit(heat: np.ndarray, size: tuple[int, int], spec: Preprocessing) -> np.ndarray:
    """Scales a heat map of the network's input to the original image: the inverse of `fit`.

    Args:
        heat: (size_px, size_px) float32.
        size: height and width of the image, in pixels.

    Returns:
        (height, width) float32; 0 outside the centre crop, which the network did not see.
    """
    height, width = size
    target, top, left = _geometry(height, width, spec)
    scaled = np.zeros((target[1], target[0]), np.float32)
    scaled[top : top + spec.size_px, left : left + spec.size_px] = heat
    return cv2.resize(scaled, (width, height), interpolation=cv2.INTER_LINEAR)


def normalize(image: np.ndarray, spec: Preprocessing) -> np.ndarray:
    """(x - mean) / std per channel: ([N,] H, W, C), values 0..255 -> float32 ([N,] C, H, W)."""
    x = np.moveaxis(image, -1, -3).astype(np.float32, order="C")  # planes first: six times as fast as pixels of three
    mean, std = (np.array(values, np.float32).reshape(-1, 1, 1) for values in (spec.mean, spec.std))
    x -= mean
    x /= std
    return x


def preprocess(image: np.ndarray, spec: Preprocessing) -> np.ndarray:
    """Decoded image (H, W, C) -> network input float32 (C, size_px, size_px), without augmentation."""
    return normalize(fit(image, spec), spec)
