"""Reading of pickles that strangers made: arrays and plain data, and nothing else.

`paddle.load` is `pickle.load`: a weight file can run any program. Here a file is first walked opcode by
opcode, then read by an unpickler that knows a handful of names, each mapped to a stand-in of ours; no
object of the file's choosing is ever made, and no more memory is taken than the file has bytes.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import re
import typing
from collections.abc import Callable

import numpy as np

MAX_OPCODES = 2_000_000  # ResNet-152 has about 30,000
MAX_NODES = 200_000
MAX_DEPTH = 8
MAX_TUPLE = 1000


def read_pickle(data: bytes) -> object:
    """Reads a pickle of dicts, lists, tuples, numbers, strings and numeric arrays.

    Raises:
        pickle.UnpicklingError: for anything else, saying what was asked for.
    """
    _scan(data)
    try:
        value = _Unpickler(data).load()
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # a broken stream makes the unpickler raise almost anything
        raise pickle.UnpicklingError(f"damaged weight file ({type(error).__name__}: {error})") from None
    return _to_plain(value)


_OPCODES = frozenset(
    "PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT "
    "BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 "
    "EMPTY_LIST EMPTY_DICT EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 APPEND APPENDS SETITEM SETITEMS "
    "GLOBAL STACK_GLOBAL REDUCE BUILD BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET".split()
)
"""What protocols 2 to 4 write for dicts of arrays."""


def _scan(data: bytes) -> None:
    """Walks the opcodes without running them: the stream is whole, and what it declares is bounded.

    A tuple may become a dict's key, and is then hashed item by item, in C: nested deeply that ends the
    process, nested in itself it never ends. So a shadow of the stack counts what each tuple holds.
    """
    stack: list[int] = []  # of each value: what it holds, if it is a tuple; else 1
    marks: list[int] = []
    memo: dict[int, int] = {}
    try:
        for count, (opcode, given, _) in enumerate(pickletools.genops(data), start=1):
            name, argument = opcode.name, typing.cast(typing.Any, given)
            if count > MAX_OPCODES:
                raise pickle.UnpicklingError("too many opcodes for a weight file")
            if name not in _OPCODES:
                raise pickle.UnpicklingError(f"opcode {name} is not allowed in a weight file")
            if name == "LONG1" and not -(2**63) <= argument < 2**63:
                raise pickle.UnpicklingError("a number of more than 64 bits")  # such keys can share a hash
            if name in ("BINPUT", "LONG_BINPUT"):
                if argument > count:
                    raise pickle.UnpicklingError("a memo index that no writer makes")  # would allocate gigabytes
                memo[argument] = stack[-1]
            elif name == "MEMOIZE":
                memo[len(memo)] = stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                stack.append(memo[argument])
            elif name == "MARK":
                marks.append(len(stack))
            else:
                marked = pickletools.markobject in opcode.stack_before
                start = marks.pop() if marked else max(len(stack) - len(opcode.stack_before), 0)
                held = stack[start:]
                del stack[start:]
                if name.startswith("TUPLE"):
                    stack.append(1 + sum(held))
                    if stack[-1] > MAX_TUPLE:
                        raise pickle.UnpicklingError("too large or too deep a tuple for a weight file")
                elif not marked:  # the list or dict of APPENDS and SETITEMS lies below the mark, and stays
                    stack += [1] * len(opcode.stack_after)
    except ValueError as error:
        raise pickle.UnpicklingError(
            f"not a weight file, or truncated (begins with {data[:16]!r}; {str(error)[:80]})"
        ) from None
    except (LookupError, OverflowError) as error:
        raise pickle.UnpicklingError(f"damaged weight file ({error})") from None


class _Dtype:
    """Stands in for numpy.dtype: a numeric type and its byte order, nothing else."""

    def __init__(self, code: object = "", *_: object) -> None:
        if not isinstance(code, str) or not re.fullmatch(r"[biufc]\d{1,2}", code):
            raise pickle.UnpicklingError(f"array type {str(code)[:20]!r} is not allowed in a weight file")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """Stands in for numpy.ndarray; the data are taken over when they are as long as the shape says."""

    value: np.ndarray | None = None

    def __setstate__(self, state: tuple) -> None:
        _, shape, kind, fortran, raw = state
        if not isinstance(shape, tuple) or not all(type(n) is int and n >= 0 for n in shape):
            raise pickle.UnpicklingError("a damaged array")
        if not isinstance(kind, _Dtype) or not isinstance(raw, bytes):
            raise pickle.UnpicklingError("a damaged array")
        if len(shape) > 32 or math.prod(shape) * kind.dtype.itemsize != len(raw):
            raise pickle.UnpicklingError(f"an array declared as {shape} {kind.dtype} holds {len(raw)} bytes")
        self.value = np.frombuffer(raw, kind.dtype).reshape(shape, order="F" if fortran else "C")


class _Pair(list):
    """Stands in for the (name, array) tuple by which Paddle saves a tensor inside a structure."""


def _pair(items: object) -> _Pair:
    if not isinstance(items, tuple) or len(items) != 2:
        raise pickle.UnpicklingError("a call of tuple that no weight file needs")
    return _Pair(items)


def _scalar(kind: object, raw: object = b"") -> object:
    if not isinstance(kind, _Dtype) or not isinstance(raw, bytes) or len(raw) != kind.dtype.itemsize:
        raise pickle.UnpicklingError("a damaged number")
    return np.frombuffer(raw, kind.dtype)[0].item()


class _Maker:
    """A function that a file may call; a plain one could have its defaults changed by the file."""

    __slots__ = ("_make",)
    _make: Callable

    def __init__(self, make: Callable) -> None:
        object.__setattr__(self, "_make", make)

    def __call__(self, *arguments: object) -> object:
        return self._make(*arguments)

    def __setattr__(self, name: str, value: object) -> None:
        raise pickle.UnpicklingError("an attempt to change the reader")


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        left = len(data)

        def latin1(text: str, encoding: str) -> bytes:
            """Protocol 2 writes bytes as `_codecs.encode(text, "latin1")`; in all they fit in the file."""
            nonlocal left
            left -= len(text)
            if encoding != "latin1" or not isinstance(text, str) or left < 0:
                raise pickle.UnpicklingError("an encoding that no weight file uses")
            return text.encode("latin1")

        self._allowed: dict[tuple[str, str], object] = {
            ("collections", "OrderedDict"): _Maker(lambda: {}),
            ("__builtin__", "bytes"): _Maker(lambda: b""),  # protocol 2, an empty array
            ("builtins", "tuple"): _Maker(_pair),
            ("__builtin__", "tuple"): _Maker(_pair),
            ("numpy", "ndarray"): "numpy.ndarray",  # only ever passed to _reconstruct
            ("numpy", "dtype"): _Maker(_Dtype),
            ("_codecs", "encode"): _Maker(latin1),
        }
        for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            self._allowed[module, "_reconstruct"] = _Maker(lambda *_: _Array())
            self._allowed[module, "scalar"] = _Maker(_scalar)

    def find_class(self, module: str, name: str) -> object:
        try:
            return self._allowed[module, name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"the file asks for {module}.{name}, which no weight file needs; nothing was run"
            ) from None


def _to_plain(value: object) -> object:
    """Stand-ins become arrays, (name, array) pairs their array; everything else must be plain data."""
    left = [MAX_NODES]

    def convert(item: object, depth: int) -> object:
        left[0] -= 1
        if left[0] < 0 or depth > MAX_DEPTH:
            raise pickle.UnpicklingError("too large or too deep a structure for a weight file")
        if isinstance(item, _Array):
            if item.value is None:
                raise pickle.UnpicklingError("a damaged array")
            return item.value
        if isinstance(item, dict):
            if not all(isinstance(key, (str, int)) for key in item):
                raise pickle.UnpicklingError("a dict with keys that are not names")
            return {key: convert(child, depth + 1) for key, child in item.items()}
        if isinstance(item, (list, tuple)):
            children = [convert(child, depth + 1) for child in item]
            is_tuple = isinstance(item, (tuple, _Pair))
            if is_tuple and len(children) == 2 and isinstance(children[0], str) and isinstance(children[1], np.ndarray):
                return children[1]  # how Paddle saves a tensor inside a structure
            return tuple(children) if is_tuple else children
        if item is None or isinstance(item, (bool, int, float, str)):
            return item
        raise pickle.UnpicklingError(f"a {type(item).__name__} is not allowed in a weight file")

    return convert(value, 0)
