"""Inference backends: what gives the logits of a trained network. A backend has one method, `logits`.

| engine | runs | precisions on a CPU |
|---|---|---|
| `paddle` | the network in Paddle, see `predictor.PaddleNetwork` | f32 |
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

from paddle_medcls.core.errors import SetupError, WeightsError
from paddle_medcls.core.hardware import has_bfloat16, usable_cores
from paddle_medcls.deployment.graph import Graph
from paddle_medcls.deployment.graph_models import to_onnx, to_openvino

FORMS = {"paddle": "onednn", "onnx": "onnxruntime", "openvino": "openvino"}
"""Exported form -> the engine that runs it."""

ENGINES = ("paddle", *FORMS.values())
FASTEST_FIRST = ("openvino", "onnxruntime")
"""Engines that run the inference graph of a weight file."""
_WITHOUT_BFLOAT16 = ("paddle", "onnxruntime")
_ANNOUNCEMENTS = (b"ReduceMeanCheckIfOneDNNSupport",)
"""Names of functions that Paddle 3.3 prints when they are first called; they tell a user nothing."""
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
            found = self._run(x)
        except RuntimeError as error:  # an operator that an engine lacks in this precision shows here only
            reason = next((line.strip() for line in str(error).splitlines() if "Error" in line), str(error)[:200])
            raise SetupError(
                f"{self.engine} cannot compute this model in {self.precision}: {reason}",
                fix="take another --engine, or --precision f32",
            ) from None
        if found["logits"].shape != (len(x), self._num_outputs):
            raise WeightsError(
                f"the model gives logits of shape {found['logits'].shape} for {len(x)} image(s)",
                expected=str((len(x), self._num_outputs)),
                fix="do not use this model unless you know who made it; export it again",
            )
        return found


def installed(engine: str) -> bool:
    """Whether the engine's libraries are there; they are not imported."""
    return all(importlib.util.find_spec(name) is not None for name in _MODULES[engine])


def require(engine: str, precision: str = "f32") -> None:
    """Refuses an engine that is not installed, or that cannot compute in this precision here."""
    if not installed(engine):
        raise SetupError(f"the engine {engine} is not installed", fix=f"pip install {' '.join(_MODULES[engine])}")
    if precision != "f32" and engine in _WITHOUT_BFLOAT16:
        able = ", ".join(name for name in ENGINES if name not in _WITHOUT_BFLOAT16)
        raise SetupError(f"the engine {engine} has no {precision} on a CPU", expected=f"one of {able}")
    if precision == "bf16" and not has_bfloat16():
        raise SetupError("this processor has no bfloat16 (avx512_bf16 or amx_bf16)", fix="use --precision f32")


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
            run = _by_session(_session(to_onnx(graph).SerializeToString()))
    except (ImportError, RuntimeError, ValueError, OSError) as error:
        raise SetupError(
            f"{engine} cannot compile the network: {_last_line(error)}", fix="use --engine paddle"
        ) from None
    return InferenceBackend(run, engine, precision, num_outputs)


