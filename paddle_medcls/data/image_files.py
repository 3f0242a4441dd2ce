"""The paths of image files, from folders, patterns and lists: always in the same order, one at a time.

A million paths are never in memory at once, but for the names of one folder.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from paddle_medcls.core.errors import DataError
from paddle_medcls.data.decode import SUFFIXES

MAX_PATH_BYTES = 1 << 16  # of a line; more is no list of paths


@dataclass(frozen=True)
class ImageFiles:
    """The image files that arguments and a list name; each iteration looks for them anew.

    Attributes:
        arguments: files, folders (searched below) and globs.
        list_file: one path a line, which is taken as it is.

    Raises:
        DataError: an argument that is nothing, a folder without images, a folder or list that cannot be read.
    """

    arguments: Sequence[str]
    list_file: Path | None = None

    def __iter__(self) -> Iterator[str]:
        for argument in self.arguments:
            yield from _named(argument)
        if self.list_file is not None:
            yield from listed_files(self.list_file)


def expand(arguments: Sequence[str]) -> list[Path]:
    """All of `ImageFiles` at once."""
    return [Path(path) for path in ImageFiles(arguments)]


def _named(argument: str) -> Iterator[str]:
    """Yields the image files that one argument names."""
    path = Path(argument)
    if path.is_dir():
        found = ""
        for found in files_below(str(path)):
            yield found
        if not found:
            expected = f"{', '.join(SUFFIXES)}; links to folders are not followed"
            raise DataError(f"{path}: no images in this folder", expected=expected)
    elif path.exists():
        yield str(path)
    else:
        yield from _matches(path)


def files_below(folder: str) -> Iterator[str]:
    """Yields the image files in a folder and the folders below it, in the order of their paths' parts.

    Links to files are followed, links to folders are not.
    """
    levels = [_entries(folder)]
    while levels:
        for path, is_folder in levels[-1]:
            if is_folder:
                levels.append(_entries(path))
                break
            yield path
        else:
            levels.pop()


def _entries(folder: str) -> Iterator[tuple[str, bool]]:
    """Yields the image files and the folders in a folder, sorted: (path, whether it is a folder)."""
    folders, files = set(), []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.add(entry.name)
                elif os.path.splitext(entry.name)[1].lower() in SUFFIXES and not entry.is_dir():
                    files.append(entry.name)
    except OSError as error:
        raise DataError(f"{folder}: the folder cannot be read: {error.strerror or error}") from None
    files += folders
    files.sort()
    for name in files:
        yield os.path.join(folder, name), name in folders


def listed_files(path: Path) -> Iterator[str]:
    """Yields the paths in a list, one a line, in any encoding that file names have."""
    if path.exists() and not path.is_file():
        raise DataError(f"{path}: a list of images must be a regular file, because it is read twice")
    try:
        with open(path, "rb") as file:
            number = 0
            while line := file.readline(MAX_PATH_BYTES):
                number += 1
                name = line.rstrip(b"\r\n")
                if not name or len(line) == MAX_PATH_BYTES or b"\0" in name:
                    fault = "is empty" if not name else "is no path"
                    raise DataError(f"{path}: line {number} {fault}", expected="one path of an image file a line")
                yield os.fsdecode(name)
    except OSError as error:
        raise DataError(f"{path}: the list cannot be read: {error.strerror or error}") from None
    if not number:
        raise DataError(f"{path}: the list is empty", expected="one path of an image file a line")


def _matches(pattern: Path) -> Iterator[str]:
    try:
        below = Path(pattern.anchor)
        matches = sorted(below.glob(str(pattern.relative_to(below))))
    except ValueError as error:  # "**" beside other characters, before Python 3.13
        raise DataError(f"{pattern}: not a pattern of files: {error}", fix="write ** alone, as a/**/*.png") from None
    if not matches:
        raise DataError(f"{pattern}: no such file or folder")
    yield from (str(match) for match in matches if match.is_file())
