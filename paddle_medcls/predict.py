"""The one object that is served: weights with their preprocessing, behind every door."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from paddle_medcls.data import dataset_classes
from paddle_medcls.data.index import Index
from paddle_medcls.engines import FORMS, PRECISIONS, Forward, open_model, require
from paddle_medcls.errors import DataError, SetupError, WeightsError
from paddle_medcls.images import preprocess, read_image, unfit
from paddle_medcls.models.layouts import recognise
from paddle_medcls.output_head import OutputHead, check_finite
from paddle_medcls.prepared import candidates, open_prepared
from paddle_medcls.recipe import Recipe
from paddle_medcls.recipes import get_recipe
from paddle_medcls.sidecar import Sidecar, find_model, sidecar_of

_NOTEBOOKS = {("document 001", 1): "palm_tutorial", ("document 003", 4): "covid_notebook"}
"""(layout, outputs) of a weight file without a sidecar -> the recipe it must have been made with."""


class Predictor:
    """A trained network that takes images and gives probabilities, whatever computes them.

    Attributes:
        card: classes, preprocessing and the rest of the sidecar.
        notes: what was assumed about a file without a sidecar, one line each.
        engine: what computes, one of `engines.ENGINES`.
        precision: "f32" or "bf16".
    """

    def __init__(
        self,
        card: Sidecar,
        notes: Sequence[str] = (),
        model=None,
        forward: Forward | None = None,
        engine: str = "paddle",
        precision: str = "f32",
        source: tuple[Path, Sidecar | None, Recipe | None] | None = None,
    ) -> None:
        """Of a network, or of what computes its logits; see `from_weights` for files.

        Args:
            model: the network; its flips are averaged here.
            forward: that of `engine`, see `engines.open_model`; flips are averaged inside.
            source: weight file, sidecar and recipe that the network can be built from when heat maps are asked for.
        """
        self.card = card
        self.notes = list(notes)
        self.engine = engine
        self.precision = precision
        self._model = model
        self._forward = forward
        self._source = source
        if model is not None:
            model.eval()

    @staticmethod
    def from_weights(
        path: str | Path,
        recipe: Recipe | None = None,
        engine: str | None = None,
        precision: str = "f32",
        say: Callable[[str], None] = lambda line: None,
    ) -> Predictor:
        """Loads a weight file or an exported model.

        Args:
            path: `.pdparams` or `.safetensors`, a sidecar of the same name beside it is read; or a file of an
                export; or a folder that holds one of these.
            recipe: for a file without a sidecar, how it was trained; None: told from its layout, which
                works for the two notebooks' own files.
            engine: None, the file's own: the network itself ("paddle"), or for an export that of its form. For a
                weight file another of `engines.ENGINES`, through an exported form that is kept beside it; "auto",
                the fastest of them that is installed and agrees with the network.
            precision: "f32" or "bf16".
            say: takes a line about an engine that is being prepared or cannot be used.

        Raises:
            WeightsError: unreadable, hostile, not fitting, or nothing known about its training.
            SetupError: the engine is not installed or cannot compute in this precision.
        """
        path = find_model(Path(path))
        sidecar = sidecar_of(path)
        card = Sidecar.read(sidecar) if sidecar.is_file() else None
        if card is not None and card.form:
            return _of_export(path, card, engine, precision)
        for name in candidates(path, engine, precision):
            if name == "paddle":
                break
            try:
                known, forward = open_prepared(path, card, recipe, name, precision, say)
                taken = f"{path.name}: no sidecar; taken as recipe {known.recipe}, {known.network.model}"
                notes = [] if card else [taken]
                return Predictor(known, notes, None, forward, name, precision, (path, card, recipe))
            except SetupError as error:  # of the engine; faults of the weights are the same everywhere
                if engine != "auto":
                    raise
                say(f"{name} cannot be used: {error.what}")
        require("paddle", precision)
        return _of_network(path, card, recipe)

    @property
    def head(self) -> OutputHead:
        """What the logits mean."""
        return self.card.head

    @property
    def model(self):
        """The network in evaluation mode; built when it is first asked for."""
        if self._model is None:
            if self._source is None:
                raise WeightsError(
                    "an exported model has no layers to look into", do="give the weight file that it was made of"
                )
            self._model = _of_network(*self._source)._model
        return self._model

    def logits(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Decoded images (H, W, C) uint8, channels as the preprocessing says -> logits (N, outputs)."""
        return self.forward(np.stack([preprocess(image, self.card.preprocessing) for image in images]))

    def forward(self, x: np.ndarray) -> np.ndarray:
        """Preprocessed x (N, C, S, S) float32 -> logits (N, outputs)."""
        if self._forward is not None:
            return self._forward(x)
        from paddle_medcls.evaluate import predict_logits

        return predict_logits(self.model, x, self.card.flips)

    def split_logits(self, index: Index, batch_size: int, workers: int) -> np.ndarray:
        """Logits (N, outputs) of a whole split, in its order."""
        from paddle_medcls.data.loader import cut
        from paddle_medcls.evaluate import forward_split

        batches = cut(range(len(index)), batch_size)
        logits = np.concatenate(forward_split(self.forward, index, self.card.preprocessing, batches, workers))
        return check_finite(logits, index.ids)

    def input_zeros(self) -> np.ndarray:
        """A batch of one empty image, to ask about layers with."""
        spec = self.card.preprocessing
        return np.zeros((1, spec.num_channels, spec.size_px, spec.size_px), np.float32)

    def heatmaps(
        self,
        images: Sequence[np.ndarray],
        classes: int | Sequence[int],
        layer: str | None = None,
        method: str = "gradcam",
    ) -> list[np.ndarray]:
        """Grad-CAM of decoded images, each (H, W) float32 in [0, 1] at the size of its own image.

        The map explains the image as it is; flips that the card averages at evaluation are left out.

        Args:
            images: as for `logits`.
            classes: class explained, one for all or one for each.
            layer, method: see `gradcam.gradcam`.
        """
        from paddle_medcls.gradcam import gradcam

        spec = self.card.preprocessing
        maps = gradcam(self.model, np.stack([preprocess(image, spec) for image in images]), layer, classes, method)
        return [unfit(heat, image.shape[:2], spec) for heat, image in zip(maps, images)]

    def read_files(
        self, paths: Sequence[Path], batch_size: int = 16, workers: int = 2
    ) -> Iterable[list[tuple[Path, np.ndarray | DataError]]]:
        """Yields groups of (path, decoded image), the next one read meanwhile; for an unreadable file its error."""
        spec = self.card.preprocessing

        def read(path: Path) -> np.ndarray | DataError:
            try:
                return read_image(path, spec.channels, spec.least_px)
            except DataError as error:
                return error

        groups = [paths[start : start + batch_size] for start in range(0, len(paths), batch_size)]
        with ThreadPoolExecutor(max(1, workers)) as pool:
            ahead: deque = deque()
            for group in groups:
                ahead.append((group, pool.map(read, group)))
                if len(ahead) == 2:
                    yield list(zip(*ahead.popleft()))
            while ahead:
                yield list(zip(*ahead.popleft()))

    def predict_files(
        self, paths: Sequence[Path], batch_size: int = 16, workers: int = 2
    ) -> Iterable[tuple[Path, np.ndarray | DataError]]:
        """Yields (path, probabilities (C,)) in order; for an unreadable file (path, its error)."""
        for group in self.read_files(paths, batch_size, workers):
            names, good = [], []
            for path, image in group:
                if not isinstance(image, DataError):
                    names.append(path)
                    good.append(image)
            probs = iter(self.head.probabilities(self.logits(good), names) if good else ())
            for path, image in group:
                yield path, image if isinstance(image, DataError) else next(probs)


