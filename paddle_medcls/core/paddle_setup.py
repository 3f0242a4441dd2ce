"""Imports and configures Paddle; all other modules import Paddle from here.

`from paddle_medcls.core.paddle_setup import paddle` makes sure that two things are done before Paddle is imported:

- zlib is imported first: Paddle 2.6.2 exports its own inflate, and any later use of zlib crashes.
- the number of threads and the switch of the matrix library are set, see `cpu`.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import platform
import subprocess
import sys
import time
import zlib  # noqa: F401  before paddle, see above
from pathlib import Path
from typing import Any

from paddle_medcls import __version__
from paddle_medcls.core.errors import SetupError
from paddle_medcls.core.hardware import cpu_info, prepare_environment


def _import_paddle() -> Any:
    prepare_environment()
    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output):  # Paddle warns about our number of threads
            import paddle
    except ImportError as error:
        missing = error.name == "paddle"
        fault = "is not installed" if missing else f"cannot be loaded ({error})"
        raise SetupError(f"PaddlePaddle {fault}: pip install paddlepaddle, or a GPU build (docs/gpu.md)") from None
    finally:
        for line in output.getvalue().splitlines():
            if "OMP_NUM_THREADS" not in line and "OpenBlas" not in line:
                print(line, file=sys.stderr)
    logging.getLogger().setLevel(logging.WARNING)  # Paddle 3 sets the root logger to INFO
    # Dygraph mode is per thread: if another thread than the main one imports Paddle, it starts in static mode.
    paddle.disable_static()
    return paddle


paddle = _import_paddle()


def count_gpus() -> int:
    """Number of GPUs that Paddle can use; 0 for its CPU build."""
    return paddle.device.cuda.device_count() if paddle.is_compiled_with_cuda() else 0


def select_device(name: str = "auto") -> str:
    """Sets Paddle's device.

    Args:
        name: "auto" (a GPU if there is one), "cpu" or "gpu".

    Returns:
        Paddle's name of the device, "cpu" or "gpu:0".

    Raises:
        SetupError: "gpu", and there is none or this is a CPU build of Paddle.
    """
    has_gpu = count_gpus() > 0
    if name == "gpu" and not has_gpu:
        reason = "no GPU is visible" if paddle.is_compiled_with_cuda() else "this Paddle is the CPU build"
        raise SetupError(
            f"--device gpu: {reason}",
            fix="use --device cpu, or install a GPU build: see docs/gpu.md",
        )
    paddle.set_device("gpu" if has_gpu and name != "cpu" else "cpu")
    return paddle.get_device()


def require_gpu(device: str, option: str) -> None:
    """Raises SetupError if an option that needs a GPU is used on another device."""
    if not device.startswith("gpu"):
        raise SetupError(f"{option} needs a GPU; this run is on the {device}", fix=f"leave {option} out")


def configure_gpu(deterministic: bool, amp: bool) -> None:
    """Sets all of Paddle's GPU switches that this package uses, so that none is left over from an earlier run.

    Does nothing in a CPU build of Paddle, whose operators are deterministic.

    Args:
        deterministic: use deterministic algorithms only. FLAGS_cudnn_deterministic=1 in the environment has the same
            effect. Otherwise cuDNN measures its convolution algorithms on the first batch of each shape and uses
            the fastest one.
        amp: the run uses mixed precision. If not deterministic, Paddle may then store activations channels-last,
            which makes float16 convolutions faster on GPUs with tensor cores.
    """
    if not paddle.is_compiled_with_cuda():
        return
    deterministic = deterministic or os.environ.get("FLAGS_cudnn_deterministic", "").lower() in ("1", "true")
    paddle.set_flags(
        {
            "FLAGS_cudnn_deterministic": deterministic,
            "FLAGS_embedding_deterministic": int(deterministic),
            "FLAGS_cudnn_exhaustive_search": not deterministic,
        }
    )
    paddle.incubate.autotune.set_config({"layout": {"enable": amp and not deterministic}})


def environment(device: str) -> dict:
    """Everything that may explain a different result: versions, processor, threads, switches, state of the code."""
    import cv2
    import numpy

    return {
        "paddle_medcls": __version__,
        "code": _state_of_the_code(Path(__file__).parents[2]),
        "date": time.strftime("%Y-%m-%d"),
        "paddle": paddle.__version__,
        "python": platform.python_version(),
        "numpy": numpy.__version__,
        "opencv": cv2.__version__,
        "platform": platform.platform(),
        "processor": cpu_info("model name") or platform.processor() or platform.machine(),
        "device": device,
        "threads": int(os.environ.get("OMP_NUM_THREADS", "1").split(",")[0]),
        "switches": {
            name: os.environ[name] for name in ("MKL_DEBUG_CPU_TYPE", "FLAGS_cudnn_deterministic") if name in os.environ
        },
    }


def _state_of_the_code(clone: Path) -> str:
    """The commit of a clone; of an installed package, which may lie inside a repository of its user, none."""
    if not (clone / ".git").exists():
        return "as installed"
    try:
        git = ["git", "-C", str(clone), "describe", "--always", "--dirty"]
        return subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip() or "unknown"
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
