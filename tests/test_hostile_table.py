"""docs/hostile-inputs.md: what each hostile or broken input gets, written by the code itself.

`python -m pytest tests/test_hostile_table.py --update-docs` writes the page again; without the option the
test compares. The inputs are those of the other tests, which say what else must hold for each.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import test_archives
import test_cache
import test_comparison
import test_data
import test_dicom
import test_ensemble
import test_images
import test_medmnist
import test_novelty
import test_own_images
import test_predict
import test_recipe
import test_sharded_prediction
import test_train
import test_weights
from fakes import ROOT, covid_tree, palm_tree, pixels, within, write_image
from PIL import Image
from test_download import BODY, MD5, server  # noqa: F401  a fixture
from test_train import half  # noqa: F401  a fixture

from paddle_medcls.cli import train
from paddle_medcls.core.errors import MedclsError
from paddle_medcls.core.files import sha256
from paddle_medcls.core.paddle_setup import paddle
from paddle_medcls.data.archives import unpack
from paddle_medcls.data.datasets import covid, load_index
from paddle_medcls.data.decode import read_image
from paddle_medcls.data.download import download
from paddle_medcls.data.image_files import listed_files
from paddle_medcls.data.own_images import own_images
from paddle_medcls.deployment.predictor import Predictor
from paddle_medcls.evaluation.predictions import read_predictions
from paddle_medcls.models.novelty import read_novelty
from paddle_medcls.models.sidecar import Sidecar
from paddle_medcls.models.weights import load_strict, read_weights
from paddle_medcls.recipes.recipe import Recipe

PAGE = ROOT / "docs" / "hostile-inputs.md"
HEAD = """# Hostile and broken inputs

What each gets: the class of the error, the first line of its message and, where it lists faults, the first of
them; long lines are cut. Each is refused within seconds, nothing in it is run, and what is refused is not
used in part. This page is written by the code:

    python -m pytest tests/test_hostile_table.py --update-docs

