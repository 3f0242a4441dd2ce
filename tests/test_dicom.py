"""DICOM decoding: windows calculated by hand from the standard, kinds of pixels, faulty files, all commands alike."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import toynet  # noqa: F401  its networks
from fakes import ROOT, pixels, within, write_image
from PIL import Image, features

pydicom = pytest.importorskip("pydicom", reason="pydicom is not installed: pip install -e '.[dicom]'")

from pydicom.dataset import Dataset, FileMetaDataset  # noqa: E402
from pydicom.encaps import encapsulate  # noqa: E402
from pydicom.filewriter import write_file_meta_info  # noqa: E402
from pydicom.sequence import Sequence  # noqa: E402

from paddle_medcls.core.errors import DataError  # noqa: E402
from paddle_medcls.core.paddle_setup import paddle  # noqa: E402
from paddle_medcls.data.decode import decode_image, image_mode, image_size, read_image  # noqa: E402
from paddle_medcls.data.dicom import _can_decode  # noqa: E402
from paddle_medcls.data.dicom_display import window  # noqa: E402
from paddle_medcls.data.image_files import expand  # noqa: E402
from paddle_medcls.deployment.predictor import PaddleNetwork, Predictor  # noqa: E402
from paddle_medcls.models.network import Network  # noqa: E402
from paddle_medcls.models.sidecar import Sidecar  # noqa: E402
from paddle_medcls.preprocessing.transforms import Preprocessing  # noqa: E402

EXPLICIT, IMPLICIT = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2"
DEFLATED, JPEG, JPEG2000 = EXPLICIT + ".99", "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.90"
LOSSLESS, RLE = "1.2.840.10008.1.2.4.70", "1.2.840.10008.1.2.5"
PATIENT = "Mustermann^Erika"


def dicom(stored: np.ndarray | bytes, syntax: str = EXPLICIT, **attributes: object) -> bytes:
    """A DICOM file; attributes default to those of the stored values, None omits one."""
    ds = Dataset()
    if isinstance(stored, np.ndarray):
        ds.Rows, ds.Columns = stored.shape[:2]
        ds.SamplesPerPixel = stored.shape[2] if stored.ndim == 3 else 1
        ds.BitsAllocated = ds.BitsStored = 8 * stored.itemsize
        ds.PixelRepresentation = int(stored.dtype.kind == "i")
        ds.PhotometricInterpretation = "RGB" if stored.ndim == 3 else "MONOCHROME2"
        if stored.ndim == 3:
            ds.PlanarConfiguration = 0
        data = stored.tobytes()
    else:
        data = stored
    ds.PixelData = data + b"\0" * (len(data) % 2)
    ds["PixelData"].VR = "OW" if syntax == IMPLICIT or ds.get("BitsAllocated", 8) > 8 else "OB"
    ds["PixelData"].is_undefined_length = syntax.startswith("1.2.840.10008.1.2.4") or syntax == RLE
    ds.PatientName = PATIENT
    ds.SOPClassUID, ds.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.7", "1.2.3"
    for name, value in attributes.items():
        if value is not None:
            setattr(ds, name, value)
        elif name in ds:
            del ds[name]
    if "BitsStored" in ds and "HighBit" not in attributes:
        ds.HighBit = max(0, ds.BitsStored - 1)
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = syntax
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = ds.SOPClassUID, ds.SOPInstanceUID
    meta.FileMetaInformationVersion, meta.ImplementationClassUID = b"\0\1", "1.2.3.4"
    file, body = io.BytesIO(), io.BytesIO()
    file.write(bytes(128) + b"DICM")
    write_file_meta_info(file, meta)
    body = pydicom.filebase.DicomFileLike(io.BytesIO())
    body.is_little_endian, body.is_implicit_VR = True, syntax == IMPLICIT
    pydicom.filewriter.write_dataset(body, ds)
    content = body.parent.getvalue()
    if syntax == DEFLATED:
        packer = zlib.compressobj(9, zlib.DEFLATED, -15)
        content = packer.compress(content) + packer.flush()
    return file.getvalue() + content


def framed(data: bytes, **attributes: object) -> bytes:
    """A compressed frame as a DICOM file."""
    return dicom(encapsulate([data]), **attributes)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def grey(data: bytes) -> np.ndarray:
    return decode_image(data, "scan.dcm", "gray")[:, :, 0]


def shades(values: list[int], kind: type = np.int16, **attributes: object) -> list[int]:
    return grey(dicom(np.array([values], kind), **attributes))[0].tolist()


# --- windows ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "center", "width", "values", "expected"),
    [
        # PS3.3 C.11.2.1.2.1, the note's examples: y = ((x - 2047.5) / 4095 + 0.5) * 255, and so on
        ("LINEAR", 2048, 4096, [-1, 0, 1024, 2048, 4095, 4096], [0, 0, 64, 128, 255, 255]),
        ("LINEAR", 2048, 1, [2047, 2048, 2049], [0, 255, 255]),
        ("LINEAR", 0, 100, [-51, -50, -25, 0, 24, 49, 50], [0, 0, 64, 129, 191, 255, 255]),
        ("LINEAR", 0, 1, [-1, 0, 1], [0, 255, 255]),
        # C.11.2.1.3.2: y = ((x - c) / w + 0.5) * 255
        ("LINEAR_EXACT", 2048, 4096, [0, 1024, 2048, 3072, 4096], [0, 64, 128, 191, 255]),
        ("LINEAR_EXACT", 0, 100, [-50, -25, 0, 10, 50], [0, 64, 128, 153, 255]),
        # C.11.2.1.3.1: y = 255 / (1 + exp(-4 (x - c) / w)); at c + w/4 it is 255 / (1 + 1/e)
        ("SIGMOID", 0, 100, [-32768, -25, 0, 25, 32767], [0, 69, 128, 186, 255]),
    ],
)
def test_windows_by_hand(function: str, center: int, width: int, values: list, expected: list) -> None:
    found = shades(values, WindowCenter=center, WindowWidth=width, VOILUTFunction=function)
    assert found == expected


def test_the_default_function_is_linear_and_the_first_window_is_used() -> None:
    assert shades([-50, 0, 49], WindowCenter=[0, 500], WindowWidth=[100, 7]) == [0, 129, 255]


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
def test_windows_are_pydicoms(function: str) -> None:
    """Against pydicom's own window, on signed 16 bit without a rescale: its range is that of the type."""
    if pydicom.__version__ >= "3":
        from pydicom.pixels import apply_windowing
    else:
        from pydicom.pixel_data_handlers.util import apply_windowing
    ds = Dataset()
    ds.PhotometricInterpretation, ds.BitsStored, ds.PixelRepresentation = "MONOCHROME2", 16, 1
    ds.WindowCenter, ds.WindowWidth, ds.VOILUTFunction = 300.5, 801.0, function
    x = np.arange(-2000, 2000, 7)
    expected = (apply_windowing(x.astype(np.int16), ds) + 32768) / 65535
    np.testing.assert_allclose(window(x, 300.5, 801.0, function, "").clip(0, 1), expected, atol=1e-9)


