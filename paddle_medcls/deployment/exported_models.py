"""Opens exported models: what they take, which operators they may have, the engine of their form."""

from __future__ import annotations

import contextlib
import ctypes
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from paddle_medcls.core.errors import WeightsError
from paddle_medcls.core.hardware import usable_cores
from paddle_medcls.core.openvino_setup import import_openvino
from paddle_medcls.deployment.inference_engines import (
    FORMS,
    InferenceBackend,
    Run,
    by_session,
    compile_openvino,
    last_line,
    onnx_session,
    require,
)

_ANNOUNCEMENTS = (b"ReduceMeanCheckIfOneDNNSupport",)
"""Names of functions that Paddle 3.3 prints when they are first called; they tell a user nothing."""
MAX_BYTES = {"onnx": 2 << 30, "openvino": 64 << 20, "paddle": 2 << 30}
"""Largest file that an export of a form may be opened by; of OpenVINO the XML, whose arrays lie in a file beside it."""
MAX_NODES = 100_000  # ResNet-152 has about 400
_CONTROL_FLOW = ("Loop", "Scan", "If", "TensorIterator")
_ENDS = ("image", "uint8", {"logits", "probabilities"})


def open_model(folder: Path, name: str, form: str, precision: str, num_outputs: int) -> InferenceBackend:
    """Opens an exported model with the engine of its form, on all usable cores.

    Models of ONNX and OpenVINO are checked first: no loops and branches, which need not end; no array in other files.
    A Paddle program cannot be checked, and its operators can write files: the caller asks the user first.

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
        fault = f"{engine} cannot open the model: {last_line(error)}"
        raise WeightsError(fault, path=folder, fix="export it again") from None
    return InferenceBackend(lambda x: run(_to_pixels(x)), engine, precision, num_outputs)


def _to_pixels(x: np.ndarray) -> np.ndarray:
    """The network's input (N, C, S, S), whole values 0 to 255, as an export takes it: (N, S, S, C) uint8."""
    return np.ascontiguousarray(x.transpose(0, 2, 3, 1)).astype(np.uint8)


def _check_ends(path: Path, image: str, kind: str, outputs: tuple[str, ...]) -> None:
    """Refuses a model that does not take pixels and give probabilities and logits, as those of version 0.1."""
    if (image, kind, {*outputs} - {"novelty"}) != _ENDS or len(outputs) != len({*outputs}):
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
        has_graphs = any(one.HasField("g") or one.graphs for one in node.attribute)
        if has_graphs or node.op_type in _CONTROL_FLOW or node.domain not in ("", "ai.onnx"):
            faults.append(f"{node.domain or 'onnx'} {node.op_type}")
        arrays += [tensor for one in node.attribute for tensor in (one.t, *one.tensors)]
    faults += [f"{array.name} in another file" for array in arrays if array.data_location or array.external_data]
    faults += ["sparse arrays"] if model.graph.sparse_initializer else []
    _refuse_operators(path, faults)
    session = onnx_session(data)
    inputs, outputs = session.get_inputs(), session.get_outputs()
    kinds = ", ".join(one.type.replace("tensor(", "").rstrip(")") for one in inputs)
    _check_ends(path, ", ".join(one.name for one in inputs), kinds, tuple(one.name for one in outputs))
    return by_session(session)


def _open_openvino(path: Path, precision: str) -> Run:
    openvino = import_openvino()

    model = openvino.Core().read_model(str(path))
    kinds = [operation.get_type_name() for operation in model.get_ops()]
    faults = [f"{len(kinds):,} operations"] if len(kinds) > MAX_NODES else []
    _refuse_operators(path, faults + sorted({kind for kind in kinds if kind in _CONTROL_FLOW}))
    taken = ", ".join(one.element_type.to_string() for one in model.inputs)
    names = [[one.any_name for one in ends] for ends in (model.inputs, model.outputs)]
    _check_ends(path, ", ".join(names[0]), "uint8" if taken == "u8" else taken, tuple(names[1]))
    return compile_openvino(model, precision)


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
    two = len(outputs) == 2  # version 0.1: one; they have Paddle's own names
    output_names = ("probabilities", "logits") if two else ("logits",)
    _check_ends(path, names[0], "uint8" if two else "float32", output_names)
    image = predictor.get_input_handle(names[0])

    def run(pixels: np.ndarray) -> dict[str, np.ndarray]:
        image.reshape(list(pixels.shape))
        image.copy_from_cpu(pixels)
        with stdout_to_stderr():  # some operators announce themselves
            predictor.run()
        return {end: predictor.get_output_handle(name).copy_to_cpu() for end, name in zip(output_names, outputs)}

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
    stdout = os.dup(1)
    in_memory = hasattr(os, "memfd_create")  # Linux: no folder needs to be writable
    with os.fdopen(os.memfd_create("stdout"), "w+b") if in_memory else tempfile.TemporaryFile() as captured:
        try:
            os.dup2(captured.fileno(), 1)
            yield
        finally:
            ctypes.CDLL(None).fflush(None)  # what C has buffered would come out later
            os.dup2(stdout, 1)
            os.close(stdout)
            captured.seek(0)
            for line in captured:
                if line.strip() not in _ANNOUNCEMENTS:
                    os.write(2, line)
