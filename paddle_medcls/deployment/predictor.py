"""A trained model with its preprocessing: images in, probabilities out."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Union

import numpy as np

from paddle_medcls.core.errors import DataError, SetupError, WeightsError
from paddle_medcls.core.files import sha256
from paddle_medcls.data.datasets import dataset_classes
from paddle_medcls.data.decode import decode_image, read_image, to_channels
from paddle_medcls.data.index import Index
from paddle_medcls.deployment.graph import KNOWN, logits_graph
from paddle_medcls.deployment.inference_engines import (
    FASTEST_FIRST,
    FORMS,
    InferenceBackend,
    compile_graph,
    open_model,
    require,
)
from paddle_medcls.models.output_head import OutputHead, check_finite
from paddle_medcls.models.sidecar import Sidecar, find_model, form_of, pixels_spec, sidecar_of
from paddle_medcls.models.weight_layouts import recognise
from paddle_medcls.models.weights import load_strict, read_weights
from paddle_medcls.preprocessing.transforms import preprocess, unfit
from paddle_medcls.recipes import get_recipe
from paddle_medcls.recipes.recipe import Recipe

_NOTEBOOKS = {("PALM tutorial", 1): "palm_tutorial", ("COVID-19 tutorial", 4): "covid_notebook"}
"""(layout, outputs) of a weight file without a sidecar -> the recipe it must have been made with."""

AnyImage = Union[np.ndarray, str, Path, bytes]
"""Pixels, uint8 RGB (H, W, 3) or grey (H, W) or (H, W, 1); or an image file, by its path or its bytes."""


class PaddleNetwork:
    """The inference backend that is the network itself, in Paddle; see `inference_engines` for the others."""

    engine = "paddle"
    precision = "f32"

    def __init__(self, network, flips: tuple[str, ...] = ()) -> None:
        """Takes a network, and the flips that its logits are averaged over (`Sidecar.flips`)."""
        self.network = network
        self._flips = flips
        network.eval()

    def logits(self, x: np.ndarray) -> np.ndarray:
        """Preprocessed x (N, C, S, S) float32 -> logits (N, outputs) float32."""
        from paddle_medcls.evaluation.evaluate import predict_logits

        return predict_logits(self.network, x, self._flips)


class Predictor:
    """A sidecar and an inference backend.

    Attributes:
        card: classes, preprocessing and the rest of the sidecar.
        backend: gives logits of preprocessed images, see `inference_engines`.
        notes: what was assumed about a file without a sidecar, one line each.
        path: the file that was opened; None for a network in memory.
    """

    def __init__(
        self,
        card: Sidecar,
        backend: PaddleNetwork | InferenceBackend,
        notes: Sequence[str] = (),
        load_network: Callable[[], PaddleNetwork] | None = None,
    ) -> None:
        """See `from_weights` for files; `load_network` makes the network in Paddle when heat maps are asked for."""
        self.card = card
        self.backend = backend
        self.notes = list(notes)
        self.path: Path | None = None
        self._network = backend if isinstance(backend, PaddleNetwork) else None
        self._load_network = load_network
        self._layer = ""

    @staticmethod
    def from_weights(
        path: str | Path,
        recipe: Recipe | None = None,
        engine: str | None = None,
        precision: str = "f32",
        say: Callable[[str], None] = lambda line: None,
        allow_program: bool = False,
    ) -> Predictor:
        """Loads a weight file or an exported model.

        A weight file is arrays, whatever its sidecar says; an export is opened only if it is named itself.

        Args:
            path: `.pdparams` or `.safetensors`, a sidecar of the same name beside it is read; or a file of an
                export; or a folder that holds one of these.
            recipe: for a file without a sidecar, how it was trained; None: told from its layout, which
                works for the two notebooks' own files.
            engine: None: the network in Paddle, or for an export the engine of its form. For a weight file one of
                `inference_engines.ENGINES`, or "auto": the fastest that is installed and knows the network.
            precision: "f32" or "bf16".
            say: takes a line about an engine that cannot be used.
            allow_program: also open an export in Paddle's format, which is a program that can write files.

        Raises:
            WeightsError: unreadable, hostile, not fitting, or nothing known about its training; or a recipe was
                given though there is a sidecar.
            SetupError: the engine is not installed, does not know the network or lacks this precision.
        """
        path = find_model(Path(path))
        sidecar = sidecar_of(path)
        card = Sidecar.read(sidecar) if sidecar.is_file() else None
        if card is not None and recipe is not None:
            raise WeightsError(
                f"recipe {recipe.name} was given, but the sidecar says how these weights were trained: {card.recipe}",
                path=sidecar,
                fix="leave --recipe out; to overrule the sidecar, move it away",
            )
        if form_of(path):
            predictor = _of_export(path, card, (engine, precision), allow_program)
            predictor.path = path
            return predictor
        if card is not None and card.form:
            raise WeightsError(
                f"{path}: the sidecar beside these weights describes an export, not them",
                path=sidecar,
                fix="restore the sidecar of the weights; to use the export, name its folder or its model file",
            )
        predictor = _of_weights(path, card, recipe, (engine, precision), say)
        predictor.path = path
        return predictor

    @property
    def engine(self) -> str:
        """One of `inference_engines.ENGINES`."""
        return self.backend.engine

    @property
    def precision(self) -> str:
        """One of `inference_engines.PRECISIONS`."""
        return self.backend.precision

    @property
    def head(self) -> OutputHead:
        """What the logits mean."""
        return self.card.head

    @property
    def model(self):
        """The network in Paddle, in evaluation mode; made when it is first asked for."""
        if self._network is None:
            if self._load_network is None:
                raise WeightsError(
                    "an exported model has no layers to look into", fix="give the weight file that it was made of"
                )
            self._network = self._load_network()
        return self._network.network

    def decode(self, image: AnyImage, name: str = "image") -> np.ndarray:
        """An image file, or checked pixels, as uint8: RGB (H, W, 3) or grey (H, W, 1).

        Args:
            image: see `AnyImage`.
            name: of the image, for messages.

        Raises:
            DataError: a file that cannot be read, or an array of another type or shape.
        """
        spec = self.card.preprocessing
        channels, least_px = "gray" if spec.channels == "gray" else "rgb", spec.least_px
        if isinstance(image, (str, Path)):
            return read_image(image, channels, least_px)
        if isinstance(image, bytes):
            return decode_image(image, name, channels, least_px)
        return _checked_pixels(image, name)

    def input_of(self, images: Sequence[AnyImage]) -> np.ndarray:
        """Images -> the network's input x (N, C, S, S) float32, channels in the order that it was trained with."""
        spec = self.card.preprocessing
        if isinstance(images, (str, bytes, Path)) or (isinstance(images, np.ndarray) and images.ndim < 4):
            raise DataError("one image was given where a list of images is expected", fix="pass [image]")
        pixels = (self.decode(image, f"image {number}") for number, image in enumerate(images))
        return np.stack([preprocess(to_channels(image, spec.channels), spec) for image in pixels])

    def logits(self, images: Sequence[AnyImage], names: Sequence[object] = ()) -> np.ndarray:
        """Images -> logits (N, outputs) float32.

        Args:
            names: of the images, for messages; default: their paths or numbers.

        Raises:
            DataError: see `decode`.
            WeightsError: logits that are not finite; the message names the images.
        """
        logits = self.backend.logits(self.input_of(images))
        paths = [image if isinstance(image, (str, Path)) else f"image {k}" for k, image in enumerate(images)]
        return check_finite(logits, names or paths)

    def split_logits(self, index: Index, batch_size: int, workers: int) -> np.ndarray:
        """Logits (N, outputs) of a whole split, in its order."""
        from paddle_medcls.evaluation.evaluate import forward_split
        from paddle_medcls.preprocessing.loader import ImageDataset, cut

        images, batches = ImageDataset(index, self.card.preprocessing), cut(range(len(index)), batch_size)
        logits = np.concatenate(forward_split(self.backend.logits, images, batches, workers))
        return check_finite(logits, index.ids)

    def input_zeros(self) -> np.ndarray:
        """A batch of one empty image, to ask about layers with."""
        spec = self.card.preprocessing
        return np.zeros((1, spec.num_channels, spec.size_px, spec.size_px), np.float32)

    def heatmaps(
        self,
        images: Sequence[AnyImage],
        classes: int | Sequence[int],
        layer: str | None = None,
        method: str = "gradcam",
    ) -> list[np.ndarray]:
        """Grad-CAM, each (H, W) float32 in [0, 1] at the size of its own image.

        The map explains the image as it is; flips that the card averages at evaluation are left out.

        Args:
            images: as for `logits`.
            classes: class explained, one for all or one for each.
            layer, method: see `gradcam.gradcam`.
        """
        from paddle_medcls.explanation.gradcam import default_layer, gradcam

        if layer is None:
            self._layer = self._layer or default_layer(self.model, self.input_zeros())
            layer = self._layer
        spec, pixels = self.card.preprocessing, [self.decode(image) for image in images]
        maps = gradcam(self.model, self.input_of(pixels), layer, classes, method)
        return [unfit(heat, image.shape[:2], spec) for heat, image in zip(maps, pixels)]

    def read_files(
        self, paths: Sequence[Path], batch_size: int = 16, workers: int = 2
    ) -> Iterable[list[tuple[Path, np.ndarray | DataError]]]:
        """Yields groups of (path, `decode`d image), the next one read meanwhile; for an unreadable file its error."""

        def read(path: Path) -> np.ndarray | DataError:
            try:
                return self.decode(path)
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
        for path, _, probs in self.predict_decoded(paths, batch_size, workers):
            yield path, probs

    def predict_decoded(
        self, paths: Sequence[Path], batch_size: int = 16, workers: int = 2
    ) -> Iterable[tuple[Path, np.ndarray | None, np.ndarray | DataError]]:
        """As `predict_files`, with the decoded image between; None for an unreadable file."""
        for group in self.read_files(paths, batch_size, workers):
            names = [path for path, image in group if not isinstance(image, DataError)]
            good = [image for _, image in group if not isinstance(image, DataError)]
            probs = iter(())
            if good:
                probs = iter(self.head.probabilities(self.backend.logits(self.input_of(good)), names))
            for path, image in group:
                yield (path, None, image) if isinstance(image, DataError) else (path, image, next(probs))


