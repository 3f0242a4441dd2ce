"""Unpacking of archives that come from elsewhere: nothing leaves the target, nothing is half there."""

from __future__ import annotations

import shutil
import stat
import tempfile
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from paddle_medcls.errors import DataError
from paddle_medcls.progress import progress

MAX_MEMBERS = 400_000
MAX_BYTES = 64 * 2**30
MAX_RATIO = 200  # unpacked to packed, of one member; images and tables stay far below


def unpack(archive: Path, target: Path) -> int:
    """Unpacks a zip file into the new folder `target`, completely or not at all.

    Returns:
        The number of files.

    Raises:
        DataError: no zip file, damaged, too large, a member that leads elsewhere, or `target` exists.
    """
    if target.exists():
        raise DataError(f"{target} already exists", do="remove it first, or keep it: nothing was changed")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with zipfile.ZipFile(archive) as file:
            members = [member for member in file.infolist() if not member.is_dir()]
            faults = _faults(members)
            if faults:
                raise DataError(f"{archive.name} is not unpacked", items=faults, where=archive)
            temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
            try:
                for member in progress(members, f"unpacking {archive.name}", len(members), "file"):
                    file.extract(member, temporary)
                temporary.chmod(0o755)
                temporary.rename(target)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, NotImplementedError, RuntimeError) as error:
        raise DataError(f"{archive.name} cannot be unpacked: {error}", where=archive, do="download it again") from None
    return len(members)


def _faults(members: list[zipfile.ZipInfo]) -> list[str]:
    faults = []
    if len(members) > MAX_MEMBERS:
        faults.append(f"{len(members)} files; at most {MAX_MEMBERS}")
    if sum(member.file_size for member in members) > MAX_BYTES:
        faults.append(f"more than {MAX_BYTES >> 30} GiB unpacked")
    for member in members:
        path = PurePosixPath(member.filename.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts or ":" in path.parts[0]:
            faults.append(f"{member.filename!r} leads out of the folder")
        elif stat.S_ISLNK(member.external_attr >> 16):
            faults.append(f"{member.filename!r} is a link")
        elif member.file_size > MAX_RATIO * max(member.compress_size, 1000):
            faults.append(f"{member.filename!r} unpacks to {member.file_size:,} bytes from {member.compress_size:,}")
    return faults
