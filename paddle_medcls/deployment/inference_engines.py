"""Inference backends: what gives the logits of a trained network. A backend has one method, `logits`.

| engine | runs | precisions on a CPU |
|---|---|---|
| `paddle` | the network in Paddle, see `opening.PaddleNetwork` | f32 |
| `openvino` | the inference graph of a weight file (`graph`), or an OpenVINO export | f32, bf16 |
| `onnxruntime` | the inference graph of a weight file, or an ONNX export | f32 |
| `onednn` | a Paddle export, in Paddle's own inference with oneDNN | f32, bf16 |

Exports are opened in `exported_models`. Nothing here imports Paddle. bf16 rounds inside the network to 8 bits of
mantissa; it needs a processor that has it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import numpy as np

from paddle_medcls.core.errors import SetupError, WeightsError
from paddle_medcls.core.hardware import has_bfloat16, usable_cores
from paddle_medcls.core.openvino_setup import import_openvino, signal_stack_kept
from paddle_medcls.deployment.graph import Graph
from paddle_medcls.deployment.graph_models import to_onnx, to_openvino

FORMS = {"paddle": "onednn", "onnx": "onnxruntime", "openvino": "openvino"}
"""Exported form -> the engine that runs it."""

ENGINES = ("paddle", *FORMS.values())
FASTEST_FIRST = ("openvino", "onnxruntime")
"""Engines that run the inference graph of a weight file."""
WITHOUT_BFLOAT16 = ("paddle", "onnxruntime")
_MODULES = {
    "paddle": ("paddle",),
    "openvino": ("openvino",),
    "onnxruntime": ("onnxruntime", "onnx"),
    "onednn": ("paddle",),
}


Run = Callable[[np.ndarray], dict[str, np.ndarray]]
"""The model's input -> its outputs by their names, `logits` among them."""


class InferenceBackend:
    """A compiled inference graph, or an exported model.

    Attributes:
        engine: one of ENGINES.
        precision: one of PRECISIONS.
    """

    def __init__(self, run: Run, engine: str, precision: str, num_outputs: int) -> None:
        self._run = run
        self.engine = engine
        self.precision = precision
        self._num_outputs = num_outputs

    def logits(self, x: np.ndarray) -> np.ndarray:
        """Preprocessed x (N, C, S, S) float32 -> logits (N, outputs) float32; errors as for `outputs`."""
        return self.outputs(x)["logits"]

    def outputs(self, x: np.ndarray) -> dict[str, np.ndarray]:
        """All outputs of the model: `logits`; of an export also `probabilities` (N, classes).

        Raises:
            SetupError: the engine lacks an operator in this precision.
            WeightsError: the model gives logits of another shape.
        """
        try:
            outputs = self._run(x)
        except RuntimeError as error:  # an operator that an engine lacks in this precision shows here only
            reason = next((line.strip() for line in str(error).splitlines() if "Error" in line), str(error)[:200])
            raise SetupError(
                f"{self.engine} cannot compute this model in {self.precision}: {reason}",
                fix="take another --engine, or --precision f32",
            ) from None
        if outputs["logits"].shape != (len(x), self._num_outputs):
            raise WeightsError(
                f"the model gives logits of shape {outputs['logits'].shape} for {len(x)} image(s)",
                expected=str((len(x), self._num_outputs)),
                fix="do not use this model unless you know who made it; export it again",
            )
        return outputs


def installed(engine: str) -> bool:
    """Whether the engine's libraries are there; they are not imported."""
    return all(importlib.util.find_spec(name) is not None for name in _MODULES[engine])


def require(engine: str, precision: str = "f32") -> None:
    """Refuses an engine that is not installed, or that cannot compute in this precision here."""
    if not installed(engine):
        raise SetupError(f"the engine {engine} is not installed", fix=f"pip install {' '.join(_MODULES[engine])}")
    if precision != "f32" and engine in WITHOUT_BFLOAT16:
        able = ", ".join(name for name in ENGINES if name not in WITHOUT_BFLOAT16)
        raise SetupError(f"the engine {engine} has no {precision} on a CPU", expected=f"one of {able}")
    if precision == "bf16" and not has_bfloat16():
        raise SetupError("this processor has no bfloat16 (avx512_bf16 or amx_bf16)", fix="use --precision f32")


def resolve_precision(engine: str, precision: str) -> str:
    """ "auto" as the fastest precision that the engine has on this processor; others as they are."""
    if precision != "auto":
        return precision
    return "bf16" if engine not in WITHOUT_BFLOAT16 and has_bfloat16() else "f32"


def compile_graph(graph: Graph, engine: str, precision: str, num_outputs: int) -> InferenceBackend:
    """Compiles an inference graph in memory, for all usable cores.

    Args:
        engine: one of FASTEST_FIRST.

    Raises:
        SetupError: the engine is not installed, cannot compute in this precision, or refuses the graph.
    """
    require(engine, precision)
    try:
        if engine == "openvino":
            run = compile_openvino(to_openvino(graph), precision)
        else:
            run = by_session(onnx_session(to_onnx(graph).SerializeToString()))
    except (ImportError, RuntimeError, ValueError, OSError) as error:
        raise SetupError(
            f"{engine} cannot compile the network: {last_line(error)}", fix="use --engine paddle"
        ) from None
    return InferenceBackend(run, engine, precision, num_outputs)


def compile_openvino(model, precision: str) -> Run:
    openvino = import_openvino()

    settings = {
        "INFERENCE_PRECISION_HINT": precision,  # unset, processors with bfloat16 would use it
        "INFERENCE_NUM_THREADS": usable_cores(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    with signal_stack_kept():
        compiled = openvino.Core().compile_model(model, "CPU", settings)
    names = [output.any_name for output in model.outputs]

    def run(x: np.ndarray) -> dict[str, np.ndarray]:
        results = compiled(x)
        return {name: np.array(results[name]) for name in names}

    return run


def onnx_session(model: bytes):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = usable_cores()
    options.log_severity_level = 3  # errors alone
    try:
        return onnxruntime.InferenceSession(model, options, ["CPUExecutionProvider"])
    except Exception as error:  # its own types, which differ from release to release
        raise RuntimeError(str(error)) from None


def by_session(session) -> Run:
    names = [output.name for output in session.get_outputs()]

    def run(x: np.ndarray) -> dict[str, np.ndarray]:
        try:
            return dict(zip(names, session.run(names, {"image": x})))
        except Exception as error:  # as above
            raise RuntimeError(str(error)) from None

    return run


def last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
