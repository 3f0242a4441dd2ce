"""Faults of a data set that inflate its figures: the same image twice, in two splits, in two classes.

Two images are the same when their pixels agree, whatever their files are called; they are nearly the
same when their difference hashes differ in at most `MAX_BITS` of 64 bits and their thumbnails by at most
`MAX_DIFFERENCE` on average (rescaled, recompressed or slightly cropped copies).
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

MAX_BITS = 6
MAX_DIFFERENCE = 2.5  # of 255
THUMBNAIL = 32  # pixels


@dataclass(frozen=True)
class Pair:
    """Two images that are the same; `difference` of thumbnails, 0..255, 0 for the same pixels."""

    a: tuple[str, str]  # (split, id)
    b: tuple[str, str]
    exact: bool
    difference: float
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

    def leaked(self, split: str) -> set[str]:
        """Images of this split that are in the training split as well."""
        ends = [end for pair in self.pairs if pair.leak for end in (pair.a, pair.b)]
        return {name for where, name in ends if where == split}


@dataclass(frozen=True)
class _Print:
    """What is kept of one image: 1 kB, whatever its size."""

    pixels: bytes
    bits: int
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
    labels = [places[k][0].labels[places[k][1]] for k in good]
    pairs = [
        Pair(names[i], names[j], kept[i].pixels == kept[j].pixels, difference, bool(np.all(labels[i] == labels[j])))
        for i, j, difference in _same(kept)
    ]
    return Report(
        len(places), unreadable, _suspicious(kept, names) + _misnamed(indexes), pairs, _torn_patients(indexes)
    )


def _torn_patients(indexes: Sequence[Index]) -> list[str]:
    splits: dict[str, list[str]] = {}
    for index in indexes:
        for patient in sorted(set(index.groups)):
            splits.setdefault(patient, []).append(index.split)
    return [f"patient {patient}: {', '.join(where)}" for patient, where in splits.items() if len(where) > 1]


def _fingerprint(image: np.ndarray, mode: str) -> _Print:
    gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    small = cv2.resize(gray, (9, 8), interpolation=cv2.INTER_AREA).astype(np.int16)
    bits = int.from_bytes(np.packbits(small[:, 1:] > small[:, :-1]).tobytes(), "big")
    thumbnail = cv2.resize(gray, (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_AREA)
    digest = hashlib.sha256(repr(image.shape).encode() + np.ascontiguousarray(image).tobytes()).digest()
    return _Print(digest, bits, thumbnail, (image.shape[1], image.shape[0]), mode, bool(gray.std() < 1))


def _same(prints: Sequence[_Print]) -> Iterator[tuple[int, int, float]]:
    """Rows (i, j) with i < j of images that are the same or nearly so, and their difference."""
    bits = np.array([found.bits for found in prints], np.uint64)
    counts = np.array([bin(value).count("1") for value in range(1 << 16)], np.uint8)
    for i in range(len(prints) - 1):
        differing = (bits[i + 1 :] ^ bits[i]).view(np.uint16).reshape(-1, 4)
        near = np.flatnonzero(counts[differing].sum(axis=1) <= MAX_BITS)
        for j in (near + i + 1).tolist():
            difference = float(cv2.absdiff(prints[i].thumbnail, prints[j].thumbnail).mean())
            if difference <= MAX_DIFFERENCE:
                yield i, j, difference


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
