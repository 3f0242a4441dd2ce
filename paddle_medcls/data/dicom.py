"""DICOM decoding: files with one image -> uint8 arrays, with pydicom.

The steps are those of the standard: stored value -> modality LUT (rescale slope and intercept) -> VOI (window, else
LUT) -> 0..255, MONOCHROME1 inverted (PS3.3 C.11.1, C.11.2). Without a window or a LUT, pixels of up to 8 bits keep
their values and deeper ones are scaled from the lowest to the highest value. Padding (PixelPaddingValue) is black and
not part of that range. In an enhanced file rescale and window are those of the frame's functional groups
(PS3.3 C.7.6.16). Only image attributes are read, so no message quotes a patient's data.
"""

from __future__ import annotations

import importlib
import io
import logging
import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from paddle_medcls.core.errors import DataError
from paddle_medcls.data import jpeg

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
            return _grey(pixels, ds, name)
        return _rgb(pixels, ds, name)
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
            shown = int(value) if isinstance(value, int) else "absent or no number"
            expected = " or ".join(map(str, allowed))
            if isinstance(allowed, range):
                expected = f"{allowed[0]} to {allowed[-1]}"
            faults.append(f"{attribute}: {shown}; expected {expected}")

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
            if ds.PhotometricInterpretation.startswith("YBR_FULL") and not _decodes_to_rgb():
                pixels = _functions().convert_color_space(pixels, "YBR_FULL", "RGB")
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
        first = image.layer[0][0]  # type: ignore[attr-defined]  # number of its first component
        declares_colour = "adobe_transform" in image.info or first == ord("R")
        if ds.PhotometricInterpretation == "RGB" and not declares_colour:
            image.draft("YCbCr", image.size)  # no conversion: the stored values are RGB already
            return np.asarray(image)
        return np.asarray(image.convert("RGB"))


def _grey(pixels: np.ndarray, ds, name: str) -> np.ndarray:
    """Stored values (H, W) -> uint8 (H, W)."""
    unused = ds.BitsAllocated - ds.BitsStored  # these bits may hold an overlay, or lack the sign
    if unused:
        pixels = pixels << unused >> unused
    padding = _padding(pixels, ds, name)
    body = pixels if padding is None else pixels[~padding]
    if not body.size:
        raise DataError(f"{name}: the DICOM file declares all of its pixels as padding (PixelPaddingValue)")
    if ds.BitsStored <= 8:
        lowest = -(1 << ds.BitsStored - 1) if ds.PixelRepresentation else 0
        highest = lowest + (1 << ds.BitsStored) - 1
    else:
        lowest, highest = int(body.min()), int(body.max())
    shades = _shades(np.arange(lowest, highest + 1), ds, name)
    if ds.PhotometricInterpretation == "MONOCHROME1":
        shades = 255 - shades
    image = shades[np.clip(pixels.astype(np.int32), lowest, highest) - lowest]
    if padding is not None:
        image[padding] = 0
    return image


