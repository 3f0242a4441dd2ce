"""The one object that is served: weights with their preprocessing, behind every door."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from paddle_medcls import metrics
from paddle_medcls.data import dataset_classes
from paddle_medcls.data.index import Index
from paddle_medcls.errors import DataError, WeightsError
from paddle_medcls.evaluate import evaluate_split, predict_logits
from paddle_medcls.gradcam import gradcam
from paddle_medcls.images import SUFFIXES, Preprocessing, preprocess, read_image, unfit
from paddle_medcls.models.weights import load_strict, read_weights, recognise
from paddle_medcls.recipe import Recipe
from paddle_medcls.recipes import get_recipe
from paddle_medcls.sidecar import Sidecar

_NOTEBOOKS = {("document 001", 1): "palm_tutorial", ("document 003", 4): "covid_notebook"}
"""(layout, outputs) of a weight file without a sidecar -> the recipe it must have been made with."""


class Predictor:
    """A trained network that takes images and gives probabilities.

    Attributes:
        model: the network, in evaluation mode.
        card: classes, preprocessing and the rest of the sidecar.
        notes: what was assumed about a file without a sidecar, one line each.
    """

    def __init__(self, model, card: Sidecar, notes: Sequence[str] = ()) -> None:
        model.eval()
        self.model = model
        self.card = card
        self.notes = list(notes)

    @staticmethod
    def from_weights(path: str | Path, recipe: Recipe | None = None) -> Predictor:
        """Loads a weight file.

        Args:
            path: `.pdparams` or `.safetensors`; a sidecar of the same name beside it is read.
            recipe: for a file without a sidecar, how it was trained; None: told from its layout, which
                works for the two notebooks' own files.

        Raises:
            WeightsError: unreadable, hostile, not fitting, or nothing known about its training.
        """
        path = Path(path)
        state = read_weights(path)
        sidecar = path.with_suffix(".json")
        if sidecar.is_file():
            card = Sidecar.read(sidecar)
            card.check(path)
            notes: list[str] = []
        else:
            card, state, notes = _assume(path, state, recipe)
        model = card.network.build()
        load_strict(model, state, path)
        return Predictor(model, card, notes)

    def logits(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Decoded images (H, W, C) uint8, channels as the preprocessing says -> logits (N, outputs)."""
        x = np.stack([preprocess(image, self.card.preprocessing) for image in images])
        return predict_logits(self.model, x, self.card.flips)

    def split_logits(self, index: Index, batch_size: int, workers: int) -> np.ndarray:
        """Logits (N, outputs) of a whole split, in its order."""
        return evaluate_split(self.model, index, self.card.preprocessing, batch_size, workers, self.card.flips)

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """Logits -> (N, C) probabilities, with the card's temperature."""
        return metrics.probabilities(logits / self.card.temperature, self.card.loss, self.card.task)

    def guesses(self, probs: np.ndarray) -> np.ndarray:
        """The class (N,) that each row of probabilities is decided for; the most probable of several labels."""
        if self.card.task == "multi-label":
            return probs.argmax(axis=1)
        return metrics.predicted(probs, self.card.task, self.card.threshold)

    def input_zeros(self) -> np.ndarray:
        """A batch of one empty image, to ask about layers with."""
        spec = self.card.preprocessing
        return np.zeros((1, spec.num_channels, spec.size_px, spec.size_px), np.float32)

    def heatmaps(
        self, images: Sequence[np.ndarray], classes: int | Sequence[int], layer: str | None = None
    ) -> list[np.ndarray]:
        """Grad-CAM of decoded images, each (H, W) float32 in [0, 1] at the size of its own image.

        The map explains the image as it is; flips that the card averages at evaluation are left out.

        Args:
            images: as for `logits`.
            classes: class explained, one for all or one for each.
            layer: see `gradcam.gradcam`.
        """
        spec = self.card.preprocessing
        maps = gradcam(self.model, np.stack([preprocess(image, spec) for image in images]), layer, classes)
        return [unfit(heat, image.shape[:2], spec) for heat, image in zip(maps, images)]

    def read_files(
        self, paths: Sequence[Path], batch_size: int = 16, workers: int = 2
    ) -> Iterable[list[tuple[Path, np.ndarray | DataError]]]:
        """Yields groups of (path, decoded image); for an unreadable file (path, its error)."""
        spec = self.card.preprocessing

        def read(path: Path) -> np.ndarray | DataError:
            try:
                return read_image(path, spec.channels, spec.least_px)
            except DataError as error:
                return error

        with ThreadPoolExecutor(max(1, workers)) as pool:
            for start in range(0, len(paths), batch_size):
                group = paths[start : start + batch_size]
                yield list(zip(group, pool.map(read, group)))

    def predict_files(
        self, paths: Sequence[Path], batch_size: int = 16, workers: int = 2
    ) -> Iterable[tuple[Path, np.ndarray | DataError]]:
        """Yields (path, probabilities (C,)) in order; for an unreadable file (path, its error)."""
        for group in self.read_files(paths, batch_size, workers):
            good = [image for _, image in group if not isinstance(image, DataError)]
            probs = iter(self.probabilities(self.logits(good)) if good else ())
            for path, image in group:
                yield path, image if isinstance(image, DataError) else next(probs)


