"""A trained model with its preprocessing: images in, probabilities out."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, Union

import numpy as np

from paddle_medcls.core.errors import DataError, WeightsError, did_you_mean
from paddle_medcls.core.hardware import installed_version
from paddle_medcls.data.decode import decode_image, read_image, to_channels
from paddle_medcls.data.index import Index
from paddle_medcls.data.reading import read_ahead
from paddle_medcls.deployment.ensemble import Ensemble, open_ensemble
from paddle_medcls.deployment.inference_engines import InferenceBackend
from paddle_medcls.deployment.opening import Opened, PaddleNetwork, open_trained
from paddle_medcls.deployment.prediction import HeatMap, Prediction
from paddle_medcls.models.output_head import OutputHead, check_finite
from paddle_medcls.models.sidecar import Sidecar, find_models
from paddle_medcls.preprocessing.transforms import preprocess, refuse_narrow, unfit

if TYPE_CHECKING:
    from paddle_medcls.recipes.recipe import Recipe

AnyImage = Union[np.ndarray, str, Path, bytes]
"""Pixels, uint8 RGB (H, W, 3) or grey (H, W) or (H, W, 1); or an image file, by its path or its bytes."""
AnyPath = TypeVar("AnyPath", str, Path)


class Predictor:
    """A sidecar and an inference backend.

    Attributes:
        sidecar: classes, preprocessing and the rest of the sidecar.
        backend: gives logits of preprocessed images, see `inference_engines`.
        notes: what was assumed about a file without a sidecar, one line each.
        path: the file that was opened; None for a network in memory and for an average of models.
        members: the models of an average; empty for one model.
        novelty: outputs of the backend -> scores (N,), see `models.novelty`; None: the model has none.
    """

    def __init__(
        self,
        sidecar: Sidecar,
        backend: PaddleNetwork | InferenceBackend | Ensemble,
        notes: Sequence[str] = (),
        load_network: Callable[[], PaddleNetwork] | None = None,
        path: Path | None = None,
        novelty: Callable[[dict[str, np.ndarray]], np.ndarray] | None = None,
    ) -> None:
        """See `from_weights` for files; `load_network` makes the network in Paddle when heat maps are asked for."""
        self.sidecar = sidecar
        self.backend = backend
        self.notes = list(notes)
        self.path = path
        self.novelty = novelty
        self._network = backend if isinstance(backend, PaddleNetwork) else None
        self._load_network = load_network
        self._layer = ""
        self.members = [Predictor(*one) for one in backend.members] if isinstance(backend, Ensemble) else []

    @classmethod
    def from_weights(
        cls,
        path: str | Path | Sequence[str | Path],
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
                export; or a folder that holds one of these. Several of them, or the folder of a cross-validation:
                their average as one model.
            recipe: for a file without a sidecar, how it was trained; None: told from its layout, which
                works for the two notebooks' own files.
            engine: None: the network in Paddle, or for an export the engine of its form. For a weight file one of
                `inference_engines.ENGINES`, or "auto": the fastest that is installed and knows the network.
            precision: "f32", "bf16", or "auto": bf16 where engine and processor have it.
            say: takes a line about an engine that cannot be used.
            allow_program: also open an export in Paddle's format, which is a program that can write files.

        Raises:
            WeightsError: unreadable, hostile, not fitting, or nothing known about its training; or a recipe was
                given though there is a sidecar.
            SetupError: the engine is not installed, does not know the network or lacks this precision.
        """
        paths, options = find_models(path), (recipe, (engine, precision), say, allow_program)
        return cls(*(open_trained(paths[0], *options) if len(paths) == 1 else open_ensemble(paths, *options)))

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
        return self.sidecar.head

    @property
    def model(self):
        """The network in Paddle, in evaluation mode; made when it is first asked for."""
        if self._network is None:
            if self.members:
                raise WeightsError(
                    f"an average of {len(self.members)} models has no layers of its own", fix="name one of the models"
                )
            if self._load_network is None:
                raise WeightsError(
                    "an exported model has no layers to look into", fix="give the weight file that it was made of"
                )
            self._network = self._load_network()
        return self._network.network

    def decode(self, image: AnyImage, name: str = "image") -> np.ndarray:
        """An image file, or checked pixels, as uint8: RGB (H, W, 3) or grey (H, W, 1).

        Raises:
            DataError: a file that cannot be read, an array of another type or shape, or a side too long to be scaled.
        """
        spec = self.sidecar.preprocessing
        channels, least_px = "gray" if spec.channels == "gray" else "rgb", spec.least_px
        if isinstance(image, (str, Path)):
            name, pixels = str(image), read_image(image, channels, least_px)
        elif isinstance(image, bytes):
            pixels = decode_image(image, name, channels, least_px)
        else:
            pixels = _checked_pixels(image, name)
        refuse_narrow(pixels, spec, name)
        return pixels

    def input_of(self, images: Sequence[AnyImage]) -> np.ndarray:
        """Images -> the network's input x (N, C, S, S) float32, channels in the order that it was trained with."""
        if isinstance(images, (str, bytes, Path)) or (isinstance(images, np.ndarray) and images.ndim < 4):
            raise DataError("one image was given where a list of images is expected", fix="pass [image]")
        return np.stack([self._input_of_one(self.decode(image, f"image {k}")) for k, image in enumerate(images)])

    def _input_of_one(self, pixels: np.ndarray) -> np.ndarray:
        """A `decode`d image -> the network's input x (C, S, S)."""
        spec = self.sidecar.preprocessing
        return preprocess(to_channels(pixels, spec.channels), spec)

    def predict(self, image: AnyImage, coverage: float | None = None, name: object = None) -> Prediction:
        """The prediction for one image: `.label`, `.probability`, `.probabilities`, `.in_distribution`, `.notes`, …

        Args:
            coverage: also `.prediction_set`, the classes that hold the true one in this share of images, 0.5 to 0.99.
            name: of the image, for messages; default: its path.

        Raises:
            DataError: see `decode`.
            WeightsError: logits that are not finite.
            RunError: a coverage that is not possible, or a model whose prediction sets were not calibrated.
        """
        name = name or (image if isinstance(image, (str, Path)) else "image 0")
        (prediction,) = self.predictions(self.input_of([image]), [name])
        return self.with_prediction_set(prediction, coverage)

    def predictions(self, x: np.ndarray, names: Sequence[object]) -> list[Prediction]:
        """The predictions for preprocessed images x (N, C, S, S); `names` of the images are for messages."""
        notes = tuple(self.notes)
        if isinstance(self.backend, Ensemble):
            outputs = self.backend.outputs(x, names)
            logits, novelty = outputs["logits"], outputs.get("novelty")
        else:
            logits, novelty = self.logits_and_novelty(x)
        found = [Prediction.of(row, self.head, notes) for row in self.head.probabilities(logits, names)]
        if isinstance(self.backend, Ensemble):
            each = np.moveaxis(outputs["probabilities"], 1, 0)  # (N, models, classes)
            found = [
                replace(one, disagreement=self.backend.disagreement(probs, one.probs))
                for one, probs in zip(found, each)
            ]
        if novelty is not None:
            limit = self.sidecar.novelty["limit"]
            found = [
                replace(one, novelty=float(score), in_distribution=bool(score <= limit))
                for one, score in zip(found, novelty)
            ]
        return found

    def logits_and_novelty(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Logits (N, outputs) of preprocessed images x (N, C, S, S), and novelty (N,), where the model scores it."""
        return Opened(self.sidecar, self.backend, novelty=self.novelty).logits_and_novelty(x)

    def possible_classes(self, probs: np.ndarray, coverage: float) -> tuple[str, ...]:
        """The prediction set of one image, see `evaluation.conformal`.

        Args:
            probs: (C,).
            coverage: the share of images whose set holds the true class, 0.5 to 0.99 in steps of 0.01.

        Raises:
            RunError: another coverage, or a model whose prediction sets were not calibrated.
        """
        from paddle_medcls.evaluation.conformal import prediction_sets

        (inside,) = prediction_sets(probs[None], self.sidecar.prediction_sets, coverage)
        return tuple(self.sidecar.classes[k] for k in np.flatnonzero(inside))

    def with_prediction_set(self, prediction: Prediction, coverage: float | None) -> Prediction:
        """A prediction with its `.prediction_set`, see `possible_classes`; with a coverage of None as it is."""
        if coverage is None:
            return prediction
        return replace(prediction, prediction_set=self.possible_classes(prediction.probs, coverage))

    def gradcam(
        self, image: AnyImage, label: str | None = None, layer: str | None = None, method: str = "gradcam"
    ) -> HeatMap:
        """The heat map of one image: `.values`, `.overlay()`, `.save(path)`.

        Args:
            label: the class to explain; None: the predicted one.
            layer, method: see `gradcam.gradcam`.

        Raises:
            DataError: see `decode`; an unknown class.
            RecipeError: no such layer, or one that gives no map.
            WeightsError: an export, which has no layers to look into.
        """
        classes = self.sidecar.classes
        pixels = self.decode(image)
        if label is None:
            label = classes[int(self.head.explained(self.head.probabilities(self.logits([pixels])))[0])]
        if label not in classes:
            raise DataError(f"unknown class {label!r}{did_you_mean(label, classes)}", expected=", ".join(classes))
        values = self.heatmaps([pixels], classes.index(label), layer, method)[0]
        return HeatMap(values, to_channels(pixels, "rgb"), label)

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
        return self.split_outputs(index, batch_size, workers)[0]

    def split_outputs(self, index: Index, batch_size: int, workers: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Logits (N, outputs) of a whole split, in its order, and novelty (N,), where the model scores it."""
        from paddle_medcls.evaluation.evaluate import forward_split
        from paddle_medcls.preprocessing.loader import ImageDataset, cut

        images, batches = ImageDataset(index, self.sidecar.preprocessing), cut(range(len(index)), batch_size)

        def forward(x: np.ndarray) -> np.ndarray:
            logits, novelty = self.logits_and_novelty(x)
            return logits if novelty is None else np.column_stack([logits, novelty])

        columns = np.concatenate(forward_split(forward, images, batches, workers))
        logits = check_finite(columns[:, : self.head.num_outputs], index.ids)
        return logits, None if self.novelty is None else columns[:, -1]

    def input_zeros(self) -> np.ndarray:
        """A batch of one empty image, to ask about layers with."""
        spec = self.sidecar.preprocessing
        return np.zeros((1, spec.num_channels, spec.size_px, spec.size_px), np.float32)

    def default_layer(self) -> str:
        """Name of the layer that heat maps show, see `gradcam.default_layer`; of an average that of its first model."""
        from paddle_medcls.explanation.gradcam import default_layer

        if self.members:
            return self.members[0].default_layer()
        self._layer = self._layer or default_layer(self.model, self.input_zeros())
        return self._layer

    def heatmaps(
        self,
        images: Sequence[AnyImage],
        classes: int | Sequence[int],
        layer: str | None = None,
        method: str = "gradcam",
    ) -> list[np.ndarray]:
        """Grad-CAM, each (H, W) float32 in [0, 1] at the size of its own image.

        The map explains the image as it is; flips that the model averages at evaluation are left out. The map of an
        average of models is the mean of their maps, divided by its largest value.

        Args:
            images: as for `logits`.
            classes: class explained, one for all or one for each.
            layer, method: see `gradcam.gradcam`.
        """
        from paddle_medcls.explanation.gradcam import gradcam

        spec, pixels = self.sidecar.preprocessing, [self.decode(image) for image in images]
        if self.members:
            each = [member.heatmaps(pixels, classes, layer, method) for member in self.members]
            sums = [np.sum(maps, axis=0) for maps in zip(*each)]
            return [heat / (np.max(heat) or 1) for heat in sums]
        layer = layer or self.default_layer()
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

        groups = (paths[start : start + batch_size] for start in range(0, len(paths), batch_size))
        with contextlib.closing(read_ahead(read, groups, max(1, workers), 1)) as loaded:
            yield from (list(zip(group, images)) for group, images in loaded)

    def predict_decoded(
        self, paths: Sequence[AnyPath], batch_size: int = 16, workers: int = 2, keep_images: bool = True
    ) -> Iterable[tuple[AnyPath, np.ndarray | None, Prediction | DataError]]:
        """Yields (path, decoded image, prediction) in order; for an unreadable file (path, None, its error).

        Args:
            workers: threads that decode, scale and normalise images while the network computes.
            keep_images: False: None in place of the decoded images, which may be large.
        """

        def read(path: AnyPath) -> tuple[np.ndarray | None, np.ndarray | DataError]:
            try:
                image = self.decode(path)
            except DataError as error:
                return None, error
            return image if keep_images else None, self._input_of_one(image)

        groups = (paths[start : start + batch_size] for start in range(0, len(paths), batch_size))
        with contextlib.closing(read_ahead(read, groups, max(1, workers), 1)) as loaded:
            for group, results in loaded:
                names = [path for path, (_, x) in zip(group, results) if not isinstance(x, DataError)]
                inputs = [x for _, x in results if not isinstance(x, DataError)]
                found = iter(self.predictions(np.stack(inputs), names) if inputs else ())
                for path, (image, x) in zip(group, results):
                    yield (path, None, x) if isinstance(x, DataError) else (path, image, next(found))


def load_predictor(
    weights: str | Path | Sequence[str | Path],
    recipe: Recipe | str | None = None,
    engine: str = "auto",
    precision: str = "f32",
    device: str = "auto",
    allow_program: bool = False,
) -> Predictor:
    """Opens a trained model, as the commands do.

    Args:
        weights: a weight file, an export, or a folder that holds one; several of them, or the folder of a
            cross-validation: their average.
        recipe: for a weight file without a sidecar: how it was trained, a recipe or its name.
        engine: "auto" (on a CPU the fastest that is installed, on a GPU Paddle), "paddle", "openvino" or "onnxruntime".
        precision: "f32", "bf16", or "auto": bf16 where engine and processor have it.
        device: "auto" (a GPU if Paddle has one), "cpu" or "gpu".
        allow_program: see `Predictor.from_weights`.

    Raises:
        MedclsError: see `Predictor.from_weights`.
    """
    if device == "gpu" or installed_version("paddlepaddle-gpu"):  # else Paddle, slow to import, need not be asked
        from paddle_medcls.core.paddle_setup import select_device

        on_gpu = select_device(device) != "cpu"
    else:
        on_gpu = False
    if isinstance(recipe, str):
        from paddle_medcls.recipes import get_recipe

        recipe = get_recipe(recipe)
    say = functools.partial(print, file=sys.stderr)
    chosen_engine = None if on_gpu and engine == "auto" else engine
    return Predictor.from_weights(weights, recipe, chosen_engine, precision, say, allow_program)


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
