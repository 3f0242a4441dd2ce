"""Environment variables that make Paddle fast on a CPU; they must be set before Paddle is imported.

- `OMP_NUM_THREADS`: if unset, Paddle uses one thread. Several processes of one run share the cores.
- `MKL_DEBUG_CPU_TYPE`: Paddle's matrix library (MKL) is slow on AMD processors; this unofficial switch makes it 2 to 3
  times as fast, and changes rounding in the last digits.

Variables that the user has set are not changed. If Paddle is already imported, nothing is changed and `NOTES` says so.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

NOTES: list[str] = []
"""Variables that were set, or could not be set, one line each."""


def usable_cores() -> int:
    """Cores that this process may use: its affinity, and the container's CPU quota if lower."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cores = min(cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass  # no cgroup v2
    return cores


def cpu_info(name: str) -> str:
    """A field of Linux's /proc/cpuinfo, such as "model name" or "flags"; "" if it is missing."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == name), "")


def matrix_switch() -> str | None:
    """Value for MKL_DEBUG_CPU_TYPE: "7" (AVX-512) or "5" (AVX2) on AMD, None elsewhere."""
    if cpu_info("vendor_id") != "AuthenticAMD":
        return None
    flags = cpu_info("flags").split()
    return "7" if "avx512f" in flags else "5" if "avx2" in flags else None


def has_bfloat16() -> bool:
    """Whether the processor has bfloat16 instructions (AVX-512 or AMX)."""
    flags = cpu_info("flags").split()
    return "avx512_bf16" in flags or "amx_bf16" in flags


def prepare_environment() -> None:
    """Sets the variables that are not set yet, unless Paddle is already imported."""
    processes = int(os.environ.get("PADDLE_LOCAL_SIZE", "1"))  # processes of this run on this machine, see `launcher`
    variables = {"OMP_NUM_THREADS": str(max(1, usable_cores() // processes)), "MKL_DEBUG_CPU_TYPE": matrix_switch()}
    if "paddle" in sys.modules:
        late = [f"{name}={value}" for name, value in variables.items() if value and name not in os.environ]
        if late:
            NOTES.append(f"Paddle was imported first, so not set: {', '.join(late)} (slower on the CPU)")
        return
    for name, value in variables.items():
        if value and name not in os.environ:
            os.environ[name] = value
            NOTES.append(f"{name}={value}")
    os.environ.setdefault("GLOG_minloglevel", "2")
    warnings.filterwarnings("ignore", message="No ccache found")
    warnings.filterwarnings("ignore", message="When training, we now always track global mean")


@contextlib.contextmanager
def environment_variables(values: dict[str, str]) -> Iterator[None]:
    """Sets variables meanwhile, for processes that are started or libraries that read them."""
    earlier = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in earlier.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def installed_version(package: str) -> str:
    """Version of an installed package, or ""."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return ""
