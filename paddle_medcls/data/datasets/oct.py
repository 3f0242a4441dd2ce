"""OCT2017 (Kermany et al. 2018): retinal OCT scans in four classes, as in the OCT transfer-learning tutorial.

Layout of Kaggle and Mendeley: `OCT2017/{train,val,test}/<class>/*.jpeg`, in the data root or a folder below it. A file
name contains the patient: `CNV-1016042-1.jpeg`.

The `val` folder has 8 images of each class, too few to choose weights. By default a tenth of the patients of each class
is held out of `train` for validation, with all their images; `labels="shipped"` uses the `val` folder, as the tutorial
does.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from paddle_medcls.core.errors import DataError, command
from paddle_medcls.data.index import Index, image_files, index_of_files, only_copy, subfolders
from paddle_medcls.data.splits import split_groups

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
"""The table of `datasets/oct/README.md`, for model cards."""
KNOWN_FAULTS = (
    "The `val` folder has 8 scans of each class, too few to choose weights. The recipe `oct` holds out a tenth of the "
    "patients of `train` instead, with all their scans; `oct_shipped` uses the folder.",
    "Scans of one patient look alike. A split with scans of one patient on both sides inflates the accuracy by 5 to 30 "
    "points (Tampu et al., Scientific Data 2022); `--check` lists patients in two splits.",
)
"""The section "Known faults" of `datasets/oct/README.md`, for model cards."""


def describe(name: str, labels: str = "default") -> tuple[tuple[str, ...], str]:
    """Class names and task; `labels`: "default" (patients held out of `train`) or "shipped" (the folder `val`).

    Raises:
        DataError: another reading of the labels.
    """
    if labels not in READINGS:
        raise DataError(f"oct has no labels {labels!r}", expected=", ".join(READINGS))
    return CLASSES, "multi-class"


def patient_of(file_name: str) -> str:
    """ "CNV-1016042-1.jpeg" -> "1016042"; without the class, since one patient may have scans of two.

    Raises:
        DataError: a name without a patient.
    """
    match = re.fullmatch(r"[A-Za-z]+-(\d+)-\d+", Path(file_name).stem)
    if not match:
        raise DataError(f"oct: {file_name!r} contains no patient", expected="a name like CNV-1016042-1.jpeg")
    return match[1]


def load(name: str, root: Path, split: str, labels: str = "default") -> Index:
    """The scans of one split; `labels` as in `describe`."""
    description = describe(name, labels)
    has_folder = split == "test" or labels == "shipped"
    paths, numbers = _scans(root, split if has_folder else "train")
    index = index_of_files(name, split, root, paths, numbers, description)
    index = replace(index, groups=tuple(patient_of(path.name) for path in paths))
    if has_folder:
        return index
    train, val = split_groups(index.labels, index.groups, HELD_OUT)
    return index.subset(train if split == "train" else val)


def _scans(root: Path, split: str) -> tuple[list[Path], list[int]]:
    """Paths and labels of the scans in the folder `split`.

    NORMAL alone does not identify that folder: the chest radiographs in ZhangLabData.zip have one of this name, too.
    """
    folders = [folder for folder in subfolders(root) if folder.name == split]
    folders = [folder for folder in folders if any((folder / name).is_dir() for name in CLASSES[:3])]
    if not folders:
        raise DataError(
            f"oct: no folder {split} with {', '.join(CLASSES)}",
            path=root,
            expected=f"{root}/OCT2017/{split}/CNV/CNV-1016042-1.jpeg, …",
            fix=f"unpack the archive: {command('prepare')} --dataset oct --archives DIR, or pass --data-root",
        )
    folder = only_copy(folders, lambda folder: [path for name in CLASSES for path in _images(folder / name)])
    by_class = [_images(folder / name) for name in CLASSES]
    empty = [name for name, paths in zip(CLASSES, by_class) if not paths]
    if empty:
        raise DataError(f"oct: no scans of {', '.join(empty)}", path=folder, expected=", ".join(CLASSES))
    numbers = [label for label, paths in enumerate(by_class) for _ in paths]
    return [path for paths in by_class for path in paths], numbers


def _images(folder: Path) -> list[Path]:
    return image_files(folder) if folder.is_dir() else []
