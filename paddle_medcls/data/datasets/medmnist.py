"""MedMNIST v2, its twelve two-dimensional data sets: small images in one npz file for each set.

Used by the MedMNIST baseline and the MedMNIST study (ResNet-18 and ResNet-50). The data root is the folder of the npz
files. A set is called like its file: `breastmnist` is `breastmnist.npz` (28 pixels), `breastmnist_64`, `_128` and
`_224` are the larger files of MedMNIST+. The names of the first version (`organmnist_axial`, …) read the files of the
second.

An npz file is a zip of arrays, which may hold pickles, and whose headers may declare any size. Each header is compared
with the set's `Card` before any array is read: a file needs no more memory than the published one, and no pickle is
opened.
"""

from __future__ import annotations

import functools
import zipfile
import zlib
from pathlib import Path

import numpy as np

from paddle_medcls.core import files
from paddle_medcls.core.errors import DataError, command
from paddle_medcls.data.datasets.medmnist_cards import ALIASES, CARDS, SIZES, URL, Card
from paddle_medcls.data.index import SYNTHETIC_MARK, Index, is_synthetic, only_copy, subfolders

SPLITS = ("train", "val", "test")
NAMES = (*CARDS, *ALIASES, *(f"{flag}_{side}" for flag in CARDS for side in SIZES[1:]))

ABOUT = {
    "title": "MedMNIST v2: twelve sets of small medical images",
    "what": "images of 28 × 28 pixels, grey or RGB, one npz file a set; MedMNIST+ has the same at 64, 128 and 224",
    "splits": "train, val and test, as published",
    "tasks": "binary, multi-class, ordinal (RetinaMNIST's five grades), multi-label (ChestMNIST's fourteen findings)",
    "from": "Zenodo, record 10519652: https://doi.org/10.5281/zenodo.10519652",
    "licence": "CC BY 4.0; **DermaMNIST CC BY-NC 4.0** (no commercial use)",
    "to cite": "Yang et al., Scientific Data 10:41 (2023), doi 10.1038/s41597-022-01721-8, and each set's source",
    "classes, md5 of all sizes": "`paddle_medcls/data/datasets/medmnist_cards.py`",
}
"""The table of `datasets/medmnist/README.md`, for model cards."""
KNOWN_FAULTS = (
    "PneumoniaMNIST: 4,690 of the 4,708 training images are distinct, and 8 validation images are also training "
    "images (counted on a copy with the same images in another order). No test image is.",
    "DermaMNIST: 886 test images show lesions that are in the training set too, so test results are optimistic.",
    "BreastMNIST: 54 of the 156 test images and 29 of the 78 validation images show a scan that is in the "
    "training set too, shifted by a pixel or so, four of the 54 there with the other label; train115 and test76 "
    "are equal pixel for pixel (`tools/prepare.py --dataset breastmnist --check`; of the 68 pairs with test "
    "images the 48 with the lowest correlation were inspected: all are the same scan). A network that memorises its "
    "training images scores too high: `eval.py --without-leaks` and `reproduce.py --without-leaks` also score the "
    "102 other test images.",
    "RetinaMNIST: at 28 pixels `--check` also reports two photographs of one eye, or of two similar eyes, as copies; "
    "look at its pairs.",
    "BreastMNIST has 78 validation and 156 test images, RetinaMNIST 120 and 400: results vary between seeds by .01 "
    "AUC and .01 to .05 accuracy, and the choice of the best epoch is noisy.",
    'BreastMNIST\'s class 1 is "normal, benign": its AUC and sensitivity are those of a healthy breast.',
    "ChestMNIST's accuracy near .947 is that of a negative answer for every finding; read its AUC.",
    "OrganAMNIST, OrganCMNIST, OrganSMNIST: classes tell left from right. ChestMNIST, PneumoniaMNIST: a mirrored "
    "chest is not a chest. These sets are not flipped by the project's own recipe.",
)
"""The section "Known faults" of `datasets/medmnist/README.md`, for model cards."""


def card_of(name: str) -> tuple[Card, int]:
    """The card of a set and its image size in pixels: "breastmnist_64" -> (card of BreastMNIST, 64)."""
    if name in ALIASES:
        return CARDS[ALIASES[name]], 28
    flag, _, side = name.partition("_")
    return CARDS[flag], int(side or 28)


def file_of(name: str) -> str:
    """Name of a set's npz file."""
    card, side = card_of(name)
    return f"{card.flag}.npz" if side == 28 else f"{card.flag}_{side}.npz"


def file_in(root: Path, name: str) -> Path:
    """Path of a set's npz file: in the data root or a folder below it; if there is none, its place in the data root."""
    at_top = root / file_of(name)
    if at_top.exists():
        return at_top
    copies = [folder / at_top.name for folder in subfolders(root) if (folder / at_top.name).is_file()]
    return only_copy(copies) if copies else at_top


def describe(name: str, labels: str = "default") -> tuple[tuple[str, ...], str]:
    """Class names and task; "default" is the only reading of the labels.

    Raises:
        DataError: another reading.
    """
    if labels != "default":
        raise DataError(f"{name} has no labels {labels!r}", expected="default")
    card, _ = card_of(name)
    return card.classes, card.task


