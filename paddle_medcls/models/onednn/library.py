"""oneDNN through ctypes: the library inside Paddle's wheel, its memory layouts, its memory, and calls of its functions.

Its C interface is stable within a major version. Shapes are in oneDNN's order (N, C, H, W), whatever the layout.

Not thread-safe: an operator stores its arguments between setting and using them, and the lists of free memory are
shared. Each thread needs its own `Engine`.

Source: oneDNN 3.x, include/oneapi/dnnl/dnnl.h and dnnl_types.h, for the names and numbers here and in `onednn`.
"""

from __future__ import annotations

import ctypes
import math
import weakref
from collections import defaultdict
from collections.abc import Mapping
from ctypes import byref, c_float, c_int, c_int64, c_size_t, c_uint, c_void_p
from pathlib import Path

import numpy as np

from paddle_medcls.core.errors import SetupError
from paddle_medcls.core.paddle_setup import paddle

MAJOR = 3  # version of oneDNN that the names and numbers are from
BF16, F32 = 2, 3  # data types
SRC, DST = 1, 17  # arguments of an operator
Shape = tuple[int, ...]


class _Version(ctypes.Structure):
    _fields_ = [("major", c_int), ("minor", c_int), ("patch", c_int)]


class _Argument(ctypes.Structure):
    _fields_ = [("index", c_int), ("memory", c_void_p)]


def open_library() -> ctypes.CDLL:
    """Opens the oneDNN library inside Paddle's wheel.

    Raises:
        SetupError: there is none, or another major version.
    """
    path = Path(paddle.__file__).parent / "libs" / "libdnnl.so.3"
    try:
        library = ctypes.CDLL(str(path))
        library.dnnl_version.restype = ctypes.POINTER(_Version)
        major = library.dnnl_version().contents.major
    except (OSError, AttributeError) as error:
        raise SetupError(f"this Paddle brings no oneDNN that can be called: {error}") from None
    if major != MAJOR:
        raise SetupError(f"this Paddle brings oneDNN {major}", expected=f"oneDNN {MAJOR}")
    library.dnnl_memory_set_data_handle.argtypes = [c_void_p, c_void_p]
    library.dnnl_memory_desc_get_size.restype = c_size_t
    library.dnnl_primitive_desc_query_md.restype = c_void_p
    return library


class Engine:
    """oneDNN's engine, with layouts, prepared operators and memory for reuse, for one thread.

    All objects that it created in oneDNN are destroyed with it, or by `close`.

    Args:
        bf16: activations are bfloat16.

    Raises:
        SetupError: see `open_library`.
    """

    def __init__(self, bf16: bool = False) -> None:
        self.library = open_library()
        self.type = BF16 if bf16 else F32
        self.engine, self.stream = c_void_p(), c_void_p()
        self._created: list[tuple[str, c_void_p]] = []
        self._destroy = weakref.finalize(self, _destroy, self.library, self._created)
        self._destroy.atexit = False  # the end of the process frees everything
        self.create("engine", "dnnl_engine_create", self.engine, c_int(1), c_size_t(0))
        self.create("stream", "dnnl_stream_create", self.stream, self.engine, c_uint(1))
        self._layouts: dict[tuple, c_void_p] = {}
        self._prepared: dict[tuple, Prepared] = {}
        self._free: dict[int, list[np.ndarray]] = defaultdict(list)
        self._shape: Shape = ()

    def _layout(self, shape: Shape, kind: int, strides: Shape | None = None) -> c_void_p:
        """Memory descriptor of a shape (N, C, H, W) with these strides; None: oneDNN chooses the layout."""
        key = (shape, kind, strides)
        if key not in self._layouts:
            handle, start = c_void_p(), (c_int(len(shape)), dims(*shape), c_int(kind))
            how, rest = ("tag", c_int(1)) if strides is None else ("strides", dims(*strides))
            self.create("memory_desc", f"dnnl_memory_desc_create_with_{how}", handle, *start, rest)
            self._layouts[key] = handle
        return self._layouts[key]

    def _nhwc(self, shape: Shape, kind: int | None = None) -> c_void_p:
        n, h, w, c = shape
        return self._layout((n, c, h, w), kind or self.type, (h * w * c, 1, w * c, c))

    def _oihw(self, shape: Shape) -> c_void_p:
        o, i, h, w = shape
        return self._layout(shape, F32, (i * h * w, h * w, w, 1))

    def _array(self, shape: Shape) -> np.ndarray:
        """An uninitialised activation."""
        kind = np.float32 if self.type == F32 else np.uint16
        return np.ndarray(shape, kind, self._bytes(math.prod(shape) * (4 if self.type == F32 else 2)))

    def _bytes(self, size: int) -> np.ndarray:
        """Uninitialised memory; when nothing refers to it any more, it is reused for the next array of its size.

        New pages from the system would take as long as some of the operators.
        """
        free = self._free[size]
        block = free.pop() if free else _aligned(size)
        lent = np.frombuffer(block.data, np.uint8)  # views refer to this array, not to the block
        weakref.finalize(lent, free.append, block).atexit = False
        return lent

    def set_batch_shape(self, shape: Shape) -> None:
        """Frees the memory for reuse if the shape of the batch has changed."""
        if shape != self._shape:
            self._shape = shape
            for blocks in self._free.values():
                blocks.clear()

    def _reorder(self, source, source_layout: c_void_p, target, target_layout: c_void_p):
        """Copies into another layout or type, and returns the target."""
        key = ("reorder", source_layout.value, target_layout.value)
        if key not in self._prepared:
            handle, ends = c_void_p(), (source_layout, self.engine, target_layout, self.engine)
            self.create("primitive_desc", "dnnl_reorder_primitive_desc_create", handle, *ends, None)
            self._prepared[key] = Prepared(self, handle, {SRC: source_layout, DST: target_layout})
        self._prepared[key]({SRC: source, DST: target})
        return target

    def _describe(self, name: str, *arguments: object) -> c_void_p:
        """Creates a primitive descriptor."""
        handle = c_void_p()
        self.create("primitive_desc", name, handle, self.engine, *arguments)
        return handle

    def create(self, kind: str, name: str, handle: c_void_p, *arguments: object) -> None:
        """Calls a function of oneDNN that creates an object; it is destroyed with the engine."""
        self.call(name, byref(handle), *arguments)
        self._created.append((f"dnnl_{kind}_destroy", handle))

    def call(self, name: str, *arguments: object) -> None:
        """Calls a function of oneDNN; see the function `call`."""
        call(self.library, name, *arguments)

    def close(self) -> None:
        """Destroys all objects; later calls raise SetupError."""
        self._prepared.clear()
        self._layouts.clear()
        self._destroy()
        self.engine.value = self.stream.value = None


