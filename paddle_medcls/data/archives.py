"""Unpacking of zip and tar archives: nothing is written outside the target, and the target is complete or absent.

Each source's archives are read as they are served: zip, tar, tar.gz, tgz, tar.bz2, tar.xz; an archive inside an
archive (PALM on AI Studio) is unpacked beside itself.
"""

from __future__ import annotations

import bz2
import errno
import gzip
import lzma
import shutil
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath, PurePosixPath
from typing import IO, Callable

from paddle_medcls.errors import DataError
from paddle_medcls.files import atomic_write
from paddle_medcls.progress import progress

SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
MAX_MEMBERS = 400_000
MAX_BYTES = 64 * 2**30
MAX_RATIO = 200  # unpacked to packed, of one member of a zip, of a whole tar; images and tables stay far below
MAX_INNER = 16  # archives inside an archive
HEADER_BYTES = 1 << 20  # of one member of a tar; long names take some hundred
BLOCK = 1 << 20
_DAMAGED: tuple[type[Exception], ...] = (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, struct.error)
_DAMAGED += (OSError, EOFError, NotImplementedError, RuntimeError, ValueError, OverflowError)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)


@dataclass(frozen=True)
class Unpacked:
    """What became of one archive.

    Attributes:
        archive: the file that was read.
        folder: where its files are.
        files: their paths below it.
        already: its files were there before, with the same content; nothing was written.
    """

    archive: Path
    folder: Path
    files: list[PurePosixPath]
    already: bool

    def __str__(self) -> str:
        if self.already:
            return (
                f"{self.archive.name}: already unpacked in {self.folder}, {len(self.files)} files with the same content"
            )
        return f"{self.archive.name}: {len(self.files)} files -> {self.folder}"


def find_archives(path: Path, suffixes: tuple[str, ...] = SUFFIXES) -> list[Path]:
    """The archive `path`, or the archives that the folder `path` holds, sorted by name.

    Raises:
        DataError: no such file or folder, or no archive in it.
    """
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if stem_of(file, suffixes) and file.is_file())
    else:
        found = [path] if path.is_file() and stem_of(path, suffixes) else []
    if not found:
        what = "no archives" if path.exists() else "no such file or folder"
        raise DataError(f"{what}: {path.name}", where=path, expected=f"files that end in {', '.join(suffixes)}")
    return found


def stem_of(file: PurePath, suffixes: tuple[str, ...] = SUFFIXES) -> str:
    """ "OCT2017.tar.gz" -> "OCT2017"; "" for a file that is no archive by its name, and for hidden files."""
    longest = max((end for end in suffixes if file.name.lower().endswith(end)), key=len, default="")
    return file.name[: -len(longest)].strip() if longest and not file.name.startswith(".") else ""


def unpack_all(path: Path, root: Path) -> Iterator[Unpacked]:
    """Unpacks the archive `path`, or all archives of the folder `path`, each into a folder of its name below `root`.

    Unpacking again is harmless: see `Unpacked.already`. Archives directly inside an archive are unpacked too, each
    into a folder of its name beside itself.

    Raises:
        DataError: see `unpack`; no archives; two archives of one name.
    """
    archives = find_archives(path)
    folders = [root / stem_of(file) for file in archives]
    twice = [str(file) for file, folder in zip(archives, folders) if folders.count(folder) > 1]
    if twice:
        raise DataError("two archives would be unpacked into one folder", items=twice, where=path, do="rename one")
    for archive, folder in zip(archives, folders):
        done = unpack_once(archive, folder)
        yield done
        inner = [folder / path for path in done.files if stem_of(path) and "__MACOSX" not in path.parts]
        if len(inner) > MAX_INNER:
            raise DataError(f"{archive.name} holds {len(inner)} archives", where=archive, expected=f"≤ {MAX_INNER}")
        for file in inner:  # their size is bounded by that of the file that came from outside
            yield unpack_once(file, file.with_name(stem_of(file)), MAX_RATIO * archive.stat().st_size)


