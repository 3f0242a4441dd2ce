"""DICOM decoding: files with one image -> uint8 arrays, with pydicom.

The steps are those of the standard: stored value -> modality LUT (rescale slope and intercept) -> VOI (window, else
LUT) -> 0..255, MONOCHROME1 inverted (PS3.3 C.11.1, C.11.2). Without a window or a LUT, pixels of up to 8 bits keep
their values and deeper ones are scaled from the lowest to the highest value. Padding (PixelPaddingValue) is black and
not part of that range. In an enhanced file rescale and window are those of the frame's functional groups
(PS3.3 C.7.6.16). Only image attributes are read, so no message quotes a patient's data.
"""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from paddle_medcls.core.errors import DataError
from paddle_medcls.data import jpeg
from paddle_medcls.data.dicom_display import decodes_to_rgb, functions, grey, rgb

GREY = ("MONOCHROME1", "MONOCHROME2")
COLOUR = ("PALETTE COLOR", "RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
DEFLATED = "1.2.840.10008.1.2.1.99"
BASELINE = ("1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51")
PLUGINS = "pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg pylibjpeg-rle"


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences pydicom's warnings, which are about harmless oddities and may quote patient data."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=rf"pydicom|{re.escape(__name__)}")
        yield


def is_dicom(data: bytes) -> bool:
    """Whether the first bytes are those of a DICOM file."""
    return data[128:132] == b"DICM"


def dicom_size(data: bytes, name: str) -> tuple[int, int]:
    """Width and height in pixels from the header. Raises DataError as `decode_dicom`."""
    header = _header(data, name, stop_before_pixels=True)
    return header.Columns, header.Rows


def dicom_mode(data: bytes, name: str) -> str:
    """Photometric interpretation and bits stored, such as "MONOCHROME2 12 bit"."""
    header = _header(data, name, stop_before_pixels=True)
    return f"{header.PhotometricInterpretation} {header.BitsStored} bit"


@_quiet()
def decode_dicom(data: bytes, name: str) -> np.ndarray:
    """Decodes a DICOM file with one image.

    Returns:
        uint8 (H, W) for grey images, (H, W, 3) RGB for others.

    Raises:
        DataError: not readable, several frames, no or too few pixels, an attribute out of range, or no installed
            decoder for the compression.
    """
    ds = _header(data, name)
    if "PixelData" not in ds:
        raise DataError(f"{name}: the DICOM file has no pixel data", expected="an image, not a report or a directory")
    pixels = _pixels(ds, name)
    try:
        if ds.PhotometricInterpretation in GREY:
            return grey(pixels, ds, name)
        return rgb(pixels, ds, name)
    except DataError:
        raise
    except Exception:  # pydicom's errors about faulty attributes are of many kinds
        raise DataError(f"{name}: the DICOM file has faulty display attributes (LUT, window or palette)") from None


@_quiet()
def _header(data: bytes, name: str, stop_before_pixels: bool = False):
    """The data set of a DICOM file, its image attributes checked."""
    pydicom = _pydicom(name)
    from pydicom.filereader import read_dataset, read_preamble

    file = io.BytesIO(data)
    try:
        read_preamble(file, False)
        meta = read_dataset(file, False, True, stop_when=lambda tag, vr, length: tag >> 16 != 2)
        deflated = str(meta.get("TransferSyntaxUID", "")) == DEFLATED
        if not deflated:
            ds = pydicom.dcmread(io.BytesIO(data), stop_before_pixels=stop_before_pixels)
            faults = _faults(ds)
    except Exception:  # pydicom's errors are of many kinds and may quote patient data
        raise DataError(
            f"{name}: the DICOM file is truncated or damaged", fix="copy or export it again; a DICOM viewer shows more"
        ) from None
    if deflated:  # pydicom would inflate it in memory, to any size
        raise DataError(f"{name}: the DICOM file is deflated", fix="save it with another transfer syntax")
    if faults:
        raise DataError(f"{name}: the DICOM file does not hold one image that can be read", items=faults)
    return ds


def _faults(ds) -> list[str]:
    """Reasons why a data set is not one readable image, one line each."""
    frames, kind = ds.get("NumberOfFrames"), ds.get("PhotometricInterpretation")
    if frames not in (None, 1):
        return [f"it has {int(frames)} frames; expected one: export each frame as a separate file"]
    if kind is None and "Rows" not in ds:
        return ["it has no pixel data: a report, a directory, or cut off"]
    if kind not in GREY + COLOUR:
        return [f"PhotometricInterpretation: expected {', '.join(GREY + COLOUR)}"]
    single = kind in GREY or kind == "PALETTE COLOR"
    faults: list[str] = []

    def check(attribute: str, allowed: range | tuple) -> None:
        value = ds.get(attribute)
        if value not in allowed:
            text = int(value) if isinstance(value, int) else "absent or no number"
            expected = " or ".join(map(str, allowed))
            if isinstance(allowed, range):
                expected = f"{allowed[0]} to {allowed[-1]}"
            faults.append(f"{attribute}: {text}; expected {expected}")

    check("Rows", range(1, 65536))
    check("Columns", range(1, 65536))
    check("SamplesPerPixel", (1,) if single else (3,))
    check("PixelRepresentation", (0, 1) if kind in GREY else (0,))
    check("BitsAllocated", (8, 16) if single else (8,))
    if not faults:
        check("BitsStored", range(1, ds.BitsAllocated + 1) if single else (8,))
    if not faults and "HighBit" in ds:
        check("HighBit", (ds.BitsStored - 1,))
    return faults


def _pixels(ds, name: str) -> np.ndarray:
    """Stored values (H, W), or RGB (H, W, 3)."""
    syntax = getattr(ds.file_meta, "TransferSyntaxUID", None)
    if syntax is None:
        raise DataError(f"{name}: the DICOM file has no TransferSyntaxUID", fix="export it again")
    if not _can_decode(syntax):
        raise DataError(f"{name}: no decoder for the DICOM transfer syntax {syntax.name} is installed", fix=PLUGINS)
    try:
        pixels = _jpeg(ds) if syntax.is_compressed else None
        if pixels is None:
            pixels = ds.pixel_array
            if ds.PhotometricInterpretation.startswith("YBR_FULL") and not decodes_to_rgb():
                pixels = functions().convert_color_space(pixels, "YBR_FULL", "RGB")
    except Exception:
        raise DataError(
            f"{name}: the DICOM file's pixel data are truncated or damaged, or do not fit {ds.Columns} x {ds.Rows}",
            fix=f"copy or export it again{'; or try ' + PLUGINS if syntax.is_compressed else ''}",
        ) from None
    shape = (ds.Rows, ds.Columns, 3)[: 2 if ds.SamplesPerPixel == 1 else 3]
    if pixels.shape != shape:
        raise DataError(f"{name}: the DICOM file's pixel data have shape {pixels.shape}, expected {shape}")
    return pixels


def _jpeg(ds) -> np.ndarray | None:
    """The pixels of a baseline JPEG in a compressed file; None if pydicom has to decode the file.

    pydicom 3 converts YCbCr twice if Adobe's marker is present, and neither pydicom 2 nor 3 reads all RGB JPEGs.

    Raises:
        ValueError: the JPEG is damaged, or its size is not Columns x Rows (checked before decoding).
    """
    from PIL import Image, UnidentifiedImageError
    from pydicom import encaps

    if hasattr(encaps, "generate_frames"):  # pydicom 3
        frame = next(encaps.generate_frames(ds.PixelData, number_of_frames=1))
    else:
        frame = encaps.defragment_data(ds.PixelData)
    try:
        image = Image.open(io.BytesIO(frame))
    except UnidentifiedImageError:  # RLE, JPEG-LS, 12-bit JPEG
        return None
    with image:
        if image.size != (ds.Columns, ds.Rows):
            raise ValueError("another size")
        if image.format != "JPEG" or str(ds.file_meta.TransferSyntaxUID) not in BASELINE:
            return None
        markers = jpeg.read_markers(frame)
        if markers is None or jpeg.lacks_data(frame, markers, np.asarray(image)):
            raise ValueError("damaged")
    with Image.open(io.BytesIO(frame)) as image:
        if ds.SamplesPerPixel == 1:
            return np.asarray(image)
        component = image.layer[0][0]  # type: ignore[attr-defined]  # number of its first component
        declares_colour = "adobe_transform" in image.info or component == ord("R")
        if ds.PhotometricInterpretation == "RGB" and not declares_colour:
            image.draft("YCbCr", image.size)  # no conversion: the stored values are RGB already
            return np.asarray(image)
        return np.asarray(image.convert("RGB"))


# --- pydicom 2 (Python 3.9) and 3 ------------------------------------------------------------------


def _pydicom(name: str):
    try:
        import pydicom
    except ImportError:
        raise DataError(f"{name}: pydicom is not installed (it reads DICOM)", fix="pip install pydicom") from None
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)  # see `_quiet`
    return pydicom


def _can_decode(syntax) -> bool:
    """Whether a decoder for a transfer syntax is installed."""
    import pydicom

    if decodes_to_rgb():
        try:
            return pydicom.pixels.get_decoder(syntax).is_available
        except NotImplementedError:
            return False
    handlers = [handler for handler in pydicom.config.pixel_data_handlers if handler.supports_transfer_syntax(syntax)]
    return any(handler.is_available() for handler in handlers)