and the same test fails when the code does something else.
"""
Case = tuple[str, Callable[[Path], object]]


def parameters(test: Callable) -> list[tuple]:
    """The cases of a parametrized test, in its order."""
    (mark,) = (mark for mark in test.pytestmark if mark.name == "parametrize")
    return [value if isinstance(value, tuple) else (value,) for value in mark.args[1]]


def text(content: str | bytes) -> str:
    """A short input as a reader sees it."""
    shown = repr(content[:60])[2 if isinstance(content, bytes) else 1 : -1]
    return "an empty file" if not content else shown + ("…" if len(content) > 60 else "")


def written(name: str, content: bytes | str, read: Callable[[Path], object]) -> Callable[[Path], object]:
    """A case of one file: writes it, then reads it."""

    def case(folder: Path) -> object:
        data = content if isinstance(content, bytes) else content.encode()
        (folder / name).write_bytes(data)
        return read(folder / name)

    return case


def pipe(path: Path) -> Path:
    """A named pipe that nothing writes to: opening it would wait for ever."""
    os.mkfifo(path)
    return path


# --- the inputs ------------------------------------------------------------------------------------


def weights() -> Iterator[Case]:
    for name, content in test_weights.hostile(Path("canary")).items():
        yield name, written("weights.pdparams", content, read_weights)
    yield "not there", lambda folder: read_weights(folder / "none.pdparams")
    yield "a pipe in place of a file", lambda folder: read_weights(pipe(folder / "weights.pdparams"))
    yield "entries of another network", _misfit


def _misfit(folder: Path) -> None:
    model = paddle.nn.Linear(4, 2)
    load_strict(model, {"weight": np.full((2, 4), np.nan, np.float32)}, "weights.pdparams")


def sidecars() -> Iterator[Case]:
    for (content,) in parameters(test_weights.test_faulty_sidecars):
        yield text(content), written("COVID.json", content, Sidecar.read)
    for changes, _ in test_weights.HOSTILE_FIELDS:
        shown = text(", ".join(f"{name} {json.dumps(value)}" for name, value in changes.items()))
        yield shown, lambda folder, c=changes: Sidecar.read(test_weights.written(folder / "COVID.json", c))
    for name, content in test_weights.HOSTILE_JSON.items():
        yield name, written("COVID.json", content, Sidecar.read)
    sidecar = Sidecar(**{**vars(test_weights.SIDECAR), "sha256": "0" * 64})
    yield "weights with another sha256 (a flipped byte, another run)", written("COVID.pdparams", b"x", sidecar.check)


def novelty_files() -> Iterator[Case]:
    for name, array in parameters(test_novelty.test_a_hostile_file_is_refused):
        shown = "missing" if array is None else f"{array.dtype} {array.shape}, {array.ravel()[:1]}"
        yield f"{name}: {shown}", lambda folder, n=name, a=array: read_novelty(test_novelty.hostile_file(folder, n, a))
    yield "5 GiB", lambda folder: read_novelty(test_novelty.huge_file(folder))
    yield "a pickle", written("COVID.novelty.safetensors", b"cos\nsystem\n(S'touch ran'\ntR.", read_novelty)
    other = written("COVID.novelty.safetensors", b"x", lambda path: read_novelty(path, "0" * 64))
    yield "another file than the sidecar describes", other


def exports() -> Iterator[Case]:
    image = [pixels(0, size=8)]
    for fault, title in test_predict.ONNX_FAULTS.items():
        yield (
            f"ONNX: {title}",
            lambda folder, fault=fault: Predictor.from_weights(test_predict.strange_export(folder, fault)).logits(
                image
            ),
        )
    yield "OpenVINO: a loop", lambda folder: Predictor.from_weights(test_predict.openvino_loop(folder))
    yield (
        "a Paddle program, without --allow-program",
        lambda folder: Predictor.from_weights(test_predict.paddle_program(folder)),
    )
    yield (
        "a weight file whose sidecar says that it is an export",
        lambda folder: Predictor.from_weights(test_predict.weights_called_an_export(folder)),
    )


def runs(run_dir: Path, images: Path) -> Iterator[Case]:
    """Damaged run directories that --resume is given."""
    write, edited, state = test_train.write, test_train.edited, test_train.STATE
    broken = {"random bytes": write(b"\x00\xff" * 99), "missing": Path.unlink, "a folder": test_train.folder}
    for name in ("recipe.json", "data.json", "environment.json", state, "PALM.pdparams"):
        damages = {**broken, "{": write("{"), "[]": write("[]")} if name.endswith(".json") else broken
        for damage, change in damages.items():
            yield f"{name}: {damage}", lambda folder, a=(name, change): _resume(folder, run_dir, images, *a)
    yield (
        "recipe.json: 100,000 brackets",
        lambda folder: _resume(folder, run_dir, images, "recipe.json", write("[" * 10**5)),
    )
    for title, change in {
        "an epoch beyond the last": lambda arrays, scalars: scalars.update(epoch=99, best_epoch=1),
        "no epoch": lambda arrays, scalars: scalars.pop("epoch"),
        "a layer less": lambda arrays, scalars: arrays.pop("model/fc.weight"),
    }.items():
        yield (
            f"{state}: {title}",
            lambda folder, change=change: _resume(folder, run_dir, images, state, edited(change)),
        )
    yield "images with other pixels under the same names", lambda folder: _resume_on_others(folder, run_dir, images)


def _resume(folder: Path, run_dir: Path, images: Path, name: str, damage: Callable[[Path], object]) -> None:
    damage(shutil.copytree(run_dir, folder / "run") / name)
    train.main(["--resume", str(folder / "run"), "--data-root", str(images), "--image-cache", "off", "--debug"])


def _resume_on_others(folder: Path, run_dir: Path, images: Path) -> None:
    others = Path(shutil.copytree(images, folder / "palm"))
    write_image(others / "PALM-Training400" / "P0001.jpg", pixels(99))
    _resume(folder, run_dir, others, "recipe.json", lambda path: None)


def pictures() -> Iterator[Case]:
    noise = Image.fromarray(test_images.noise(64, 64))
    for kind in ("JPEG", "PNG", "BMP", "TIFF"):
        data = test_images.saved(noise, kind)
        yield f"{kind}, half of it", written("scan.png", data[: len(data) // 2], read_image)
    for name, data in test_images.DAMAGED_JPEGS.items():
        if name.startswith(("baseline", "progressive")):  # all are in test_images
            yield f"JPEG, {name}", written("scan.jpg", data, read_image)
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        yield f"{kind} of three pictures", written("scan.png", test_images.several(kind), read_image)
    for suffix in (".png", ".tiff"):
        yield f"12 bits in a 16-bit file ({suffix})", written("scan.png", test_images.deep(12, suffix), read_image)
    damaged = bytearray(test_images.saved(noise, "PNG"))
    damaged[len(damaged) // 2] ^= 0xFF
    yield "PNG with a flipped byte", written("scan.png", bytes(damaged), read_image)
    for side in (30000, 11000):
        bomb = test_images.grey_png(side, 100)
        assert len(bomb) < 10**6
        yield f"PNG of {side} x {side} pixels in less than 1 MB", written("scan.png", bomb, read_image)
    line = test_images.saved(Image.new("L", (60_000, 1)), "PNG")
    scaled = test_images.Preprocessing(fit="crop")
    yield (
        "PNG of 60000 x 1 pixels, for a network that scales the shorter side and crops",
        written("scan.png", line, lambda path: test_images.fit(read_image(path), scaled)),
    )
    for content, _ in parameters(test_images.test_a_file_that_is_no_image_is_refused_by_name):
        yield text(content), written("scan.png", content, read_image)
    yield "not there", lambda folder: read_image(folder / "none.png")
    yield "a pipe in place of a file", lambda folder: read_image(pipe(folder / "scan.png"))


def dicoms() -> Iterator[Case]:
    for name, content in test_dicom.FAULTS.items():
        if "without a decoder" not in name:  # what is installed decides
            yield name.replace("DICOM, ", ""), written("scan.dcm", content, read_image)


def arrays() -> Iterator[Case]:
    for kind in test_medmnist.KINDS:
        yield kind, lambda folder, kind=kind: _npz(folder, kind)
    for keep in (0, 3000, -30):
        yield f"cut: [:{keep}]" if keep else "an empty file", lambda folder, keep=keep: _cut_npz(folder, keep)
    yield "a header that claims 784 TB", lambda folder: _claiming_npz(folder, b"(1000000000000, 28, 28)")


def _synthetic_npz(folder: Path) -> Path:
    return test_medmnist.synthetic_set(folder, "breastmnist") / "breastmnist.npz"


def _npz(folder: Path, kind: str) -> None:
    path = _synthetic_npz(folder)
    changed, _ = test_medmnist.broken(kind, test_medmnist.arrays_of(path), folder)
    np.savez_compressed(path, **changed)
    load_index("breastmnist", folder, "val")


def _cut_npz(folder: Path, keep: int) -> None:
    path = _synthetic_npz(folder)
    path.write_bytes(path.read_bytes()[:keep])
    load_index("breastmnist", folder, "val")


def _claiming_npz(folder: Path, shape: bytes) -> None:
    path = _synthetic_npz(folder)
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': " + shape + b", }"
    with zipfile.ZipFile(path) as file:
        kept = {name: file.read(name) for name in file.namelist()}
    kept["val_images.npy"] = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(1000)
    with zipfile.ZipFile(path, "w") as file:
        for name, data in kept.items():
            file.writestr(name, data)
    load_index("breastmnist", folder, "val")


def split_files() -> Iterator[Case]:
    for line in test_data.FAULTY_LINES:
        yield (
            text(line) if line else "an empty line",
            lambda folder, line=line: _list(folder, f"COVID/COVID-2.png 0\n{line}\n".encode()),
        )
    for (content,) in parameters(test_data.test_covid_faulty_split_files):
        yield f"the file {text(content)}" if content else text(content), lambda folder, c=content: _list(folder, c)


def _list(folder: Path, content: bytes) -> None:
    path = covid_tree(folder) / "train.txt"
    path.write_bytes(content)
    covid.read_split_file(path)


def tables() -> Iterator[Case]:
    for rows, _ in parameters(test_data.test_palm_faulty_rows):
        content = f"ID,imgName,Label,Fovea_X,Fovea_Y\n{rows}\n"
        yield f"labels.csv: {text(rows)}", lambda folder, content=content: _labels(folder, content.encode())
    for content, _ in parameters(test_data.test_palm_faulty_label_file):
        yield f"labels.csv: {text(content)}", lambda folder, content=content: _labels(folder, content)
    for content, _ in parameters(test_comparison.test_faulty_files):
        yield f"predictions: {text(content)}", written("predictions_val.csv", content, read_predictions)


def _labels(folder: Path, content: bytes) -> None:
    (palm_tree(folder) / "labels.csv").write_bytes(content)
    load_index("palm", folder, "val")


def image_lists() -> Iterator[Case]:
    read = test_own_images.read_image_list
    for title in (*test_own_images.HOSTILE_LISTS, *test_own_images.HOSTILE_FACTS, *test_own_images.CUT_FACTS):
        yield title, lambda folder, title=title: read(test_own_images.hostile_list(folder, title))
    for content, columns, _ in parameters(test_own_images.test_tables_that_are_refused):
        yield (
            f"a table: {text(content)}",
            lambda folder, a=(content, columns): own_images(folder, test_own_images.table_of(folder, a[0]), a[1]),
        )


def cross_validations(folder: Path) -> Iterator[Case]:
    whole = test_ensemble.cross_validation(folder)

    def damaged(target: Path, damage: Callable[[Path], None]) -> None:
        root = shutil.copytree(whole, target / "cv")
        damage(root)
        Predictor.from_weights(root)

    for damage, _ in parameters(test_ensemble.test_a_damaged_folder):
        title = damage.__name__.replace("_", " ")
        yield title, lambda target, damage=damage: damaged(target, damage)


def shards() -> Iterator[Case]:
    for name in test_sharded_prediction.DAMAGES:
        if name != "settings of another model":  # the message shows the sha256 of this one
            yield f"manifest.json: {name}", lambda folder, name=name: test_sharded_prediction.damaged(folder, name)
    for content, _ in parameters(test_sharded_prediction.test_a_faulty_list):
        if content is not None:
            yield f"--list: {text(content)}", written("list.txt", content, lambda path: list(listed_files(path)))
    yield "--list: a pipe", lambda folder: list(listed_files(pipe(folder / "list.txt")))


def archives() -> Iterator[Case]:
    for member, _ in parameters(test_archives.test_refuses_hostile_members):
        name = member[0] if isinstance(member[0], str) else "a symbolic link"
        yield f"member {name}", lambda folder, member=member: _archive(folder, member)
    for member, _ in parameters(test_archives.test_refuses_hostile_members_of_tars):
        yield (
            f"member of a tar {member.name}",
            lambda folder, member=member: unpack(test_archives.make_tar(folder / "a.tar.gz", member), folder / "out"),
        )
    for (name,) in parameters(test_archives.test_members_without_a_name):
        member = zipfile.ZipInfo(name), b"x"
        yield f"member without a name {name!r}", lambda folder, member=member: _archive(folder, member)
    yield "an HTML page", written("a.zip", "<html>404</html>", lambda path: unpack(path, path.parent / "out"))
    yield "a good archive over a folder that is there", lambda folder: _archive(folder, ("x", b"1"), over=True)


def _archive(folder: Path, member: tuple, over: bool = False) -> None:
    if over:
        (folder / "out").mkdir()
    unpack(test_archives.make(folder / "a.zip", [("fine.txt", b"x"), member]), folder / "out")


def recipes() -> Iterator[Case]:
    for content, _ in parameters(test_recipe.test_faulty_files):
        yield text(content), written("recipe.json", content, Recipe.from_file)


def downloads(url: str) -> Iterator[Case]:
    size, good = len(BODY), MD5
    for title, path, wanted, md5 in (
        ("other bytes than published", "file", 0, "0" * 32),
        ("another size than published", "file", 10, good),
        ("the connection ends half-way", "cut", size, good),
        ("a page that is gone", "gone", 0, good),
        ("a redirect to ftp", "away", 0, good),
    ):
        yield title, lambda folder, a=(path, wanted, md5): download(f"{url}/{a[0]}", folder / "file", a[1], a[2])
    for address in ("http://example.org/x", "file:///etc/hostname"):
        yield address, lambda folder, address=address: _fetch_by_https(address, folder / "file")


def _fetch_by_https(address: str, target: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:  # the server of the other cases speaks http
        patch.setattr("paddle_medcls.data.download.SCHEMES", ("https",))
        download(address, target, md5=MD5)


def not_used(folder: Path) -> Iterator[tuple[str, str]]:
    """What is ignored or made again; each case asserts what its line says."""
    mine = test_predict.saved(folder / "mine", preprocessing=test_predict.SMALL)
    image = [pixels(0, size=8)]
    alone = Predictor.from_weights(mine).logits(image)
    beside = mine.parent / ".engines" / f"{mine.name}-onnxruntime"
    test_predict.strange_export(beside, "none", sha256=sha256(mine))
    assert not Predictor.from_weights(beside).logits(image).any()  # it can be opened, and is another model
    np.testing.assert_array_equal(Predictor.from_weights(mine).logits(image), alone)
    yield "a folder `.engines` with an export beside weights", "ignored: the weight file is the model"
    test_cache.test_another_folders_pixels_are_never_used(folder / "cache")
    yield (
        "an image cache of another folder: same names, sizes and times",
        "ignored: a cache belongs to its images' bytes",
    )
    index = load_index("palm", palm_tree(folder / "palm"), "train")
    for name in ("old", "cut", "no statistics", "empty", "another shape"):
        (folder / name).mkdir()
    test_cache.test_the_cache_of_version_0_1_is_not_read(index, folder / "old")
    yield "an image cache of version 0.1", "ignored"
    for harm in ("cut", "no statistics", "empty", "another shape"):
        test_cache.test_an_incomplete_cache_is_built_again(index, folder / harm, harm)
        yield f"an image cache: {harm}", "made again from the images"


# --- the page --------------------------------------------------------------------------------------


def outcome(case: Callable[[Path], object], folder: Path) -> tuple[str, str]:
    """Class and message of the error that an input gets; any other end is a defect."""
    folder.mkdir()
    start = time.perf_counter()
    with pytest.raises(MedclsError) as caught:
        within(20, lambda: case(folder))
    assert time.perf_counter() - start < 10
    assert not (folder / "canary").exists() and not (folder / "ran").exists(), "something ran"
    first, *others = str(caught.value).replace(f"{folder}/", "").splitlines()
    labels = ("  path ", "  expected ", "  fix ")
    line = f"{first}: {others[0].strip()}" if others and not others[0].startswith(labels) else first
    line = re.sub(r"bytes from [\d,]+$", "bytes from far fewer", line)  # how few is the packer's affair
    return type(caught.value).__name__, line


def cell(line: str) -> str:
    """As a cell of a Markdown table, printable and not too long."""
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
    line = line if len(line) <= 150 else line[:149] + "…"
    return re.sub(r"([\\|<>*_`\[\]])", r"\\\1", line)


@pytest.mark.filterwarnings("ignore:invalid escape sequence")  # a text opcode, decoded before it is refused
def test_the_page_is_what_the_code_does(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    groups = {
        "Weight files": weights(),
        "Sidecars": sidecars(),
        "Novelty files": novelty_files(),
        "Exports": exports(),
        "Folders of a cross-validation": cross_validations(tmp_path / "whole"),
        "Runs to resume": runs(*reversed(request.getfixturevalue("half"))),
        "Images": pictures(),
        "DICOM files": dicoms(),
        "MedMNIST files (npz)": arrays(),
        "Split files": split_files(),
        "Tables (CSV)": tables(),
        "Own images: lists and tables": image_lists(),
        "Very many images: shards and lists": shards(),
        "Archives": archives(),
        "Recipes": recipes(),
        "Downloads": downloads(request.getfixturevalue("server")),
    }
    page, number = [HEAD], 0
    for title, cases in groups.items():
        page.append(f"## {title}\n\n| input | error | message |\n|---|---|---|")
        for name, case in cases:
            number += 1
            kind, line = outcome(case, tmp_path / str(number))
            page.append(f"| {cell(name)} | `{kind}` | {cell(line)} |")
        page.append("")
    page.append("## Ignored or made again\n\n| input | result |\n|---|---|")
    page += [f"| {name} | {line} |" for name, line in not_used(tmp_path / "not used")]
    found = "\n".join([*page, ""])
    if request.config.getoption("--update-docs"):
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(found, encoding="utf-8")
    assert number > 150 and PAGE.read_text(encoding="utf-8") == found, "write it again with --update-docs"
