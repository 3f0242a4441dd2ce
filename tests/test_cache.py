"""The cache of decoded, scaled images, and decoding at reduced scale."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import threading
from pathlib import Path

import cv2
import numpy as np
import pytest
import toynet  # noqa: F401  its networks
from fakes import palm_tree, pixels, recipe, write_image
from PIL import Image, ImageOps

from paddle_medcls.core import files
from paddle_medcls.core.errors import DataError, RecipeError, RunError, Stopped
from paddle_medcls.data.datasets import load_index
from paddle_medcls.data.decode import decode_image, read_image
from paddle_medcls.data.index import Index
from paddle_medcls.data.sample import draw
from paddle_medcls.preprocessing import image_cache
from paddle_medcls.preprocessing.image_cache import content_key, scan_cached
from paddle_medcls.preprocessing.statistics import image_statistics
from paddle_medcls.preprocessing.transforms import Preprocessing, fit
from paddle_medcls.recipes import get_recipe
from paddle_medcls.training.loop import Options, train

SPEC = Preprocessing(size_px=16, fit="crop", resize_px=20, channels="bgr")


@pytest.fixture
def index(palm_root: Path) -> Index:
    return load_index("palm", palm_root, "train")


def built(index: Index, folder: Path, spec: Preprocessing = SPEC) -> tuple[dict, np.ndarray | None, list[str]]:
    lines: list[str] = []
    return *scan_cached(index, spec, 2, folder, lines.append), lines


def forbid_reading(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("paddle_medcls.data.index.read_image", lambda *_: pytest.fail("an image was read"))


# --- the cache -------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", ["bgr", "gray"])
def test_holds_the_result_of_fit_and_the_same_statistics(index: Index, tmp_path: Path, channels: str) -> None:
    spec = Preprocessing(
        16,
        20,
        "crop",
        channels,
        mean=(0.0,) * (1 if channels == "gray" else 3),
        std=(1.0,) * (1 if channels == "gray" else 3),
    )
    statistics, images, lines = built(index, tmp_path / "images", spec)
    assert images is not None and images.dtype == np.uint8 and len(lines) == 1
    for row in range(len(index)):
        np.testing.assert_array_equal(images[row], fit(index.read(row, channels), spec))
    assert statistics == image_statistics(index, 1, channels)


def test_a_second_run_reads_nothing(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    statistics, images, _ = built(index, tmp_path / "images")
    forbid_reading(monkeypatch)
    again, mapped, _ = built(index, tmp_path / "images")
    assert again == statistics
    np.testing.assert_array_equal(mapped, images)


def test_a_changed_file_list_or_geometry_is_another_cache(index: Index, palm_root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    built(index, folder)
    built(index.subset(range(11)), folder)
    built(index, folder, Preprocessing(size_px=16, channels="bgr"))
    assert len(list(folder.glob("*.npy"))) == 3
    built(index, folder, Preprocessing(size_px=16, channels="bgr", mean=(1.0, 2.0, 3.0)))
    assert len(list(folder.glob("*.npy"))) == 3  # mean and std come after it


def same_from_outside(root: Path, seed: int) -> Index:
    """A PALM folder whose files are alike in name, size and time whatever the seed, as an archive gives them."""
    index = load_index("palm", palm_tree(root), "train")
    for number, split in enumerate(("train", "val")):
        for row, path in enumerate(load_index("palm", root, split).images):
            path.write_bytes(cv2.imencode(".bmp", pixels(seed + 100 * number + row))[1].tobytes())
            os.utime(path, ns=(0, 0))
    return index


def test_another_folders_pixels_are_never_used(tmp_path: Path) -> None:
    """Names, sizes and times agree; also where the files themselves are replaced in their place."""
    a, b = same_from_outside(tmp_path / "a", 0), same_from_outside(tmp_path / "b", 1000)
    facts = [[(p.stat().st_size, p.stat().st_mtime_ns) for p in index.images] for index in (a, b)]
    assert facts[0] == facts[1] and a.fingerprint() == b.fingerprint()
    folder = tmp_path / "images"
    for root, seed, index in (("a", 0, a), ("b", 1000, b), ("a", 2000, same_from_outside(tmp_path / "a", 2000))):
        statistics, images, _ = built(index, folder)
        for row, path in enumerate(index.images):
            np.testing.assert_array_equal(images[row], fit(read_image(path), SPEC), f"{root} {seed}")
        assert statistics == image_statistics(index, 1, "bgr")


def test_a_resume_sees_pixels_replaced_in_their_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paddle_medcls.evaluation.outputs.write_outputs", lambda *_: None)
    root, own = tmp_path / "a", recipe(model="toy", epochs=2)
    same_from_outside(root, 0)
    quiet = {"device": "cpu", "workers": 1, "say": lambda line: None, "image_cache": str(tmp_path / "images")}
    with pytest.raises(Stopped):
        train(own, root, tmp_path / "run", Options(**quiet, deadline=-1.0))
    same_from_outside(root, 1000)
    with pytest.raises(RunError, match="other pixels under the same names"):
        train(own, root, tmp_path / "run", Options(**quiet), resume=True)


@pytest.mark.parametrize("nanoseconds", [0, 4_000_000_000 * 10**9])
def test_file_times_do_not_matter(
    index: Index, tmp_path: Path, nanoseconds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Times of 1970 and of 2096: the cache is used, and follows the bytes."""
    for path in index.images:
        os.utime(path, ns=(nanoseconds, nanoseconds))
    _, images, _ = built(index, tmp_path / "images")
    with monkeypatch.context() as patch:
        forbid_reading(patch)
        np.testing.assert_array_equal(built(index, tmp_path / "images")[1], images)
    write_image(Path(index.images[3]), pixels(99))
    os.utime(index.images[3], ns=(nanoseconds, nanoseconds))
    np.testing.assert_array_equal(built(index, tmp_path / "images")[1][3], fit(read_image(index.images[3]), SPEC))


