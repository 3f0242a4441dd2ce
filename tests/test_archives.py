"""Archives: unpacked completely inside the target, or not at all."""

import stat
import zipfile

import pytest

from paddle_medcls.data.archives import unpack
from paddle_medcls.errors import DataError


def make(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in members:
            file.writestr(name, data)
    return path


def test_unpacks(tmp_path):
    archive = make(tmp_path / "a.zip", [("PALM/x.jpg", b"1"), ("PALM/deep/y.jpg", b"2")])
    assert unpack(archive, tmp_path / "out" / "a") == 2
    assert (tmp_path / "out/a/PALM/deep/y.jpg").read_bytes() == b"2"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a"]  # no temporary folder left


def link(name, to):
    info = zipfile.ZipInfo(name)
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info, to


@pytest.mark.parametrize(
    "member, message",
    [
        (("../escaped.txt", b"x"), "leads out"),
        (("/absolute.txt", b"x"), "leads out"),
        (("a/../../escaped.txt", b"x"), "leads out"),
        ((r"..\escaped.txt", b"x"), "leads out"),
        (("C:/escaped.txt", b"x"), "leads out"),
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
