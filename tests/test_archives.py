"""Unpacking of archives: completely inside the target folder, or not at all."""

import gzip
import io
import stat
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import source_archives as source

from paddle_medcls.cli import prepare, train
from paddle_medcls.core.errors import DataError
from paddle_medcls.data.archives import unpack, unpack_all
from paddle_medcls.data.datasets import load_index
from paddle_medcls.data.sample import draw_npz


def make(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in members:
            file.writestr(name, data)
    return path


def test_unpacks(tmp_path):
    archive = make(tmp_path / "a.zip", [("PALM/x.jpg", b"1"), ("PALM/deep/y.jpg", b"2")])
    files = unpack(archive, tmp_path / "out" / "a")
    assert [str(path) for path in files] == ["PALM/deep/y.jpg", "PALM/x.jpg"]
    assert (tmp_path / "out/a/PALM/deep/y.jpg").read_bytes() == b"2"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a"]  # no temporary folder left


def link(name, to):
    info = zipfile.ZipInfo(name)
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info, to


@pytest.mark.parametrize(
    "member, message",
    [
        (("../escaped.txt", b"x"), "leaves the target folder"),
        (("/absolute.txt", b"x"), "leaves the target folder"),
        (("a/../../escaped.txt", b"x"), "leaves the target folder"),
        ((r"..\escaped.txt", b"x"), "leaves the target folder"),
        (("C:/escaped.txt", b"x"), "leaves the target folder"),
        (link("shortcut", "/etc"), "is a link"),
        (("bomb.bin", bytes(3_000_000)), "unpacks to 3,000,000 bytes"),
    ],
)
def test_refuses_hostile_members(tmp_path, member, message):
    archive = make(tmp_path / "a.zip", [("fine.txt", b"x"), member])
    with pytest.raises(DataError, match=message):
        unpack(archive, tmp_path / "out" / "a")
    assert not (tmp_path / "out" / "a").exists()
    assert not (tmp_path / "escaped.txt").exists() and not (tmp_path / "out" / "escaped.txt").exists()


def test_damaged_archive_leaves_nothing(tmp_path):
    archive = make(tmp_path / "a.zip", [(f"{k}.bin", bytes(range(256)) * 40) for k in range(5)])
    data = bytearray(archive.read_bytes())
    data[len(data) // 2] ^= 0xFF  # a checksum no longer fits
    archive.write_bytes(data)
    with pytest.raises(DataError, match="cannot be unpacked"):
        unpack(archive, tmp_path / "out" / "a")
    assert list((tmp_path / "out").iterdir()) == []


def test_never_over_an_existing_folder(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(DataError, match="already exists"):
        unpack(make(tmp_path / "a.zip", [("x", b"1")]), tmp_path / "a")


def test_not_a_zip(tmp_path):
    (tmp_path / "a.zip").write_text("<html>404</html>")
    with pytest.raises(DataError, match="cannot be unpacked"):
        unpack(tmp_path / "a.zip", tmp_path / "a")


# --- what each source serves, through the command --------------------------------------------------------------------


def prepare_from(root, archives, dataset, *words):
    return prepare.main(["--dataset", dataset, "--archives", str(archives), "--data-root", str(root), *words])


def tree(root):
    return {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}


OCT_COUNTS = {"train": 36, "val": 4, "test": 8}
SOURCES = {
    "COVID, Kaggle": ("covid", source.covid_kaggle, {"train": 28, "val": 8, "test": 4}),
    "OCT, Kaggle": ("oct", source.oct_kaggle, OCT_COUNTS),
    "OCT, Mendeley 2": ("oct", source.oct_mendeley, OCT_COUNTS),
    "OCT, as tgz": ("oct", lambda: source.oct_mendeley("OCT2017.tgz"), OCT_COUNTS),
    "OCT, as tar": ("oct", lambda: source.oct_mendeley("OCT2017.tar", "w"), OCT_COUNTS),
    "OCT, Mendeley 3": ("oct", source.oct_zhang_lab, OCT_COUNTS),
    "PALM, AI Studio": ("palm", source.palm_ai_studio, {"train": 12, "val": 7}),
    "PALM, copies": ("palm", source.palm_flat, {"train": 12, "val": 7}),
}


@pytest.mark.parametrize("name", SOURCES)
def test_each_sources_archives_go_through_one_command_and_load(tmp_path, capsys, name):
    dataset, archives, counts = SOURCES[name]
    folder, root = source.write(archives(), tmp_path / "downloads"), tmp_path / "data"
    words = ["--split"] if dataset == "covid" else []
    assert prepare_from(root, folder, dataset, *words) == 0
    for split, count in counts.items():
        assert len(load_index(dataset, root, split)) == count
    before = tree(root)
    capsys.readouterr()
    assert prepare_from(root, folder, dataset, *words) == 0  # again: harmless
    shown = capsys.readouterr().out
    assert tree(root) == before
    assert shown.count("already unpacked") == shown.count("same content") >= len(archives())


def test_the_readmes_covid_command_and_a_training(tmp_path, capsys):
    archive = source.write(source.covid_kaggle(), tmp_path) / "archive.zip"
    root = tmp_path / "covid"
    assert prepare_from(root, archive, "covid", "--split", "--stats") == 0  # the archive itself serves as well
    assert "40 images: train 28 / val 8 / test 4" in capsys.readouterr().out
    words = ["--dataset", "covid", "--data-root", str(root), "--epochs", "1", "--batch-size", "14", "--model"]
    sizes = ["--set", "size_px=32", "resize_px=36"]
    assert train.main([*words, "toy_resnet", *sizes, "--device", "cpu", "--output", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "COVID.pdparams").is_file()


@pytest.mark.parametrize("packed", ["npz", "npz in a zip"])
def test_medmnist_files(tmp_path, capsys, packed):
    draw_npz("breastmnist", tmp_path / "made", counts=(6, 4, 4))
    data = (tmp_path / "made" / "breastmnist.npz").read_bytes()
    archives = (
        {"breastmnist.npz": data} if packed == "npz" else {"archive.zip": source.zipped({"x/breastmnist.npz": data})}
    )
    root = tmp_path / "data"
    root.mkdir()
    (root / "DRAWN.txt").write_text("")
    for _ in range(2):
        assert prepare_from(root, source.write(archives, tmp_path / "downloads"), "breastmnist") == 0
        assert len(load_index("breastmnist", root, "train")) == 6
    assert "with the same content" in capsys.readouterr().out


def test_two_candidates_are_refused_and_named(tmp_path, capsys):
    source.write(source.oct_kaggle(), tmp_path / "downloads")
    assert prepare_from(tmp_path / "data", tmp_path / "downloads", "oct") == 0
    other = tmp_path / "data/archive/oct2017/OCT2017 /test/CNV/CNV-1000-1.jpeg"
    other.write_bytes(other.read_bytes() + b"x")
    with pytest.raises(DataError, match="test was found 2 times, with different content") as caught:
        load_index("oct", tmp_path / "data", "test")
    assert "archive/OCT2017 /test" in str(caught.value) and "archive/oct2017/OCT2017 /test" in str(caught.value)
    assert len(load_index("oct", tmp_path / "data", "train")) == 36


# --- again, interrupted, changed -------------------------------------------------------------------------------------


def test_what_a_killed_process_left_is_removed_and_unpacking_starts_anew(tmp_path):
    archive = make(tmp_path / "a.zip", [("x", b"1"), ("y", b"2")])
    (tmp_path / "out" / ".a.unpacking").mkdir(parents=True)
    (tmp_path / "out" / ".a.unpacking" / "x").write_bytes(b"hal")
    (done,) = unpack_all(archive, tmp_path / "out")
    assert not done.already and tree(tmp_path / "out") == {Path("a/x"): b"1", Path("a/y"): b"2"}


def test_an_interruption_leaves_nothing(tmp_path, monkeypatch):
    archive = make(tmp_path / "a.zip", [("x", b"1"), ("y", b"2")])

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.copyfileobj", stop)
    with pytest.raises(KeyboardInterrupt):
        unpack(archive, tmp_path / "out" / "a")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    "change", [lambda x: x.write_bytes(b"2"), lambda x: x.unlink(), lambda x: x.write_bytes(b"11")]
)
def test_a_folder_with_another_content_is_left_as_it_is(tmp_path, change):
    archive = make(tmp_path / "a.zip", [("x", b"1"), ("y", b"2")])
    list(unpack_all(archive, tmp_path / "out"))
    change(tmp_path / "out/a/x")
    before = tree(tmp_path / "out")
    with pytest.raises(DataError, match="already exists, and differs from a.zip") as caught:
        list(unpack_all(archive, tmp_path / "out"))
    assert "x is missing or differs" in str(caught.value) and tree(tmp_path / "out") == before


def test_no_archives(tmp_path):
    for place, message in ((tmp_path / "none", "no such file or folder"), (tmp_path, "no archives")):
        with pytest.raises(DataError, match=message):
            list(unpack_all(place, tmp_path / "out"))


def test_two_archives_of_one_name(tmp_path):
    source.write({"a.zip": source.zipped({"x": b"1"}), "a.tar": source.tarred({"x": b"1"}, "w")}, tmp_path)
    with pytest.raises(DataError, match="into one folder"):
        list(unpack_all(tmp_path, tmp_path / "out"))


# --- hostile ---------------------------------------------------------------------------------------------------------


def tar_member(name, **fields):
    info = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(info, field, value)
    return info


def make_tar(path, member):
    with gzip.open(path, "wb") as file:
        file.write(tar_member("fine.txt").tobuf() + member.tobuf() + bytes(1024))
    return path


@pytest.mark.parametrize(
    "member, message",
    [
        (tar_member("../escaped.txt"), "leaves the target folder"),
        (tar_member("/absolute.txt"), "leaves the target folder"),
        (tar_member("a/../../escaped.txt"), "leaves the target folder"),
        (tar_member("link", type=tarfile.SYMTYPE, linkname="/etc"), "is a link"),
        (tar_member("hard", type=tarfile.LNKTYPE, linkname="fine.txt"), "is a link"),
        (tar_member("pipe", type=tarfile.FIFOTYPE), "is no plain file"),
        (tar_member("device", type=tarfile.CHRTYPE), "is no plain file"),
        (tar_member("fine.txt"), "occurs twice"),
        (tar_member("."), "not a file name"),
        (tar_member("huge", size=2**40), "bytes unpacked"),
    ],
)
def test_refuses_hostile_members_of_tars(tmp_path, member, message):
    archive = make_tar(tmp_path / "a.tar.gz", member)
    with pytest.raises(DataError, match=message):
        unpack(archive, tmp_path / "out" / "a")
    assert list((tmp_path / "out").iterdir()) == [] and not (tmp_path / "escaped.txt").exists()


@pytest.mark.parametrize("size", [30_000_000, pytest.param(300_000_000, marks=pytest.mark.slow)])
def test_bombs_of_tars(tmp_path, size):
    """In a file, and in the header of one, which Python's tarfile would read into memory."""
    with tarfile.open(tmp_path / "file.tar.gz", "w:gz") as file:
        file.addfile(tar_member("zeros", size=size), io.BytesIO(bytes(size)))
    with gzip.open(tmp_path / "header.tar.gz", "wb") as stream:
        stream.write(tar_member("x", type=tarfile.GNUTYPE_LONGNAME, size=size).tobuf() + b"x" * size)
    for name, message in (("file", "times the file"), ("header", "a header of more than 1,048,576 bytes")):
        with pytest.raises(DataError, match=message):
            unpack(tmp_path / f"{name}.tar.gz", tmp_path / "out" / name)
        assert not (tmp_path / "out" / name).exists()


@pytest.mark.parametrize("name", ["", ".", "./."])
def test_members_without_a_name(tmp_path, name):
    archive = make(tmp_path / "a.zip", [(zipfile.ZipInfo(name), b"1")])
    with pytest.raises(DataError, match="is not a file name"):
        unpack(archive, tmp_path / "out")


@pytest.mark.parametrize("method", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2, zipfile.ZIP_DEFLATED])
def test_every_damage_is_one_clear_error(tmp_path, method):
    whole = tmp_path / "whole.zip"
    content = np.random.default_rng(0).integers(0, 9, 400, np.uint8).tobytes()
    with zipfile.ZipFile(whole, "w", method) as file:
        file.writestr("x", content)
    data = whole.read_bytes()
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 0xFF
        (tmp_path / "a.zip").write_bytes(damaged)
        try:
            unpack(tmp_path / "a.zip", tmp_path / "out" / str(position))
        except DataError:
            assert not (tmp_path / "out" / str(position)).exists()
        else:  # bytes that do not matter, as a date: but never another content
            assert [file.read_bytes() for file in (tmp_path / "out" / str(position)).iterdir()] == [content]


def test_damaged_and_cut_tars(tmp_path):
    (data,) = source.oct_mendeley().values()
    for k, damaged in enumerate(
        (data[: len(data) // 2], data[:-9], data[:99] + b"\0\0\0" + data[102:], b"<html>", b"")
    ):
        (tmp_path / "a.tar.gz").write_bytes(damaged)
        with pytest.raises(DataError, match="a.tar.gz cannot be unpacked"):
            unpack(tmp_path / "a.tar.gz", tmp_path / "out" / str(k))


def test_archives_in_archives_are_bounded(tmp_path):
    many = {f"{k}.zip": source.zipped({"x": b"1"}) for k in range(17)}
    source.write({"a.zip": source.zipped(many)}, tmp_path)
    with pytest.raises(DataError, match="holds 17 archives"):
        list(unpack_all(tmp_path / "a.zip", tmp_path / "out"))
