"""MedMNIST v2 in two dimensions: one npz file a set, small images of twelve kinds. Documents 000 and 002.

The data root is the folder of the npz files. A set's name is its file's: `breastmnist` is
`breastmnist.npz` (28 pixels), `breastmnist_64`, `_128` and `_224` are MedMNIST+'s larger files. The
names of the first version (`organmnist_axial`, …) read the same files as their successors.

An npz file is a zip of arrays that may hold pickles, and its headers may promise any size. Here each
header is compared with the card before any array is read, so a file takes no more memory than the
real one, and no pickle is ever opened.
"""

from __future__ import annotations

import functools
import zipfile
import zlib
from pathlib import Path

import numpy as np

from paddle_medcls import files
from paddle_medcls.data.download import checksum_text, download
from paddle_medcls.data.index import DRAWN_MARK, Index, is_drawn, only_copy, subfolders
from paddle_medcls.data.medmnist_cards import ALIASES, CARDS, SIZES, URL, Card
from paddle_medcls.errors import DataError, command

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
    "classes, md5 of all sizes": "`paddle_medcls/data/medmnist_cards.py`",
}
"""What a model card repeats about the data: the table of `datasets/medmnist/README.md`."""
KNOWN_FAULTS = (
    "PneumoniaMNIST: 4,690 of the 4,708 training images are distinct, and 8 validation images are also training "
    "images (counted on a copy with the same images in another order). No test image is.",
    "DermaMNIST: 886 test images show lesions that are in the training set too, so test figures are optimistic.",
    "BreastMNIST: 54 of the 156 test images and 29 of the 78 validation images show a scan that is in the "
    "training set too, shifted by a pixel or so, four of the 54 there with the other label; train115 and test76 "
    "are equal pixel for pixel (`tools/prepare.py --dataset breastmnist --check`; of the 68 pairs with test "
    "images the 48 least alike were looked at: all are the same scan). A network that remembers its training "
    "images gains by it: `eval.py --without-leaks` and `reproduce.py --without-leaks` score the 102 other test "
    "images as well.",
    "RetinaMNIST: at 28 pixels `--check` also takes two photographs of one eye, or of two alike, for copies; look"
    " at its pairs.",
    "BreastMNIST has 78 validation and 156 test images, RetinaMNIST 120 and 400: one seed's figures move by .01 "
    "AUC and .01 to .05 accuracy, and the choice of the best epoch is noisy.",
    'BreastMNIST\'s class 1 is "normal, benign": its AUC and sensitivity are those of a healthy breast.',
    'ChestMNIST\'s accuracy near .947 is that of saying "no" to every finding; read its AUC.',
    "OrganAMNIST, OrganCMNIST, OrganSMNIST: classes tell left from right. ChestMNIST, PneumoniaMNIST: a mirrored "
    "chest is not a chest. These sets are not flipped by the project's own recipe.",
)
"""The section of this name of `datasets/medmnist/README.md`."""


def card_of(name: str) -> tuple[Card, int]:
    """Card and side in pixels of a set's name: "breastmnist_64" -> (BreastMNIST, 64)."""
    if name in ALIASES:
        return CARDS[ALIASES[name]], 28
    flag, _, side = name.partition("_")
    return CARDS[flag], int(side or 28)


def file_of(name: str) -> str:
    """Name of a set's npz file."""
    card, side = card_of(name)
    return f"{card.flag}.npz" if side == 28 else f"{card.flag}_{side}.npz"


def file_in(root: Path, name: str) -> Path:
    """A set's npz file: in the data root, or, as archives unpack, in a folder below; its place, where there is none."""
    at_top = root / file_of(name)
    if at_top.exists():
        return at_top
    found = [folder / at_top.name for folder in subfolders(root) if (folder / at_top.name).is_file()]
    return only_copy(found) if found else at_top


def describe(name: str, labels: str = "default") -> tuple[tuple[str, ...], str]:
    """Class names and task."""
    if labels != "default":
        raise DataError(f"{name} has no labels {labels!r}", expected="default")
    card, _ = card_of(name)
    return card.classes, card.task


def load(name: str, root: Path, split: str, labels: str = "default") -> Index:
    """One split of a set, its images in memory."""
    classes, task = describe(name, labels)
    card, side = card_of(name)
    path = file_in(root, name)
    drawn = is_drawn(root)
    images, numbers = _read_npz(path, card, side, split, drawn)
    if task != "multi-label":
        numbers = numbers[:, 0]
    return Index(
        dataset=name,
        split=split,
        ids=tuple(f"{split}{row}" for row in range(len(images))),
        sources=images,
        labels=numbers.astype(np.int64),
        classes=classes,
        task=task,
        drawn=drawn,
        note="" if drawn else _bytes_note(path, card.md5[side]),
    )


