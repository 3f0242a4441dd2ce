"""Opens weight files and exports: reads the sidecar, or infers one, and makes the inference backend."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from paddle_medcls.core.errors import SetupError, WeightsError
from paddle_medcls.core.files import sha256
from paddle_medcls.core.openvino_setup import import_openvino
from paddle_medcls.data.datasets import dataset_classes
from paddle_medcls.deployment.exported_models import open_model
from paddle_medcls.deployment.graph import KNOWN, logits_graph
from paddle_medcls.deployment.inference_engines import (
    FASTEST_FIRST,
    FORMS,
    InferenceBackend,
    compile_graph,
    require,
    resolve_precision,
)
from paddle_medcls.models.network import MODELS
from paddle_medcls.models.novelty import novelty_of, novelty_path
from paddle_medcls.models.output_head import OutputHead
from paddle_medcls.models.sidecar import Sidecar, find_model, form_of, pixels_spec, sidecar_of
from paddle_medcls.models.weight_layouts import recognise
from paddle_medcls.models.weights import load_strict, parse_weights, read_weight_file, read_weights

if TYPE_CHECKING:
    from paddle_medcls.deployment.ensemble import Ensemble
    from paddle_medcls.recipes.recipe import Recipe

_NOTEBOOKS = {("PALM tutorial", 1): "palm_tutorial", ("COVID-19 tutorial", 4): "covid_notebook"}
"""(layout, outputs) of a weight file without a sidecar -> the recipe it must have been made with."""


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

    def outputs(self, x: np.ndarray) -> dict[str, np.ndarray]:
        """`logits`, and `features` (N, channels), see `evaluate.predict_features`."""
        from paddle_medcls.evaluation.evaluate import predict_features

        logits, features = predict_features(self.network, x, self._flips)
        return {"logits": logits, "features": features}


class Opened(NamedTuple):
    """The arguments of a `Predictor`, in its order."""

    sidecar: Sidecar
    backend: PaddleNetwork | InferenceBackend | Ensemble
    notes: Sequence[str] = ()
    load_network: Callable[[], PaddleNetwork] | None = None
    path: Path | None = None
    novelty: Callable[[dict[str, np.ndarray]], np.ndarray] | None = None

    def logits_and_novelty(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Logits (N, outputs) of preprocessed images x (N, C, S, S), and novelty (N,), where the model scores it."""
        if self.novelty is None:  # the logits alone cost less
            return self.backend.logits(x), None
        outputs = self.backend.outputs(x)
        return outputs["logits"], self.novelty(outputs)


def open_trained(
    path: Path,
    recipe: Recipe | None,
    engine_and_precision: tuple[str | None, str],
    say: Callable[[str], None],
    allow_program: bool,
) -> Opened:
    """Opens a weight file or an export; see `Predictor.from_weights`."""
    path = find_model(path)
    sidecar_path = sidecar_of(path)
    sidecar = Sidecar.read(sidecar_path) if sidecar_path.is_file() else None
    if sidecar is not None and recipe is not None:
        raise WeightsError(
            f"recipe {recipe.name} was given, but the sidecar says how these weights were trained: {sidecar.recipe}",
            path=sidecar_path,
            fix="leave --recipe out; to overrule the sidecar, move it away",
        )
    if form_of(path):
        return _open_export(path, sidecar, engine_and_precision, allow_program)
    if sidecar is not None and sidecar.form:
        raise WeightsError(
            f"{path}: the sidecar beside these weights describes an export, not them",
            path=sidecar_path,
            fix="restore the sidecar of the weights; to use the export, name its folder or its model file",
        )
    return _open_weights(path, sidecar, recipe, engine_and_precision, say)


def _open_weights(
    path: Path,
    sidecar: Sidecar | None,
    recipe: Recipe | None,
    engine_and_precision: tuple[str | None, str],
    say: Callable[[str], None],
) -> Opened:
    """Opens a weight file with the first engine that can be used."""
    engine, precision = engine_and_precision
    notes: list[str] = []
    if sidecar is not None:
        state = _read_checked(path, sidecar, engine in ("auto", "openvino"))
    else:
        sidecar, state, notes = _infer_sidecar(path, read_weights(path), recipe)
    fitted = novelty_of(path, sidecar) if sidecar.novelty else None
    novelty = None if fitted is None else lambda outputs: fitted.scores(outputs["features"])
    if sidecar.novelty and fitted is None:
        missing = novelty_path(path).name
        notes.append(f"{missing} is missing: images unlike the training images are not told from others")
    for name in _candidates(sidecar.network.model, engine, precision):
        try:
            graph, outputs = logits_graph(sidecar, state, path, fitted is not None), sidecar.network.num_outputs
            backend = compile_graph(graph, name, resolve_precision(name, precision), outputs)
            return Opened(sidecar, backend, notes, lambda: _reload(path, sidecar), path, novelty)
        except SetupError as error:  # of the engine; faults of the weights are the same everywhere
            if engine != "auto":
                raise
            say(f"{name} cannot be used: {error.what}")
    require("paddle", resolve_precision("paddle", precision))
    return Opened(sidecar, _paddle_network(sidecar, state, path), notes, path=path, novelty=novelty)