def _assume(path: Path, state: dict, recipe: Recipe | None) -> tuple[Sidecar, dict, list[str]]:
    """Card, renamed state and notes for a file without a sidecar."""
    network, state, layout = recognise(state, path)
    notes = [f"{path.name}: no sidecar; {network.model}, {network.num_outputs} output(s), names of {layout}"]
    if recipe is None:
        name = _NOTEBOOKS.get((layout, network.num_outputs))
        if name is None:
            raise WeightsError(
                f"{path}: no sidecar {path.with_suffix('.json').name}, and a {network.model} with "
                f"{network.num_outputs} outputs in the layout of {layout} could be anything",
                do="name the recipe that it was trained with: --recipe NAME",
            )
        recipe = get_recipe(name)
    classes, task = dataset_classes(recipe.dataset, recipe.labels)
    outputs = 1 if recipe.loss == "sigmoid" and task == "binary" else len(classes)
    if outputs != network.num_outputs:
        raise WeightsError(f"{path}: has {network.num_outputs} output(s), recipe {recipe.name} needs {outputs}")
    spec = Preprocessing.of(recipe)
    mean, std = spec.mean[0], spec.std[0]
    notes.append(
        f"assumed: recipe {recipe.name}; {spec.channels.upper()}, {spec.size_px} px, "
        f"mean {mean:.2f}, std {std:.2f}; classes {', '.join(classes)}"
    )
    card = Sidecar(recipe.dataset, recipe.name, classes, task, recipe.loss, network, spec, labels=recipe.labels)
    return card, state, notes


def expand(arguments: Sequence[str]) -> list[Path]:
    """Files, folders (searched below) and globs -> image files, sorted within each argument.

    Raises:
        DataError: an argument that is nothing, or a folder without images.
    """
    found: list[Path] = []
    for argument in arguments:
        path = Path(argument)
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
            if not inside:
                raise DataError(f"{path}: no images in this folder", expected=", ".join(SUFFIXES))
            found += inside
        elif path.exists():
            found.append(path)
        else:
            matches = sorted(Path().glob(argument)) if not path.is_absolute() else _absolute_glob(path)
            if not matches:
                raise DataError(f"{argument}: no such file or folder")
            found += [match for match in matches if match.is_file()]
    return found


def _absolute_glob(path: Path) -> list[Path]:
    root = Path(path.anchor)
    return sorted(root.glob(str(path.relative_to(root))))


def picture_names(paths: Sequence[Path], what: str) -> dict[Path, Path]:
    """A relative name `<folders>/<stem>_<what>.png` for a picture of each file, no two the same.

    Folders are those below the one that all files share.
    """
    whole = {path: path.absolute() for path in paths}
    shared = Path(os.path.commonpath([path.parent for path in whole.values()])) if paths else Path()
    names: dict[Path, Path] = {}
    taken: set[Path] = set()
    for path, absolute in whole.items():
        folder = absolute.parent.relative_to(shared)
        name = folder / f"{path.stem}_{what}.png"
        if name in taken:  # a.jpg beside a.png
            name = folder / f"{path.name}_{what}.png"
        taken.add(name)
        names[path] = name
    return names
