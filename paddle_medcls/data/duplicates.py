"""Finds faults of a data set that inflate its results: duplicate images, within and between splits and classes.

Two images are exact duplicates if their pixels are equal. They are near duplicates (rescaled, recompressed, brightened
or slightly cropped copies) if their thumbnails correlate at `MIN_CORRELATION` or more, after each is scaled to mean 0
and norm 1 and the mean of the training images is subtracted: without that, any two fundus photographs would correlate.
The mean leaves the two images out, so that the result for a pair depends on the training split alone; without other
training images nothing is subtracted.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from paddle_medcls.data.index import Index
from paddle_medcls.data.reading import map_images

MIN_CORRELATION = 0.96
"""By eye, all 15 pairs above it among 1,592 COVID radiographs are copies; PALM has 5, and the next pair is at 0.952."""
THUMBNAIL = 32  # pixels


@dataclass(frozen=True)
class Pair:
    """Two duplicate images.

    Attributes:
        a, b: (split, id) of each.
        exact: whether all pixels are equal.
        correlation: of the thumbnails; 1 for exact duplicates.
        same_label: whether the labels are equal.
    """

    a: tuple[str, str]
    b: tuple[str, str]
    exact: bool
    correlation: float
    same_label: bool

    @property
    def leak(self) -> bool:
        """Whether exactly one of the two images is in the training split."""
        return (self.a[0] == "train") != (self.b[0] == "train")


@dataclass(frozen=True)
class Report:
    """The faults of a data set.

    Attributes:
        images: number of images that were compared.
        unreadable: a line for each image that cannot be read.
        suspicious: a line for each image without content, of an unusual size or mode, or with another class's name.
        pairs: the duplicates.
        patients: a line for each patient in several splits.
    """

    images: int
    unreadable: list[str]
    suspicious: list[str]
    pairs: list[Pair]
    patients: list[str]

    def record(self) -> dict:
        """The report as plain values, for a JSON file."""
        return {**vars(self), "pairs": [{**vars(pair), "leak": pair.leak} for pair in self.pairs]}

    def leaked(self, split: str) -> set[str]:
        """Ids of this split's images with a duplicate in the training split."""
        ends = [end for pair in self.pairs if pair.leak for end in (pair.a, pair.b)]
        return {name for where, name in ends if where == split}


@dataclass(frozen=True)
class _Fingerprint:
    """A summary of one image, of about 1 kB."""

    digest: bytes  # sha256 of the pixels
    thumbnail: np.ndarray  # uint8 (THUMBNAIL, THUMBNAIL)
    size: tuple[int, int]
    mode: str
    constant: bool


def check_images(indexes: Sequence[Index], workers: int = 2) -> Report:
    """Reads every image of some splits of a data set and compares each with all others."""
    places = [(index, row) for index in indexes for row in range(len(index))]
    results = list(map_images(places, _fingerprint, workers, f"checking {indexes[0].dataset}"))
    readable = [k for k, result in enumerate(results) if isinstance(result, _Fingerprint)]
    prints: list[_Fingerprint] = [results[k] for k in readable]
    names = [(places[k][0].split, places[k][0].ids[places[k][1]]) for k in readable]
    labels = [places[k][0].labels[places[k][1]] for k in readable]
    in_training = np.array([split == "train" for split, _ in names], bool)
    in_training |= not in_training.any()  # without a training split, the mean of all images is subtracted
    pairs = [
        Pair(
            names[i], names[j], prints[i].digest == prints[j].digest, correlation, bool(np.all(labels[i] == labels[j]))
        )
        for i, j, correlation in _duplicates(prints, in_training)
    ]
    return Report(
        images=len(places),
        unreadable=[result for result in results if isinstance(result, str)],
        suspicious=_suspicious(prints, names) + _misnamed(indexes),
        pairs=pairs,
        patients=_patients_in_two_splits(indexes),
    )


def not_leaked(train: Index, other: Index, workers: int) -> list[int]:
    """Rows of the split `other` whose images have no duplicate in the training split, exact or near."""
    leaked = check_images([train, other], workers).leaked(other.split)
    return [row for row, name in enumerate(other.ids) if name not in leaked]


def _patients_in_two_splits(indexes: Sequence[Index]) -> list[str]:
    splits: dict[str, list[str]] = {}
    for index in indexes:
        for patient in sorted(set(index.groups)):
            splits.setdefault(patient, []).append(index.split)
    return [f"patient {patient}: {', '.join(where)}" for patient, where in splits.items() if len(where) > 1]