def _read_checked(path: Path, sidecar: Sidecar, with_openvino: bool = False) -> dict[str, np.ndarray]:
    """The arrays of a weight file that is the one its sidecar describes; OpenVINO is imported while it is hashed."""
    data = read_weight_file(path)
    with ThreadPoolExecutor(1) as pool:
        digest = pool.submit(lambda: hashlib.sha256(data).hexdigest())
        state = parse_weights(data, path)
        with contextlib.suppress(ImportError):
            _ = import_openvino() if with_openvino else None
    sidecar.check_digest(path, digest.result())
    return state


def _candidates(model: str, engine: str | None, precision: str) -> list[str]:
    """Engines of an inference graph to try, the fastest first; none: the network in Paddle."""
    if engine in (None, "paddle"):
        return []
    if engine == "auto":
        candidates = []
        for name in FASTEST_FIRST if model in KNOWN else ():
            try:
                require(name, resolve_precision(name, precision))
                candidates.append(name)
            except SetupError:
                continue
        return candidates
    if engine not in FASTEST_FIRST:
        expected = ", ".join(("auto", "paddle", *FASTEST_FIRST))
        raise SetupError(
            f"the engine {engine} runs exports, not weight files", expected=expected, fix="leave --engine out"
        )
    if model not in KNOWN:
        raise SetupError(
            f"the engine {engine} does not know the network {model}",
            expected=", ".join(KNOWN),
            fix="use --engine paddle, or export the model and give the export",
        )
    return [str(engine)]


def _paddle_network(sidecar: Sidecar, state: dict, path: Path) -> PaddleNetwork:
    model = sidecar.network.build()
    load_strict(model, state, path)
    if MODELS[sidecar.network.model] == "vision":
        from paddle_medcls.models.architectures.vision import refuse_size

        refuse_size(model, sidecar.network, sidecar.preprocessing.size_px, "restore the sidecar of the weights")
    return PaddleNetwork(model, sidecar.flips)


def _reload(path: Path, sidecar: Sidecar) -> PaddleNetwork:
    """The network in Paddle, from the same file: reading it again saves a second copy of the arrays in memory."""
    state = _read_checked(path, sidecar)
    if not sidecar_of(path).is_file():
        state = recognise(state, path)[1]
    return _paddle_network(sidecar, state, path)


def _open_export(
    path: Path, sidecar: Sidecar | None, engine_and_precision: tuple[str | None, str], allow_program: bool
) -> Opened:
    """Opens an exported model with the engine of its form, in the precision that it was exported for."""
    form, sidecar_path, (engine, precision) = form_of(path), sidecar_of(path), engine_and_precision
    if sidecar is None or sidecar.form != form:
        raise WeightsError(f"{path} has no sidecar of an export", path=sidecar_path, fix="copy all files of the export")
    engine_of_form = FORMS[form]
    if engine not in (None, "auto", engine_of_form):
        raise SetupError(f"{path} is an export for {engine_of_form}, not for {engine}", fix="leave --engine out")
    if sidecar.flips or sidecar.preprocessing != pixels_spec(sidecar.preprocessing):
        raise WeightsError(
            f"{path}: exported by version 0.1, whose models do not take pixels", fix="export the weights again"
        )
    if form == "paddle" and not allow_program:
        raise WeightsError(
            f"{path} is a Paddle program, and operators of a program can write any file",
            fix="give --allow-program if you exported it yourself; else ask for a weight file or an ONNX export",
        )
    precision = resolve_precision(engine_of_form, precision)
    precision = "bf16" if "bf16" in (precision, sidecar.precision) else "f32"
    sidecar.check(path)
    backend = open_model(path.parent, sidecar_path.stem, form, precision, sidecar.network.num_outputs)
    return Opened(sidecar, backend, path=path, novelty=_exported_novelty if sidecar.novelty else None)


def _exported_novelty(outputs: dict[str, np.ndarray]) -> np.ndarray:
    """The novelty (N,) that an exported model gives beside its logits."""
    scores = outputs.get("novelty", np.zeros(0))
    if scores.shape != (len(outputs["logits"]), 1) or not np.isfinite(scores).all():
        raise WeightsError(
            "the model does not give the novelty score that its sidecar promises",
            expected=f"novelty of shape {(len(outputs['logits']), 1)}, finite",
            fix="copy all files of the export again from one place",
        )
    return scores[:, 0].astype(np.float64)


def _infer_sidecar(path: Path, state: dict, recipe: Recipe | None) -> tuple[Sidecar, dict, list[str]]:
    """Sidecar, renamed state and notes for a file without a sidecar, from its layout and the recipe."""
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
        from paddle_medcls.recipes import get_recipe

        recipe = get_recipe(name)
    classes, task = dataset_classes(recipe.dataset, recipe.labels)
    head = OutputHead(task, recipe.loss, classes)
    if head.num_outputs != network.num_outputs:
        raise WeightsError(
            f"{path}: has {network.num_outputs} output(s), recipe {recipe.name} needs {head.num_outputs}"
        )
    spec, flips = recipe.preprocessing, recipe.evaluation_flips
    mean, std = (", ".join(f"{value:.2f}" for value in dict.fromkeys(values)) for values in (spec.mean, spec.std))
    flips_text = f"; averaged over the image and its flips ({', '.join(flips)})" if flips else ""
    notes.append(
        f"assumed: recipe {recipe.name}; {spec.channels.upper()}, {spec.size_px} px, "
        f"mean {mean}, std {std}; classes {', '.join(classes)}{flips_text}"
    )
    sidecar = Sidecar(
        recipe.dataset, recipe.name, classes, task, recipe.loss, network, spec, flips, labels=recipe.labels
    )
    return replace(sidecar, sha256=sha256(path)), state, notes
