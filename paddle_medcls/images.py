"""Image decoding and preprocessing, shared by training, evaluation and prediction.

File bytes -> `read_image` -> uint8 (H, W, C) -> `fit` -> (size, size, C), values 0..255
-> `normalize` -> float32 (C, size, size). Augmentation takes place between `fit` and `normalize`.

The decoder applies EXIF orientation, keeps the high byte of 16-bit images, repeats a grey channel three times, drops
alpha, expands palettes, converts CMYK and applies the window of DICOM files (`dicom`).

It checks the size in the header before it decodes, and refuses truncated and damaged files (for JPEG see `jpeg`:
OpenCV alone would return the upper half of a truncated file), files with several pictures (animations, pages), and
16-bit images that use 14 bits or fewer: these would become almost black, and no format says by how much to scale
them (PNG's sBIT promises values of the full range).
"""

from __future__ import annotations

import io
import reprlib
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from paddle_medcls import jpeg
from paddle_medcls.dicom import decode_dicom, dicom_mode, dicom_size, is_dicom
from paddle_medcls.errors import DataError, SetupError
from paddle_medcls.files import atomic_write, read_bounded

try:
    import cv2
except ImportError as error:  # opencv-python needs graphics libraries, which servers without a screen lack
    raise SetupError(
        f"OpenCV cannot be loaded: {error}",
        expected="the module cv2, from opencv-python or opencv-python-headless",
        do="on a machine without a screen: pip uninstall -y opencv-python && pip install opencv-python-headless",
    ) from error

cv2.setNumThreads(1)  # the loader's threads already decode several images at once

MAX_PIXELS = 100_000_000
MAX_BYTES = 1 << 30  # of a file: more than MAX_PIXELS take uncompressed, three channels of 16 bits
MAX_SIDE_PX = 2048  # of a network's input: 16 images then take about 10 GB in a ResNet
MEAN_RANGE = (-1000, 1000)  # pixel values, with room for other conventions than 0..255
STD_RANGE = (0.001, 1000)
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".dcm", ".dicom")
INTERPOLATIONS = {
    "nearest": cv2.INTER_NEAREST,
    "linear": cv2.INTER_LINEAR,
    "area": cv2.INTER_AREA,
    "cubic": cv2.INTER_CUBIC,
}
DECODE_FLAGS = {  # denominator of the scale -> OpenCV's flags for colour and for grey
    1: (cv2.IMREAD_COLOR, cv2.IMREAD_GRAYSCALE),
    2: (cv2.IMREAD_REDUCED_COLOR_2, cv2.IMREAD_REDUCED_GRAYSCALE_2),
    4: (cv2.IMREAD_REDUCED_COLOR_4, cv2.IMREAD_REDUCED_GRAYSCALE_4),
    8: (cv2.IMREAD_REDUCED_COLOR_8, cv2.IMREAD_REDUCED_GRAYSCALE_8),
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


def image_size(data: bytes, name: str) -> tuple[int, int]:
    """Width and height in pixels from the header, without decoding.

    Raises:
        DataError: not an image, too large, or several pictures in one file.
    """
    if not data:
        raise DataError(f"{name}: the file is empty", do="copy or download it again")
    width, height = dicom_size(data, name) if is_dicom(data) else _pillow_size(data, name)
    if width * height > MAX_PIXELS:
        raise DataError(
            f"{name}: {width} x {height} pixels is too large to decode safely",
            expected=f"at most {MAX_PIXELS:,} pixels",
            do="scale it down first",
        )
    return width, height


def _pillow_size(data: bytes, name: str) -> tuple[int, int]:
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as header:
                # MPO: a camera's JPEG, followed by a preview or by the second picture of a stereo pair
                if getattr(header, "is_animated", False) and header.format != "MPO":
                    raise DataError(
                        f"{name}: the {header.format} file holds several pictures: frames of an animation, or pages",
                        expected="one picture",
                        do="save each picture as a separate file",
                    )
                return header.size
    except Image.DecompressionBombError as error:
        raise DataError(
            f"{name}: the image is too large to decode safely: {error}", expected=f"at most {MAX_PIXELS:,} pixels"
        ) from None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError):
        raise DataError(
            f"{name}: not an image (begins with {data[:16]!r})",
            expected="PNG, JPEG, BMP, TIFF, WebP or DICOM",
            do="open it in a viewer; the file may be an error page that a download has saved",
        ) from None


def image_mode(path: str | Path) -> str:
    """Pixel format of a readable image file: Pillow's mode ("L", "RGB", "I;16", …); for DICOM see `dicom_mode`."""
    from PIL import Image

    with open(path, "rb") as file:
        if is_dicom(file.read(132)):
            return dicom_mode(Path(path).read_bytes(), str(path))
    with Image.open(path) as header:
        return header.mode


def read_image(path: str | Path, channels: str = "bgr", least_px: int = 0) -> np.ndarray:
    """Reads one image file.

    Args:
        path: any path, non-ASCII names included.
        channels: "bgr", "rgb" or "gray".
        least_px: 0: full size; else a JPEG is decoded at 1/8, 1/4 or 1/2 of its size: the smallest scale at which
            both sides have at least this many pixels; see `Preprocessing.least_px`.

    Returns:
        uint8 (H, W, 3), or (H, W, 1) for "gray".

    Raises:
        DataError: missing, no regular file, empty, not an image, truncated, damaged, too large, several pictures in
            one file, or 16 bits of which 14 or fewer are used; the message names the file.
    """
    try:
        data = read_bounded(path, MAX_BYTES)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None
    return decode_image(data, str(path), channels, least_px)


