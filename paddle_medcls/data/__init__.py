"""Data sets: one module each, found by its name.

A module `data/<name>.py` offers

- `WEIGHTS_NAME`: stem of its weight files ("PALM" for `PALM.pdparams`);
- `SPLITS`: the splits it has, in order;
- `describe(name, labels)`: class names and task;
- `load(name, root, split, labels)`: an `Index`.

To add a data set, add a module, and a recipe in `recipes/`. Nothing else is edited.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from pathlib import Path
from types import ModuleType

from paddle_medcls.data.index import Index
from paddle_medcls.errors import DataError

_HELPERS = {"archives", "check", "index", "loader", "sample", "splits", "statistics"}


def dataset_names() -> list[str]:
    """Names that `--dataset` takes."""
    return sorted(info.name for info in pkgutil.iter_modules(__path__) if info.name not in _HELPERS)


def dataset_module(name: str) -> ModuleType:
    """The module of a data set; an unknown name is an error with the nearest ones."""
    names = dataset_names()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise DataError(f"unknown data set {name!r}{hint}", expected=", ".join(names))
    return importlib.import_module(f"paddle_medcls.data.{name}")


def load_index(name: str, root: str | Path, split: str, labels: str = "default") -> Index:
    """Lists one split of a data set, without reading a pixel.

    Args:
        name: "palm", "covid", …
        root: the data root.
        split: one of the data set's splits.
        labels: reading of the labels, where the data set offers several.

    Raises:
        DataError: unknown name or split, missing folder, or files that disagree with their labels.
    """
    module = dataset_module(name)
    if split not in module.SPLITS:
        raise DataError(f"{name} has no split {split!r}", expected=", ".join(module.SPLITS))
    root = Path(root)
    if not root.is_dir():
        raise DataError(
            f"{name}: the data root does not exist",
            where=root,
            do=f"get the images as datasets/{name}/README.md says, or pass --data-root",
        )
    return module.load(name, root, split, labels)


def dataset_classes(name: str, labels: str = "default") -> tuple[tuple[str, ...], str]:
    """Class names and task of a data set, without its images."""
    return dataset_module(name).describe(name, labels)