def put(file: Path, target: Path) -> str:
    """Copies a file of a data set that is no archive (MedMNIST's npz) to its place; says what was done.

    Raises:
        DataError: another file is there.
    """
    if target.exists():
        with open(file, "rb") as stream:
            if not _same_bytes(stream, target):
                raise DataError(f"{target} already exists, and differs from {file}", do="remove one of the two")
        return f"{target} is there already, with the same content"
    atomic_write(target, lambda name: shutil.copyfile(file, name))
    return f"{file} -> {target}"


def unpack_once(archive: Path, target: Path, max_bytes: int = MAX_BYTES) -> Unpacked:
    """Unpacks an archive into `target`, unless `target` holds its files already, compared byte by byte."""
    if target.is_dir() and any(target.iterdir()):
        return Unpacked(archive, target, _compare(archive, target, max_bytes), already=True)
    if target.is_dir():
        target.rmdir()
    return Unpacked(archive, target, unpack(archive, target, max_bytes), already=False)


def unpack(archive: Path, target: Path, max_bytes: int = MAX_BYTES) -> list[PurePosixPath]:
    """Unpacks an archive into the new folder `target`, completely or not at all.

    Files are written into a hidden folder beside `target`, which is renamed at the end. A hidden folder that a
    killed process has left is removed first.

    Args:
        max_bytes: refused when its files are larger together.

    Returns:
        The files, as paths below `target`.

    Raises:
        DataError: no archive, damaged, too large, a member that leads elsewhere, or `target` exists.
    """
    if target.exists():
        raise DataError(f"{target} already exists", do="remove it first, or keep it: nothing was changed")
    temporary = target.with_name(f".{target.name}.unpacking")

    def write(path: PurePosixPath, stream: IO[bytes]) -> None:
        file = temporary / path
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "xb") as out:
            shutil.copyfileobj(stream, out, BLOCK)

    try:
        _remove(temporary)
        temporary.mkdir(parents=True)
        files = _for_each(archive, write, max_bytes)
        temporary.rename(target)
    except OSError as error:
        raise _cannot(archive, error) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return files


def _remove(folder: Path) -> None:
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)