def _fingerprint(index: Index, row: int) -> _Fingerprint:
    image = index.read(row, "rgb")
    gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    thumbnail = cv2.resize(gray, (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_AREA)
    digest = hashlib.sha256(repr(image.shape).encode() + np.ascontiguousarray(image).tobytes()).digest()
    return _Fingerprint(digest, thumbnail, (image.shape[1], image.shape[0]), index.mode(row), bool(gray.std() < 1))


def _duplicates(prints: Sequence[_Fingerprint], in_training: np.ndarray) -> Iterator[tuple[int, int, float]]:
    """Rows i < j of exact and near duplicates, and the correlation of their thumbnails.

    Args:
        in_training: bool (N,), the images whose mean is subtracted.
    """
    if not prints:
        return
    x = np.stack([image.thumbnail for image in prints]).reshape(len(prints), -1).astype(np.float32)
    x -= x.mean(axis=1, keepdims=True)
    x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-6)
    mean = x[in_training].sum(axis=0) / max(1, in_training.sum())
    rows_of_digest: dict[bytes, list[int]] = {}
    for start in range(0, len(x), 512):  # a block of rows at a time bounds the memory
        block = _correlations(x, slice(start, start + 512), in_training, mean)
        for i in range(start, start + len(block)):
            equal = rows_of_digest.setdefault(prints[i].digest, [])
            near = np.flatnonzero(block[i - start, :i] >= MIN_CORRELATION).tolist()
            for j in sorted({*equal, *near}):
                yield j, i, 1.0 if j in equal else float(block[i - start, j])
            equal.append(i)


def _correlations(x: np.ndarray, rows: slice, in_training: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Correlations of some images with all, after the mean of the training images except the two is subtracted.

    With m that mean for the pair i, j, the product (xi - m)(xj - m) is expanded into terms of one matrix product.

    Args:
        x: (N, D), each row of mean 0 and norm 1; 0 for an image of one colour, which correlates with no other.
        rows: of the images to compare with all.
        in_training: bool (N,).
        mean: (D,), of the rows of `x` in the training split.

    Returns:
        float32 (rows, N).
    """
    n = np.float32(in_training.sum())
    own, products = x @ mean, x[rows] @ x.T
    t = in_training.astype(np.float32)
    a, b, tone = own[rows, None], own[None, :], np.float32(mean @ mean)
    ta, tb = t[rows, None], t[None, :]
    rest = np.maximum(n - ta - tb, 1)
    xi_m = (n * a - ta - tb * products) / rest
    xj_m = (n * b - tb - ta * products) / rest
    m_m = (n * n * tone + ta + tb - 2 * n * (ta * a + tb * b) + 2 * ta * tb * products) / rest**2
    alone = n - ta - tb <= 0
    xi_m, xj_m, m_m = (np.where(alone, np.float32(0), value) for value in (xi_m, xj_m, m_m))
    norms = np.sqrt(np.maximum(1 - 2 * xi_m + m_m, 1e-9) * np.maximum(1 - 2 * xj_m + m_m, 1e-9))
    blank = ~x.any(axis=1)
    return np.where(blank[rows, None] | blank[None, :], np.float32(0), (products - xi_m - xj_m + m_m) / norms)


def _suspicious(prints: Sequence[_Fingerprint], names: Sequence[tuple[str, str]]) -> list[str]:
    """Images without content, and images of another size or mode than at least 90% of all images."""
    lines = [f"{name}: all pixels are the same" for image, (_, name) in zip(prints, names) if image.constant]
    traits = {
        "size": [f"{image.size[0]}x{image.size[1]}" for image in prints],
        "mode": [f"stored as {image.mode}" for image in prints],
    }
    for values in traits.values():
        usual, count = Counter(values).most_common(1)[0] if values else ("", 0)
        if 0.9 * len(prints) <= count < len(prints):
            lines += [
                f"{name}: {value}, nearly all others {usual.removeprefix('stored as ')}"
                for value, (_, name) in zip(values, names)
                if value != usual
            ]
    return lines


def _misnamed(indexes: Sequence[Index]) -> list[str]:
    """Images whose file name begins with the name of another class than their label's."""
    lines = []
    for index in indexes:
        plain = [_plain(name) for name in index.classes]
        for name, label in zip(index.ids, index.labels):
            letters = _plain(re.split(r"\d", Path(name).stem)[0])  # "Viral Pneumonia-1004" -> "viralpneumonia"
            named = [k for k, known in enumerate(plain) if letters == known]
            if named and np.ndim(label) == 0 and int(label) not in named:
                lines.append(f"{name}: the name says {index.classes[named[0]]}, the label {index.classes[int(label)]}")
    return lines


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())
