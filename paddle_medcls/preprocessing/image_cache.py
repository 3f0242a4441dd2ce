"""Disk cache of decoded images, and the keys of all disk caches.

A file is named by a hash of everything that it depends on, including the bytes of every image, so it never becomes
stale and later runs can use it. Names, sizes and times of files would not do: archives, `cp -p` and `rsync` give
different files the same ones. Files are written atomically, so several processes may build the same cache. Caches of
version 0.1 have other names and are not read.
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
from paddle_medcls.core.errors import DataError, SetupError
from paddle_medcls.core.files import atomic_write, folder_error, read_json, sha256, write_json
from paddle_medcls.data.index import Index
from paddle_medcls.preprocessing.statistics import image_statistics
from paddle_medcls.preprocessing.transforms import Preprocessing

FREE_SHARE = 0.5  # largest fraction of the free disk space for one cache of images
GEOMETRY = ("size_px", "resize_px", "fit", "channels", "interpolation", "decode")
"""Fields of `Preprocessing` that a cached image depends on; mean and std are applied later."""

DECODERS = ("pillow", "pydicom", "pylibjpeg", "pylibjpeg-libjpeg", "pylibjpeg-openjpeg", "pylibjpeg-rle", "python-gdcm")
"""Packages other than OpenCV that may decode an image."""


def content_key(index: Index, workers: int) -> str:
    """sha256 of the split: file names, labels, the bytes of every image, and the versions of the decoders.

    All files are read once, at 0.7 GB/s per core if the system has them in memory; decoding takes much longer.

    Raises:
        OSError: a file is missing.
    """
    digest = hashlib.sha256(f"{__version__} {cv2.__version__} {index.fingerprint()}".encode())
    for name in DECODERS:
        try:
            digest.update(f"{name} {importlib.metadata.version(name)}\n".encode())
        except importlib.metadata.PackageNotFoundError:
            continue
    if isinstance(index.images, np.ndarray):
        digest.update(f"{index.images.shape}".encode())
        digest.update(np.ascontiguousarray(index.images).data)
        return digest.hexdigest()
    with ThreadPoolExecutor(max(1, workers)) as pool:
        for one in pool.map(_file_hash, index.images):
            digest.update(one.encode())
    return digest.hexdigest()


def refuse_changed(index: Index, key: str, workers: int) -> None:
    """Raises DataError if images were replaced since `content_key` returned `key`."""
    if content_key(index, workers) != key:
        raise DataError(
            f"{index.dataset}: images of the {index.split} split changed while they were read",
            fix="start again when no other program writes to their folder",
        )


def _file_hash(path: str | Path) -> str:
    path = os.path.realpath(path)
    status = os.stat(path)
    return _known_hash(path, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev)


@lru_cache(maxsize=1 << 18)
def _known_hash(path: str, *_status: int) -> str:
    """sha256 of a file; within a process it is read again only if its size, times or inode change."""
    return sha256(path)


def keyed_file(folder: Path, key: list) -> Path:
    """The cache file in a folder for a key of JSON values."""
    return folder / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.npy"


def mapped(path: Path) -> np.memmap:
    """A memory-mapped array: only the used parts are read from disk."""
    return np.load(path, mmap_mode="r", allow_pickle=False)


def scan_cached(
    index: Index, spec: Preprocessing, workers: int, folder: Path | None, say: Callable[[str], None]
) -> tuple[dict, np.memmap | None]:
    """Runs `statistics.image_statistics` and, in the same pass, stores every image scaled to the network's size.

    If an earlier run has read the same files, byte for byte, nothing is decoded.

    Args:
        folder: of the cache; None: no cache.
        say: prints one line: the size of the cache, or why there is none.

    Returns:
        The statistics, and the images, uint8 (N, size_px, size_px, C), memory-mapped. The images are None without a
        cache; there is none for images in memory and for float32 inputs (`resize_dtype="float32"`).
    """
    workers = max(1, workers)
    if folder is None or isinstance(index.images, np.ndarray) or spec.resize_dtype != "uint8":
        return image_statistics(index, workers, spec.channels, spec), None
    try:
        content = content_key(index, workers)
    except OSError:  # a file is missing: the scan's error names it
        return image_statistics(index, workers, spec.channels, spec), None
    path = keyed_file(folder, [content, [getattr(spec, name) for name in GEOMETRY]])
    shape = (len(index), spec.size_px, spec.size_px, spec.num_channels)
    earlier = _read_cache(path, shape)
    if earlier is not None:
        return earlier
    error = folder_error(folder)
    if error:
        say(f"no image cache: {folder}: {error}")
        return image_statistics(index, workers, spec.channels, spec), None
    size = int(np.prod(shape, dtype=np.int64))
    statistics: dict = {}

    def write(target: str) -> None:
        with open(target, "wb") as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            # Not memory-mapped: on a full disk a write raises OSError, a mapped page kills the process (SIGBUS).
            statistics.update(
                image_statistics(index, workers, spec.channels, spec, lambda image: file.write(image.tobytes()))
            )
        refuse_changed(index, content, workers)

    try:
        free = shutil.disk_usage(folder).free
        if size > FREE_SHARE * free:
            say(f"no image cache of {index.split}: {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free in {folder}")
            return image_statistics(index, workers, spec.channels, spec), None
        atomic_write(path, write)
        write_json(path.with_suffix(".json"), statistics)
    except (SetupError, OSError) as error:
        say(f"no image cache of {index.split}: {str(error).splitlines()[0]}")
        return statistics or image_statistics(index, workers, spec.channels, spec), None
    say(f"image cache of {index.split}: {size / 1e6:.0f} MB in {folder}")
    return statistics, mapped(path)


def _read_cache(path: Path, shape: tuple[int, ...]) -> tuple[dict, np.memmap] | None:
    """Statistics and images of an earlier run; None if they are missing or incomplete."""
    try:
        images = mapped(path)
        statistics = read_json(path.with_suffix(".json"))
    except (OSError, ValueError, EOFError):
        return None
    if not isinstance(statistics, dict) or not {"classes", "per_image"} <= statistics.keys():
        return None
    return (statistics, images) if images.shape == shape and images.dtype == np.uint8 else None
