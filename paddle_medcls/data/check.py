"""Faults of a data set that inflate its figures: the same image twice, in two splits, in two classes.

Two images are the same when their pixels agree, whatever their files are called. They are nearly the same
when their thumbnails correlate at `MIN_CORRELATION` or more, after each is brought to mean 0 and deviation 1
and the mean of the training images is subtracted (else any two fundus photographs would do): copies that were
rescaled, recompressed, brightened or slightly cropped. The two images themselves are left out of that mean, so
a pair is judged by the training split alone, whatever else is compared; without other training images nothing is
subtracted.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from paddle_medcls.data.index import Index
from paddle_medcls.errors import DataError
from paddle_medcls.progress import progress

MIN_CORRELATION = 0.96
"""On 1,592 COVID radiographs all 15 pairs above it are copies to the eye; PALM has 5, and the next is at 0.952."""
THUMBNAIL = 32  # pixels


@dataclass(frozen=True)
class Pair:
    """Two images that are the same: exactly, or with this `correlation` of their thumbnails."""

    a: tuple[str, str]  # (split, id)
    b: tuple[str, str]
    exact: bool
    correlation: float
    same_label: bool

    @property
    def leak(self) -> bool:
        """Whether one of them is in the training split and the other is not."""
        return (self.a[0] == "train") != (self.b[0] == "train")


@dataclass(frozen=True)
class Report:
    """What was found; `suspicious` and `unreadable` are one line an image, `patients` one a patient in two splits."""

    images: int
    unreadable: list[str]
    suspicious: list[str]
    pairs: list[Pair]
    patients: list[str]

    def record(self) -> dict:
        """All of it as plain values, for a file."""
        return {**vars(self), "pairs": [{**vars(pair), "leak": pair.leak} for pair in self.pairs]}

    def leaked(self, split: str) -> set[str]:
        """Images of this split that are in the training split as well."""
        ends = [end for pair in self.pairs if pair.leak for end in (pair.a, pair.b)]
        return {name for where, name in ends if where == split}


@dataclass(frozen=True)
class _Print:
    """What is kept of one image: 1 kB, whatever its size."""

    pixels: bytes
    thumbnail: np.ndarray
    size: tuple[int, int]
    mode: str
    constant: bool


def check(indexes: Sequence[Index], workers: int) -> Report:
    """Reads every image of some splits of a data set and compares each with all others."""
    places = [(index, row) for index in indexes for row in range(len(index))]

    def take(place: tuple[Index, int]) -> _Print | str:
        index, row = place
        try:
            return _fingerprint(index.read(row, "rgb"), index.mode(row))
        except DataError as error:
            return str(error).splitlines()[0]

    with ThreadPoolExecutor(max(1, workers)) as pool:
        results = pool.map(take, places)
        prints = list(progress(results, f"checking {indexes[0].dataset}", len(places), "image"))
    good = [k for k, found in enumerate(prints) if isinstance(found, _Print)]
    unreadable = [found for found in prints if isinstance(found, str)]
    kept: list[_Print] = [prints[k] for k in good]
    names = [(places[k][0].split, places[k][0].ids[places[k][1]]) for k in good]
    in_training = np.array([split == "train" for split, _ in names], bool)
    in_training |= not in_training.any()  # without a training split: all that is compared
    labels = [places[k][0].labels[places[k][1]] for k in good]
    pairs = [
        Pair(names[i], names[j], kept[i].pixels == kept[j].pixels, correlation, bool(np.all(labels[i] == labels[j])))
        for i, j, correlation in _same(kept, in_training)
    ]
    return Report(
        len(places), unreadable, _suspicious(kept, names) + _misnamed(indexes), pairs, _torn_patients(indexes)
    )


def not_leaked(train: Index, other: Index, workers: int) -> list[int]:
    """Rows of a split whose image is not, nearly or exactly, in the training split."""
    leaked = check([train, other], workers).leaked(other.split)
    return [row for row, name in enumerate(other.ids) if name not in leaked]


def _torn_patients(indexes: Sequence[Index]) -> list[str]:
    splits: dict[str, list[str]] = {}
    for index in indexes:
        for patient in sorted(set(index.groups)):
            splits.setdefault(patient, []).append(index.split)
    return [f"patient {patient}: {', '.join(where)}" for patient, where in splits.items() if len(where) > 1]


def _fingerprint(image: np.ndarray, mode: str) -> _Print:
    gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    thumbnail = cv2.resize(gray, (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_AREA)
    digest = hashlib.sha256(repr(image.shape).encode() + np.ascontiguousarray(image).tobytes()).digest()
    return _Print(digest, thumbnail, (image.shape[1], image.shape[0]), mode, bool(gray.std() < 1))


def _same(prints: Sequence[_Print], in_training: np.ndarray) -> Iterator[tuple[int, int, float]]:
    """Rows (i, j) with i < j of images that are the same or nearly so, and their correlation.

    Args:
        in_training: bool (N,), the images whose mean is subtracted.
    """
    if not prints:
        return
    x = np.stack([found.thumbnail for found in prints]).reshape(len(prints), -1).astype(np.float32)
    x -= x.mean(axis=1, keepdims=True)
    x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-6)
    mean = x[in_training].sum(axis=0) / max(1, in_training.sum())
    pixels: dict[bytes, list[int]] = {}
    for start in range(0, len(x), 512):  # a block of rows at a time bounds the memory
        block = _correlations(x, slice(start, start + 512), in_training, mean)
        for i in range(start, start + len(block)):
            twins = pixels.setdefault(prints[i].pixels, [])
            near = np.flatnonzero(block[i - start, :i] >= MIN_CORRELATION).tolist()
            for j in sorted({*twins, *near}):
                yield j, i, 1.0 if j in twins else float(block[i - start, j])
            twins.append(i)


def _correlations(x: np.ndarray, rows: slice, in_training: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Correlation of some images with all, after the mean of the training images other than the two is subtracted.

    With that mean m of a pair, (xi - m)(xj - m) is written out in the products that a matrix product gives at once.

    Args:
        x: (N, D), each row of mean 0 and norm 1 (0 for an image of one colour, which correlates with none).
        in_training: bool (N,); mean: (D,), of the rows of `x` in the training split.

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
    found = (products - xi_m - xj_m + m_m) / norms
    return np.where(blank[rows, None] | blank[None, :], np.float32(0), found)


def _suspicious(prints: Sequence[_Print], names: Sequence[tuple[str, str]]) -> list[str]:
    """Images without content, and those of another size or mode than at least nine in ten of all."""
    lines = [f"{name}: all pixels are the same" for found, (_, name) in zip(prints, names) if found.constant]
    traits = {
        "size": [f"{found.size[0]}x{found.size[1]}" for found in prints],
        "mode": [f"stored as {found.mode}" for found in prints],
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
    """Images whose file name begins with another class than the one they are labelled with."""
    lines = []
    for index in indexes:
        plain = [_plain(name) for name in index.classes]
        for name, label in zip(index.ids, index.labels):
            letters = _plain(re.split(r"\d", Path(name).stem)[0])  # "Viral Pneumonia-1004" -> "viralpneumonia"
            said = [k for k, known in enumerate(plain) if letters == known]
            if said and np.ndim(label) == 0 and int(label) not in said:
                lines.append(f"{name}: the name says {index.classes[said[0]]}, the label {index.classes[int(label)]}")
    return lines


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())
