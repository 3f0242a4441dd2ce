"""What makes Paddle fast on a CPU; it must be in the environment before Paddle is imported.

- `OMP_NUM_THREADS`: unset, Paddle runs on one thread. Several processes on one run divide the cores.
- `MKL_DEBUG_CPU_TYPE`: the wheel's matrix library takes its slow path on AMD processors; this
  unofficial switch of it gives 2 to 3 times the speed, and changes rounding in the last digits.

Nothing that the user has set is overridden. If Paddle is already imported, nothing is changed and
`NOTES` says so.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

NOTES: list[str] = []
"""What the set-up did or could not do, one line each."""


def usable_cores() -> int:
    """Cores that this process may use: its affinity, and the container's CPU quota if lower."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cores = min(cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass  # no cgroup v2 here: the affinity is all there is to know
    return cores


def cpu_info(name: str) -> str:
    """What Linux says of the first processor: "vendor_id", "model name", "flags", …; "" elsewhere."""
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
    """Whether the processor computes with bfloat16 (AVX-512 or AMX)."""
    flags = cpu_info("flags").split()
    return "avx512_bf16" in flags or "amx_bf16" in flags


def prepare_environment() -> None:
    """Sets what is not set yet, unless Paddle is already there."""
    processes = int(os.environ.get("PADDLE_LOCAL_SIZE", "1"))  # that share this machine, see `launcher`
    wanted = {"OMP_NUM_THREADS": str(max(1, usable_cores() // processes)), "MKL_DEBUG_CPU_TYPE": matrix_switch()}
    if "paddle" in sys.modules:
        late = [f"{name}={value}" for name, value in wanted.items() if value and name not in os.environ]
        if late:
            NOTES.append(f"Paddle was imported first, so not set: {', '.join(late)} (slower on the CPU)")
        return
    for name, value in wanted.items():
        if value and name not in os.environ:
            os.environ[name] = value
            NOTES.append(f"{name}={value}")
    os.environ.setdefault("GLOG_minloglevel", "2")
    warnings.filterwarnings("ignore", message="No ccache found")
    warnings.filterwarnings("ignore", message="When training, we now always track global mean")