def _checked_pixels(image: np.ndarray, name: str) -> np.ndarray:
    """(H, W, 1) or (H, W, 3) uint8 of an array; anything else is refused with what to do about it."""
    expected = "uint8, values 0 to 255, of shape (height, width, 3) in RGB order, (height, width) or (height, width, 1)"
    if not isinstance(image, np.ndarray):
        raise DataError(f"{name}: a {type(image).__name__} is no image", expected=f"an array, {expected}; or a file")
    if image.dtype != np.uint8:
        fix = "decode it to 8 bits; values in [0, 1]: (image * 255).round().astype(numpy.uint8)"
        raise DataError(f"{name}: pixels of type {image.dtype}", expected=expected, fix=fix)
    image = image[:, :, None] if image.ndim == 2 else image
    if image.ndim != 3 or image.shape[2] not in (1, 3) or not image.size:
        fix = "pass the pixels of one image"
        if image.ndim == 3 and image.shape[2] == 4:
            fix = "leave the alpha channel out: image[:, :, :3]"
        elif image.ndim == 3 and image.shape[0] in (1, 3):
            fix = "put the channels last: image.transpose(1, 2, 0)"
        raise DataError(f"{name}: pixels of shape {image.shape}", expected=expected, fix=fix)
    return image


def _of_weights(
    path: Path,
    card: Sidecar | None,
    recipe: Recipe | None,
    wanted: tuple[str | None, str],
    say: Callable[[str], None],
) -> Predictor:
    """A weight file in the engine and precision that are wanted."""
    engine, precision = wanted
    state = read_weights(path)
    notes: list[str] = []
    if card is not None:
        card.check(path)
    else:
        card, state, notes = _assume(path, state, recipe)
    for name in _candidates(card.network.model, engine, precision):
        try:
            outputs = card.network.num_outputs
            backend = compile_graph(logits_graph(card, state, path), name, precision, outputs)
            return Predictor(card, backend, notes, lambda: _reload(path, card))
        except SetupError as error:  # of the engine; faults of the weights are the same everywhere
            if engine != "auto":
                raise
            say(f"{name} cannot be used: {error.what}")
    require("paddle", precision)
    return Predictor(card, _in_paddle(card, state, path), notes)


