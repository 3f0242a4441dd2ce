"""Image decoding and preprocessing, against hand-made files and the code of the tutorials."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from fakes import pixels, write_image
from PIL import Image, ImageOps

from paddle_medcls.core.errors import DataError, printable
from paddle_medcls.data import decode
from paddle_medcls.data.decode import decode_image, read_image, to_channels, write_png
from paddle_medcls.preprocessing.transforms import Preprocessing, fit, normalize, preprocess, unfit
from paddle_medcls.recipes import get_recipe


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


# --- decoded images --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP"])
def test_pure_red_stays_in_its_channel(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    data = saved(Image.new("RGB", (5, 4), (255, 0, 0)), kind, **options)
    assert decode_image(data, "red", "rgb").shape == (4, 5, 3)
    assert (decode_image(data, "red", "rgb") == (255, 0, 0)).all()
    assert (decode_image(data, "red", "bgr") == (0, 0, 255)).all()


def test_bgr_equals_cv2_imread(tmp_path: Path) -> None:
    path = write_image(tmp_path / "a.jpg", pixels(1, size=48))
    np.testing.assert_array_equal(read_image(path), cv2.imread(str(path)))
    np.testing.assert_array_equal(read_image(path, "rgb"), cv2.imread(str(path))[:, :, ::-1])


def test_grey_becomes_three_equal_channels() -> None:
    grey = noise(6, 7)[:, :, 0]
    data = saved(Image.fromarray(grey), "PNG")
    for channels in ("rgb", "bgr"):
        np.testing.assert_array_equal(decode_image(data, "grey", channels), np.repeat(grey[:, :, None], 3, 2))
    np.testing.assert_array_equal(decode_image(data, "grey", "gray"), grey[:, :, None])


def test_colour_read_as_grey_is_the_luma_of_rec_601() -> None:
    image = noise(6, 7)
    luma = image @ np.array([0.299, 0.587, 0.114])
    found = decode_image(saved(Image.fromarray(image), "PNG"), "colour", "gray")[:, :, 0]
    assert np.abs(found - luma).max() <= 1


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
@pytest.mark.parametrize("channels", ["gray", "rgb"])
def test_sixteen_bits_keep_the_high_byte(suffix: str, channels: str) -> None:
    deep = np.random.default_rng(0).integers(0, 65536, (8, 9), np.uint16)
    found = decode_image(cv2.imencode(suffix, deep)[1].tobytes(), "deep", channels)
    np.testing.assert_array_equal(found, np.repeat((deep >> 8).astype(np.uint8)[:, :, None], found.shape[2], 2))


def test_alpha_is_dropped_and_the_colour_under_it_kept() -> None:
    rgba = np.dstack([noise(5, 6), np.zeros((5, 6), np.uint8)])
    np.testing.assert_array_equal(decode_image(saved(Image.fromarray(rgba), "PNG"), "a", "rgb"), rgba[:, :, :3])


@pytest.mark.parametrize("transparency", [None, 3])
def test_palette_is_expanded(transparency: int | None) -> None:
    image = Image.fromarray(pixels(2)).quantize(8)
    options = {} if transparency is None else {"transparency": transparency}
    found = decode_image(saved(image, "PNG", **options), "palette", "rgb")
    np.testing.assert_array_equal(found, np.asarray(image.convert("RGB")))


def test_one_bit_is_black_and_white() -> None:
    bits = np.random.default_rng(0).random((9, 9)) < 0.5
    found = decode_image(saved(Image.fromarray(bits), "PNG"), "bits", "gray")[:, :, 0]
    np.testing.assert_array_equal(found, bits * np.uint8(255))


def test_cmyk_jpeg_is_converted_as_pillow_does() -> None:
    cmyk = Image.fromarray(pixels(3, size=64)).convert("CMYK")
    data = saved(cmyk, "JPEG", quality=95)
    with Image.open(io.BytesIO(data)) as again:
        expected = np.asarray(again.convert("RGB")).astype(int)
    assert np.abs(decode_image(data, "cmyk", "rgb") - expected).mean() < 3  # two decoders: 1 measured


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("channels", ["rgb", "gray"])
def test_exif_orientation_is_applied(orientation: int, channels: str) -> None:
    image = Image.fromarray(cv2.resize(pixels(4), (40, 24)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(image, "JPEG", quality=95, exif=exif)
    with Image.open(io.BytesIO(data)) as again:
        upright = ImageOps.exif_transpose(again)
        expected = np.asarray(upright if channels == "rgb" else upright.convert("L")).astype(int)
    found = decode_image(data, "turned", channels)
    assert found.shape[:2] == expected.shape[:2] == ((24, 40) if orientation < 5 else (40, 24))
    assert np.abs(found.squeeze() - expected).mean() < 2  # a wrong turn differs by 20 and more


def test_non_ascii_path(tmp_path: Path) -> None:
    path = write_image(tmp_path / "眼底 图像" / "Ünïcode ß.png", pixels(5))
    np.testing.assert_array_equal(read_image(path, "rgb"), pixels(5))


def test_the_name_does_not_decide_the_format(tmp_path: Path) -> None:
    data = write_image(tmp_path / "a.jpg", pixels(6)).read_bytes()
    (tmp_path / "b.png").write_bytes(data)
    np.testing.assert_array_equal(read_image(tmp_path / "b.png"), read_image(tmp_path / "a.jpg"))


# --- refused files ---------------------------------------------------------------------------------


def with_thumbnail(jpeg: bytes, thumbnail: bytes) -> bytes:
    """A JPEG with an EXIF segment that holds another complete JPEG, end marker included."""
    entries = struct.pack("<HHII", 0x0201, 4, 1, 8 + 6 + 2 + 24 + 4) + struct.pack(
        "<HHII", 0x0202, 4, 1, len(thumbnail)
    )
    tiff = b"II*\0" + struct.pack("<I", 8)  # header
    tiff += struct.pack("<HI", 0, 14)  # IFD0: no entries; IFD1 at 14
    tiff += struct.pack("<H", 2) + entries + struct.pack("<I", 0) + thumbnail
    segment = b"Exif\0\0" + tiff
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + jpeg[2:]


JPEGS = {
    "baseline": saved(Image.fromarray(noise(64, 64)), "JPEG"),
    "progressive": saved(Image.fromarray(noise(64, 64)), "JPEG", progressive=True),
    "restart markers": saved(Image.fromarray(noise(64, 64)), "JPEG", restart_marker_blocks=2),
    "thumbnail": with_thumbnail(
        saved(Image.fromarray(noise(64, 64)), "JPEG"), saved(Image.fromarray(pixels(7)), "JPEG")
    ),
}


@pytest.mark.parametrize("kind", JPEGS)
def test_a_truncated_jpeg_is_refused_and_a_complete_one_is_not(kind: str) -> None:
    data = JPEGS[kind]
    assert decode_image(data, "whole").shape == (64, 64, 3)
    assert decode_image(data + b"\0" * 100, "whole, with a tail as some cameras write it").shape == (64, 64, 3)
    for share in (0.3, 0.5, 0.7, 0.9, 0.99):
        cut = data[: int(len(data) * share)]
        with pytest.raises(DataError, match="half.jpg"):
            decode_image(cut, "half.jpg")
    assert b"\xff\xd9" in JPEGS["thumbnail"][: len(JPEGS["thumbnail"]) // 2]  # so a search for the marker is fooled


def replaced_middle(data: bytes, by: bytes) -> bytes:
    """A tenth of a file, from its middle on, overwritten."""
    start, length = len(data) // 2, len(data) // 10
    return data[:start] + (by * length)[:length] + data[start + length :]


PHOTO = Image.fromarray(cv2.resize(pixels(8, size=64), (150, 200), interpolation=cv2.INTER_CUBIC)).convert("RGB")
DAMAGED_JPEGS = {
    f"{kind}, {how}": harm(saved(PHOTO.convert(mode), "JPEG", quality=95, **options))
    for kind, mode, options in (
        ("baseline", "RGB", {}),
        ("grey", "L", {}),
        ("CMYK", "CMYK", {}),
        ("optimized", "RGB", {"optimize": True}),
        ("progressive", "RGB", {"progressive": True}),
        ("restart markers", "RGB", {"restart_marker_rows": 1}),
    )
    for how, harm in (
        ("half of it and an end marker", lambda data: data[: len(data) // 2] + b"\xff\xd9"),
        ("the last hundredth gone before the end marker", lambda data: data[: -len(data) // 100] + b"\xff\xd9"),
        ("zeros in the middle", lambda data: replaced_middle(data, b"\0")),
        ("0xFF in the middle", lambda data: replaced_middle(data, b"\xff")),
    )
}


@pytest.mark.parametrize("channels", ["rgb", "gray"])
@pytest.mark.parametrize("least_px", [0, 40])
@pytest.mark.parametrize("kind", DAMAGED_JPEGS)
def test_a_jpeg_that_lacks_data_before_its_end_marker_is_refused(kind: str, least_px: int, channels: str) -> None:
    with pytest.raises(DataError, match="damaged.jpg: the image is truncated or damaged"):
        decode_image(DAMAGED_JPEGS[kind], "damaged.jpg", channels, least_px)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_damaged_jpeg_is_refused_in_every_orientation(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(PHOTO, "JPEG", exif=exif)
    assert decode_image(data, "whole").size
    with pytest.raises(DataError, match="truncated or damaged"):
        decode_image(data[: len(data) // 2] + b"\xff\xd9", "half")


@pytest.mark.parametrize("options", [{}, {"optimize": True}, {"progressive": True}, {"restart_marker_rows": 1}])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("level", [0, 127, 128, 255])
def test_an_intact_jpeg_that_looks_damaged_is_accepted(level: int, mode: str, options: dict) -> None:
    """Uniform images, black ones with runs of zeros in the scan, and images that end in grey."""
    even = Image.new("RGB", (803, 601), (level,) * 3).convert(mode)
    assert decode_image(saved(even, "JPEG", **options), "even").shape == (601, 803, 3)
    even.paste(Image.fromarray(noise(300, 803)).convert(mode))
    assert decode_image(saved(even, "JPEG", **options), "half even").shape == (601, 803, 3)


@pytest.mark.data
def test_real_jpegs_are_accepted_and_halves_of_them_refused(real_data: Path) -> None:
    paths = [*(real_data / "palm").rglob("*.jpg")][::20] + [*(real_data / "oct2017").rglob("*.jpeg")]
    assert len(paths) > 50
    for path in paths:
        data = path.read_bytes()
        decode_image(data, str(path))
        for part in (len(data) // 2, len(data) * 99 // 100):
            with pytest.raises(DataError):
                decode_image(data[:part] + b"\xff\xd9", str(path))


def test_opencv_imread_alone_would_return_half_an_image(tmp_path: Path) -> None:
    """Why files go through `read_image`: this test fails once OpenCV refuses them itself."""
    (tmp_path / "half.jpg").write_bytes(JPEGS["baseline"][:3000])
    assert cv2.imread(str(tmp_path / "half.jpg")) is not None
    with pytest.raises(DataError, match="truncated"):
        read_image(tmp_path / "half.jpg")


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP"])
@pytest.mark.parametrize("share", [0.5, 0.95])
def test_other_truncated_files_are_refused(kind: str, share: float) -> None:
    data = saved(Image.fromarray(noise(64, 64)), kind)
    with pytest.raises(DataError, match="half"):
        decode_image(data[: int(len(data) * share)], "half")


def test_damaged_png_is_refused() -> None:
    data = bytearray(saved(Image.fromarray(noise(64, 64)), "PNG"))
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(DataError, match="damaged"):
        decode_image(bytes(data), "flipped")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"<!DOCTYPE html><html><body>404 Not Found</body></html>", "not an image.*<!DOCTYPE html>"),
        (b"\x00" * 1000, "not an image"),
        (b"\xff\xd8\xff", "not an image|truncated"),
        (b"\x89PNG\r\n\x1a\n", "not an image|truncated"),
    ],
)
def test_a_file_that_is_no_image_is_refused_by_name(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "scan.png"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_image(path)
    assert str(path) in str(caught.value)


def test_missing_file_and_directory(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing.png: No such file"):
        read_image(tmp_path / "nothing.png")
    with pytest.raises(DataError, match="[Dd]irectory"):
        read_image(tmp_path)


def grey_png(side: int, rows_a_block: int) -> bytes:
    """A valid black PNG of side x side, by hand: one compressed block of rows, repeated.

    The checksum of n zero bytes is known (Adler-32: a = 1, b = n mod 65521), so nothing large is made.
    """
    assert side % rows_a_block == 0
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = packer.compress(bytes((side + 1) * rows_a_block)) + packer.flush(zlib.Z_FULL_FLUSH)
    adler = (side * (side + 1) % 65521) << 16 | 1
    body = b"\x78\x01" + block * (side // rows_a_block) + b"\x03\x00" + struct.pack(">I", adler)

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [30000, 11000])  # above Pillow's own limit, and between it and ours
def test_image_bomb_is_refused_from_its_header(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    np.testing.assert_array_equal(decode_image(grey_png(300, 100), "small"), np.zeros((300, 300, 3), np.uint8))
    bomb = grey_png(side, 100)
    assert len(bomb) < 2_000_000
    monkeypatch.setattr(decode.cv2, "imdecode", lambda *_: pytest.fail("the bomb was decoded"))
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("the bomb was decoded"))
    with pytest.raises(DataError, match="bomb.png") as caught:
        decode_image(bomb, "bomb.png")
    assert "100,000,000 pixels" in str(caught.value)


def several(kind: str) -> bytes:
    """A file of three pictures."""
    first, *others = (Image.new("RGB", (20, 20), (80 * number, 0, 0)) for number in range(3))
    return saved(first, kind, save_all=True, append_images=others)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_files_of_several_pictures_are_refused(kind: str) -> None:
    assert decode_image(saved(Image.new("RGB", (20, 20)), kind), "one").shape == (20, 20, 3)
    with pytest.raises(DataError, match=f"three: the {kind} file holds several pictures"):
        decode_image(several(kind), "three")


def test_a_cameras_jpeg_with_a_preview_behind_it_is_its_first_picture() -> None:
    found = decode_image(several("MPO"), "camera", "rgb")
    assert found.shape == (20, 20, 3) and found.max() == 0


def deep(bits: int, suffix: str, channels: int = 1) -> bytes:
    """A picture of 16 bits with values that need `bits`."""
    values = np.random.default_rng(bits).integers(0, 2**bits, (9, 9, channels)).astype(np.uint16)
    values[4, 4, 0] = 2**bits - 1  # blue, which counts little in a grey picture
    return cv2.imencode(suffix, values)[1].tobytes()


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("requested", ["rgb", "gray"])
def test_few_bits_in_a_file_of_sixteen_are_refused(suffix: str, channels: int, requested: str) -> None:
    """12 bits would become 0 to 15 of 255; from 15 bits on the picture is at most half as bright as it may be."""
    for bits in (8, 10, 12, 14):
        with pytest.raises(DataError, match=f"largest value is {2**bits - 1} of 65535") as caught:
            decode_image(deep(bits, suffix, channels), "deep", requested)
        assert f"multiply its values by {2 ** (16 - bits)} if they have {bits} bits" in str(caught.value)
    for bits in (15, 16):
        assert decode_image(deep(bits, suffix, channels), "deep", requested).max() > 60
    black = cv2.imencode(suffix, np.zeros((9, 9, channels), np.uint16))[1].tobytes()
    assert decode_image(black, "black", requested).max() == 0
    dark = cv2.imencode(suffix, np.full((9, 9, channels), 15, np.uint8))[1].tobytes()
    assert decode_image(dark, "8 bits", requested).max() == 15


# --- preprocessing ---------------------------------------------------------------------------------


def palm_notebook(image: np.ndarray) -> np.ndarray:
    """PALM myopia tutorial: resize, channels first, to -1..1."""
    x = np.transpose(cv2.resize(image, (224, 224)), (2, 0, 1)).astype("float32")
    return x / 255.0 * 2.0 - 1.0


@pytest.mark.parametrize("shape", [(300, 280), (224, 224), (100, 120)])
def test_palm_preprocessing_is_the_notebooks(shape: tuple[int, int]) -> None:
    image = noise(*shape)
    x = preprocess(image, get_recipe("palm_tutorial").preprocessing)
    assert x.dtype == np.float32 and x.shape == (3, 224, 224) and x.flags.c_contiguous
    np.testing.assert_allclose(x, palm_notebook(image), atol=1e-6)


def test_covid_preprocessing_is_the_notebooks() -> None:
    """COVID-19 radiography tutorial: float32, Paddle's Resize(224), ToTensor (no division by 255), Normalize."""
    from paddle_medcls.core.paddle_setup import paddle

    t = paddle.vision.transforms
    mean, std = [129.90909919] * 3, [59.0183735] * 3
    notebook = t.Compose([t.Resize(size=224), t.ToTensor(), t.Normalize(mean=mean, std=std, data_format="CHW")])
    image = noise(299, 299)
    x = preprocess(image, get_recipe("covid_notebook").preprocessing)
    np.testing.assert_allclose(x, notebook(image.astype("float32")).numpy(), atol=1e-5)


