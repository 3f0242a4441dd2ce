"""PALM (iChallenge-PM): fundus photographs with and without pathologic myopia, as in the PALM myopia tutorial.

Training labels are the first letter of the file name: P is pathologic; H (high myopia) and N (normal) are not.
Validation labels come from `labels.csv` (ID,imgName,Label,Fovea_X,Fovea_Y) or from the original
`PM_Label_and_Fovea_Location.xlsx`.

The three-class reading (`labels="three"`: normal, high myopia, pathologic) exists for training files alone, since the
validation labels do not distinguish normal from high myopia: a fifth of the training files of each class, chosen with
a fixed seed, is held out for validation.
"""

from __future__ import annotations

from pathlib import Path

from paddle_medcls.core.errors import DataError, command
from paddle_medcls.data.index import Index, image_files, index_of_files, only_copy, subfolders
from paddle_medcls.data.splits import holdout

WEIGHTS_NAME = "PALM"
SPLITS = ("train", "val")
CLASSES = {
    "default": ("non-pathologic", "pathologic"),
    "three": ("normal", "high myopia", "pathologic"),
}
LETTERS = {
    "default": {"N": 0, "H": 0, "P": 1},
    "three": {"N": 0, "H": 1, "P": 2},
}
IMAGES = (".jpg", ".jpeg", ".png")
ABOUT = {
    "title": "PALM (iChallenge-PM): pathologic myopia on fundus photographs",
    "what": "colour fundus photographs, mostly 2124 × 2056, JPEG",
    "classes": "`non-pathologic` (0: normal N, high myopia H), `pathologic` (1: P)",
    "counts": "training 400: P 213, N 161, H 26 · validation 400: 211 pathologic, 189 not",
    "labels": "training: first letter of the file name · validation: `labels.csv`, or the original "
    "`PM_Label_and_Fovea_Location.xlsx`",
    "made by": "Baidu and Zhongshan Ophthalmic Center, Sun Yat-sen University",
    "from": "IEEE DataPort, doi 10.21227/55pk-8z03 (registration); copies on Baidu AI Studio, data sets 19065, 19469, "
    "23828",
    "to cite": "Fang et al., Scientific Data 11:99 (2024), doi 10.1038/s41597-024-02911-2",
    "licence": "research and education; read the terms where you download it",
}
"""The table of `datasets/palm/README.md`, for model cards."""
KNOWN_FAULTS = (
    "The same photograph under two names: P0014 = P0072, V0107 = V0160, V0268 = V0320, and across the splits "
    "P0056 = V0163 and P0057 = V0252 (2 of 400 validation images are in the training set).",
    "There is no labelled test set here. The tutorials choose their weights on the validation images and report "
    "the accuracy on the same ones, which is optimistic; of the recipes `palm` alone chooses nothing on them.",
    "The classes differ at the border of the image as well: `tools/prepare.py --dataset palm --audit` on the "
    "images at 224 pixels: a logistic regression on the outer 10% of a 40-pixel grey image has an accuracy of 87.3% on "
    "the validation images (95% 83.6 to 90.2), on the complete image 90.8% (87.5 to 93.2); chance is 52.8%.",
    "The three-class reading (`--recipe palm_three`) exists for the training files alone: a fifth of each class "
    "is held out.",
)
"""The section "Known faults" of `datasets/palm/README.md`, for model cards."""

LABEL_FILES = ("labels.csv", "PM_Label_and_Fovea_Location.xlsx")


def describe(name: str, labels: str = "default") -> tuple[tuple[str, ...], str]:
    """Class names and task; `labels`: "default" (two classes) or "three".

    Raises:
        DataError: another reading of the labels.
    """
    if labels not in CLASSES:
        raise DataError(f"palm has no labels {labels!r}", expected=", ".join(CLASSES))
    return CLASSES[labels], "binary" if labels == "default" else "multi-class"


def load(name: str, root: Path, split: str, labels: str = "default") -> Index:
    """The training or validation images with their labels; the module's docstring has the source of the labels."""
    description = describe(name, labels)
    if labels == "three" or split == "train":
        paths, numbers = _by_first_letter(root, LETTERS[labels])
    else:
        paths, numbers = _by_label_file(root)
    index = index_of_files(name, split, root, paths, numbers, description)
    if labels == "three":
        train, val = holdout(index.labels, 0.2)
        return index.subset(train if split == "train" else val)
    return index