def call(library: ctypes.CDLL, name: str, *arguments: object) -> None:
    """Calls a function of oneDNN; raises SetupError for a status other than success."""
    status = getattr(library, name)(*arguments)
    if status != 0:
        raise SetupError(f"oneDNN: {name} failed with status {status}", fix="use --kernels paddle")


def _destroy(library: ctypes.CDLL, created: list[tuple[str, c_void_p]]) -> None:
    while created:  # the newest first: an object may need older ones
        name, handle = created.pop()
        getattr(library, name)(handle)


class Prepared:
    """An operator for one shape.

    Args:
        layouts: layout of each argument; None: the descriptor's choice.
    """

    def __init__(self, engine: Engine, description: c_void_p, layouts: Mapping[int, c_void_p | None]) -> None:
        self.library, self.stream, self.description = engine.library, engine.stream, description
        self.layouts = {index: layout or self._chosen_layout(index) for index, layout in layouts.items()}
        self.primitive = c_void_p()
        engine.create("primitive", "dnnl_primitive_create", self.primitive, description)
        self.memories = {}
        for index, layout in self.layouts.items():
            memory = self.memories[index] = c_void_p()
            engine.create("memory", "dnnl_memory_create", memory, layout, engine.engine, None)
        pairs = [_Argument(index, memory) for index, memory in self.memories.items()]
        self.arguments = (_Argument * len(pairs))(*pairs)

    def _chosen_layout(self, index: int) -> c_void_p:
        query = 255  # dnnl_query_exec_arg_md
        return c_void_p(self.library.dnnl_primitive_desc_query_md(self.description, c_int(query), c_int(index)))

    def size(self, index: int) -> int:
        """Bytes of an argument; 0 if the operator does not use it."""
        return self.library.dnnl_memory_desc_get_size(self.layouts[index])

    def __call__(self, tensors: dict) -> None:
        for index, memory in self.memories.items():
            self.library.dnnl_memory_set_data_handle(memory, _address(tensors[index]))
        count = c_int(len(self.arguments))
        call(self.library, "dnnl_primitive_execute", self.primitive, self.stream, count, self.arguments)
        call(self.library, "dnnl_stream_wait", self.stream)


def floats(tensor) -> np.ndarray:
    """A view of a float32 tensor's memory on the CPU: writing to it changes the tensor."""
    return np.ctypeslib.as_array((c_float * tensor.size).from_address(tensor.data_ptr()))


def _address(array) -> int:
    return array.ctypes.data if isinstance(array, np.ndarray) else array.data_ptr()


def _aligned(size: int) -> np.ndarray:
    """Uninitialised bytes, aligned to a cache line (64 bytes)."""
    block = np.empty(size + 64, np.uint8)
    start = -block.ctypes.data % 64
    return block[start : start + size]


def dims(*sizes: int):
    """Sizes as oneDNN's type dnnl_dims_t."""
    return (c_int64 * 12)(*sizes)
