"""Inference backends: what gives the logits of a trained network. A backend has one method, `logits`.

| engine | runs | precisions on a CPU |
|---|---|---|
| `paddle` | the network in Paddle, see `predict.PaddleNetwork` | f32 |
| `openvino` | the inference graph of a weight file (`graph`), or an OpenVINO export | f32, bf16 |
| `onnxruntime` | the inference graph of a weight file, or an ONNX export | f32 |
| `onednn` | a Paddle export, in Paddle's own inference with oneDNN | f32, bf16 |

Nothing here imports Paddle but `onednn`. bf16 rounds inside the network to 8 bits of mantissa; it needs a
processor that has it.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from paddle_medcls.cpu import has_bfloat16, usable_cores
from paddle_medcls.errors import SetupError, WeightsError
from paddle_medcls.graph import Graph, to_onnx, to_openvino

FORMS = {"paddle": "onednn", "onnx": "onnxruntime", "openvino": "openvino"}
"""Exported form -> the engine that runs it."""

ENGINES = ("paddle", *FORMS.values())
FASTEST_FIRST = ("openvino", "onnxruntime")
"""Engines that run the inference graph of a weight file."""
PRECISIONS = ("f32", "bf16")
_WITHOUT_BFLOAT16 = ("paddle", "onnxruntime")
_ANNOUNCEMENTS = (b"ReduceMeanCheckIfOneDNNSupport",)
"""Names of functions that Paddle 3.3 prints when they are first called; they tell a user nothing."""
_MODULES = {
    "paddle": ("paddle",),
    "openvino": ("openvino",),
    "onnxruntime": ("onnxruntime", "onnx"),
    "onednn": ("paddle",),
}


class InferenceBackend:
    """A compiled inference graph, or an exported model.

    Attributes:
        engine: one of ENGINES.
        precision: one of PRECISIONS.
    """

    def __init__(self, run: Callable[[np.ndarray], np.ndarray], engine: str, precision: str, num_outputs: int) -> None:
        self._run = run
        self.engine = engine
        self.precision = precision
        self._num_outputs = num_outputs

    def logits(self, x: np.ndarray) -> np.ndarray:
        """Preprocessed x (N, C, S, S) float32 -> logits (N, outputs) float32.

        Raises:
            SetupError: the engine lacks an operator in this precision.
            WeightsError: the model gives another shape.
        """
        try:
            logits = self._run(x)
        except RuntimeError as error:  # an operator that an engine lacks in this precision shows here only
            reason = next((line.strip() for line in str(error).splitlines() if "Error" in line), str(error)[:200])
            raise SetupError(
                f"{self.engine} cannot compute this model in {self.precision}: {reason}",
                do="take another --engine, or --precision f32",
            ) from None
        if logits.shape != (len(x), self._num_outputs):
            raise WeightsError(
                f"the model gives logits of shape {logits.shape} for {len(x)} image(s)",
                expected=str((len(x), self._num_outputs)),
                do="do not use this model unless you know who made it; export it again",
            )
        return logits


def installed(engine: str) -> bool:
    """Whether the engine's libraries are there; they are not imported."""
    return all(importlib.util.find_spec(name) is not None for name in _MODULES[engine])


def require(engine: str, precision: str = "f32") -> None:
    """Refuses an engine that is not installed, or that cannot compute in this precision here."""
    if not installed(engine):
        raise SetupError(f"the engine {engine} is not installed", do=f"pip install {' '.join(_MODULES[engine])}")
    if precision != "f32" and engine in _WITHOUT_BFLOAT16:
        able = ", ".join(name for name in ENGINES if name not in _WITHOUT_BFLOAT16)
        raise SetupError(f"the engine {engine} has no {precision} on a CPU", expected=f"one of {able}")
    if precision == "bf16" and not has_bfloat16():
        raise SetupError("this processor has no bfloat16 (avx512_bf16 or amx_bf16)", do="use --precision f32")


def compile_graph(graph: Graph, engine: str, precision: str, num_outputs: int) -> InferenceBackend:
    """Compiles an inference graph in memory, for all usable cores.

    Args:
        graph: of `graph.logits_graph`.
        engine: one of FASTEST_FIRST.

    Raises:
        SetupError: the engine is not installed, cannot compute in this precision, or refuses the graph.
    """
    require(engine, precision)
    try:
        if engine == "openvino":
            run = _compile_openvino(to_openvino(graph), precision)
        else:
            run = _open_session(to_onnx(graph).SerializeToString())
    except (ImportError, RuntimeError, ValueError, OSError) as error:
        raise SetupError(
            f"{engine} cannot compile the network: {_last_line(error)}", do="use --engine paddle"
        ) from None
    return InferenceBackend(run, engine, precision, num_outputs)


