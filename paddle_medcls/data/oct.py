"""OCT2017 (Kermany et al. 2018): retinal OCT scans, CNV / DME / DRUSEN / NORMAL. Document 004.

Layout of Kaggle and Mendeley: `OCT2017/{train,val,test}/<class>/*.jpeg`, at the root or below. A file
name carries the patient: `CNV-1016042-1.jpeg`.

The shipped `val` has 8 images a class, too few to choose weights by. By default a tenth of the patients
of each class is taken out of `train` for validation, whole patients at a time; `labels="shipped"` takes
the tutorial's `val` folder instead.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from paddle_medcls.data.index import Index, image_files, is_drawn, only_copy, subfolders
from paddle_medcls.data.splits import split_groups
from paddle_medcls.errors import DataError, command

WEIGHTS_NAME = "OCT"
SPLITS = ("train", "val", "test")
CLASSES = ("CNV", "DME", "DRUSEN", "NORMAL")
READINGS = ("default", "shipped")
HELD_OUT = 0.1  # of the patients of each class

ABOUT = {
    "title": "OCT2017 (Kermany et al. 2018): retinal OCT scans",
    "what": "grey JPEG B-scans of the retina, most 496 pixels high and 512 or 768 wide",
    "classes": "`CNV` (about 37,000 for training), `DME` (11,000), `DRUSEN` (8,000), `NORMAL` (26,000); test: 250 each",
    "patients": "in the file name: `CNV-1016042-1.jpeg` is scan 1 of patient 1016042",
    "from": "Mendeley Data, doi 10.17632/rscbjbr9sj; Kaggle, `paultimothymooney/kermany2018`",
    "to cite": "Kermany, Goldbaum et al., Cell 172:1122 (2018)",
    "licence": "CC BY 4.0",
}
"""What a model card repeats about the data: the table of `datasets/oct/README.md`."""
KNOWN_FAULTS = (
    "The shipped `val` has 8 scans a class, too few to choose weights by. The recipe `oct` takes a tenth of the "
    "patients out of `train` instead, whole patients at a time; `oct_shipped` uses the folder.",
    "Scans of one patient look alike. A split that tears patients apart inflates the accuracy by 5 to 30 points "
    "(Tampu et al., Scientific Data 2022); `--check` lists patients that stand in two splits.",
)
"""The section of this name of `datasets/oct/README.md`."""


def describe(name: str, labels: str = "default") -> tuple[tuple[str, ...], str]:
    """Class names and task."""
    if labels not in READINGS:
        raise DataError(f"oct has no labels {labels!r}", expected=", ".join(READINGS))
    return CLASSES, "multi-class"


def patient_of(file_name: str) -> str:
    """ "CNV-1016042-1.jpeg" -> "1016042"; the class in front does not matter, one patient may have two."""
    found = re.fullmatch(r"[A-Za-z]+-(\d+)-\d+", Path(file_name).stem)
    if not found:
        raise DataError(f"oct: {file_name!r} carries no patient", expected="a name like CNV-1016042-1.jpeg")
    return found[1]


def load(name: str, root: Path, split: str, labels: str = "default") -> Index:
    """The scans of one split."""
    classes, task = describe(name, labels)
    own_folder = split == "test" or labels == "shipped"
    paths, numbers = _scans(root, split if own_folder else "train")
    index = Index(
        dataset=name,
        split=split,
        ids=tuple(path.relative_to(root).as_posix() for path in paths),
        sources=paths,
        labels=np.array(numbers, np.int64),
        classes=classes,
        task=task,
        groups=tuple(patient_of(path.name) for path in paths),
        drawn=is_drawn(root),
    )
    if own_folder:
        return index
    train, val = split_groups(index.labels, index.groups, HELD_OUT)
    return index.subset(train if split == "train" else val)


def _scans(root: Path, split: str) -> tuple[list[Path], list[int]]:
    # NORMAL alone does not tell: the chest films beside the scans in ZhangLabData.zip have such a folder as well
    folders = [folder for folder in subfolders(root) if folder.name == split]
    folders = [folder for folder in folders if any((folder / name).is_dir() for name in CLASSES[:3])]
    if not folders:
        raise DataError(
            f"oct: no folder {split} with {', '.join(CLASSES)}",
            where=root,
            expected=f"{root}/OCT2017/{split}/CNV/CNV-1016042-1.jpeg, …",
            do=f"unpack the archive: {command('prepare')} --dataset oct --archives DIR, or pass --data-root",
        )
    folder = only_copy(folders, lambda folder: [path for name in CLASSES for path in _images(folder / name)])
    by_class = [_images(folder / name) for name in CLASSES]
    empty = [name for name, found in zip(CLASSES, by_class) if not found]
    if empty:
        raise DataError(f"oct: no scans of {', '.join(empty)}", where=folder, expected=", ".join(CLASSES))
    numbers = [label for label, found in enumerate(by_class) for _ in found]
    return [path for found in by_class for path in found], numbers


def _images(folder: Path) -> list[Path]:
    return image_files(folder) if folder.is_dir() else []
