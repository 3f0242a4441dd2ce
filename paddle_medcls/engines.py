"""What computes logits outside the training framework: an exported model in a faster engine.

| engine | runs the form | library | precisions |
|---|---|---|---|
| `onednn` | `paddle` | Paddle's own inference, with oneDNN | f32, bf16 |
| `onnxruntime` | `onnx` | ONNX Runtime | f32 |
| `openvino` | `openvino` | OpenVINO | f32, bf16 |

The engine `paddle` is the network itself, see `predict.Predictor`. Nothing here imports Paddle but `onednn`.
bf16 rounds inside the network to 8 bits of mantissa; it needs a processor that has it.
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

FORMS = {"paddle": "onednn", "onnx": "onnxruntime", "openvino": "openvino"}
"""Exported form -> the engine that runs it."""

ENGINES = ("paddle", *FORMS.values())
PRECISIONS = ("f32", "bf16")
_WITHOUT_BFLOAT16 = ("paddle", "onnxruntime")
_ANNOUNCEMENTS = (b"ReduceMeanCheckIfOneDNNSupport",)
"""Names of functions that Paddle 3.3 prints when they are first called; they tell a user nothing."""
_MODULES = {"onednn": "paddle", **{name: name for name in ENGINES if name != "onednn"}}

Forward = Callable[[np.ndarray], np.ndarray]
"""x (N, C, S, S) float32, preprocessed -> logits (N, outputs) float32."""


def installed(engine: str) -> bool:
    """Whether the engine's library is there; it is not imported."""
    return importlib.util.find_spec(_MODULES[engine]) is not None


def require(engine: str, precision: str = "f32") -> None:
    """Refuses an engine that is not installed, or that cannot compute in this precision here."""
    if not installed(engine):
        raise SetupError(f"the engine {engine} is not installed", do=f"pip install {_MODULES[engine]}")
    if precision != "f32" and engine in _WITHOUT_BFLOAT16:
        able = ", ".join(name for name in ENGINES if name not in _WITHOUT_BFLOAT16)
        raise SetupError(f"the engine {engine} has no {precision} on a CPU", expected=f"one of {able}")
    if precision == "bf16" and not has_bfloat16():
        raise SetupError("this processor has no bfloat16 (avx512_bf16 or amx_bf16)", do="use --precision f32")


def open_model(folder: Path, name: str, form: str, precision: str) -> Forward:
    """Opens an exported model with the engine of its form, on all usable cores.

    Args:
        folder, name: of the export, as `export.export` wrote it.
    """
    engine = FORMS[form]
    require(engine, precision)
    openers = {"paddle": _open_onednn, "onnx": _open_onnxruntime, "openvino": _open_openvino}
    try:
        forward = openers[form](folder, name, precision)
    except (RuntimeError, ValueError, OSError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise WeightsError(f"{engine} cannot open the model: {lines[-1]}", where=folder, do="export it again") from None

    def guarded(x: np.ndarray) -> np.ndarray:
        try:
            return forward(x)
        except RuntimeError as error:  # an operator that an engine lacks in this precision shows here only
            reason = next((line.strip() for line in str(error).splitlines() if "Error" in line), str(error)[:200])
            raise SetupError(
                f"{engine} cannot compute this model in {precision}: {reason}",
                do="take another --engine, or --precision f32",
            ) from None

    return guarded


def _open_onnxruntime(folder: Path, name: str, precision: str) -> Forward:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = usable_cores()
    options.log_severity_level = 3  # errors alone
    try:
        session = onnxruntime.InferenceSession(str(folder / f"{name}.onnx"), options, ["CPUExecutionProvider"])
    except Exception as error:  # its own types, which differ from release to release
        raise RuntimeError(str(error)) from None
    return lambda x: session.run(["logits"], {"image": x})[0]


def _open_openvino(folder: Path, name: str, precision: str) -> Forward:
    import openvino

    settings = {
        "INFERENCE_PRECISION_HINT": precision,  # unset, processors with bfloat16 would use it
        "INFERENCE_NUM_THREADS": usable_cores(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    model = openvino.Core().compile_model(str(folder / f"{name}.xml"), "CPU", settings)
    return lambda x: np.array(model(x)["logits"])


def _open_onednn(folder: Path, name: str, precision: str) -> Forward:
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