def _images(folder: Path) -> list[Path]:
    return image_files(folder, IMAGES)


def _by_first_letter(root: Path, letters: dict[str, int]) -> tuple[list[Path], list[int]]:
    folder = _find_folder(root, "PALM-Training400", "PHN")
    paths = _images(folder)
    unknown = [path.name for path in paths if path.name[0] not in letters]
    if unknown:
        raise DataError(
            f"palm: {len(unknown)} training file(s) with an unknown first letter",
            items=unknown,
            path=folder,
            expected="P (pathologic), H (high myopia) or N (normal)",
            fix="remove the files that do not belong to PALM-Training400",
        )
    return paths, [letters[path.name[0]] for path in paths]


def _by_label_file(root: Path) -> tuple[list[Path], list[int]]:
    label_file = _find_label_file(root)
    rows = _read_labels(label_file)
    folder = _find_folder(root, "PALM-Validation400", "V")
    present = {path.name for path in _images(folder)}
    missing = [f"row {number} names {name!r}" for number, name, _ in rows if name not in present]
    extra = sorted(present - {name for _, name, _ in rows})
    if missing or extra:
        raise DataError(
            f"palm: {label_file.name} and the validation images disagree: "
            f"{len(missing)} missing, {len(extra)} without a label",
            items=[f"{text}, which does not exist" for text in missing] + [f"no label for {name}" for name in extra],
            path=folder,
            expected=f"{len(rows)} images, found {len(present)}",
            fix="unpack the archives again, or pass --data-root",
        )
    return [folder / name for _, name, _ in rows], [label for _, _, label in rows]


def _find_folder(root: Path, name: str, letters: str) -> Path:
    """The folder with the images: by its own name, or else by the names of its files."""
    folders = [folder for folder in subfolders(root) if _has_images(folder, letters)]
    named = [folder for folder in folders if folder.name == name]
    if folders:
        return only_copy(named or folders, _images)
    raise DataError(
        f"palm: no folder {name} with images",
        path=root,
        expected=f"{root}/{name}/{letters[0]}0001.jpg, …",
        fix=f"unpack the archives: {command('prepare')} --dataset palm --archives DIR, or pass --data-root",
    )


def _has_images(folder: Path, letters: str) -> bool:
    names = (path.name for path in folder.iterdir() if path.suffix.lower() in IMAGES)
    return any(name[0] in letters and name[1:5].isdigit() for name in names)


def _find_label_file(root: Path) -> Path:
    for name in LABEL_FILES:
        copies = [folder / name for folder in subfolders(root) if (folder / name).is_file()]
        if copies:
            return only_copy(copies)
    raise DataError(
        "palm: no validation labels",
        path=root,
        expected=" or ".join(LABEL_FILES),
        fix=f"unpack the archive of validation labels: {command('prepare')} --dataset palm --archives DIR",
    )


def _read_labels(path: Path) -> list[tuple[int, str, int]]:
    """Rows of (row number, image name, label); the row number counts the header as 1."""
    import pandas

    try:
        table = pandas.read_csv(path, dtype=str) if path.suffix == ".csv" else pandas.read_excel(path, dtype=str)
    except ImportError as error:
        raise DataError(f"palm: {path.name} needs openpyxl: {error}", fix="pip install openpyxl") from None
    except Exception as error:  # pandas raises many types for broken files
        raise DataError(f"palm: {path.name} cannot be read: {error}", path=path) from None
    if not {"imgName", "Label"} <= set(table.columns):
        raise DataError(
            f"palm: {path.name} lacks a column", path=path, expected=f"imgName and Label, found {list(table.columns)}"
        )
    rows, faults = [], []
    for number, (name, label) in enumerate(zip(table["imgName"], table["Label"]), start=2):
        if label not in ("0", "1") or not isinstance(name, str) or Path(name).name != name:
            faults.append(f"row {number}: imgName {name!r}, Label {label!r}")
        rows.append((number, name, label))
    if faults:
        raise DataError(
            f"palm: {len(faults)} faulty row(s) in {path.name}",
            items=faults,
            path=path,
            expected="a file name and a label of 0 or 1",
        )
    names = [name for _, name, _ in rows]
    if len(set(names)) < len(names):
        duplicates = sorted({name for name in names if names.count(name) > 1})
        raise DataError(f"palm: {path.name} lists images twice", items=duplicates, path=path)
    return [(number, name, int(label)) for number, name, label in rows]
