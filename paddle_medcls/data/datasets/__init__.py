"""The data sets, one module for each; a module is found by its name.

A module `data/datasets/<name>.py` defines

- `SPLITS`: its splits, in order;
- `WEIGHTS_NAME`: stem of its weight files ("PALM" for `PALM.pdparams`); without it, the set's name;
- `NAMES`, only where it reads several data sets (MedMNIST, own images): their names;
- `describe(name, labels)`: class names and task;
- `load(name, root, split, labels)`: an `Index`;
- `ABOUT`, `KNOWN_FAULTS`: the text about the data for model cards, as in `datasets/<name>/README.md`;
- `fetch(name, root)`, if a program may download the data set;
- `file_of(name)`, if a data set is one file: the name of the file;
- `open_images(name, root)`, if the images are a user's own: an `ImageList`;
- `make_split_files(root, seed)`, if the split is written by `prepare --split`: the text of each split file;
- `hold_out_source(root, seed, source)`, if the sources of its images are known: folder and files of a second split.

To add a data set, add a module, and a recipe in `recipes/`. Nothing else is edited.
"""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from types import ModuleType

from paddle_medcls.core.errors import DataError, command, did_you_mean
from paddle_medcls.data.image_list import ImageList
from paddle_medcls.data.index import Index


def _modules() -> dict[str, ModuleType]:
    """The module of each data set."""
    modules = {}
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"paddle_medcls.data.datasets.{info.name}")
        if hasattr(module, "load"):  # else cards or tables of one
            modules.update(dict.fromkeys(getattr(module, "NAMES", (info.name,)), module))
    return modules


def dataset_names() -> list[str]:
    """The names for `--dataset`, sorted."""
    return sorted(_modules())


def dataset_module(name: str) -> ModuleType:
    """The module of a data set.

    Raises:
        DataError: an unknown name; the message suggests the nearest one.
    """
    modules = _modules()
    if name not in modules:
        hint = did_you_mean(name, modules)
        raise DataError(f"unknown data set {name!r}{hint}", expected=", ".join(sorted(modules)))
    return modules[name]


def is_own(name: str) -> bool:
    """Whether a data set is a user's own images, `folder` or `table`."""
    return hasattr(dataset_module(name), "open_images")


def splits_of(name: str, root: str | Path | ImageList) -> tuple[str, ...]:
    """The splits of a data set, in order."""
    module = dataset_module(name)
    return module.open_images(name, root).names if is_own(name) else module.SPLITS


def weights_name(name: str) -> str:
    """Stem of a data set's weight files: "PALM", "COVID", a MedMNIST flag."""
    return getattr(dataset_module(name), "WEIGHTS_NAME", name)


def default_root(name: str) -> Path:
    """The default data root of a data set: datasets/<its module's name>.

    Raises:
        DataError: own images, which have none.
    """
    if is_own(name):
        raise DataError(f"{name}: no folder of images is named", fix="pass --data-root with the folder of your images")
    return Path("datasets") / dataset_module(name).__name__.rpartition(".")[2]


def how_to_get(name: str) -> str:
    """Where to get a data set, and the command that puts it into its data root."""
    module = dataset_module(name)
    if is_own(name):
        return "pass --data-root with the folder of your images"
    prepare = f"{command('prepare')} --dataset {name}"
    if hasattr(module, "fetch"):
        return f"{prepare} --download"
    lists = " --split" if hasattr(module, "make_split_files") else ""
    return f"get the archives from {module.ABOUT['from']}; then: {prepare} --archives DIR{lists}"


def fetch(name: str, root: str | Path) -> str:
    """Downloads a data set into its data root; returns a message for the user.

    Raises:
        DataError: a data set that needs a registration; see also `download.download`.
    """
    module = dataset_module(name)
    if not hasattr(module, "fetch"):
        raise DataError(
            f"{name} cannot be downloaded by a program",
            expected="a MedMNIST set",
            fix=how_to_get(name),
        )
    return module.fetch(name, Path(root))


def load_index(name: str, root: str | Path | ImageList, split: str, labels: str = "default") -> Index:
    """The images and labels of one split of a data set; no image is decoded.

    Args:
        name: "palm", "covid", …
        root: the data root; of own images also their list.
        split: one of the data set's splits.
        labels: reading of the labels, for data sets with several.

    Raises:
        DataError: unknown name or split, missing folder, or images and labels that disagree.
    """
    module = dataset_module(name)
    if split not in module.SPLITS:
        raise DataError(f"{name} has no split {split!r}", expected=", ".join(module.SPLITS))
    if is_own(name):
        return module.load(name, root, split, labels)
    root = Path(root)  # type: ignore[arg-type]
    if not root.is_dir():
        raise DataError(
            f"{name}: the data root does not exist",
            path=root,
            fix=f"{how_to_get(name)}; or pass --data-root with the folder that holds it",
        )
    return module.load(name, root, split, labels)


def dataset_classes(name: str, labels: str = "default") -> tuple[tuple[str, ...], str]:
    """Class names and task of a data set; its images need not be there."""
    return dataset_module(name).describe(name, labels)


def load_dataset(
    name: str,
    split: str = "train",
    root: str | Path | ImageList | None = None,
    download: bool = False,
    labels: str = "default",
    sample: bool = False,
) -> Index:
    """Loads one split of a data set: `len()`, `[i]` (image, label), `.classes`, `.labels`, `.counts()`, `.show()`.

    Args:
        name: "palm", "covid", "oct", a MedMNIST flag, …; "folder" or "table" for own images.
        split: "train", "val" or "test", where the data set has it.
        root: the data root; None: `default_root(name)`, below the working directory; for "folder" and "table" the
            folder of the images, a run's `images.csv`, or what `own_images` gives.
        download: download the data set first, where a program may.
        labels: see `load_index`.
        sample: first write synthetic images in the layout of the data set below `root`, to try things out; as
            `train --sample` does.

    Raises:
        DataError: see `load_index`; a data set that no program may download; a failed download; a folder for the
            sample that holds other files.
    """
    if sample:
        from paddle_medcls.data.sample import draw  # it knows the data sets

        if root is None or isinstance(root, ImageList):
            raise DataError("sample=True writes images, but no folder is named", fix="pass root with a new folder")
        draw(name, Path(root))
    root = default_root(name) if root is None else root
    if download:
        fetch(name, root)  # type: ignore[arg-type]
    return load_index(name, root, split, labels)