def test_rescale_comes_before_the_window() -> None:
    """Stored 1024 with slope 2 and intercept -2048 is 0: the middle of a window about 0."""
    found = shades(
        [999, 1024, 1049], RescaleSlope=2, RescaleIntercept=-2048, WindowCenter=0.5, WindowWidth=101, VOILUTFunction=""
    )
    assert found == [0, 128, 255]


def test_modality_lut_and_voi_lut() -> None:
    """Stored 0..3 -> modality 10, 20, 30, 40 -> VOI LUT from 10 on, in steps of ten: 0, 51, 204, 255."""

    def lut(first: int, values: list[int]) -> Dataset:
        item = Dataset()
        item.LUTDescriptor, item.LUTData = [len(values), first, 8], values
        item["LUTDescriptor"].VR, item["LUTData"].VR = "US", "US"
        return item

    modality = lut(0, [10, 20, 30, 40])
    modality.ModalityLUTType = "US"
    steps = [0] * 10 + [51] * 10 + [204] * 10 + [255]
    found = shades(
        [0, 1, 2, 3], np.uint8, ModalityLUTSequence=Sequence([modality]), VOILUTSequence=Sequence([lut(10, steps)])
    )
    assert found == [0, 51, 204, 255]
    assert shades([0, 128], np.uint8, VOILUTSequence=Sequence([lut(0, [255] * 256)])) == [255, 255]


