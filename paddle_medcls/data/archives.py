"""Safe unpacking of zip and tar archives: no path escapes the target folder, and the target is complete or absent.

Formats: zip, tar, tar.gz, tgz, tar.bz2, tar.xz. An archive inside an archive (PALM on AI Studio) is unpacked into a
folder beside it.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath
from typing import IO

from paddle_medcls.core.errors import DataError
from paddle_medcls.core.files import atomic_write
from paddle_medcls.data.archive_members import BLOCK, MAX_BYTES, MAX_RATIO, for_each_file, unreadable_archive

SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
MAX_INNER = 16  # archives inside an archive


@dataclass(frozen=True)
class Unpacked:
    """The result of unpacking one archive.

    Attributes:
        archive: path of the archive.
        folder: the folder that holds its files.
        files: paths of the files relative to `folder`, sorted.
        already: True if `folder` held the same files before; nothing was written.
    """

    archive: Path
    folder: Path
    files: list[PurePosixPath]
    already: bool

    def __str__(self) -> str:
        name, count = self.archive.name, len(self.files)
        if self.already:
            return f"{name}: already unpacked in {self.folder}, {count} files with the same content"
        return f"{name}: {count} files -> {self.folder}"


def find_archives(path: Path) -> list[Path]:
    """The archive `path`, or the archives in the folder `path`, sorted by name.

    Raises:
        DataError: no such file or folder, or no archive in it.
    """
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    archives = [file for file in files if stem_of(file) and file.is_file()]
    if not archives:
        fault = "no archives" if path.exists() else "no such file or folder"
        raise DataError(f"{fault}: {path.name}", path=path, expected=f"files that end in {', '.join(SUFFIXES)}")
    return archives


def stem_of(file: PurePath) -> str:
    """ "OCT2017.tar.gz" -> "OCT2017"; "" for hidden files and for names without an archive's suffix."""
    suffix = max((end for end in SUFFIXES if file.name.lower().endswith(end)), key=len, default="")
    return file.name[: -len(suffix)].strip() if suffix and not file.name.startswith(".") else ""


def unpack_all(path: Path, root: Path) -> Iterator[Unpacked]:
    """Unpacks the archive `path`, or all archives in the folder `path`, each into the folder `root / stem_of(archive)`.

    Unpacking again is harmless: see `Unpacked.already`. Archives inside an archive are unpacked too, each into a folder
    beside it; archives inside these are not.

    Raises:
        DataError: see `unpack`; no archives; two archives with one stem; more than MAX_INNER archives in an archive.
    """
    archives = find_archives(path)
    folders = [root / stem_of(file) for file in archives]
    clashes = [str(file) for file, folder in zip(archives, folders) if folders.count(folder) > 1]
    if clashes:
        raise DataError("two archives would be unpacked into one folder", items=clashes, path=path, fix="rename one")
    for archive, folder in zip(archives, folders):
        result = _unpack_or_compare(archive, folder)
        yield result
        inner = [folder / path for path in result.files if stem_of(path) and "__MACOSX" not in path.parts]
        if len(inner) > MAX_INNER:
            raise DataError(f"{archive.name} holds {len(inner)} archives", path=archive, expected=f"≤ {MAX_INNER}")
        for file in inner:  # the bound follows the outer archive: MAX_RATIO holds for both levels together
            yield _unpack_or_compare(file, file.with_name(stem_of(file)), MAX_RATIO * archive.stat().st_size)


def put(file: Path, target: Path) -> str:
    """Copies a data file that is no archive (MedMNIST's npz) to `target`, unless the same file is there.

    Returns:
        A message for the user.

    Raises:
        DataError: `target` exists with another content.
    """
    if target.exists():
        with open(file, "rb") as stream:
            if not _same_bytes(stream, target):
                raise DataError(f"{target} already exists and differs from {file}", fix="remove one of the two")
        return f"{target} already exists with the same content"
    atomic_write(target, lambda name: shutil.copyfile(file, name))
    return f"{file} -> {target}"


def _unpack_or_compare(archive: Path, target: Path, max_bytes: int = MAX_BYTES) -> Unpacked:
    """Unpacks an archive into `target`; where `target` holds files, compares them with the archive byte by byte."""
    if target.is_dir() and any(target.iterdir()):
        return Unpacked(archive, target, _compare(archive, target, max_bytes), already=True)
    if target.is_dir():
        target.rmdir()
    return Unpacked(archive, target, unpack(archive, target, max_bytes), already=False)


def unpack(archive: Path, target: Path, max_bytes: int = MAX_BYTES) -> list[PurePosixPath]:
    """Unpacks an archive into the new folder `target`, completely or not at all.

    Files are written into a hidden folder beside `target`, which is renamed at the end. A hidden folder left by a
    killed process is removed first.

    Args:
        archive: zip or tar; the suffix decides between the two.
        max_bytes: the largest total size of the unpacked files, in bytes.

    Returns:
        The files' paths relative to `target`, sorted.

    Raises:
        DataError: no archive, damaged, too large, a member whose path leaves `target`, or `target` exists.
    """
    if target.exists():
        raise DataError(f"{target} already exists", fix="remove it first, or keep it: nothing was changed")
    temporary = target.with_name(f".{target.name}.unpacking")

    def write(path: PurePosixPath, stream: IO[bytes]) -> None:
        file = temporary / path
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "xb") as out:
            shutil.copyfileobj(stream, out, BLOCK)

    try:
        if temporary.exists():
            shutil.rmtree(temporary)
        temporary.mkdir(parents=True)
        files = for_each_file(archive, write, max_bytes)
        temporary.rename(target)
    except OSError as error:
        raise unreadable_archive(archive, error) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return files


def _compare(archive: Path, target: Path, max_bytes: int) -> list[PurePosixPath]:
    """Paths of an archive's files, which `target` must hold with the same content."""
    different: list[str] = []

    def compare(path: PurePosixPath, stream: IO[bytes]) -> None:
        if len(different) < 20 and not _same_bytes(stream, target / path):
            different.append(f"{path} is missing or differs")

    files = for_each_file(archive, compare, max_bytes)
    if different:
        raise DataError(
            f"{target} already exists, and differs from {archive.name}",
            items=different,
            path=target,
            fix="remove it to unpack the archive again, or omit --archives to use it as it is; nothing was changed",
        )
    return files


def _same_bytes(stream: IO[bytes], path: Path) -> bool:
    if path.is_symlink() or not path.is_file():
        return False
    with open(path, "rb") as file:
        while block := stream.read(BLOCK):
            if file.read(len(block)) != block:
                return False
        return not file.read(1)
