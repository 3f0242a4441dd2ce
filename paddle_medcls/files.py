"""Atomic file writing: a file is complete or absent. It is written beside its place, flushed to the disk, renamed."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
import platform
import re
import stat
import tempfile
import typing
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from paddle_medcls.errors import SetupError

_MACHINE = f"{zlib.crc32(platform.node().encode()):08x}"  # of several that share a disk
_TEMPORARY = re.compile(rf"\.medcls-{_MACHINE}-(\d+)-")


def atomic_write(path: str | Path, write: Callable[[str], object] | bytes) -> None:
    """Replaces `path` in one step; whatever fails, the previous file stays as it was.

    Args:
        path: the target; its folder is made.
        write: the bytes, or a function that writes a file at the name that it is given.
    """
    path = Path(path)
    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(
            dir=path.parent, prefix=f".medcls-{_MACHINE}-{os.getpid()}-", suffix=path.suffix
        )
        os.close(handle)
        if isinstance(write, bytes):
            Path(temporary).write_bytes(write)
        else:
            write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp's 0600 would hide the file from the user's group
        os.replace(temporary, path)
        temporary = ""
        _sync_folder(path.parent)
    except OSError as error:
        raise SetupError(
            f"cannot write {path}: {error.strerror or error}",
            do="free some space or choose another folder; an earlier file of this name is unharmed",
        ) from error
    finally:
        if temporary:
            Path(temporary).unlink(missing_ok=True)


def remove_abandoned(folder: str | Path) -> None:
    """Removes the temporary files of `atomic_write` in a folder whose process, of this machine, has ended."""
    try:
        files = [(file, _TEMPORARY.match(file.name)) for file in Path(folder).iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return
    for file, found in files:
        if found and not _is_running(int(found[1])):
            file.unlink(missing_ok=True)  # another process may be at it, too


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)  # signal 0 asks, and does nothing
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass  # of another user
    return True


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":
        return  # Windows has no handle on a folder
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def folder_error(folder: Path) -> str:
    """Why no file can be written in a folder, which is created if missing; "" if one can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return str(error.strerror or error)


def python_path() -> str:
    """PYTHONPATH under which a fresh process finds this package, installed or not."""
    return os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))


def read_bounded(path: str | Path, most: int) -> bytes:
    """The bytes of a regular file of at most `most` bytes.

    Raises:
        OSError: missing, larger, or a folder, pipe or device, which might never end.
    """
    found = os.stat(path)
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError("a directory, not a file")
    if not stat.S_ISREG(found.st_mode):
        raise OSError("a pipe or device, not a regular file")
    if found.st_size > most:
        raise OSError(f"{found.st_size:,} bytes; at most {most:,} are read")
    with open(path, "rb") as file:
        return file.read(found.st_size)


def read_json(path: str | Path, most: int = 4 << 20) -> object:
    """A JSON file from outside, read strictly.

    Raises:
        OSError: see `read_bounded`; at most 4 MiB are read.
        ValueError: not JSON in UTF-8, or a key twice, NaN, infinity, a number of more than 20 digits, deep nesting.
    """

    def refuse(text: str) -> typing.NoReturn:
        raise ValueError(f"{text[:20]} is not a finite number of up to 20 digits")

    def decimal(text: str) -> float:
        return float(text) if math.isfinite(float(text)) else refuse(text)

    def whole(text: str) -> int:
        return int(text) if len(text) <= 20 else refuse(text)  # int() takes long for a million digits

    def object_of(pairs: list[tuple[str, object]]) -> dict:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"the key {Counter(names).most_common(1)[0][0][:100]!r} occurs twice")
        return found

    text = read_bounded(path, most).decode("utf-8")
    try:
        return json.loads(
            text, object_pairs_hook=object_of, parse_constant=refuse, parse_float=decimal, parse_int=whole
        )
    except RecursionError:
        raise ValueError("lists or objects are nested too deeply") from None


def write_text(path: str | Path, text: str) -> None:
    atomic_write(path, text.encode("utf-8"))


def write_json(path: str | Path, value: object) -> None:
    """Strict JSON: figures that are not numbers (nan) become null."""
    write_text(path, json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # numpy scalars and arrays
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_csv(path: str | Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    atomic_write(path, text.getvalue().encode("utf-8", "backslashreplace"))  # names of files need not be UTF-8


def sha256(path: str | Path) -> str:
    return _digest(path, hashlib.sha256())


def md5(path: str | Path) -> str:
    return _digest(path, hashlib.md5(usedforsecurity=False))


def _digest(path: str | Path, digest) -> str:
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