def fetch(name: str, root: Path) -> str:
    """Downloads a set's file into the data root, unless one is there; says what was done."""
    card, side = card_of(name)
    target = file_in(root, name)
    if target.exists():
        return _bytes_note(target, card.md5[side]) or f"{target} is there already, md5 as published"
    size = card.num_bytes if side == 28 else 0
    download(URL.format(file=target.name), target, size, md5=card.md5[side])
    return f"{target}: {target.stat().st_size:,} bytes, md5 as published; licence {card.licence}"


def _bytes_note(path: Path, md5: str) -> str:
    status = path.stat()
    found = _md5(path, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
    return "" if found == md5 else f"{path.name}: not the official bytes: md5 {found}, published {md5}"


@functools.lru_cache(maxsize=64)
def _md5(path: Path, *_state: int) -> str:
    """The md5 of a file in the state that size, times and inode tell: gigabytes are read once a process."""
    return files.md5(path)


# --- npz -----------------------------------------------------------------------------------------


def _read_npz(path: Path, card: Card, side: int, split: str, drawn: bool) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, S, S) or (N, S, S, 3) and labels (N, 1) or (N, L) of a split; all headers are checked."""
    key = "the file"
    try:
        with zipfile.ZipFile(path) as file:
            found = {}
            for part, count in zip(SPLITS, card.counts):
                pixels = (side, side, 3) if card.channels == 3 else (side, side)
                width = len(card.classes) if card.task == "multi-label" else 1
                for key, rest in ((f"{part}_images", pixels), (f"{part}_labels", (width,))):
                    found[key] = _check_header(file, path, key, (count, *rest), drawn)
                if found[f"{part}_images"] != found[f"{part}_labels"]:
                    raise _fault(path, key, f"{found[key]} labels", f"one for each of {found[f'{part}_images']} images")
            key = f"{split}_images"
            images = _read_array(file, key)
            key = f"{split}_labels"
            labels = _read_array(file, key)
    except FileNotFoundError:
        raise DataError(
            f"{path.stem}: no file {path.name}",
            where=path.parent,
            do=f"{command('prepare')} --dataset {path.stem} --download --data-root {path.parent}, or fetch "
            f"{URL.format(file=path.name)} and save it there; {checksum_text(card.md5[side])}",
        ) from None
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError, zlib.error) as error:
        raise _fault(path, key, f"it cannot be read ({error})", "a whole npz file") from None
    top = 1 if card.task == "multi-label" else len(card.classes) - 1
    if labels.max() > top:
        raise _fault(path, key, f"a label of {labels.max()}", f"labels of 0 to {top}")
    return images, labels


def _check_header(file: zipfile.ZipFile, path: Path, key: str, shape: tuple[int, ...], drawn: bool) -> int:
    """Refuses an array that is not what the card says, before it is read; returns its length.

    Drawn files (marked as such) may be shorter than the real ones.
    """
    try:
        member = file.getinfo(f"{key}.npy")
    except KeyError:
        raise _fault(path, key, "missing", f"an array {_shape_text(shape)}, uint8") from None
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise _fault(path, key, f"packed by method {member.compress_type}", "stored or deflated, as numpy writes it")
    with file.open(member) as stream:
        try:
            version = np.lib.format.read_magic(stream)
            read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
            found, _, dtype = read(stream)
        except Exception as error:  # numpy's reader of headers raises many kinds
            raise _fault(path, key, f"no numpy array ({error})", f"an array {_shape_text(shape)}, uint8") from None
        header = stream.tell()
    if dtype.hasobject:
        raise _fault(path, key, "pickled objects, which may run any program", f"{_shape_text(shape)}, uint8")
    fits = found[1:] == shape[1:] and len(found) == len(shape)
    fits &= 0 < found[0] <= shape[0] if drawn and found else found == shape
    if dtype != np.uint8 or not fits:
        raise _fault(path, key, f"{_shape_text(found)}, {dtype}", f"{_shape_text(shape)}, uint8")
    if member.file_size != header + int(np.prod(found)):
        raise _fault(path, key, f"{member.file_size:,} bytes", f"{header + int(np.prod(found)):,} by its header")
    return found[0]


def _read_array(file: zipfile.ZipFile, key: str) -> np.ndarray:
    with file.open(f"{key}.npy") as stream:
        array = np.lib.format.read_array(stream, allow_pickle=False)
        stream.read(1)  # the end of the member, where its checksum is compared
    return np.ascontiguousarray(array)


def _shape_text(shape: tuple[int, ...]) -> str:
    return " x ".join(str(side) for side in shape) or "a single number"


def _fault(path: Path, key: str, found: str, expected: str) -> DataError:
    return DataError(
        f"{path.name}: {key}: {found}",
        where=path,
        expected=expected,
        do="download it again; for generated files of your own, with fewer images, "
        f"put an empty file {DRAWN_MARK} beside them",
    )