def test_a_voi_lut_longer_than_its_entries_are_wide() -> None:
    """1024 entries of 8 bits, as words and packed into bytes: pydicom's lookup wraps around at 256."""
    table = np.arange(1024) // 4
    for data in (table.astype("<u2").tobytes(), table.astype(np.uint8).tobytes()):
        item = Dataset()
        item.LUTDescriptor, item.LUTData = [1024, 100, 8], data
        item["LUTDescriptor"].VR, item["LUTData"].VR = "US", "OW"
        found = shades([0, 100, 612, 1123, 4000], VOILUTSequence=Sequence([item]))
        assert found == [0, 0, 128, 255, 255]


# --- padding ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "padding", "stored"),
    [(np.uint16, 65535, 65535), (np.int16, -2000, -2000), (np.int16, 63536, -2000), (np.int16, -32768, -32768)],
)
def test_padding_is_black_and_not_part_of_the_range(kind: type, padding: int, stored: int) -> None:
    """The body spans black to white as without padding; a signed value may be written as an unsigned one."""
    values = {"SmallestImagePixelValue": None}
    body = [0, 1000, 4000]
    assert shades(body, kind) == [0, 64, 255]
    found = shades([stored, *body, stored], kind, PixelPaddingValue=_stored(padding, kind), **values)
    assert found == [0, 0, 64, 255, 0]
    inverted = {"PhotometricInterpretation": "MONOCHROME1", "PixelPaddingValue": _stored(padding, kind)}
    assert shades([stored, *body], kind, **inverted) == [0, 255, 191, 0]


def _stored(value: int, kind: type) -> int:
    return int(np.array(value & 0xFFFF, np.uint16).view(kind))


def test_a_range_of_padding_includes_both_ends() -> None:
    attributes = {"PixelPaddingValue": -2000, "PixelPaddingRangeLimit": -1998}
    assert shades([-2000, -1999, -1998, -1997, 3], **attributes) == [0, 0, 0, 0, 255]
    attributes = {"PixelPaddingValue": 100, "PixelPaddingRangeLimit": 90}
    assert shades([90, 95, 100, 0, 200], **attributes) == [0, 0, 0, 0, 255]


def test_padding_under_a_window_and_of_eight_and_twelve_bits() -> None:
    window = {"WindowCenter": 0, "WindowWidth": 1, "PixelPaddingValue": 500}
    assert shades([-5, 5, 500], **window) == [0, 255, 0]
    assert shades([7, 9, 255], np.uint8, PixelPaddingValue=255) == [7, 9, 0]
    stored = np.array([[0xF830, 0, 100]], np.uint16).view(np.int16)  # -2000 in 12 bits, an overlay above it
    found = grey(dicom(stored, BitsStored=12, PixelPaddingValue=-2000))
    assert found[0].tolist() == [0, 0, 255]


def test_without_padding_in_the_picture_nothing_changes() -> None:
    image = np.random.default_rng(0).integers(0, 4096, (9, 7)).astype(np.uint16)
    np.testing.assert_array_equal(grey(dicom(image, PixelPaddingValue=65535)), grey(dicom(image)))


# --- enhanced files of one frame -------------------------------------------------------------------


def group(**macros: Dataset) -> Sequence:
    item = Dataset()
    for name, attributes in macros.items():
        setattr(item, name, Sequence([attributes]))
    return Sequence([item])


def attributes(**values: object) -> Dataset:
    item = Dataset()
    for name, value in values.items():
        setattr(item, name, value)
    return item


RESCALE = attributes(RescaleSlope=2, RescaleIntercept=-2048, RescaleType="HU")
WINDOW = attributes(WindowCenter=0.5, WindowWidth=101)
OTHER = attributes(WindowCenter=5000, WindowWidth=7)
SHARED, OWN = "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"