def _candidates(model: str, engine: str | None, precision: str) -> list[str]:
    """Engines of an inference graph to try, the fastest first; none: the network in Paddle."""
    if engine in (None, "paddle"):
        return []
    if engine == "auto":
        found = []
        for name in FASTEST_FIRST if model in KNOWN else ():
            try:
                require(name, precision)
                found.append(name)
            except SetupError:
                continue
        return found
    if engine not in FASTEST_FIRST:
        known = ", ".join(("auto", "paddle", *FASTEST_FIRST))
        raise SetupError(
            f"the engine {engine} runs exports, not weight files", expected=known, fix="leave --engine out"
        )
    if model not in KNOWN:
        raise SetupError(
            f"the engine {engine} does not know the network {model}",
            expected=", ".join(KNOWN),
            fix="use --engine paddle, or export the model and give the export",
        )
    return [str(engine)]


def _in_paddle(card: Sidecar, state: dict, path: Path) -> PaddleNetwork:
    model = card.network.build()
    load_strict(model, state, path)
    return PaddleNetwork(model, card.flips)


def _reload(path: Path, card: Sidecar) -> PaddleNetwork:
    """The network of a file that was read before, from the same bytes: arrays are not kept twice for its sake."""
    card.check(path)
    state = read_weights(path)
    if not sidecar_of(path).is_file():
        state = recognise(state, path)[1]
    return _in_paddle(card, state, path)