def _compare(archive: Path, target: Path, max_bytes: int) -> list[PurePosixPath]:
    """The files of an archive that has been unpacked into `target`; another content is an error."""
    different: list[str] = []

    def compare(path: PurePosixPath, stream: IO[bytes]) -> None:
        if len(different) < 20 and not _same_bytes(stream, target / path):
            different.append(f"{path} is missing or differs")

    files = _for_each(archive, compare, max_bytes)
    if different:
        raise DataError(
            f"{target} already exists, and is not what {archive.name} holds",
            items=different,
            where=target,
            do="remove it to unpack the archive again, or leave --archives out to use it as it is; nothing was changed",
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


# --- members ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Member:
    """One file of an archive; `fault` says why it is no plain file of a plausible size, "" where it is one."""

    name: str
    size: int
    fault: str
    open: Callable[[], IO[bytes] | None]


def _for_each(archive: Path, use: Callable[[PurePosixPath, IO[bytes]], None], max_bytes: int) -> list[PurePosixPath]:
    """Calls `use` with path and content of each file; returns the paths, sorted.

    Raises:
        DataError: damaged or too large at once; members that lead elsewhere, all of them, at the end.
    """
    faults: list[str] = []
    seen: set[PurePosixPath] = set()
    total, most = 0, min(max_bytes, MAX_BYTES)
    try:
        members = _zip_members(archive) if archive.name.lower().endswith(".zip") else _tar_members(archive)
        for member in progress(members, f"unpacking {archive.name}", 0, "file"):
            path, fault = _path_of(member)
            total += member.size
            if len(seen) + len(faults) >= MAX_MEMBERS:
                raise _refused(archive, [*faults, f"more than {MAX_MEMBERS} files"])
            if total > most:
                raise _refused(archive, [*faults, f"more than {most:,} bytes unpacked"])
            if path in seen:
                fault = f"{member.name!r} is there twice"
            if fault:
                faults.append(fault)
                continue
            seen.add(path)
            stream = member.open()
            assert stream is not None, "only plain files are opened"
            with stream:
                use(path, stream)
                while stream.read(BLOCK):  # the end of a member is where its checksum is compared
                    pass
    except _DAMAGED as error:
        raise _cannot(archive, error) from None
    if faults:
        raise _refused(archive, faults)
    return sorted(seen)


def _refused(archive: Path, faults: list[str]) -> DataError:
    return DataError(f"{archive.name} is not unpacked", items=faults, where=archive)


def _cannot(archive: Path, error: Exception) -> DataError:
    here = isinstance(error, OSError) and error.errno in _NO_ROOM
    do = "make room, or choose a folder that can be written (--data-root)" if here else "download it again"
    return DataError(f"{archive.name} cannot be unpacked: {error or type(error).__name__}", where=archive, do=do)


def _path_of(member: _Member) -> tuple[PurePosixPath, str]:
    """Where a member goes below the target, and why it may not, "" where it may."""
    path = PurePosixPath(member.name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or (path.parts and ":" in path.parts[0]):
        return path, f"{member.name!r} leads out of the folder"
    if not path.parts:
        return path, f"{member.name!r} is no name of a file"
    return path, f"{member.name!r} {member.fault}" if member.fault else ""


def _zip_members(archive: Path) -> Iterator[_Member]:
    with zipfile.ZipFile(archive) as file:
        for info in file.infolist():
            if info.filename.endswith("/"):  # is_dir() of Python 3.9 fails on an empty name
                continue
            fault = "is a link" if stat.S_ISLNK(info.external_attr >> 16) else ""
            if info.file_size > MAX_RATIO * max(info.compress_size, 1000):
                fault = f"unpacks to {info.file_size:,} bytes from {info.compress_size:,}"
            yield _Member(info.filename, info.file_size, fault, partial(file.open, info))


def _tar_members(archive: Path) -> Iterator[_Member]:
    """In the order of the file, in one pass; Python 3.9 has no filters of tar members, so types are checked here."""
    with open(archive, "rb") as raw:
        start = raw.read(6)
        raw.seek(0)
        openers: dict[bytes, Callable] = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open, b"\xfd7": lzma.open}
        source = _Bounded(
            openers.get(start[:2], lambda file: file)(raw), MAX_RATIO * max(archive.stat().st_size, 100_000)
        )
        source.until = HEADER_BYTES
        with tarfile.open(fileobj=source, mode="r|") as file:  # type: ignore[call-overload]  # it only calls read
            while (info := file.next()) is not None:
                source.until = source.done + info.size + HEADER_BYTES
                if info.isdir():
                    continue
                fault = "is a link" if info.issym() or info.islnk() else ""
                if not fault and (not info.isreg() or info.issparse()):
                    fault = "is no plain file"
                yield _Member(info.name, info.size, fault, partial(file.extractfile, info))
        source.until = source.most
        while source.read(BLOCK):  # the checksum of the whole is at the end
            pass


class _Bounded:
    """The unpacked bytes of a tar; more than `most`, or a header that reads beyond `until`, is an error."""

    def __init__(self, file: IO[bytes], most: int) -> None:
        self.file = file
        self.most = most
        self.done = 0
        self.until = 0

    def read(self, size: int) -> bytes:
        data = self.file.read(size)
        self.done += len(data)
        if self.done > self.most:
            raise tarfile.ReadError(f"more than {self.most:,} bytes unpacked, {MAX_RATIO} times the file")
        if self.done > self.until:
            raise tarfile.ReadError(f"a header of more than {HEADER_BYTES:,} bytes")
        return data
