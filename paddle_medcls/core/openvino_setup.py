"""The only import of OpenVINO."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator
from typing import Any

_CONVERTER = "openvino.tools.ovc"


def import_openvino() -> Any:
    """Imports OpenVINO without its model converter, which this package does not use.

    `import openvino` imports the converter too, and that reports every import to Google Analytics, with an identifier
    that it keeps in the home folder. Leaving it out also halves the time of the import. `import openvino.tools.ovc`
    still finds it.

    Raises:
        ImportError: OpenVINO is not installed.
    """
    blocked = sys.modules.setdefault(_CONVERTER, None) is None  # type: ignore[arg-type]
    try:
        import openvino  # takes the missing converter for one that is not installed
    finally:
        if blocked:
            del sys.modules[_CONVERTER]
    return openvino


class _SignalStack(ctypes.Structure):
    """`stack_t` of Linux."""

    _fields_ = [("address", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]


@contextlib.contextmanager
def signal_stack_kept() -> Iterator[None]:
    """Restores this thread's alternate signal stack, which OpenVINO replaces when it compiles for AMX.

    It frees the new one with the compiled model. Python runs signal handlers on that stack: the next Ctrl-C would
    end the process with a segmentation fault.
    """
    if sys.platform != "linux":
        yield
        return
    libc, before = ctypes.CDLL(None), _SignalStack()
    libc.sigaltstack(None, ctypes.byref(before))
    try:
        yield
    finally:
        libc.sigaltstack(ctypes.byref(before), None)