def decode_image(data: bytes, name: str, channels: str = "bgr", least_px: int = 0) -> np.ndarray:
    """Decodes the bytes of one image file; see `read_image`."""
    size = image_size(data, name)
    if is_dicom(data):
        return to_channels(decode_dicom(data, name), channels)
    is_jpeg = data[:2] == b"\xff\xd8"
    markers = jpeg.read_markers(data) if is_jpeg else None
    image = None
    if markers or not is_jpeg:
        scales = (8, 4, 2) if least_px and is_jpeg else ()
        scale = next((scale for scale in scales if min(size) // scale >= least_px), 1)
        image = _decode(data, DECODE_FLAGS[scale][channels == "gray"])
    if image is None or (markers and jpeg.lacks_data(data, markers, image)):
        raise DataError(f"{name}: the image is truncated or damaged", do="copy or download it again")
    if not is_jpeg:
        _refuse_unused_bits(data, image, name)
    if channels == "gray":
        return image[:, :, None]
    return image if channels == "bgr" else cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def _decode(data: bytes, flag: int) -> np.ndarray | None:
    """The image as OpenCV decodes it; None if it cannot."""
    try:
        return cv2.imdecode(np.frombuffer(data, np.uint8), flag)
    except cv2.error:
        return None


def _refuse_unused_bits(data: bytes, image: np.ndarray, name: str) -> None:
    """Refuses a 16-bit image whose values are below a quarter of the range; see the module's docstring.

    Args:
        image: the image decoded to 8 bits; only a dark one is decoded again.
    """
    if image.max() > 1 << 6:  # not >=: some formats round to 8 bits
        return
    deep = _decode(data, cv2.IMREAD_ANYDEPTH | cv2.IMREAD_ANYCOLOR)
    if deep is None or deep.dtype != np.uint16 or not 0 < deep.max() < 1 << 14:
        return
    bits = int(deep.max()).bit_length()
    raise DataError(
        f"{name}: a 16-bit image whose largest value is {deep.max()} of 65535 would become almost black",
        expected="values of the full range, 0 to 65535",
        do=f"multiply its values by {1 << 16 - bits} if they have {bits} bits, or save the image with 8 bits",
    )


def to_channels(image: np.ndarray, channels: str) -> np.ndarray:
    """Converts uint8 grey (H, W) or (H, W, 1), or RGB (H, W, 3), to the channels of `read_image`."""
    if image.ndim == 2 or image.shape[2] == 1:
        return np.repeat(image.reshape(*image.shape[:2], 1), 1 if channels == "gray" else 3, axis=2)
    if channels == "gray":
        return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[:, :, None]
    return image if channels == "rgb" else cv2.cvtColor(image, cv2.COLOR_RGB2BGR)


def fit(image: np.ndarray, spec: Preprocessing) -> np.ndarray:
    """Scales (and crops) an image to the network's input size.

    Args:
        image: (H, W, C), values 0..255.

    Returns:
        (size_px, size_px, C), values 0..255, uint8 or float32 by `spec.resize_dtype`.
    """
    if spec.resize_dtype == "float32":
        image = image.astype(np.float32)
    height, width, channels = image.shape
    target, top, left = _geometry(height, width, spec)
    if (width, height) != target:
        image = cv2.resize(image, target, interpolation=INTERPOLATIONS[spec.interpolation])
        image = image.reshape(target[1], target[0], channels)  # OpenCV drops a single channel
    return image[top : top + spec.size_px, left : left + spec.size_px]


def _geometry(height: int, width: int, spec: Preprocessing) -> tuple[tuple[int, int], int, int]:
    """Size (width, height) after scaling, and top and left of the crop, in pixels."""
    target = (spec.size_px, spec.size_px)
    if spec.fit == "crop":
        scale = spec.resize_px / min(height, width)
        target = (max(spec.size_px, round(width * scale)), max(spec.size_px, round(height * scale)))
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


def write_png(path: Path, image: np.ndarray) -> None:
    """Writes an RGB image, uint8 (H, W, 3), as a PNG file."""
    atomic_write(path, cv2.imencode(".png", np.ascontiguousarray(image[:, :, ::-1]))[1].tobytes())


def normalize(image: np.ndarray, spec: Preprocessing) -> np.ndarray:
    """(x - mean) / std per channel: ([N,] H, W, C), values 0..255 -> float32 ([N,] C, H, W)."""
    x = (image.astype(np.float32) - np.array(spec.mean, np.float32)) / np.array(spec.std, np.float32)
    return np.ascontiguousarray(np.moveaxis(x, -1, -3))


def preprocess(image: np.ndarray, spec: Preprocessing) -> np.ndarray:
    """Decoded image (H, W, C) -> network input float32 (C, size_px, size_px), without augmentation."""
    return normalize(fit(image, spec), spec)
