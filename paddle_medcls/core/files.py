"""Atomic file writing: a file is complete or absent. It is written beside its place, flushed to the disk, renamed.

Also bounded, strict reading of untrusted files.
"""

from __future__ import annotations

import contextlib
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
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from paddle_medcls.core.errors import RunError, SetupError

NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,99}")
"""Names of recipes, data sets and readings of labels: they become parts of file names."""
NAME_RULE = "up to 100 letters, digits, '.', '_' and '-', with no '.' in front"


_MACHINE = f"{zlib.crc32(platform.node().encode()):08x}"  # several machines may share a disk
MAX_JSON_BYTES = 4 << 20
_TEMPORARY = re.compile(rf"\.medcls-{_MACHINE}-(\d+)-")


def atomic_write(path: str | Path, write: Callable[[str], object] | bytes) -> None:
    """Replaces `path` in one step; after any failure the previous file is unchanged.

    Args:
        path: the target; its folder is created.
        write: the bytes, or a function that writes a file under the temporary name that it is called with.

    Raises:
        SetupError: the disk is full, or the folder cannot be written.
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
            fix="free some space or choose another folder; an earlier file of this name is unchanged",
        ) from error
    finally:
        if temporary:
            Path(temporary).unlink(missing_ok=True)


def remove_abandoned(folder: str | Path) -> None:
    """Removes temporary files that `atomic_write` left in a folder, if their process ran here and has ended."""
    try:
        files = [(file, _TEMPORARY.match(file.name)) for file in Path(folder).iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return
    for file, match in files:
        if match and not _is_running(int(match[1])):
            file.unlink(missing_ok=True)  # another process may remove it at the same time


@contextlib.contextmanager
def locked_folder(folder: Path, work: str, file: str = "") -> Iterator[None]:
    """Creates a folder and locks it; the lock ends with the process. At the end an empty folder is removed.

    Args:
        work: what a process with the lock does, for the message of the others.
        file: name of a file there that is created and locked in its place: NFS locks files for all machines, and
            folders for one.

    Raises:
        RunError: another process has the lock, or there can be no such folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / file, os.O_RDWR | os.O_CREAT if file else os.O_RDONLY, 0o666)
    except OSError as error:
        raise RunError(f"{folder} cannot be used as a folder: {error.strerror}", fix="give another") from None
    try:
        _lock(handle, folder, work)
        yield
    finally:
        os.close(handle)
        with contextlib.suppress(OSError):
            folder.rmdir()  # where the work failed before it wrote anything; else it is not empty


def _lock(handle: int, folder: Path, work: str) -> None:
    try:
        import fcntl
    except ImportError:
        return  # Windows has no lock on a folder
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RunError(f"{folder}: another process {work}", fix="wait for its end") from None
    except OSError:
        pass  # a file system without locks


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)  # signal 0 only checks that the process exists
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass  # a process of another user
    return True


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":
        return  # Windows cannot open a folder
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
    """Returns a PYTHONPATH with which a new process can import this package, installed or not."""
    return os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))


def read_bounded(path: str | Path, most: int) -> bytes:
    """Reads a regular file of at most `most` bytes.

    Raises:
        OSError: missing, larger, or a folder, pipe or device; opening a pipe could wait for ever.
    """
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError("a directory, not a file")
    if not stat.S_ISREG(status.st_mode):
        raise OSError("a pipe or device, not a regular file")
    if status.st_size > most:
        raise OSError(f"{status.st_size:,} bytes; at most {most:,} are read")
    with open(path, "rb") as file:
        return file.read(status.st_size)


def read_json(path: str | Path) -> object:
    """Reads a JSON file of at most `MAX_JSON_BYTES` strictly.

    Raises:
        OSError: see `read_bounded`.
        ValueError: see `parse_json`.
    """
    return parse_json(read_bounded(path, MAX_JSON_BYTES))


def parse_json(data: bytes) -> object:
    """Parses JSON from an untrusted source strictly.

    Raises:
        ValueError: not JSON in UTF-8, or a key twice, NaN, infinity, a number of more than 20 digits, deep nesting.
    """

    def refuse(text: str) -> typing.NoReturn:
        raise ValueError(f"{text[:20]} is not a finite number of up to 20 digits")

    def decimal(text: str) -> float:
        return float(text) if math.isfinite(float(text)) else refuse(text)

    def integer(text: str) -> int:
        return int(text) if len(text) <= 20 else refuse(text)  # int() takes long for a million digits

    def object_of(pairs: list[tuple[str, object]]) -> dict:
        values = dict(pairs)
        if len(values) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"the key {Counter(names).most_common(1)[0][0][:100]!r} occurs twice")
        return values

    text = data.decode("utf-8")
    try:
        return json.loads(
            text, object_pairs_hook=object_of, parse_constant=refuse, parse_float=decimal, parse_int=integer
        )
    except RecursionError:
        raise ValueError("lists or objects are nested too deeply") from None


def write_text(path: str | Path, text: str) -> None:
    """Writes UTF-8 text, see `atomic_write`."""
    atomic_write(path, text.encode("utf-8"))


def write_json(path: str | Path, value: object) -> None:
    """Writes strict JSON, see `atomic_write`: NaN and infinity become null."""
    write_text(path, json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _plain(value: object) -> object:
    """Converts a value to the types of JSON."""
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
    """Writes a table, see `atomic_write`; bytes of file names that are not UTF-8 become backslash escapes."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    atomic_write(path, text.getvalue().encode("utf-8", "backslashreplace"))


def sha256(path: str | Path) -> str:
    """Returns the SHA-256 of a file as 64 hexadecimal digits."""
    return _digest(path, hashlib.sha256())


def md5(path: str | Path) -> str:
    """Returns the MD5 of a file as 32 hexadecimal digits; compares downloads with published sums."""
    return _digest(path, hashlib.md5(usedforsecurity=False))


def _digest(path: str | Path, digest) -> str:
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def picture_names(paths: Sequence[Path], what: str) -> dict[Path, Path]:
    """A relative name `<folders>/<stem>_<what>.png` for a picture of each file, no two the same.

    Folders are those below the one that all files share.
    """
    absolute_paths = {path: path.absolute() for path in paths}
    shared = Path(os.path.commonpath([path.parent for path in absolute_paths.values()])) if paths else Path()
    names: dict[Path, Path] = {}
    taken: set[Path] = set()
    for path, absolute in absolute_paths.items():
        folder = absolute.parent.relative_to(shared)
        name = folder / f"{path.stem}_{what}.png"
        if name in taken:  # a.jpg beside a.png
            name = folder / f"{path.name}_{what}.png"
        taken.add(name)
        names[path] = name
    return names