def load(name: str, root: Path, split: str, labels: str = "default") -> Index:
    """One split of a set, its images in memory.

    Raises:
        DataError: no file, or a file that disagrees with the set's card.
    """
    classes, task = describe(name, labels)
    card, side = card_of(name)
    path = file_in(root, name)
    synthetic = is_synthetic(root)
    images, numbers = _read_npz(path, card, side, split, synthetic)
    if task != "multi-label":
        numbers = numbers[:, 0]
    return Index(
        dataset=name,
        split=split,
        ids=tuple(f"{split}{row}" for row in range(len(images))),
        images=images,
        labels=numbers.astype(np.int64),
        classes=classes,
        task=task,
        synthetic=synthetic,
        note="" if synthetic else _bytes_note(path, card.md5[side]),
    )


def fetch(name: str, root: Path) -> str:
    """Downloads a set's file into the data root, unless it exists; returns a message for the user."""
    from paddle_medcls.data.download import download  # not above: only this needs http

    card, side = card_of(name)
    target = file_in(root, name)
    if target.exists():
        return _bytes_note(target, card.md5[side]) or f"{target} already exists, md5 as published"
    size = card.num_bytes if side == 28 else 0
    download(URL.format(file=target.name), target, size, md5=card.md5[side])
    return f"{target}: {target.stat().st_size:,} bytes, md5 as published; licence {card.licence}"


def _bytes_note(path: Path, md5: str) -> str:
    """A note about a file with another checksum than the published one; "" for the published file."""
    status = path.stat()
    actual = _md5(path, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
    return "" if actual == md5 else f"{path.name}: differs from the official file: md5 {actual}, published {md5}"


@functools.lru_cache(maxsize=64)
def _md5(path: Path, *_state: int) -> str:
    """The md5 of a file, computed once in a process; size, times and inode number detect a changed file."""
    return files.md5(path)


# --- npz -----------------------------------------------------------------------------------------


def _read_npz(path: Path, card: Card, side: int, split: str, synthetic: bool) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, S, S) or (N, S, S, 3) and labels (N, 1) or (N, L) of a split, uint8; all headers are verified."""
    key = "the file"
    try:
        with zipfile.ZipFile(path) as file:
            pixels = (side, side, 3) if card.channels == 3 else (side, side)
            width = len(card.classes) if card.task == "multi-label" else 1
            for part, count in zip(SPLITS, card.counts):
                key = f"{part}_images"
                num_images = _check_header(file, path, key, (count, *pixels), synthetic)
                key = f"{part}_labels"
                num_labels = _check_header(file, path, key, (count, width), synthetic)
                if num_images != num_labels:
                    raise _fault(path, key, f"{num_labels} labels", f"one for each of {num_images} images")
            key = f"{split}_images"
            images = _read_array(file, key)
            key = f"{split}_labels"
            labels = _read_array(file, key)
    except FileNotFoundError:
        raise DataError(
            f"{path.stem}: no file {path.name}",
            path=path.parent,
            fix=f"{command('prepare')} --dataset {path.stem} --download --data-root {path.parent}, or download "
            f"{URL.format(file=path.name)} and save it there; its md5 is {card.md5[side]}",
        ) from None
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError, zlib.error) as error:
        raise _fault(path, key, f"it cannot be read ({error})", "a complete npz file") from None
    max_label = 1 if card.task == "multi-label" else len(card.classes) - 1
    if labels.max() > max_label:
        raise _fault(path, key, f"a label of {labels.max()}", f"labels of 0 to {max_label}")
    return images, labels


def _check_header(file: zipfile.ZipFile, path: Path, key: str, shape: tuple[int, ...], synthetic: bool) -> int:
    """The length of an array, from its header; synthetic files (`synthetic`) may be shorter than the published ones.

    Raises:
        DataError: missing, compressed with an unusual method, or another type, shape or size than the card's.
    """
    expected = f"{_shape_text(shape)}, uint8"
    try:
        member = file.getinfo(f"{key}.npy")
    except KeyError:
        raise _fault(path, key, "missing", f"an array {expected}") from None
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise _fault(path, key, f"packed by method {member.compress_type}", "stored or deflated, as numpy writes it")
    with file.open(member) as stream:
        try:
            version = np.lib.format.read_magic(stream)
            read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
            actual, _, dtype = read(stream)
        except Exception as error:  # numpy's header reader raises many types
            raise _fault(path, key, f"no numpy array ({error})", f"an array {expected}") from None
        header = stream.tell()
    if dtype.hasobject:
        raise _fault(path, key, "pickled objects, which may run any program", expected)
    shorter = synthetic and len(actual) == len(shape) and actual[1:] == shape[1:] and 0 < actual[0] <= shape[0]
    if dtype != np.uint8 or not (actual == shape or shorter):
        raise _fault(path, key, f"{_shape_text(actual)}, {dtype}", expected)
    size = header + int(np.prod(actual))
    if member.file_size != size:
        raise _fault(path, key, f"{member.file_size:,} bytes", f"{size:,} by its header")
    return actual[0]


def _read_array(file: zipfile.ZipFile, key: str) -> np.ndarray:
    with file.open(f"{key}.npy") as stream:
        array = np.lib.format.read_array(stream, allow_pickle=False)
        stream.read(1)  # zipfile verifies the checksum at the end of a member
    return np.ascontiguousarray(array)


def _shape_text(shape: tuple[int, ...]) -> str:
    return " x ".join(str(side) for side in shape) or "a single number"


def _fault(path: Path, key: str, actual: str, expected: str) -> DataError:
    return DataError(
        f"{path.name}: {key}: {actual}",
        path=path,
        expected=expected,
        fix="download it again; for generated files of your own, with fewer images, "
        f"put an empty file {SYNTHETIC_MARK} beside them",
    )
