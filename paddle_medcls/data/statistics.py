"""One pass over a split: is every image readable, how large are they, what are mean and std.

Two readings of mean and std, in units of pixel values, per channel:

- `per_image`: the average over images of each image's own mean and standard deviation, as document
  003 does it (129.909 and 59.018 on the full COVID set);
- `per_pixel`: over all pixels of all images.

Images are streamed, on all cores; memory does not grow with their number.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np

from paddle_medcls.data.index import Index
from paddle_medcls.errors import DataError
from paddle_medcls.files import write_json
from paddle_medcls.images import Preprocessing, fit
from paddle_medcls.progress import progress

VERSION = 2  # of the cached figures; raised when their meaning changes


def scan(
    index: Index,
    workers: int,
    channels: str = "rgb",
    spec: Preprocessing | None = None,
    keep: Callable[[np.ndarray], object] | None = None,
) -> dict:
    """Decodes every image of an index once.

    Args:
        spec: decodes as this preprocessing does, which may be at reduced scale.
        keep: with `spec`, is given each image scaled to the network's size, in order.

    Returns:
        `count`, `classes` (images a class), `sizes` ([width, height, images], most frequent first),
        `modes` (images stored as "L" grey, "RGB", …, in Pillow's words), `channels`, and `per_image` and
        `per_pixel`, each with `mean` and `std` (lists, 0..255).

    Raises:
        DataError: images that cannot be read; the message lists them.
    """
    if isinstance(index.sources, np.ndarray):
        return _scan_memory(index, channels)
    sums = np.zeros((4, 1 if channels == "gray" else 3))  # sum of means, of stds, of pixels, of squares
    sizes: Counter = Counter()
    modes: Counter = Counter()
    pixels, unreadable = 0, []

    def read(row: int) -> tuple | str:
        try:
            image = index.read(row, channels, spec.least_px if spec else 0)
        except DataError as error:
            return str(error).splitlines()[0]
        mean, std = cv2.meanStdDev(image)  # accumulates in double
        fitted = fit(image, spec) if spec and keep else None
        return (image.shape[1], image.shape[0]), index.mode(row), mean[:, 0], std[:, 0], fitted

    with ThreadPoolExecutor(workers) as pool:
        groups = (range(start, min(start + 512, len(index))) for start in range(0, len(index), 512))
        results = (result for rows in groups for result in pool.map(read, rows))  # all at once would fill the memory
        for result in progress(results, f"reading {index.dataset} {index.split}", len(index), "image"):
            if isinstance(result, str):
                unreadable.append(result)
                continue
            size, mode, mean, std, fitted = result
            if keep:
                keep(fitted)
            area = size[0] * size[1]
            sums += [mean, std, mean * area, (std**2 + mean**2) * area]
            pixels += area
            sizes[size] += 1
            modes[mode] += 1
    if unreadable:
        raise DataError(
            f"{index.dataset}: {len(unreadable)} of {len(index)} {index.split} image(s) cannot be read",
            items=unreadable,
            do="copy or download these files again; nothing is skipped",
        )
    return _figures(index, channels, sums, pixels, sizes, modes)


def _scan_memory(index: Index, channels: str) -> dict:
    """`scan` of images that are in memory already, hundreds at a time."""
    assert isinstance(index.sources, np.ndarray)
    height, width = index.sources.shape[1:3]
    area = height * width
    sums = np.zeros((4, 1 if channels == "gray" else 3))
    step = max(1, 2**22 // area)  # some 100 MB of float64
    for start in range(0, len(index), step):
        rows = np.arange(start, min(start + step, len(index)))
        pixels = index.read_rows(rows, channels).astype(np.float64)
        mean, std = pixels.mean(axis=(1, 2)), pixels.std(axis=(1, 2))
        for k, values in enumerate((mean, std, mean * area, (std**2 + mean**2) * area)):
            sums[k] += values.sum(axis=0)
    sizes, modes = Counter({(width, height): len(index)}), Counter({index.mode(0): len(index)})
    return _figures(index, channels, sums, area * len(index), sizes, modes)


def _figures(index: Index, channels: str, sums: np.ndarray, pixels: int, sizes: Counter, modes: Counter) -> dict:
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


def file_key(index: Index, channels: str) -> str:
    """Changes whenever the list, a label, a file's place, size, number or times change."""
    digest = hashlib.sha256(f"{VERSION} {channels} {index.fingerprint()}".encode())
    if isinstance(index.sources, np.ndarray):
        digest.update(np.ascontiguousarray(index.sources).data)
    else:
        for path in index.sources:
            status = Path(path).stat()
            times = f"{status.st_mtime_ns} {status.st_ctime_ns}"  # the second cannot be set, as archives do the first
            digest.update(f"{Path(path).resolve()} {status.st_size} {times} {status.st_ino}\n".encode())
    return digest.hexdigest()


def read_cache(path: Path) -> dict:
    """Cached scans by split; an unreadable cache counts as none."""
    try:
        cached = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return cached if isinstance(cached, dict) else {}


def cached_scan(index: Index, workers: int, path: Path, channels: str = "rgb") -> dict:
    """`scan`, unless `path` holds the figures of exactly these files; the caller stores the result."""
    key = file_key(index, channels)
    known = read_cache(path).get(index.split)
    if isinstance(known, dict) and known.get("key") == key:
        return known
    return {"key": key, **scan(index, workers, channels)}


def scan_splits(indexes: Sequence[Index], workers: int, cache: Path) -> dict[str, dict]:
    """`cached_scan` of several splits of a data set, by split; the figures are written to `cache` (JSON)."""
    found = {index.split: cached_scan(index, workers, cache) for index in indexes}
    write_json(cache, {**read_cache(cache), **found})
    return found


def examples_of_classes(index: Index, count: int = 6) -> dict[str, list[int]]:
    """Up to `count` rows of each class, spread over the index."""
    member = index.labels if index.labels.ndim == 2 else index.labels[:, None] == np.arange(len(index.classes))
    rows = [np.flatnonzero(column) for column in np.transpose(member)]
    return {name: found[:: max(1, len(found) // count)][:count].tolist() for name, found in zip(index.classes, rows)}