def _compile_openvino(model, precision: str) -> Run:
    import openvino

    settings = {
        "INFERENCE_PRECISION_HINT": precision,  # unset, processors with bfloat16 would use it
        "INFERENCE_NUM_THREADS": usable_cores(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = openvino.Core().compile_model(model, "CPU", settings)
    names = [output.any_name for output in model.outputs]

    def run(x: np.ndarray) -> dict[str, np.ndarray]:
        found = compiled(x)
        return {name: np.array(found[name]) for name in names}

    return run


def _session(model: bytes):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = usable_cores()
    options.log_severity_level = 3  # errors alone
    try:
        return onnxruntime.InferenceSession(model, options, ["CPUExecutionProvider"])
    except Exception as error:  # its own types, which differ from release to release
        raise RuntimeError(str(error)) from None


def _by_session(session) -> Run:
    names = [output.name for output in session.get_outputs()]

    def run(x: np.ndarray) -> dict[str, np.ndarray]:
        try:
            return dict(zip(names, session.run(names, {"image": x})))
        except Exception as error:  # as above
            raise RuntimeError(str(error)) from None

    return run


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


# --- exported models ---------------------------------------------------------------------------------

MAX_BYTES = {"onnx": 2 << 30, "openvino": 64 << 20, "paddle": 2 << 30}
"""Largest file that an export of a form may be opened by; of OpenVINO the XML, whose arrays lie in a file beside it."""
MAX_NODES = 100_000  # ResNet-152 has about 400
_CONTROL_FLOW = ("Loop", "Scan", "If", "TensorIterator")
_ENDS = ("image", "uint8", ("logits", "probabilities"))


def open_model(folder: Path, name: str, form: str, precision: str, num_outputs: int) -> InferenceBackend:
    """Opens an exported model with the engine of its form, on all usable cores.

    Models of ONNX and OpenVINO are checked first: no loops and branches, which need not end; no array in other files.
    A Paddle program cannot be checked, and its operators can write files: the caller asks the user first.

    Args:
        folder, name: of the export, as `export.export` wrote it.

    Raises:
        SetupError: the engine is not installed or cannot compute in this precision.
        WeightsError: the model cannot be read, is not allowed, or does not take pixels.
    """
    engine = FORMS[form]
    require(engine, precision)
    names = {"onnx": f"{name}.onnx", "openvino": f"{name}.xml", "paddle": f"{name}.inference.pdiparams"}
    path = folder / names[form]
    if path.is_file() and path.stat().st_size > MAX_BYTES[form]:
        raise WeightsError(f"{path}: {path.stat().st_size:,} bytes", expected=f"at most {MAX_BYTES[form]:,}")
    openers = {"onnx": _open_onnx, "openvino": _open_openvino, "paddle": _open_onednn}
    try:
        run = openers[form](path, precision)
    except WeightsError:
        raise
    except (RuntimeError, ValueError, OSError) as error:
        fault = f"{engine} cannot open the model: {_last_line(error)}"
        raise WeightsError(fault, path=folder, fix="export it again") from None
    return InferenceBackend(lambda x: run(_to_pixels(x)), engine, precision, num_outputs)


def _to_pixels(x: np.ndarray) -> np.ndarray:
    """The network's input (N, C, S, S), whole values 0 to 255, as an export takes it: (N, S, S, C) uint8."""
    return np.ascontiguousarray(x.transpose(0, 2, 3, 1)).astype(np.uint8)


def _check_ends(path: Path, image: str, kind: str, outputs: tuple[str, ...]) -> None:
    """Refuses a model that does not take pixels and give probabilities and logits, as those of version 0.1."""
    if (image, kind, tuple(sorted(outputs))) != _ENDS:
        raise WeightsError(
            f"{path}: the model takes {image} ({kind}) and gives {', '.join(outputs)}",
            expected="image (uint8) and probabilities, logits; version 0.1 exported otherwise",
            fix="export the weights again",
        )


def _refuse_operators(path: Path, faults: list[str]) -> None:
    if faults:
        raise WeightsError(
            f"{path}: the model has operators that are not allowed",
            items=faults,
            expected="a network without loops, branches, functions and arrays in other files",
            fix="do not use this file unless you know who made it",
        )


def _open_onnx(path: Path, precision: str) -> Run:
    import onnx

    data = path.read_bytes()
    try:
        model = onnx.load_model_from_string(data)
    except Exception as error:  # of protobuf's own types
        raise RuntimeError(str(error)) from None
    nodes, arrays = model.graph.node[:MAX_NODES], list(model.graph.initializer)
    faults = [f"{len(model.graph.node):,} nodes"] if len(model.graph.node) > MAX_NODES else []
    faults += ["functions of its own"] if model.functions else []
    for node in nodes:
        held = [one for one in node.attribute if one.HasField("g") or one.graphs]
        if held or node.op_type in _CONTROL_FLOW or node.domain not in ("", "ai.onnx"):
            faults.append(f"{node.domain or 'onnx'} {node.op_type}")
        arrays += [tensor for one in node.attribute for tensor in (one.t, *one.tensors)]
    faults += [f"{array.name} in another file" for array in arrays if array.data_location or array.external_data]
    faults += ["sparse arrays"] if model.graph.sparse_initializer else []
    _refuse_operators(path, faults)
    session = _session(data)
    inputs, outputs = session.get_inputs(), session.get_outputs()
    kinds = ", ".join(one.type.replace("tensor(", "").rstrip(")") for one in inputs)
    _check_ends(path, ", ".join(one.name for one in inputs), kinds, tuple(one.name for one in outputs))
    return _by_session(session)


def _open_openvino(path: Path, precision: str) -> Run:
    import openvino

    model = openvino.Core().read_model(str(path))
    kinds = [operation.get_type_name() for operation in model.get_ops()]
    faults = [f"{len(kinds):,} operations"] if len(kinds) > MAX_NODES else []
    _refuse_operators(path, faults + sorted({kind for kind in kinds if kind in _CONTROL_FLOW}))
    taken = ", ".join(one.element_type.to_string() for one in model.inputs)
    names = [[one.any_name for one in ends] for ends in (model.inputs, model.outputs)]
    _check_ends(path, ", ".join(names[0]), "uint8" if taken == "u8" else taken, tuple(names[1]))
    return _compile_openvino(model, precision)


def _open_onednn(path: Path, precision: str) -> Run:
    from paddle_medcls.core.paddle_setup import paddle

    folder, name = path.parent, path.name[: -len(".inference.pdiparams")]
    if of_later_paddle(folder, name):
        raise WeightsError(
            f"the model was exported by Paddle 3, which Paddle {paddle.__version__} cannot read",
            path=folder,
            fix="export it again with this Paddle (Paddle 3 reads that too), or install Paddle 3",
        )
    program = next(path for path in map(folder.joinpath, program_names(name)) if path.is_file())
    config = paddle.inference.Config(str(program), str(path))
    config.disable_glog_info()
    config.set_cpu_math_library_num_threads(usable_cores())
    onednn = "onednn" if hasattr(config, "enable_onednn") else "mkldnn"  # its former name, in Paddle 2.6
    getattr(config, f"enable_{onednn}")()
    if precision == "bf16":
        getattr(config, f"enable_{onednn}_bfloat16")()
    with stdout_to_stderr():
        predictor = paddle.inference.create_predictor(config)
    names, outputs = predictor.get_input_names(), predictor.get_output_names()
    found = (
        ("probabilities", "logits") if len(outputs) == 2 else ("logits",)
    )  # they have Paddle's names; version 0.1: one
    _check_ends(path, names[0], "uint8" if len(outputs) == 2 else "float32", found)
    given = predictor.get_input_handle(names[0])

    def run(pixels: np.ndarray) -> dict[str, np.ndarray]:
        given.reshape(list(pixels.shape))
        given.copy_from_cpu(pixels)
        with stdout_to_stderr():  # some operators announce themselves
            predictor.run()
        return {end: predictor.get_output_handle(name).copy_to_cpu() for end, name in zip(found, outputs)}

    return run


def program_names(name: str) -> tuple[str, str]:
    """Names of Paddle's program file: of Paddle 3, of Paddle 2."""
    return f"{name}.inference.json", f"{name}.inference.pdmodel"


def of_later_paddle(folder: Path, name: str) -> bool:
    """Whether an export is Paddle 3's and this is Paddle 2, which crashes on it."""
    from paddle_medcls.core.paddle_setup import paddle

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