@pytest.mark.parametrize("package", ["pydicom", "pillow"])
def test_another_decoder_is_another_cache(index: Index, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before, version = content_key(index, 1), image_cache.importlib.metadata.version
    assert content_key(index, 2) == before
    monkeypatch.setattr(
        image_cache.importlib.metadata, "version", lambda name: "0.0" if name == package else version(name)
    )
    assert content_key(index, 1) != before


def test_a_file_is_hashed_again_only_when_its_status_changes(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    monkeypatch.setattr(image_cache, "sha256", lambda path: hashed.append(path) or "0" * 64)
    for _ in range(2):
        content_key(index, 2)
    assert len(hashed) == len(index)
    path = Path(index.images[0])
    path.rename(path.with_suffix(".old"))
    path.write_bytes(path.with_suffix(".old").read_bytes())
    content_key(index, 2)
    assert len(hashed) == len(index) + 1


def test_images_replaced_while_they_are_read_are_refused(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replacing(*arguments: object) -> dict:
        statistics = image_statistics(*arguments)
        write_image(Path(index.images[5]), pixels(77))
        return statistics

    monkeypatch.setattr(image_cache, "image_statistics", replacing)
    with pytest.raises(DataError, match="images of the train split changed while they were read"):
        built(index, tmp_path / "images")
    assert list((tmp_path / "images").iterdir()) == []


def test_the_cache_of_version_0_1_is_not_read(index: Index, tmp_path: Path) -> None:
    """Named as then, by sizes and times, with other pixels in it."""
    digest = hashlib.sha256(f"2 bgr {index.fingerprint()}".encode())
    for path in index.images:
        digest.update(f"{path.stat().st_size} {path.stat().st_mtime_ns}\n".encode())
    geometry = [getattr(SPEC, name) for name in image_cache.GEOMETRY]
    old = image_cache.keyed_file(tmp_path, [digest.hexdigest(), geometry, cv2.__version__])
    np.save(old, np.zeros((len(index), 16, 16, 3), np.uint8))
    old.with_suffix(".json").write_text(json.dumps(image_statistics(index, 1, "bgr")))
    _, images, lines = built(index, tmp_path)
    np.testing.assert_array_equal(images[0], fit(index.read(0, "bgr"), SPEC))
    assert images.any() and "image cache of train" in lines[0] and old.is_file()


@pytest.mark.parametrize("harm", ["cut", "no statistics", "empty", "another shape"])
def test_an_incomplete_cache_is_built_again(index: Index, tmp_path: Path, harm: str) -> None:
    _, images, _ = built(index, tmp_path)
    expected = np.array(images)
    (path,) = tmp_path.glob("*.npy")
    if harm == "no statistics":
        path.with_suffix(".json").unlink()
    elif harm == "another shape":
        np.save(path, expected[:5])
    else:
        os.truncate(path, 500 if harm == "cut" else 0)
    _, images, _ = built(index, tmp_path)
    np.testing.assert_array_equal(images, expected)


def test_a_full_disk_leaves_a_run_without_a_cache(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, write) -> None:
        def narrow(target: str) -> None:
            write("/dev/full" if os.path.exists("/dev/full") else target)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        files.atomic_write(path, narrow)

    monkeypatch.setattr(image_cache, "atomic_write", full)
    statistics, images, lines = built(index, tmp_path / "images")
    assert images is None and statistics == image_statistics(index, 1, "bgr")
    assert len(lines) == 1 and "no image cache of train" in lines[0] and os.strerror(errno.ENOSPC) in lines[0]
    assert list((tmp_path / "images").iterdir()) == []


def test_too_little_free_disk_and_a_folder_that_cannot_be_made(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    statistics, images, lines = built(index, tmp_path / "file")
    assert images is None and statistics["count"] == 12 and "no image cache" in lines[0]
    monkeypatch.setattr(image_cache, "FREE_SHARE", 0.0)
    statistics, images, lines = built(index, tmp_path / "images")
    assert images is None and statistics["count"] == 12 and "GB are free" in lines[0]


def test_a_folder_that_cannot_be_written_is_named_once_a_run(
    palm_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("paddle_medcls.evaluation.outputs.write_outputs", lambda *_: None)
    (tmp_path / "file").write_text("")
    lines: list[str] = []
    options = Options(device="cpu", workers=0, say=lines.append, image_cache=str(tmp_path / "file"))
    train(recipe(model="toy", epochs=1), palm_root, tmp_path / "run", options)
    assert sum("no image cache" in line for line in lines) == 1


def test_an_unreadable_image_is_the_scans_error_and_leaves_no_cache(index: Index, tmp_path: Path) -> None:
    Path(index.images[2]).write_bytes(b"x")
    with pytest.raises(DataError, match="1 of 12 train image"):
        built(index, tmp_path / "images")
    assert list((tmp_path / "images").iterdir()) == []


def test_two_at_once_both_end_right(index: Index, tmp_path: Path) -> None:
    results: list = []
    threads = [threading.Thread(target=lambda: results.append(built(index, tmp_path / "images")[1])) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = np.stack([fit(index.read(row, "bgr"), SPEC) for row in range(len(index))])
    assert len(results) == 2
    for images in results:
        np.testing.assert_array_equal(images, expected)
    assert len(list((tmp_path / "images").iterdir())) == 2  # one array, its statistics


@pytest.mark.parametrize("changes", [{}, {"flip": 0.5, "rotate_degrees": 10, "brightness": 0.2, "test_flips": True}])
def test_training_is_the_same_to_the_bit(
    palm_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict
) -> None:
    monkeypatch.setattr("paddle_medcls.evaluation.outputs.write_outputs", lambda *_: None)
    monkeypatch.setattr("paddle_medcls.training.run_directory.write_history", lambda *_: None)
    own = recipe(model="toy", epochs=2, **changes)
    folder = tmp_path / "images"
    quiet = {"device": "cpu", "workers": 1, "say": lambda line: None}
    plain = train(own, palm_root, tmp_path / "plain", Options(**quiet, image_cache="off")).metrics
    cached = train(own, palm_root, tmp_path / "cached", Options(**quiet, image_cache=folder)).metrics
    assert len(list(folder.glob("*.npy"))) == 2 and cached == plain
    forbid_reading(monkeypatch)
    again = train(own, palm_root, tmp_path / "again", Options(**quiet, image_cache=folder)).metrics
    assert again == plain
    first, *others = [(tmp_path / name / "PALM.pdparams").read_bytes() for name in ("plain", "cached", "again")]
    assert others == [first, first]


def test_random_crops_are_taken_from_the_full_image(palm_root: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("paddle_medcls.evaluation.outputs.write_outputs", lambda *_: None)
    own = recipe(model="toy", epochs=1, fit="crop", resize_px=36, crop_scale=0.5)
    train(own, palm_root, tmp_path / "run", Options("cpu", 1, image_cache=tmp_path / "images", say=lambda line: None))
    (only,) = (tmp_path / "images").glob("*.npy")
    assert len(np.load(only, allow_pickle=False)) == 7  # validation


# --- decoding at reduced scale ---------------------------------------------------------------------


def big(seed: int, height: int = 1100, width: int = 1300) -> Image.Image:
    """A smooth drawing with noise, as a camera gives it."""
    rng = np.random.default_rng(seed)
    image = cv2.resize(pixels(seed, size=64), (width, height), interpolation=cv2.INTER_CUBIC).astype(np.float32)
    return Image.fromarray(np.clip(image + rng.normal(0, 4, image.shape), 0, 255).astype(np.uint8))


def jpeg(image: Image.Image, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    ("least", "shape"),
    [(0, (1100, 1300)), (551, (1100, 1300)), (550, (550, 650)), (275, (275, 325)), (100, (138, 163))],
)
def test_the_smallest_scale_that_leaves_enough(least: int, shape: tuple[int, int]) -> None:
    assert decode_image(jpeg(big(0)), "big", "rgb", least).shape[:2] == shape


def test_only_jpegs_are_reduced(tmp_path: Path) -> None:
    path = write_image(tmp_path / "a.png", np.asarray(big(0)))
    assert read_image(path, "rgb", 100).shape == (1100, 1300, 3)


@pytest.mark.parametrize("channels", ["rgb", "bgr", "gray"])
@pytest.mark.parametrize("kind", ["plain", "turned", "grey", "cmyk", "progressive"])
def test_the_input_differs_invisibly(kind: str, channels: str) -> None:
    image, options = big(1), {}
    if kind == "turned":
        exif = Image.Exif()
        exif[0x0112] = 6
        options = {"exif": exif}
    if kind in ("grey", "cmyk"):
        image = image.convert("L" if kind == "grey" else "CMYK")
    data = jpeg(image, **options, progressive=kind == "progressive")
    one = (1.0,) * (1 if channels == "gray" else 3)
    spec = Preprocessing(128, channels=channels, interpolation="area", mean=one, std=one, decode="reduced")
    exact = fit(decode_image(data, "big", channels), spec).astype(float)
    reduced = fit(decode_image(data, "big", channels, spec.least_px), spec).astype(float)
    assert decode_image(data, "big", channels, spec.least_px).shape[:2] == (
        (325, 275) if kind == "turned" else (275, 325)
    )
    assert np.abs(reduced - exact).mean() < 0.5
    if kind == "turned" and channels == "rgb":
        with Image.open(io.BytesIO(data)) as again:
            upright = np.asarray(ImageOps.exif_transpose(again))
        assert np.abs(fit(upright, spec).astype(float) - reduced).mean() < 1


def test_drawn_fundus_images(tmp_path: Path) -> None:
    draw("palm", tmp_path, 0)
    index = load_index("palm", tmp_path, "val")
    for row in range(4):
        _, encoded = cv2.imencode(
            ".jpg", cv2.resize(index.read(row, "bgr"), (1024, 1024), interpolation=cv2.INTER_CUBIC)
        )
        _differs_invisibly(encoded.tobytes(), 96)


@pytest.mark.data
def test_real_images(real_data: Path) -> None:
    """Fundus photographs as they were taken, and of 224 pixels: so for smaller inputs."""
    for path in (real_data / "palm" / "fullres").glob("*.jpg"):
        for size_px in (128, 224):
            _differs_invisibly(path.read_bytes(), size_px)
    for path in load_index("palm", real_data / "palm", "val").images[:8]:
        _differs_invisibly(Path(path).read_bytes(), 56)


def _differs_invisibly(data: bytes, size_px: int) -> None:
    spec = Preprocessing(size_px, interpolation="area", decode="reduced")
    full, reduced = decode_image(data, "big"), decode_image(data, "big", "bgr", spec.least_px)
    assert reduced.shape[0] < full.shape[0]
    assert np.abs(fit(reduced, spec).astype(float) - fit(full, spec)).mean() < 0.5


def test_the_sidecar_carries_it_and_an_old_one_means_exact() -> None:
    spec = get_recipe("palm").replace(decode="reduced").preprocessing
    assert spec.least_px == 256 and Preprocessing.from_json(spec.to_json()) == spec
    old = spec.to_json()
    del old["decode"]
    assert Preprocessing.from_json(old).least_px == 0
    assert all(get_recipe(name).preprocessing.decode == "exact" for name in ("palm_tutorial", "covid", "oct"))


def test_a_recipe_reduces_with_the_area_filter_alone() -> None:
    with pytest.raises(RecipeError, match="decode"):
        get_recipe("palm_tutorial").replace(decode="reduced")