def _of_network(path: Path, card: Sidecar | None, recipe: Recipe | None) -> Predictor:
    """The network itself, in Paddle."""
    from paddle_medcls.models.weights import load_strict, read_weights

    state = read_weights(path)
    notes: list[str] = []
    if card is not None:
        card.check(path)
    else:
        card, state, notes = _assume(path, state, recipe)
    model = card.network.build()
    load_strict(model, state, path)
    return Predictor(card, notes, model)


def _of_export(path: Path, card: Sidecar, engine: str | None, precision: str) -> Predictor:
    """An exported model, in the engine of its form and the precision that it was exported for."""
    if card.form not in FORMS or card.precision not in PRECISIONS:
        raise WeightsError(f"unknown form {card.form!r} or precision {card.precision!r}", where=sidecar_of(path))
    own = FORMS[card.form]
    if engine not in (None, "auto", own):
        raise SetupError(f"{path} is an export for {own}, not for {engine}", do="leave --engine out")
    precision = "bf16" if "bf16" in (precision, card.precision) else "f32"
    card.check(path)
    forward = open_model(path.parent, sidecar_of(path).stem, card.form, precision)
    return Predictor(card, forward=forward, engine=own, precision=precision)


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
    spec = recipe.preprocessing
    mean, std = spec.mean[0], spec.std[0]
    notes.append(
        f"assumed: recipe {recipe.name}; {spec.channels.upper()}, {spec.size_px} px, "
        f"mean {mean:.2f}, std {std:.2f}; classes {', '.join(classes)}"
    )
    card = Sidecar(recipe.dataset, recipe.name, classes, task, recipe.loss, network, spec, labels=recipe.labels)
    return card, state, notes
