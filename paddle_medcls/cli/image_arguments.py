"""Image files that a user names, and names for the pictures made of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from paddle_medcls.core.errors import DataError
from paddle_medcls.data.decode import SUFFIXES


def expand(arguments: Sequence[str]) -> list[Path]:
    """Files, folders (searched below) and globs -> image files, sorted within each argument.

    Raises:
        DataError: an argument that is nothing, or a folder without images.
    """
    files: list[Path] = []
    for argument in arguments:
        path = Path(argument)
        if path.is_dir():
            images = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
            if not images:
                raise DataError(f"{path}: no images in this folder", expected=", ".join(SUFFIXES))
            files += images
        elif path.exists():
            files.append(path)
        else:
            try:
                matches = sorted(Path().glob(argument)) if not path.is_absolute() else _absolute_glob(path)
            except ValueError as error:  # "**" beside other characters, before Python 3.13
                raise DataError(
                    f"{argument}: not a pattern of files: {error}", fix="write ** alone, as a/**/*.png"
                ) from None
            if not matches:
                raise DataError(f"{argument}: no such file or folder")
            files += [match for match in matches if match.is_file()]
    return files


def _absolute_glob(path: Path) -> list[Path]:
    root = Path(path.anchor)
    return sorted(root.glob(str(path.relative_to(root))))
