"""Stored values of a DICOM image -> uint8: padding, modality LUT, VOI window or LUT, palette; steps as in `dicom`."""

from __future__ import annotations

import importlib
import math

import numpy as np

from paddle_medcls.core.errors import DataError


def grey(pixels: np.ndarray, ds, name: str) -> np.ndarray:
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
        x = functions().apply_modality_lut(values, ds).astype(np.float64)
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
    count, first_value, bits = item.LUTDescriptor
    table = item.LUTData
    if isinstance(table, bytes):
        table = np.frombuffer(table, np.uint8 if len(table) <= (count or 65536) + 1 and bits <= 8 else "<u2")
    table = np.asarray(table)[: count or 65536]
    return table[np.clip(x.astype(np.int64) - first_value, 0, len(table) - 1)] / (2.0**bits - 1)


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


def rgb(pixels: np.ndarray, ds, name: str) -> np.ndarray:
    """RGB (H, W, 3), or palette indices (H, W) -> uint8 (H, W, 3)."""
    if ds.PhotometricInterpretation != "PALETTE COLOR":
        return pixels
    if "RedPaletteColorLookupTableData" not in ds:  # a segmented palette may expand to any size
        raise DataError(f"{name}: the DICOM file has no readable palette", fix="export it as RGB")
    coloured = functions().apply_color_lut(pixels, ds)[..., :3]
    return coloured if coloured.dtype == np.uint8 else (coloured >> 8).astype(np.uint8)


def decodes_to_rgb() -> bool:
    """Whether `pixel_array` converts YBR to RGB: pydicom 3 does."""
    import pydicom

    return int(pydicom.__version__.split(".")[0]) >= 3


def functions():
    """The module of apply_modality_lut, apply_color_lut and convert_color_space."""
    return importlib.import_module("pydicom.pixels" if decodes_to_rgb() else "pydicom.pixel_data_handlers.util")