@pytest.mark.parametrize(
    "groups",
    [
        {SHARED: group(PixelValueTransformationSequence=RESCALE, FrameVOILUTSequence=WINDOW)},
        {OWN: group(PixelValueTransformationSequence=RESCALE, FrameVOILUTSequence=WINDOW)},
        {
            SHARED: group(PixelValueTransformationSequence=RESCALE, FrameVOILUTSequence=OTHER),
            OWN: group(FrameVOILUTSequence=WINDOW),
        },
        {
            SHARED: group(PixelValueTransformationSequence=RESCALE),
            OWN: group(FrameVOILUTSequence=WINDOW),
            "WindowCenter": 5000,
            "WindowWidth": 7,
        },
    ],
    ids=["shared", "of the frame", "the frame's goes before the shared", "the frame's goes before the file's"],
)
def test_window_and_rescale_of_functional_groups(groups: dict) -> None:
    """The same as in `test_rescale_comes_before_the_window`, where both are in the file itself."""
    assert shades([999, 1024, 1049], NumberOfFrames=1, **groups) == [0, 128, 255]


# --- pydicom's own files, against pydicom's own functions ------------------------------------------


def pydicoms_files() -> list[Path]:
    """The test files in pydicom's wheel that contain one grey image of a supported kind."""
    from pydicom import data

    found = []
    for path in sorted((Path(data.__path__[0]) / "test_files").glob("*.dcm")):
        try:
            read_image(path)
        except DataError:
            continue
        if pydicom.dcmread(path).PhotometricInterpretation.startswith("MONOCHROME"):
            found.append(path)
    return found


def expected_shades(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """pydicom's result, 0..255, not rounded; and the mask of padding, which pydicom does not apply."""
    if pydicom.__version__ >= "3":
        from pydicom.pixels import apply_modality_lut, apply_voi_lut
    else:
        from pydicom.pixel_data_handlers.util import apply_modality_lut, apply_voi_lut
    ds = pydicom.dcmread(path)
    x = apply_modality_lut(ds.pixel_array, ds).astype(np.float64)
    padding = ds.pixel_array == ds.get("PixelPaddingValue", 1e9)
    body = x[~padding]
    if "WindowCenter" in ds:
        ends = apply_voi_lut(np.array([-1e12, 1e12]), ds, prefer_lut=False)
        low, high = float(ends[0]), float(ends[1])
        shade = (apply_voi_lut(x, ds, prefer_lut=False) - low) / (high - low)
    elif ds.BitsStored <= 8:
        lowest = -(1 << ds.BitsStored - 1) if ds.PixelRepresentation else 0
        ends = apply_modality_lut(np.array([lowest, lowest + (1 << ds.BitsStored) - 1]), ds)
        shade = (x - float(ends[0])) / float(ends[1] - ends[0])
    else:
        shade = (x - body.min()) / max(body.max() - body.min(), 1e-9)
    return 255 * (1 - shade if ds.PhotometricInterpretation == "MONOCHROME1" else shade), padding


@pytest.mark.filterwarnings("ignore")  # pydicom's, of oddities in its own test files
def test_grey_images_equal_pydicoms() -> None:
    files = pydicoms_files()
    assert len(files) >= 8
    for path in files:
        found = read_image(path, "gray")[:, :, 0].astype(float)
        expected, padding = expected_shades(path)
        assert not found[padding].any()
        assert np.abs(found - expected)[~padding].max() <= 1, path.name


@pytest.mark.data
def test_real_radiographs_equal_pydicoms(real_data: Path) -> None:
    files = sorted((real_data / "dicom_chest").glob("*.dcm"))
    assert files
    for path in files:
        found = read_image(path, "gray")[:, :, 0].astype(float)
        assert np.abs(found - expected_shades(path)[0]).max() <= 1, path.name


# --- kinds of pixels -------------------------------------------------------------------------------


def test_eight_bits_without_a_window_stay_as_they_are() -> None:
    image = pixels(1)[:, :, 0]
    assert image.min() > 0 and image.max() < 255
    np.testing.assert_array_equal(grey(dicom(image)), image)
    np.testing.assert_array_equal(grey(dicom(image, IMPLICIT)), image)


def test_deeper_pixels_without_a_window_span_black_to_white() -> None:
    assert shades([-1000, 0, 1000, 3000]) == [0, 64, 128, 255]
    assert shades([5, 5]) == [0, 0]
    assert shades([1000, 3000, 5000], np.uint16, RescaleSlope=-1, RescaleIntercept=0) == [255, 128, 0]


def test_monochrome1_is_monochrome2_inverted() -> None:
    image = np.random.default_rng(0).integers(0, 4096, (9, 7)).astype(np.uint16)
    for attributes in ({}, {"WindowCenter": 1000, "WindowWidth": 700}):
        light = grey(dicom(image, BitsStored=12, **attributes))
        dark = grey(dicom(image, BitsStored=12, PhotometricInterpretation="MONOCHROME1", **attributes))
        np.testing.assert_array_equal(dark, 255 - light)


def test_twelve_bits_signed_in_sixteen() -> None:
    """Without their sign in the four unused bits, as the standard wants, and with an overlay in them."""
    for clutter in (0x0000, 0xF000):
        stored = np.array([[-2048 & 0xFFF, -1 & 0xFFF, 0, 2047]], np.uint16) | clutter
        data = dicom(stored.view(np.int16), BitsStored=12, WindowCenter=0, WindowWidth=4096)
        assert grey(data)[0].tolist() == [0, 127, 128, 255]


def test_colour_is_rgb_in_either_plane_order() -> None:
    image = pixels(2)
    planes = dicom(np.ascontiguousarray(image.transpose(2, 0, 1)).tobytes(), **_shape(image, PlanarConfiguration=1))
    for data in (dicom(image), planes):
        np.testing.assert_array_equal(decode_image(data, "c", "rgb"), image)
        np.testing.assert_array_equal(decode_image(data, "c", "bgr"), image[:, :, ::-1])
        np.testing.assert_array_equal(grey(data), cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))