def _of_export(path: Path, card: Sidecar | None, wanted: tuple[str | None, str], allow_program: bool) -> Predictor:
    """An exported model, in the engine of its form and the precision that it was exported for."""
    form, sidecar, (engine, precision) = form_of(path), sidecar_of(path), wanted
    if card is None or card.form != form:
        raise WeightsError(f"{path} has no sidecar of an export", path=sidecar, fix="copy all files of the export")
    own = FORMS[form]
    if engine not in (None, "auto", own):
        raise SetupError(f"{path} is an export for {own}, not for {engine}", fix="leave --engine out")
    if card.flips or card.preprocessing != pixels_spec(card.preprocessing):
        raise WeightsError(
            f"{path}: exported by version 0.1, whose models do not take pixels", fix="export the weights again"
        )
    if form == "paddle" and not allow_program:
        raise WeightsError(
            f"{path} is a Paddle program, and operators of a program can write any file",
            fix="give --allow-program if you exported it yourself; else ask for a weight file or an ONNX export",
        )
    precision = "bf16" if "bf16" in (precision, card.precision) else "f32"
    card.check(path)
    return Predictor(card, open_model(path.parent, sidecar.stem, form, precision, card.network.num_outputs))


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
                fix="name the recipe that it was trained with: --recipe NAME",
            )
        recipe = get_recipe(name)
    classes, task = dataset_classes(recipe.dataset, recipe.labels)
    head = OutputHead(task, recipe.loss, classes)
    if head.num_outputs != network.num_outputs:
        raise WeightsError(
            f"{path}: has {network.num_outputs} output(s), recipe {recipe.name} needs {head.num_outputs}"
        )
    spec, flips = recipe.preprocessing, recipe.evaluation_flips
    mean, std = (", ".join(f"{value:.2f}" for value in dict.fromkeys(values)) for values in (spec.mean, spec.std))
    averaged = f"; averaged over the image and its flips ({', '.join(flips)})" if flips else ""
    notes.append(
        f"assumed: recipe {recipe.name}; {spec.channels.upper()}, {spec.size_px} px, "
        f"mean {mean}, std {std}; classes {', '.join(classes)}{averaged}"
    )
    card = Sidecar(recipe.dataset, recipe.name, classes, task, recipe.loss, network, spec, flips, labels=recipe.labels)
    return replace(card, sha256=sha256(path)), state, notes