def test_float_resizing_does_not_round_and_uint8_does() -> None:
    image = noise(50, 50)
    rounded = fit(image, Preprocessing(size_px=32))
    exact = fit(image, Preprocessing(size_px=32, resize_dtype="float32"))
    assert rounded.dtype == np.uint8 and exact.dtype == np.float32
    assert 0.1 < np.abs(rounded - exact).max() <= 1.1


@pytest.mark.parametrize(
    ("height", "width", "top", "left"), [(300, 600, 16, 144), (450, 300, 80, 16), (256, 256, 16, 16)]
)
def test_crop_scales_the_shorter_side_and_cuts_the_centre(height: int, width: int, top: int, left: int) -> None:
    """256 on the shorter side, then the central 224; `top` and `left` by hand: (scaled side - 224) // 2."""
    image = noise(height, width)
    shorter = min(height, width)
    scaled = cv2.resize(image, (width * 256 // shorter, height * 256 // shorter), interpolation=cv2.INTER_LINEAR)
    found = fit(image, Preprocessing(fit="crop"))
    np.testing.assert_array_equal(found, scaled[top : top + 224, left : left + 224])


def test_crop_of_a_sliver_is_full_size() -> None:
    assert fit(noise(999, 3), Preprocessing(fit="crop", size_px=32, resize_px=32)).shape == (32, 32, 3)


def test_imagenet_constants() -> None:
    """White and black with ImageNet's mean and std: 2.2489 and -2.1179, -2.0357, -1.8044 (torchvision)."""
    mean = tuple(255 * m for m in (0.485, 0.456, 0.406))
    std = tuple(255 * s for s in (0.229, 0.224, 0.225))
    spec = Preprocessing(size_px=4, mean=mean, std=std)
    np.testing.assert_allclose(preprocess(np.full((4, 4, 3), 255, np.uint8), spec)[0], 2.2489, atol=5e-5)
    black = preprocess(np.zeros((4, 4, 3), np.uint8), spec)
    np.testing.assert_allclose(black[:, 0, 0], [-2.1179, -2.0357, -1.8044], atol=5e-5)


def test_normalize_against_a_loop() -> None:
    spec = Preprocessing(size_px=3, mean=(10.0, 20.0, 30.0), std=(2.0, 4.0, 8.0))
    image = noise(3, 3)
    slow = np.empty((3, 3, 3), np.float32)
    for c in range(3):
        for y in range(3):
            for x in range(3):
                slow[c, y, x] = (float(image[y, x, c]) - spec.mean[c]) / spec.std[c]
    np.testing.assert_allclose(normalize(image, spec), slow, rtol=1e-6)


@pytest.mark.parametrize("shape", [(5, 4, 3), (2, 5, 4, 3), (5, 4, 1)])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_normalize_to_the_bit(shape: tuple[int, ...], dtype: type) -> None:
    """The order of the axes does not change a bit: trained networks get what they were trained with."""
    count = shape[-1]
    spec = Preprocessing(channels="gray" if count == 1 else "rgb", mean=(120.3,) * count, std=(57.7, 58.1, 0.3)[:count])
    image = np.random.default_rng(0).integers(0, 256, shape).astype(dtype)
    pixels_first = (image.astype(np.float32) - np.array(spec.mean, np.float32)) / np.array(spec.std, np.float32)
    x = normalize(image, spec)
    assert x.flags.c_contiguous and x.dtype == np.float32
    np.testing.assert_array_equal(x, np.moveaxis(pixels_first, -1, -3))


def test_one_channel_keeps_its_axis() -> None:
    spec = Preprocessing(size_px=16, channels="gray", mean=(127.5,), std=(127.5,))
    assert preprocess(noise(40, 30)[:, :, :1], spec).shape == (1, 16, 16)


def test_preprocessing_survives_json() -> None:
    spec = get_recipe("covid_notebook").preprocessing
    assert Preprocessing.from_json(spec.to_json()) == spec
    assert Preprocessing.from_json({**spec.to_json(), "mean": list(spec.mean)}) == spec


# --- heat maps on the image ------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(60, 100), (100, 60), (64, 64)])
@pytest.mark.parametrize("how", ["stretch", "crop"])
def test_unfit_puts_a_point_back_where_it_was(size: tuple[int, int], how: str) -> None:
    spec = Preprocessing(32, 40, how, "gray", mean=(0,), std=(1,))
    image = np.zeros((*size, 1), np.uint8)
    image[size[0] // 2 - 6 : size[0] // 2 + 2, size[1] // 2 - 3 : size[1] // 2 + 7] = 255
    back = unfit(fit(image, spec)[:, :, 0].astype(np.float32), size, spec)
    assert back.shape == size and back.dtype == np.float32

    def centre(values: np.ndarray) -> np.ndarray:
        return np.array([(grid * values).sum() / values.sum() for grid in np.indices(values.shape)])

    np.testing.assert_allclose(centre(back), centre(image[:, :, 0].astype(float)), atol=0.6)


def test_unfit_is_zero_outside_the_crop() -> None:
    """100 x 60 pixels become 67 x 40, of which the middle 32 x 32 are seen."""
    back = unfit(np.ones((32, 32), np.float32), (60, 100), Preprocessing(32, 40, "crop"))
    assert back[30, 50] == 1 and not back[:4].any() and not back[:, :24].any() and not back[:, -24:].any()
    assert back.mean() == pytest.approx((32 / 67) * (32 / 40), abs=0.03)


@pytest.mark.parametrize("channels", ["rgb", "gray"])
def test_to_channels_and_png(channels: str, tmp_path: Path) -> None:
    path = write_image(tmp_path / "a.png", pixels(4))
    shown = to_channels(read_image(path, channels), "rgb")
    write_png(tmp_path / "new" / "b.png", shown)
    np.testing.assert_array_equal(read_image(tmp_path / "new" / "b.png", "rgb"), shown)
    if channels != "gray":
        np.testing.assert_array_equal(shown, pixels(4))


@pytest.mark.parametrize("size_px", [0, 2049, 10**9, 2.0])
def test_an_input_size_out_of_range_is_refused(size_px: float) -> None:
    with pytest.raises(ValueError, match="is not a number of pixels"):
        Preprocessing(size_px=size_px)
    assert Preprocessing(size_px=2048).size_px == 2048


# --- names in messages -----------------------------------------------------------------------------


def test_escape_sequences_of_a_file_name_are_not_printed(tmp_path: Path) -> None:
    """Escape sequences, line ends and writing directions of a name are shown as escapes, in every part of a message."""
    hostile = "a\x1b[2J\x9b1m\r\n\u202egpj\u2028.png"
    shown = "a\\x1b[2J\\x9b1m\\r\\n\\u202egpj\\u2028.png"
    with pytest.raises(DataError) as caught:
        read_image(tmp_path / hostile)
    assert str(caught.value).splitlines()[0] == f"{tmp_path}/{shown}: No such file or directory"
    error = DataError(hostile, items=[hostile], path=Path(hostile), expected=hostile, fix=hostile)
    assert str(error).count(shown) == 5 and len(str(error).splitlines()) == 5 and error.what == shown
    assert printable("眼底 é \u3000 \t") == "眼底 é \u3000 \\t"
    assert printable(b"\xff.png".decode("utf-8", "surrogateescape")) == "\\udcff.png"
