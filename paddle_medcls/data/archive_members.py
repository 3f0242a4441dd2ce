"""Reads the members of zip and tar archives one by one, and refuses unsafe ones: links, bombs, paths that escape."""

from __future__ import annotations

import bz2
import errno
import gzip
import lzma
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Callable

from paddle_medcls.core.errors import DataError
from paddle_medcls.core.progress import progress

MAX_MEMBERS = 400_000
MAX_BYTES = 64 * 2**30
MAX_RATIO = 200  # unpacked to packed bytes, of one member of a zip or of a complete tar; images stay far below
HEADER_BYTES = 1 << 20  # of one member of a tar; a long name takes some hundred bytes
BLOCK = 1 << 20
_DAMAGED: tuple[type[Exception], ...] = (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, struct.error)
_DAMAGED += (OSError, EOFError, NotImplementedError, RuntimeError, ValueError, OverflowError)
_NOT_WRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)


@dataclass(frozen=True)
class _Member:
    """One file of an archive.

    Attributes:
        name: its path, as the archive has it.
        size: unpacked bytes, as the archive declares them.
        fault: why it cannot be accepted (a link, a bomb); "" if it can.
        open: opens its content.
    """

    name: str
    size: int
    fault: str
    open: Callable[[], IO[bytes] | None]


def for_each_file(
    archive: Path, use: Callable[[PurePosixPath, IO[bytes]], None], max_bytes: int
) -> list[PurePosixPath]:
    """Calls `use(path, content)` for each file of an archive; returns the paths, sorted.

    Raises:
        DataError: damaged or too large, raised at once; refused members, raised at the end with the full list.
    """
    faults: list[str] = []
    seen: set[PurePosixPath] = set()
    total, max_bytes = 0, min(max_bytes, MAX_BYTES)
    try:
        members = _zip_members(archive) if archive.name.lower().endswith(".zip") else _tar_members(archive)
        for member in progress(members, f"unpacking {archive.name}", 0, "file"):
            path, fault = _path_of(member)
            total += member.size
            if len(seen) + len(faults) >= MAX_MEMBERS:
                raise _refused(archive, [*faults, f"more than {MAX_MEMBERS} files"])
            if total > max_bytes:
                raise _refused(archive, [*faults, f"more than {max_bytes:,} bytes unpacked"])
            if path in seen:
                fault = f"{member.name!r} occurs twice"
            if fault:
                faults.append(fault)
                continue
            seen.add(path)
            stream = member.open()
            assert stream is not None, "only plain files are opened"
            with stream:
                use(path, stream)
                while stream.read(BLOCK):  # checksums are verified at the end of a member
                    pass
    except _DAMAGED as error:
        raise unreadable_archive(archive, error) from None
    if faults:
        raise _refused(archive, faults)
    return sorted(seen)


def _refused(archive: Path, faults: list[str]) -> DataError:
    return DataError(f"{archive.name} is not unpacked", items=faults, path=archive)


def unreadable_archive(archive: Path, error: Exception) -> DataError:
    not_writable = isinstance(error, OSError) and error.errno in _NOT_WRITABLE
    fix = "free some space, or choose a writable folder (--data-root)" if not_writable else "download it again"
    return DataError(f"{archive.name} cannot be unpacked: {error or type(error).__name__}", path=archive, fix=fix)


def _path_of(member: _Member) -> tuple[PurePosixPath, str]:
    """A member's path relative to the target, and why the member is refused ("" if it is not)."""
    path = PurePosixPath(member.name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or (path.parts and ":" in path.parts[0]):
        return path, f"{member.name!r} leaves the target folder"
    if not path.parts:
        return path, f"{member.name!r} is not a file name"
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
    """Members in the order of the file, in one pass. Python 3.9 has no tar filters, so types are checked here."""
    with open(archive, "rb") as raw:
        start = raw.read(6)
        raw.seek(0)
        openers: dict[bytes, Callable] = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open, b"\xfd7": lzma.open}
        unpacked = openers[start[:2]](raw) if start[:2] in openers else raw
        source = _BoundedReader(unpacked, MAX_RATIO * max(archive.stat().st_size, 100_000))
        with tarfile.open(fileobj=source, mode="r|") as file:  # type: ignore[call-overload]  # it only calls read
            while (info := file.next()) is not None:
                source.header_limit = source.bytes_read + info.size + HEADER_BYTES
                if info.isdir():
                    continue
                fault = "is a link" if info.issym() or info.islnk() else ""
                if not fault and (not info.isreg() or info.issparse()):
                    fault = "is no plain file"
                yield _Member(info.name, info.size, fault, partial(file.extractfile, info))
        source.header_limit = source.limit
        while source.read(BLOCK):  # the checksum of the complete stream is at its end
            pass


class _BoundedReader:
    """Reads an unpacked tar; more than `limit` bytes, or a header that ends after `header_limit`, is an error."""

    def __init__(self, file: IO[bytes], limit: int) -> None:
        self.file = file
        self.limit = limit
        self.header_limit = HEADER_BYTES
        self.bytes_read = 0

    def read(self, size: int) -> bytes:
        data = self.file.read(size)
        self.bytes_read += len(data)
        if self.bytes_read > self.limit:
            raise tarfile.ReadError(f"more than {self.limit:,} bytes unpacked, {MAX_RATIO} times the file")
        if self.bytes_read > self.header_limit:
            raise tarfile.ReadError(f"a header of more than {HEADER_BYTES:,} bytes")
        return data