def _shape(image: np.ndarray, **more: object) -> dict:
    values = {"Rows": image.shape[0], "Columns": image.shape[1], "SamplesPerPixel": 3 if image.ndim == 3 else 1}
    values |= {"BitsAllocated": 8, "BitsStored": 8, "PixelRepresentation": 0}
    values |= {"PhotometricInterpretation": "RGB", "PlanarConfiguration": 0} if image.ndim == 3 else {}
    return {**values, **more}


def test_ybr_is_converted() -> None:
    image = pixels(3)
    r, g, b = np.moveaxis(image.astype(float), -1, 0)
    y = 0.299 * r + 0.587 * g + 0.114 * b  # PS3.3 C.7.6.3.1.2
    cb, cr = 128 + 0.564334 * (b - y), 128 + 0.713267 * (r - y)
    ybr = np.rint(np.clip(np.stack([y, cb, cr], -1), 0, 255)).astype(np.uint8)
    full = decode_image(dicom(ybr, PhotometricInterpretation="YBR_FULL"), "y", "rgb")
    assert np.abs(full.astype(int) - image).max() <= 2
    halved = np.stack([ybr[:, ::2, 0], ybr[:, 1::2, 0], ybr[:, ::2, 1], ybr[:, ::2, 2]], -1).tobytes()
    part = decode_image(dicom(halved, **_shape(image, PhotometricInterpretation="YBR_FULL_422")), "y", "rgb")
    assert np.abs(part.astype(int) - image).mean() < 3


@pytest.mark.parametrize("bits", [8, 16])
def test_palette(bits: int) -> None:
    rng = np.random.default_rng(0)
    table = rng.integers(0, 2**bits, (3, 256)).astype(np.uint8 if bits == 8 else np.uint16)
    image = rng.integers(0, 256, (5, 6)).astype(np.uint8)
    attributes: dict = {"PhotometricInterpretation": "PALETTE COLOR"}
    for name, values in zip(("Red", "Green", "Blue"), table):
        attributes[f"{name}PaletteColorLookupTableDescriptor"] = [256, 0, bits]
        attributes[f"{name}PaletteColorLookupTableData"] = values.tobytes()
    expected = np.moveaxis(table[:, image] >> (bits - 8), 0, -1)
    np.testing.assert_array_equal(decode_image(dicom(image, **attributes), "p", "rgb"), expected)


