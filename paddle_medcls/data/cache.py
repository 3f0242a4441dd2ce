"""Arrays that are computed once and kept on the disk, under a name that says what they were computed from.

A file is named by a hash of all that it depends on, the bytes of every image among it, so it is never stale and
serves later runs. Names, sizes and times would not do: archives, `cp -p` and `rsync` give other bytes the same ones.
It is written beside its place and renamed: two processes that write the same one both end with a whole one. Caches
of earlier versions have other names, and are not read.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np

from paddle_medcls import __version__
from paddle_medcls.data.index import Index
from paddle_medcls.data.statistics import scan
from paddle_medcls.errors import DataError, SetupError
from paddle_medcls.files import atomic_write, folder_error, sha256, write_json
from paddle_medcls.images import Preprocessing

FREE_SHARE = 0.5  # of the free disk, what a cache of images may take
GEOMETRY = ("size_px", "resize_px", "fit", "channels", "interpolation", "decode")
"""Preprocessing that a scaled image depends on; mean and std come after it."""


DECODERS = ("pillow", "pydicom", "pylibjpeg", "pylibjpeg-libjpeg", "pylibjpeg-openjpeg", "pylibjpeg-rle", "python-gdcm")
"""Packages beside OpenCV that may decode an image."""


def content_key(index: Index, workers: int) -> str:
    """sha256 over the list, the labels, the bytes of every image, and the versions of all that decodes them.

    It costs one reading of the files at the start of a run (0.7 GB/s a core where they are in the system's memory; a
    disk is slower), which is a small part of what decoding them takes.

    Raises:
        OSError: a file is gone.
    """
    digest = hashlib.sha256(f"{__version__} {cv2.__version__} {index.fingerprint()}".encode())
    for name in DECODERS:
        try:
            digest.update(f"{name} {importlib.metadata.version(name)}\n".encode())
        except importlib.metadata.PackageNotFoundError:
            continue
    if isinstance(index.sources, np.ndarray):
        digest.update(f"{index.sources.shape}".encode())
        digest.update(np.ascontiguousarray(index.sources).data)
        return digest.hexdigest()
    with ThreadPoolExecutor(max(1, workers)) as pool:
        for one in pool.map(_file_hash, index.sources):
            digest.update(one.encode())
    return digest.hexdigest()


def refuse_changed(index: Index, key: str, workers: int) -> None:
    """Refuses images that were replaced since `content_key` was asked."""
    if content_key(index, workers) != key:
        raise DataError(
            f"{index.dataset}: images of the {index.split} split changed while they were read",
            do="start again when nothing writes to their folder any more",
        )


def _file_hash(path: str | Path) -> str:
    path = os.path.realpath(path)
    status = os.stat(path)
    return _known_hash(path, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev)


@lru_cache(maxsize=1 << 18)
def _known_hash(path: str, *_status: int) -> str:
    """sha256 of a file; within a process it is read again only when its status changes, its change time among it."""
    return sha256(path)


def keyed_file(folder: Path, key: list) -> Path:
    """The file in a folder for a key of JSON values."""
    return folder / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.npy"


def mapped(path: Path) -> np.memmap:
    """An array on the disk, of which only what is used is read."""
    return np.load(path, mmap_mode="r", allow_pickle=False)


def scan_cached(
    index: Index, spec: Preprocessing, workers: int, folder: Path | None, say: Callable[[str], None]
) -> tuple[dict, np.memmap | None]:
    """`statistics.scan`, and in the same pass every image scaled to the network's size, kept for the epochs.

    Where the files are those of an earlier run, byte for byte, nothing is decoded.

    Args:
        folder: of the cache; None: none.
        say: is told why there is none after all, and what it takes.

    Returns:
        The figures, and uint8 (N, size_px, size_px, C), memory-mapped; None without a cache, which is
        also so for images in memory and for inputs that are no uint8 (`resize_dtype="float32"`).
    """
    workers = max(1, workers)
    if folder is None or isinstance(index.sources, np.ndarray) or spec.resize_dtype != "uint8":
        return scan(index, workers, spec.channels, spec), None
    try:
        content = content_key(index, workers)
    except OSError:  # a file is gone: the scan says which
        return scan(index, workers, spec.channels, spec), None
    path = keyed_file(folder, [content, [getattr(spec, name) for name in GEOMETRY]])
    shape = (len(index), spec.size_px, spec.size_px, spec.num_channels)
    known = _known(path, shape)
    if known is not None:
        return known
    error = folder_error(folder)
    if error:
        say(f"no image cache: {folder}: {error}")
        return scan(index, workers, spec.channels, spec), None
    size = int(np.prod(shape, dtype=np.int64))
    figures: dict = {}

    def write(target: str) -> None:
        with open(target, "wb") as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            # Written and not mapped: on a full disk a write is an error, a mapped page the end of the process.
            figures.update(scan(index, workers, spec.channels, spec, lambda image: file.write(image.tobytes())))
        refuse_changed(index, content, workers)

    try:
        free = shutil.disk_usage(folder).free
        if size > FREE_SHARE * free:
            say(f"no image cache of {index.split}: {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free in {folder}")
            return scan(index, workers, spec.channels, spec), None
        atomic_write(path, write)
        write_json(path.with_suffix(".json"), figures)
    except (SetupError, OSError) as error:
        say(f"no image cache of {index.split}: {str(error).splitlines()[0]}")
        return figures or scan(index, workers, spec.channels, spec), None
    say(f"image cache of {index.split}: {size / 1e6:.0f} MB in {folder}")
    return figures, mapped(path)


def _known(path: Path, shape: tuple[int, ...]) -> tuple[dict, np.memmap] | None:
    """Figures and images of an earlier run; None where there are none or they are not whole."""
    try:
        images = mapped(path)
        figures = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, ValueError, EOFError):
        return None
    whole = images.shape == shape and images.dtype == np.uint8 and isinstance(figures, dict)
    return (figures, images) if whole and {"classes", "per_image"} <= figures.keys() else None
