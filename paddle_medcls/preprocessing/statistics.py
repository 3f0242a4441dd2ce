"""Statistics of a split in one pass: unreadable images, image sizes, mean and standard deviation.

Mean and standard deviation are computed in two ways, in units of pixel values (0 to 255), per channel:

- `per_image`: the average over images of each image's own mean and standard deviation, as in the COVID-19 radiography
  tutorial (129.909 and 59.018 on the complete COVID set);
- `per_pixel`: over all pixels of all images.

Images are streamed with several threads; memory does not grow with their number.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np

from paddle_medcls.core.files import read_json, write_json
from paddle_medcls.data.index import Index
from paddle_medcls.data.reading import map_images, refuse_unreadable
from paddle_medcls.preprocessing.transforms import Preprocessing, fit

VERSION = 2  # of the cached statistics; raised when their meaning changes


def image_statistics(
    index: Index,
    workers: int = 2,
    channels: str = "rgb",
    spec: Preprocessing | None = None,
    keep: Callable[[np.ndarray], object] | None = None,
) -> dict:
    """Decodes every image of an index once, and computes the statistics of the split.

    Args:
        channels: "rgb", "bgr" or "gray".
        spec: decode as this preprocessing does, which may be at reduced scale.
        keep: with `spec`, called with each image scaled to the network's size, in order.

    Returns:
        `count`, `classes` (images a class), `sizes` ([width, height, images], most frequent first),
        `modes` (images stored as "L" grey, "RGB", …, in Pillow's words), `channels`, and `per_image` and
        `per_pixel`, each with `mean` and `std` (lists, 0..255).

    Raises:
        DataError: images that cannot be read; the message lists them.
    """
    if isinstance(index.images, np.ndarray):
        return _scan_memory(index, channels)
    sums = np.zeros((4, 1 if channels == "gray" else 3))  # sum of means, of stds, of pixels, of squares
    sizes: Counter = Counter()
    modes: Counter = Counter()
    pixels, unreadable = 0, []

    def read(index: Index, row: int) -> tuple:
        image = index.read(row, channels, spec.least_px if spec else 0)
        mean, std = cv2.meanStdDev(image)  # accumulates in double
        scaled = fit(image, spec) if spec and keep else None
        return (image.shape[1], image.shape[0]), index.mode(row), mean[:, 0], std[:, 0], scaled

    places = [(index, row) for row in range(len(index))]
    for result in map_images(places, read, workers, f"reading {index.dataset} {index.split}"):
        if isinstance(result, str):
            unreadable.append(result)
            continue
        size, mode, mean, std, scaled = result
        if keep:
            keep(scaled)
        area = size[0] * size[1]
        sums += [mean, std, mean * area, (std**2 + mean**2) * area]
        pixels += area
        sizes[size] += 1
        modes[mode] += 1
    refuse_unreadable(index, unreadable)
    return _summary(index, channels, sums, pixels, sizes, modes)


def _scan_memory(index: Index, channels: str) -> dict:
    """`scan` of an index whose images are in memory, in blocks of rows."""
    assert isinstance(index.images, np.ndarray)
    height, width = index.images.shape[1:3]
    area = height * width
    sums = np.zeros((4, 1 if channels == "gray" else 3))
    step = max(1, 2**22 // area)  # about 100 MB of float64
    for start in range(0, len(index), step):
        rows = np.arange(start, min(start + step, len(index)))
        pixels = index.read_rows(rows, channels).astype(np.float64)
        mean, std = pixels.mean(axis=(1, 2)), pixels.std(axis=(1, 2))
        for k, values in enumerate((mean, std, mean * area, (std**2 + mean**2) * area)):
            sums[k] += values.sum(axis=0)
    sizes, modes = Counter({(width, height): len(index)}), Counter({index.mode(0): len(index)})
    return _summary(index, channels, sums, area * len(index), sizes, modes)


def _summary(index: Index, channels: str, sums: np.ndarray, pixels: int, sizes: Counter, modes: Counter) -> dict:
    """The result of `scan` from `sums` (4, C): of image means, of image deviations, of pixels, of squared pixels."""
    mean = sums[2] / pixels
    return {
        "version": VERSION,
        "count": len(index),
        "classes": index.counts(),
        "channels": channels,
        "sizes": [[width, height, count] for (width, height), count in sizes.most_common()],
        "modes": dict(modes.most_common()),
        "per_image": {"mean": (sums[0] / len(index)).tolist(), "std": (sums[1] / len(index)).tolist()},
        "per_pixel": {"mean": mean.tolist(), "std": np.sqrt(np.maximum(sums[3] / pixels - mean**2, 0)).tolist()},
    }


def file_key(index: Index) -> str:
    """A sha256 that changes with the ids, the labels, and each file's path, size, inode number and times."""
    digest = hashlib.sha256(f"{VERSION} {index.fingerprint()}".encode())
    if isinstance(index.images, np.ndarray):
        digest.update(np.ascontiguousarray(index.images).data)
    else:
        for path in index.images:
            status = Path(path).stat()
            times = f"{status.st_mtime_ns} {status.st_ctime_ns}"  # programs can set mtime (archives do), but not ctime
            digest.update(f"{Path(path).resolve()} {status.st_size} {times} {status.st_ino}\n".encode())
    return digest.hexdigest()


def read_cache(path: Path) -> dict:
    """The cached results of `scan` by split; empty for an unreadable file."""
    try:
        cached = read_json(path)
    except (OSError, ValueError):
        return {}
    return cached if isinstance(cached, dict) else {}


def cached_scan(index: Index, workers: int, path: Path) -> dict:
    """`image_statistics`, from the cache `path` if it holds these same files; the caller stores the result."""
    key = file_key(index)
    cached = read_cache(path).get(index.split)
    if isinstance(cached, dict) and cached.get("key") == key:
        return cached
    return {"key": key, **image_statistics(index, workers)}


def scan_splits(indexes: Sequence[Index], workers: int, cache: Path) -> dict[str, dict]:
    """`cached_scan` of several splits of a data set, by split; the results are written to `cache` (JSON)."""
    results = {index.split: cached_scan(index, workers, cache) for index in indexes}
    write_json(cache, {**read_cache(cache), **results})
    return results