def test_compressed_frames() -> None:
    image = Image.fromarray(pixels(4, size=64))
    jpeg = saved(image, "JPEG", quality=95)
    expected = decode_image(jpeg, "jpeg", "rgb").astype(int)
    colour = _shape(pixels(4, size=64), PhotometricInterpretation="YBR_FULL_422")
    found = decode_image(framed(jpeg, syntax=JPEG, **colour), "c", "rgb")
    assert np.abs(found - expected).mean() < 2
    flat = _shape(pixels(4, size=64)[:, :, 0], PhotometricInterpretation="MONOCHROME2")
    jpeg = saved(image.convert("L"), "JPEG", quality=95)
    found = grey(framed(jpeg, syntax=JPEG, **flat))
    assert np.abs(found.astype(int) - decode_image(jpeg, "jpeg", "gray")[:, :, 0]).mean() < 1
    if features.check_codec("jpg_2000"):
        lossless = saved(image.convert("L"), "JPEG2000", no_jp2=True)
        np.testing.assert_array_equal(grey(framed(lossless, syntax=JPEG2000, **flat)), np.asarray(image.convert("L")))


@pytest.mark.parametrize("kind", ["YBR_FULL_422", "RGB"])
@pytest.mark.parametrize("says", ["by Adobe's marker", "by its component numbers", "not"])
def test_jpeg_colours_for_every_declaration_of_the_colour_space(kind: str, says: str) -> None:
    image = Image.fromarray(pixels(4, size=64))
    jpeg = saved(image, "JPEG", quality=95, keep_rgb=kind == "RGB")
    adobe = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + (b"\0" if kind == "RGB" else b"\1")
    assert (adobe in jpeg) == (kind == "RGB")
    jpeg = jpeg.replace(adobe, b"")
    if says == "by Adobe's marker":
        jpeg = jpeg[:2] + adobe + jpeg[2:]
    if says == "not" and kind == "RGB":  # components 1, 2, 3 in place of R, G, B, in the frame and in the scan
        for number, letter in enumerate(b"RGB", start=1):
            for table in (b"\x11\x00", b"\x00"):
                jpeg = jpeg.replace(bytes([letter]) + table, bytes([number]) + table, 1)
    data = framed(jpeg, syntax=JPEG, **_shape(pixels(4, size=64), PhotometricInterpretation=kind))
    assert np.abs(decode_image(data, "c", "rgb").astype(int) - np.asarray(image)).mean() < 3


def test_mode_and_size(tmp_path: Path) -> None:
    path = tmp_path / "scan"
    path.write_bytes(dicom(np.zeros((3, 5), np.uint16), BitsStored=12))
    assert image_mode(path) == "MONOCHROME2 12 bit"
    assert image_size(path.read_bytes(), "scan") == (5, 3)


# --- all commands alike ----------------------------------------------------------------------------


def test_the_content_decides_and_folders_are_searched_for_both_suffixes(tmp_path: Path) -> None:
    image = pixels(5)
    for name in ("a.png", "b.dcm", "c.DICOM"):
        (tmp_path / name).write_bytes(dicom(image))
        np.testing.assert_array_equal(read_image(tmp_path / name, "rgb"), image)
    write_image(tmp_path / "d.png", image).rename(tmp_path / "d.dcm")
    np.testing.assert_array_equal(read_image(tmp_path / "d.dcm", "rgb"), image)
    assert len(expand([str(tmp_path)])) == 4


@pytest.mark.parametrize("channels", ["bgr", "gray"])
def test_probabilities_are_those_of_the_same_picture_as_png(tmp_path: Path, channels: str) -> None:
    predictor = toy_predictor(channels)
    image = pixels(6, size=48)[:, :, 0]
    write_image(tmp_path / "a.png", image)
    (tmp_path / "b.dcm").write_bytes(dicom(image))
    deep = image.astype(np.int16) * 16 - 2000
    window = {"WindowCenter": 0.5 * 255 * 16 - 2000, "WindowWidth": 255 * 16, "VOILUTFunction": "LINEAR_EXACT"}
    (tmp_path / "c.dcm").write_bytes(dicom(deep, **window))
    inverted = 255 - image
    (tmp_path / "d.dcm").write_bytes(dicom(inverted, PhotometricInterpretation="MONOCHROME1"))
    found = predictor.predict_decoded(sorted(tmp_path.iterdir()))
    png, *others = [list(prediction.probabilities.values()) for *_, prediction in found]
    assert 0 < png[0] < 1
    for probs in others:
        np.testing.assert_array_equal(probs, png)