def _padding(pixels: np.ndarray, ds, name: str) -> np.ndarray | None:
    """Mask (H, W) of the padding pixels; None if the file declares no padding.

    Source: DICOM PS3.3 C.7.5.1.1.2; the range includes its limit.
    """
    values = _numbers(ds, "PixelPaddingValue", name)
    if not values:
        return None
    values += _numbers(ds, "PixelPaddingRangeLimit", name)
    if len(values) > 2 or any(value != int(value) for value in values):
        raise DataError(f"{name}: the DICOM file's PixelPaddingValue or PixelPaddingRangeLimit is not one whole number")
    # Files often give a signed value as an unsigned one: only the stored bits count, as in the pixels.
    modulus = 1 << ds.BitsStored
    bits = [int(value) % modulus for value in values]
    if ds.PixelRepresentation:
        bits = [value - modulus if value >= modulus // 2 else value for value in bits]
    return (pixels >= min(bits)) & (pixels <= max(bits))


def _shades(values: np.ndarray, ds, name: str) -> np.ndarray:
    """Grey value 0..255, uint8, of each stored value; `values` is an ascending range."""
    rescale, voi = _of_frame(ds, "PixelValueTransformationSequence"), _of_frame(ds, "FrameVOILUTSequence")
    if ds.get("ModalityLUTSequence"):
        x = _functions().apply_modality_lut(values, ds).astype(np.float64)
    else:
        (slope,) = _numbers(rescale, "RescaleSlope", name) or [1.0]
        (intercept,) = _numbers(rescale, "RescaleIntercept", name) or [0.0]
        x = values * slope + intercept
    centers, widths = _numbers(voi, "WindowCenter", name), _numbers(voi, "WindowWidth", name)
    if centers and widths:  # several windows are alternatives, the first is the default
        share = window(x, centers[0], widths[0], voi.get("VOILUTFunction") or "LINEAR", name)
    elif voi.get("VOILUTSequence"):
        share = _voi_lut(x, voi.VOILUTSequence[0])
    else:
        share = (x - x.min()) / max(x.max() - x.min(), 1e-9)
    return np.rint(np.clip(share, 0, 1) * 255).astype(np.uint8)


def _of_frame(ds, macro: str):
    """The data set that holds the frame's attributes: its functional group, else the shared one, else the file."""
    for groups in ("PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence"):
        for group in ds.get(groups) or ():
            if group.get(macro):
                return group[macro][0]
    return ds


def _voi_lut(x: np.ndarray, item) -> np.ndarray:
    """The VOI LUT: values -> 0 (black) to 1 (white); values outside the table use its first or last entry.

    pydicom's function wraps around if a table with 8-bit entries is longer than 256.
    """
    count, first, bits = item.LUTDescriptor
    table = item.LUTData
    if isinstance(table, bytes):
        table = np.frombuffer(table, np.uint8 if len(table) <= (count or 65536) + 1 and bits <= 8 else "<u2")
    table = np.asarray(table)[: count or 65536]
    return table[np.clip(x.astype(np.int64) - first, 0, len(table) - 1)] / (2.0**bits - 1)


def window(x: np.ndarray, center: float, width: float, function: str, name: str) -> np.ndarray:
    """The VOI window: values -> 0 (black) to 1 (white); the linear functions exceed both, and the caller clips them.

    Source: DICOM PS3.3 C.11.2.1.2.1 and C.11.2.1.3.
    """
    if function not in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        raise DataError(f"{name}: the DICOM file's VOILUTFunction is none of LINEAR, LINEAR_EXACT, SIGMOID")
    if width < (1 if function == "LINEAR" else 1e-9):
        raise DataError(f"{name}: the DICOM file's WindowWidth is {width:g}", expected="at least 1 (LINEAR), above 0")
    if function == "LINEAR":
        if width == 1:
            return (x > center - 0.5).astype(np.float64)
        return (x - (center - 0.5)) / (width - 1) + 0.5
    if function == "LINEAR_EXACT":
        return (x - center) / width + 0.5
    return 1 / (1 + np.exp(np.clip(-4 * (x - center) / width, -700, 700)))


def _numbers(ds, attribute: str, name: str) -> list[float]:
    """The numbers of an attribute; [] if it is absent or empty."""
    value = ds.get(attribute)
    if value is None or value == "":
        return []
    numbers = [float(value)] if isinstance(value, (int, float)) else [float(item) for item in value]
    if not all(math.isfinite(number) and abs(number) < 1e15 for number in numbers):
        raise DataError(f"{name}: the DICOM file's {attribute} is not a finite number")
    return numbers


def _rgb(pixels: np.ndarray, ds, name: str) -> np.ndarray:
    """RGB (H, W, 3), or palette indices (H, W) -> uint8 (H, W, 3)."""
    if ds.PhotometricInterpretation != "PALETTE COLOR":
        return pixels
    if "RedPaletteColorLookupTableData" not in ds:  # a segmented palette may expand to any size
        raise DataError(f"{name}: the DICOM file has no readable palette", fix="export it as RGB")
    coloured = _functions().apply_color_lut(pixels, ds)[..., :3]
    return coloured if coloured.dtype == np.uint8 else (coloured >> 8).astype(np.uint8)


# --- pydicom 2 (Python 3.9) and 3 ------------------------------------------------------------------


def _pydicom(name: str):
    try:
        import pydicom
    except ImportError:
        raise DataError(f"{name}: pydicom is not installed (it reads DICOM)", fix="pip install pydicom") from None
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)  # see `_quiet`
    return pydicom


def _decodes_to_rgb() -> bool:
    """Whether `pixel_array` converts YBR to RGB: pydicom 3 does."""
    import pydicom

    return int(pydicom.__version__.split(".")[0]) >= 3


def _functions():
    """The module of apply_modality_lut, apply_color_lut and convert_color_space."""
    return importlib.import_module("pydicom.pixels" if _decodes_to_rgb() else "pydicom.pixel_data_handlers.util")


def _can_decode(syntax) -> bool:
    """Whether a decoder for a transfer syntax is installed."""
    import pydicom

    if _decodes_to_rgb():
        try:
            return pydicom.pixels.get_decoder(syntax).is_available
        except NotImplementedError:
            return False
    handlers = [handler for handler in pydicom.config.pixel_data_handlers if handler.supports_transfer_syntax(syntax)]
    return any(handler.is_available() for handler in handlers)