def _compile_openvino(model, precision: str) -> Callable[[np.ndarray], np.ndarray]:
    import openvino

    settings = {
        "INFERENCE_PRECISION_HINT": precision,  # unset, processors with bfloat16 would use it
        "INFERENCE_NUM_THREADS": usable_cores(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = openvino.Core().compile_model(model, "CPU", settings)
    return lambda x: np.array(compiled(x)["logits"])


def _open_session(model: bytes | str) -> Callable[[np.ndarray], np.ndarray]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = usable_cores()
    options.log_severity_level = 3  # errors alone
    try:
        session = onnxruntime.InferenceSession(model, options, ["CPUExecutionProvider"])
    except Exception as error:  # its own types, which differ from release to release
        raise RuntimeError(str(error)) from None
    return lambda x: session.run(["logits"], {"image": x})[0]


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


# --- exported models ---------------------------------------------------------------------------------


def open_model(folder: Path, name: str, form: str, precision: str, num_outputs: int) -> InferenceBackend:
    """Opens an exported model with the engine of its form, on all usable cores.

    Args:
        folder, name: of the export, as `export.export` wrote it.
    """
    engine = FORMS[form]
    require(engine, precision)
    try:
        if form == "paddle":
            run = _open_onednn(folder, name, precision)
        elif form == "onnx":
            run = _open_session(str(folder / f"{name}.onnx"))
        else:
            run = _compile_openvino(str(folder / f"{name}.xml"), precision)
    except (RuntimeError, ValueError, OSError) as error:
        fault = f"{engine} cannot open the model: {_last_line(error)}"
        raise WeightsError(fault, where=folder, do="export it again") from None
    return InferenceBackend(run, engine, precision, num_outputs)


def _open_onednn(folder: Path, name: str, precision: str) -> Callable[[np.ndarray], np.ndarray]:
    from paddle_medcls.runtime import paddle

    if of_later_paddle(folder, name):
        raise SetupError(
            f"the model was exported by Paddle 3, which Paddle {paddle.__version__} cannot read",
            where=folder,
            do="export it again with this Paddle (Paddle 3 reads that too), or install Paddle 3",
        )
    program = next(path for path in map(folder.joinpath, program_names(name)) if path.is_file())
    config = paddle.inference.Config(str(program), str(folder / f"{name}.inference.pdiparams"))
    config.disable_glog_info()
    config.set_cpu_math_library_num_threads(usable_cores())
    onednn = "onednn" if hasattr(config, "enable_onednn") else "mkldnn"  # its former name, in Paddle 2.6
    getattr(config, f"enable_{onednn}")()
    if precision == "bf16":
        getattr(config, f"enable_{onednn}_bfloat16")()
    with stdout_to_stderr():
        predictor = paddle.inference.create_predictor(config)
    given = predictor.get_input_handle(predictor.get_input_names()[0])
    wanted = predictor.get_output_handle(predictor.get_output_names()[0])

    def forward(x: np.ndarray) -> np.ndarray:
        given.reshape(list(x.shape))
        given.copy_from_cpu(np.ascontiguousarray(x))
        with stdout_to_stderr():  # some operators announce themselves
            predictor.run()
        return wanted.copy_to_cpu()

    return forward


def program_names(name: str) -> tuple[str, str]:
    """Names of Paddle's program file: of Paddle 3, of Paddle 2."""
    return f"{name}.inference.json", f"{name}.inference.pdmodel"


def of_later_paddle(folder: Path, name: str) -> bool:
    """Whether an export is Paddle 3's and this is Paddle 2, which crashes on it."""
    from paddle_medcls.runtime import paddle

    return (folder / program_names(name)[0]).is_file() and paddle.__version__.startswith("2.")


@contextlib.contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """For C++ that writes to standard output, which holds a command's results alone.

    Its lines go to standard error, but for those of `_ANNOUNCEMENTS`.
    """
    kept = os.dup(1)
    in_memory = hasattr(os, "memfd_create")  # Linux: no folder needs to be writable
    with os.fdopen(os.memfd_create("stdout"), "w+b") if in_memory else tempfile.TemporaryFile() as said:
        try:
            os.dup2(said.fileno(), 1)
            yield
        finally:
            ctypes.CDLL(None).fflush(None)  # what C has buffered would come out later
            os.dup2(kept, 1)
            os.close(kept)
            said.seek(0)
            for line in said:
                if line.strip() not in _ANNOUNCEMENTS:
                    os.write(2, line)