def toy_predictor(channels: str) -> Predictor:
    paddle.seed(0)
    count = 1 if channels == "gray" else 3
    network = Network("toy", 1, count)
    spec = Preprocessing(32, channels=channels, mean=(127.5,) * count, std=(127.5,) * count)
    sidecar = Sidecar("palm", "toy", ("normal", "pathologic"), "binary", "sigmoid", network, spec)
    return Predictor(sidecar, PaddleNetwork(network.build()))


# --- faults ----------------------------------------------------------------------------------------

IMAGE = pixels(7)[:, :, 0]
PHOTO = saved(Image.fromarray(pixels(7, size=64)).convert("L"), "JPEG")


def faults() -> dict[str, bytes]:
    """Faulty and hostile DICOM files, by their fault; tests/test_hostile_table.py uses them too."""
    valid = dicom(IMAGE)
    flat = _shape(pixels(7, size=64)[:, :, 0], PhotometricInterpretation="MONOCHROME2")
    deep = IMAGE.astype(np.uint16)
    rle = dict(_shape(IMAGE, PhotometricInterpretation="MONOCHROME2"), syntax=RLE)
    segmented = {f"{c}PaletteColorLookupTableDescriptor": [256, 0, 8] for c in ("Red", "Green", "Blue")}
    segmented |= {f"Segmented{c}PaletteColorLookupTableData": b"\1\xff\xff\xff" * 64 for c in ("Red", "Green", "Blue")}
    nested = b"\x08\x00\x15\x11SQ\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff" * 5000
    giant = valid.replace(b"OB\0\0" + len(IMAGE.tobytes()).to_bytes(4, "little"), b"OB\0\0\xfe\xff\xff\xff")
    assert giant != valid
    return {
        "the magic alone": bytes(128) + b"DICM",
        "DICOM, half of it": valid[: len(valid) // 2],
        "DICOM, 10 bytes of pixels missing": valid[:-10],
        "DICOM, cut in the header": valid[:200],
        "DICOM whose pixels claim 4 GB": giant[:-10],
        "DICOM with sequences nested 5,000 deep": valid[: valid.index(b"\x28\x00")] + nested,
        "DICOM of 12 frames": dicom(np.zeros((48, 4), np.uint8), Rows=4, NumberOfFrames=12),
        "DICOM without pixel data": dicom(IMAGE, PixelData=None),
        "a DICOM report": dicom(b"", Rows=None, PhotometricInterpretation=None, PixelData=None),
        "DICOM of 65,535 x 65,535 pixels": dicom(IMAGE, Rows=65535, Columns=65535),
        "DICOM with fewer pixels than Rows x Columns": dicom(IMAGE, Rows=1000),
        "DICOM, Rows 0": dicom(IMAGE, Rows=0),
        "DICOM without Columns": dicom(IMAGE, Columns=None),
        "DICOM, BitsAllocated 1": dicom(IMAGE, BitsAllocated=1, BitsStored=1),
        "DICOM, BitsAllocated 32": dicom(IMAGE, BitsAllocated=32),
        "DICOM, BitsStored 0": dicom(IMAGE, BitsStored=0),
        "DICOM, BitsStored 17 of 16": dicom(deep, BitsStored=17),
        "DICOM, HighBit 15 of 12": dicom(deep, BitsStored=12, HighBit=15),
        "DICOM, 4 samples a pixel": dicom(IMAGE, SamplesPerPixel=4),
        "DICOM, grey as RGB": dicom(IMAGE, PhotometricInterpretation="RGB"),
        "DICOM, PhotometricInterpretation HSV": dicom(IMAGE, PhotometricInterpretation="HSV"),
        "DICOM, WindowWidth 0": dicom(IMAGE, WindowCenter=10, WindowWidth=0),
        "DICOM, WindowCenter 1e400": dicom(IMAGE, WindowCenter="1e400", WindowWidth=10),
        "DICOM, RescaleSlope of two numbers": dicom(IMAGE, RescaleSlope=[1, 2], RescaleIntercept=0),
        "DICOM, VOILUTFunction CUBIC": dicom(IMAGE, WindowCenter=1, WindowWidth=9, VOILUTFunction="CUBIC"),
        "DICOM, a VOI LUT without data": dicom(IMAGE, VOILUTSequence=Sequence([Dataset()])),
        "DICOM, a palette of no colours": dicom(IMAGE, PhotometricInterpretation="PALETTE COLOR"),
        "DICOM, a segmented palette": dicom(IMAGE, PhotometricInterpretation="PALETTE COLOR", **segmented),
        "DICOM, deflated": dicom(IMAGE, DEFLATED),
        "DICOM, JPEG lossless without a decoder": framed(PHOTO, syntax=LOSSLESS, **flat),
        "DICOM, an unknown transfer syntax": dicom(IMAGE, "1.2.3.4.5"),
        "DICOM, all of it padding": dicom(np.full((8, 8), 7, np.uint16), PixelPaddingValue=7),
        "DICOM, padding of two values": dicom(deep, PixelPaddingValue=[1, 2, 3]),
        "DICOM, half a JPEG with an end marker": framed(PHOTO[: len(PHOTO) // 2] + b"\xff\xd9", syntax=JPEG, **flat),
        "DICOM, half a JPEG": framed(PHOTO[: len(PHOTO) // 2], syntax=JPEG, **flat),
        "DICOM, a JPEG of another size": framed(PHOTO, syntax=JPEG, **{**flat, "Rows": 32}),
        "DICOM, RLE of nonsense": framed(b"\xff" * 200, **rle),
    }


FAULTS = faults()


@pytest.mark.parametrize("kind", FAULTS)
def test_each_fault_is_one_error_without_the_patient(kind: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(DataError) as caught:
        within(20, lambda: decode_image(FAULTS[kind], "scan.dcm"))
    out, err = capsys.readouterr()
    assert "scan.dcm" in str(caught.value) and PATIENT not in str(caught.value) + out + err


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("DICOM of 12 frames", "12 frames"),
        ("DICOM without pixel data", "no pixel data"),
        ("a DICOM report", "no pixel data"),
        ("DICOM of 65,535 x 65,535 pixels", "65535 x 65535 pixels is too large"),
        ("DICOM, 10 bytes of pixels missing", "truncated"),
        ("DICOM, Rows 0", "Rows: 0; expected 1 to 65535"),
        ("DICOM, BitsAllocated 1", "BitsAllocated: 1; expected 8 or 16"),
        ("DICOM, WindowWidth 0", "WindowWidth is 0"),
        ("DICOM, JPEG lossless without a decoder", "JPEG Lossless.*[\n].*pip install pylibjpeg"),
    ],
)
def test_error_messages(kind: str, message: str) -> None:
    if "without a decoder" in kind:
        if _can_decode(pydicom.uid.UID(LOSSLESS)):
            pytest.skip("a decoder for JPEG lossless is installed")
    with pytest.raises(DataError, match=message):
        decode_image(FAULTS[kind], "scan.dcm")


def test_cuts_anywhere_are_refused() -> None:
    flat = _shape(pixels(7, size=64)[:, :, 0], PhotometricInterpretation="MONOCHROME2")
    whole = {"plain": dicom(IMAGE), "jpeg": framed(PHOTO, syntax=JPEG, **flat)}
    for kind, data in whole.items():
        decode_image(data, kind)
        for length in range(132, len(data) - 40, 37):
            with pytest.raises(DataError):
                decode_image(data[:length], kind)


def test_flipped_bytes_give_an_image_or_one_error() -> None:
    data = dicom(IMAGE, WindowCenter=100, WindowWidth=50, RescaleSlope=1, RescaleIntercept=0)
    header = data.index(b"\xe0\x7f\x10\x00")
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        hostile = bytearray(data)
        for at in rng.integers(132, header + 12, 3):
            hostile[at] = rng.integers(256)
        try:
            assert decode_image(bytes(hostile), "hostile").dtype == np.uint8
        except DataError:
            refused += 1
    assert 50 < refused < 300


def test_without_pydicom_the_error_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "scan.dcm").write_bytes(dicom(IMAGE))
    code = (
        "import sys; sys.modules['pydicom'] = None\n"
        "from paddle_medcls.data.decode import read_image\n"
        "from paddle_medcls.core.errors import DataError\n"
        "try:\n    read_image(sys.argv[1])\nexcept DataError as error:\n    print(error)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "scan.dcm")]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=60)
    assert "pydicom is not installed" in done.stdout and "pip install pydicom" in done.stdout, done.stderr
