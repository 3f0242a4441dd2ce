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
import warnings
from pathlib import Path

import numpy as np

from paddle_medcls.core.errors import DataError, SetupError
from paddle_medcls.core.files import atomic_write, read_bounded
from paddle_medcls.data import jpeg
from paddle_medcls.data.dicom import decode_dicom, dicom_mode, dicom_size, is_dicom

try:
    import cv2
except ImportError as error:  # opencv-python needs graphics libraries, which servers without a screen lack
    raise SetupError(
        f"OpenCV cannot be loaded: {error}",
        expected="the module cv2, from opencv-python or opencv-python-headless",
        fix="on a machine without a screen: pip uninstall -y opencv-python && pip install opencv-python-headless",
    ) from error

cv2.setNumThreads(1)  # the loader's threads already decode several images at once

MAX_PIXELS = 100_000_000
MAX_BYTES = 1 << 30  # of a file: more than MAX_PIXELS take uncompressed, three channels of 16 bits
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".dcm", ".dicom")
DECODE_FLAGS = {  # denominator of the scale -> OpenCV's flags for colour and for grey
    1: (cv2.IMREAD_COLOR, cv2.IMREAD_GRAYSCALE),
    2: (cv2.IMREAD_REDUCED_COLOR_2, cv2.IMREAD_REDUCED_GRAYSCALE_2),
    4: (cv2.IMREAD_REDUCED_COLOR_4, cv2.IMREAD_REDUCED_GRAYSCALE_4),
    8: (cv2.IMREAD_REDUCED_COLOR_8, cv2.IMREAD_REDUCED_GRAYSCALE_8),
}


def image_size(data: bytes, name: str) -> tuple[int, int]:
    """Width and height in pixels from the header, without decoding.

    Raises:
        DataError: not an image, too large, or several pictures in one file.
    """
    if not data:
        raise DataError(f"{name}: the file is empty", fix="copy or download it again")
    width, height = dicom_size(data, name) if is_dicom(data) else _pillow_size(data, name)
    if width * height > MAX_PIXELS:
        raise DataError(
            f"{name}: {width} x {height} pixels is too large to decode safely",
            expected=f"at most {MAX_PIXELS:,} pixels",
            fix="scale it down first",
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
                        fix="save each picture as a separate file",
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
            fix="open it in a viewer; the file may be an error page that a download has saved",
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
        raise DataError(f"{name}: the image is truncated or damaged", fix="copy or download it again")
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
        fix=f"multiply its values by {1 << 16 - bits} if they have {bits} bits, or save the image with 8 bits",
    )


def to_channels(image: np.ndarray, channels: str) -> np.ndarray:
    """Converts uint8 grey (H, W) or (H, W, 1), or RGB (H, W, 3), to the channels of `read_image`."""
    if image.ndim == 2 or image.shape[2] == 1:
        return np.repeat(image.reshape(*image.shape[:2], 1), 1 if channels == "gray" else 3, axis=2)
    if channels == "gray":
        return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[:, :, None]
    return image if channels == "rgb" else cv2.cvtColor(image, cv2.COLOR_RGB2BGR)


def write_png(path: Path, image: np.ndarray) -> None:
    """Writes an RGB image, uint8 (H, W, 3), as a PNG file."""
    atomic_write(path, cv2.imencode(".png", np.ascontiguousarray(image[:, :, ::-1]))[1].tobytes())
