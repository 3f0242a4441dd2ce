"""Your own images: `folder` (one sub-folder a class) and `table` (labels in a CSV or Excel file).

The data root is the folder of the images, or the list `images.csv` that a run or `prepare --split` has written, with
the splits of that run.
"""

from __future__ import annotations

from pathlib import Path

from paddle_medcls.core.errors import DataError
from paddle_medcls.data.image_list import CSV, JSON, ImageList, read_image_list
from paddle_medcls.data.image_list import SPLITS as SPLITS
from paddle_medcls.data.index import Index
from paddle_medcls.data.own_images import own_images

NAMES = ("folder", "table")
WEIGHTS_NAME = "MODEL"
ABOUT = {"title": "own images", "licence": "ask the owner of the images"}
"""For model cards; what else is known stands in the run's `images.json`."""


def open_images(name: str, root: str | Path | ImageList) -> ImageList:
    """The images of a data root; see the module's docstring.

    Raises:
        DataError: see `read_image_list` and `own_images`; a table without its file.
    """
    if isinstance(root, ImageList):
        return root
    if Path(root).is_file():
        return read_image_list(root)
    if name == "table":
        raise DataError("a table of labels is needed", fix="--labels FILE.csv, or --data-root RUN/images.csv of a run")
    refuse_two_splits(Path(root))
    return own_images(root)


def refuse_two_splits(root: Path) -> None:
    """Refuses a folder for which splits were written already: making others there would be an oversight."""
    if (root / CSV).is_file() and (root / JSON).is_file():
        raise DataError(
            f"the folder holds a list of its images, {CSV}, with splits",
            path=root,
            fix=f"--data-root {root / CSV} to use them; or remove {CSV} and {JSON}",
        )


def describe(name: str, labels: str = "default") -> tuple[tuple[str, ...], str]:
    """Raises a DataError: the classes of own images are known from the images alone."""
    raise DataError(f"{name}: the classes are known from the images alone", fix="keep the sidecar beside the weights")


def load(name: str, root: Path | ImageList, split: str, labels: str = "default") -> Index:
    """The images of one split."""
    return open_images(name, root).index(split, name)
