"""Reads untrusted pickles: arrays and plain data only.

`paddle.load` is `pickle.load`: a weight file can run any program. This reader does not use Python's unpickler. It
reads the file opcode by opcode and accepts only what Paddle and NumPy write (protocols 2 to 4):

    value   = None, a bool, a number of at most 64 bits, text, a list, a dict, a tuple, an array
    dict    = {} or OrderedDict(), then pairs; a key is text or a small integer, and occurs once
    array   = _reconstruct(ndarray, (0,), b"b"), then its state (1, shape, dtype, is_fortran, bytes)
    dtype   = dtype("f4", …) of booleans, integers or floats, then its state (3, "<", None, …)
    number  = scalar(dtype, bytes)
    bytes   = as they are; or encode(text, "latin1"), and bytes() if empty (protocol 2)
    tensor  = tuple((name, array)), inside a structure

The type of every value is checked before it is hashed, compared or traversed. No name of a file is looked up or
called. Memory is limited to a small multiple of the file's size.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import re
import typing

import numpy as np

MAX_OPCODES = 500_000  # ResNet-152 has about 30,000
MAX_STACK = 20_000  # pickle writes lists and dicts in pieces of 1000 items
MAX_NODES = 200_000
MAX_DEPTH = 8

_LITERALS = frozenset(
    "BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE BINUNICODE8 SHORT_BINBYTES BINBYTES "
    "BINBYTES8".split()
)
"""Opcodes that push their argument."""

_VIEWED = {"BINBYTES": 4, "BINBYTES8": 8}  # opcode of long bytes -> width of their length
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}  # opcode -> length
_OTHERS = frozenset(
    "PROTO FRAME STOP MARK EMPTY_LIST EMPTY_DICT TUPLE APPEND APPENDS SETITEM SETITEMS GLOBAL STACK_GLOBAL "
    "REDUCE BUILD BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET".split()
)
_ALLOWED = _LITERALS | _CONSTANTS.keys() | _TUPLES.keys() | _OTHERS
_OPCODES = {opcode.code: opcode for opcode in pickletools.opcodes}

_NAMES = {
    "collections OrderedDict": "OrderedDict",
    "builtins tuple": "tuple",
    "__builtin__ tuple": "tuple",
    "__builtin__ bytes": "bytes",
    "_codecs encode": "encode",
    "numpy ndarray": "ndarray",
    "numpy dtype": "dtype",
    **{f"numpy.{core}.multiarray {name}": name for core in ("core", "_core") for name in ("_reconstruct", "scalar")},
}
"""Globals that a file may name; none is looked up: `_Reader.call` returns what each would."""


def read_pickle(data: bytes) -> object:
    """Reads a pickle of dicts, lists, tuples, numbers, strings and numeric arrays.

    Returns:
        The value. Arrays are read-only views of the bytes in the file.

    Raises:
        pickle.UnpicklingError: anything else; the message names it.
    """
    if data[:1] != b"\x80":  # protocols 0 and 1, web pages, archives
        raise pickle.UnpicklingError(f"not a weight file: begins with {data[:16]!r}")
    try:
        return _to_plain(_Reader(data).read(), min(MAX_NODES, len(data)))
    except (IndexError, KeyError):
        raise pickle.UnpicklingError("damaged weight file: it uses a value that it does not hold") from None
    except (ValueError, TypeError) as error:  # raised by the readers of arguments and by NumPy
        raise pickle.UnpicklingError(
            f"not a weight file, or truncated (begins with {data[:16]!r}; {str(error)[:80]})"
        ) from None


def _kind(value: object) -> str:
    """Returns the name of a value's type, for a message."""
    return "bytes" if type(value) is memoryview else type(value).__name__.lstrip("_")


class _Name:
    """A global of `_NAMES`; `text` is its short name."""

    def __init__(self, text: str) -> None:
        if text not in _NAMES:
            name = text[:80].replace(" ", ".")
            raise pickle.UnpicklingError(f"the file asks for {name}, which no weight file needs; nothing was run")
        self.text = _NAMES[text]


def _two_lines(stream: io.BytesIO) -> str:
    """Returns module and name of a GLOBAL; pickletools' own reader undoes escapes and warns of unknown ones."""
    lines = [stream.readline(), stream.readline()]
    if not all(line.endswith(b"\n") for line in lines):
        raise ValueError("a name does not end")
    return " ".join(line[:-1].decode("ascii") for line in lines)


class _Dtype:
    """A numeric type and its byte order."""

    def __init__(self, code: str) -> None:
        if not re.fullmatch(r"[biufc][0-9]{1,2}", code):
            raise pickle.UnpicklingError(f"array type {code[:20]!r} is not allowed in a weight file")
        self.dtype = np.dtype(code)

    def build(self, state: tuple) -> None:
        """Sets the byte order from the state (3, "<", None, …) of NumPy's dtype."""
        if len(state) != 8 or type(state[1]) is not str or any(part is not None for part in state[2:5]):
            raise pickle.UnpicklingError("a damaged array type")
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder("<" if state[1] == "<" else ">")


class _Tuple(tuple):
    """A tuple with its depth: freeing one that is nested 100,000 times would overflow the stack of C."""

    depth = 0

    @staticmethod
    def of(items: list) -> _Tuple:
        """Makes a tuple of at most MAX_DEPTH levels."""
        value = _Tuple(items)
        value.depth = 1 + max((item.depth for item in items if type(item) is _Tuple), default=0)
        if value.depth > MAX_DEPTH:
            raise pickle.UnpicklingError("too deep a tuple for a weight file")
        return value


_ARRAY_STATES = [(int, _Tuple, _Dtype, order, data) for order in (bool, int) for data in (bytes, memoryview)]


class _Array:
    """An array; `value` is None until its state is read."""

    value: np.ndarray | None = None

    def build(self, state: tuple) -> int:
        """Sets the value from NumPy's state (1, shape, dtype, is_fortran, bytes); returns the number of bytes."""
        if self.value is not None or tuple(map(type, state)) not in _ARRAY_STATES:
            raise pickle.UnpicklingError("a damaged array")
        _, shape, kind, fortran, data = state
        if len(shape) > 32 or not all(type(n) is int and n >= 0 for n in shape):
            raise pickle.UnpicklingError("a damaged array: its shape is not up to 32 numbers")
        if math.prod(shape) * kind.dtype.itemsize != len(data):
            raise pickle.UnpicklingError(f"an array declared as {shape} {kind.dtype} holds {len(data)} bytes")
        self.value = np.frombuffer(data, kind.dtype).reshape(shape, order="F" if fortran else "C")
        return len(data)


class _Reader:
    """The stack machine of a pickle.

    Attributes:
        stack: values since the last mark.
        marked: the stacks below, one for each open mark.
        text_left, array_left: bytes that encoded text and that arrays may still take: each at most the file's size.
    """

    def __init__(self, data: bytes) -> None:
        self.data = memoryview(data)
        self.stream = io.BytesIO(data)
        self.stack: list = []
        self.marked: list[list] = []
        self.memo: dict[int, object] = {}
        self.text_left = self.array_left = len(data)

    def read(self) -> object:
        """Runs the program up to STOP and returns the value that is left on the stack."""
        for _ in range(MAX_OPCODES):
            code = self.stream.read(1)
            opcode = _OPCODES.get(code.decode("latin-1"))
            if opcode is None:
                raise ValueError(f"{code!r} at {self.stream.tell() - 1} is no opcode" if code else "the end is missing")
            if opcode.name not in _ALLOWED:
                raise pickle.UnpicklingError(f"opcode {opcode.name} is not allowed in a weight file")
            argument: typing.Any = None
            if opcode.name == "GLOBAL":
                argument = _two_lines(self.stream)
            elif opcode.name in _VIEWED:
                argument = self.view(_VIEWED[opcode.name])
            elif opcode.arg:
                argument = opcode.arg.reader(self.stream)
            if opcode.name == "STOP":
                if len(self.stack) != 1 or self.marked:
                    raise pickle.UnpicklingError("damaged weight file: it does not end with one value")
                return self.stack[0]
            self.step(opcode.name, argument)
            if len(self.stack) > MAX_STACK or len(self.marked) > 4 * MAX_DEPTH:
                raise pickle.UnpicklingError("too large or too deep a structure for a weight file")
        raise pickle.UnpicklingError("too many opcodes for a weight file")

    def view(self, width: int) -> memoryview:
        """Reads bytes after their length, which has `width` bytes; a view, as copying takes long."""
        length = int.from_bytes(self.stream.read(width), "little")
        start = self.stream.tell()
        if start + length > len(self.data):
            raise ValueError(f"{length} bytes expected, {len(self.data) - start} remain")
        self.stream.seek(start + length)
        return self.data[start : start + length]

    def step(self, name: str, argument: typing.Any) -> None:
        """Runs one opcode; PROTO and FRAME have no effect."""
        stack = self.stack
        if name in _LITERALS:
            if name == "LONG1" and not -(2**63) <= argument < 2**63:
                raise pickle.UnpicklingError("a number of more than 64 bits")
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _TUPLES:
            stack.append(_Tuple.of([self.pop() for _ in range(_TUPLES[name])][::-1]))
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name == "MARK":
            self.marked.append(stack)
            self.stack = []
        elif name in ("TUPLE", "APPENDS", "SETITEMS"):
            self.stack = self.marked.pop()
            if name == "TUPLE":
                self.stack.append(_Tuple.of(stack))
            elif name == "APPENDS":
                self.append(stack)
            else:
                self.set_items(stack)
        elif name == "APPEND":
            self.append([self.pop()])
        elif name == "SETITEM":
            value, key = self.pop(), self.pop()
            self.set_items([key, value])
        elif name == "EMPTY_LIST":
            stack.append([])
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name == "GLOBAL":
            stack.append(_Name(argument))
        elif name == "STACK_GLOBAL":
            attribute, module = self.pop(str), self.pop(str)
            stack.append(_Name(f"{module} {attribute}"))
        elif name == "REDUCE":
            arguments, function = self.pop(_Tuple), self.pop(_Name)
            stack.append(self.call(function.text, arguments))
        elif name == "BUILD":
            self.build(self.pop(_Tuple))

    def pop(self, kind: type = object) -> typing.Any:
        """Removes and returns the last value, which must be of this type."""
        value = self.stack.pop()
        if kind is not object and type(value) is not kind:
            raise pickle.UnpicklingError(f"damaged weight file: a {_kind(value)} where something else belongs")
        return value

    def last(self, kind: type) -> typing.Any:
        """Returns the last value, a list or dict to which items are added."""
        if type(self.stack[-1]) is not kind:
            raise pickle.UnpicklingError(f"damaged weight file: items added to a {_kind(self.stack[-1])}")
        return self.stack[-1]

    def append(self, items: list) -> None:
        """Adds items to the list that is the last value."""
        self.last(list).extend(items)

    def set_items(self, items: list) -> None:
        """Adds keys and values, which alternate, to the dict that is the last value."""
        target = self.last(dict)
        if len(items) % 2:
            raise pickle.UnpicklingError("a key without a value")
        for key, value in zip(items[::2], items[1::2]):
            if type(key) is not str and not (type(key) is int and abs(key) < 2**31):
                raise pickle.UnpicklingError("a dict with keys that are not names")
            if key in target:
                raise pickle.UnpicklingError(f"the name {str(key)[:80]!r} occurs twice in a dict")
            target[key] = value

    def call(self, name: str, arguments: tuple) -> object:
        """Returns the result of a call that Paddle or NumPy writes; all others are refused."""
        kinds = tuple(map(type, arguments))
        if name == "OrderedDict" and not kinds:
            return {}
        if name == "bytes" and not kinds:
            return b""
        if name == "tuple" and kinds == (_Tuple,):
            return arguments[0]
        if name == "encode" and kinds == (str, str) and arguments[1] == "latin1":
            self.text_left -= len(arguments[0])
            if self.text_left >= 0:
                return arguments[0].encode("latin1")
        if name == "dtype" and kinds[:1] == (str,):
            return _Dtype(arguments[0])
        if name == "_reconstruct" and kinds == (_Name, _Tuple, bytes) and arguments[0].text == "ndarray":
            return _Array()
        if name == "scalar" and kinds == (_Dtype, bytes) and arguments[0].dtype.itemsize == len(arguments[1]):
            return np.frombuffer(arguments[1], arguments[0].dtype)[0].item()
        raise pickle.UnpicklingError(f"a call of {name} that no weight file makes")

    def build(self, state: tuple) -> None:
        """Sets the state of the last value, an array or a dtype."""
        target = self.stack[-1]
        if type(target) is _Array:
            self.array_left -= target.build(state)
        elif type(target) is _Dtype:
            target.build(state)
        else:
            raise pickle.UnpicklingError(f"an attempt to set the state of a {_kind(target)}")
        if self.array_left < 0:
            raise pickle.UnpicklingError("arrays of more bytes than the file has")


def _to_plain(value: object, left: int) -> object:
    """Converts arrays to NumPy's and (name, array) pairs to their array; all else must be plain data.

    Args:
        left: limit on the number of values; a shared one counts at each occurrence.
    """

    def convert(item: object, depth: int) -> object:
        nonlocal left
        left -= 1
        if left < 0 or depth > MAX_DEPTH:
            raise pickle.UnpicklingError("too large or too deep a structure for a weight file")
        if isinstance(item, _Array):
            if item.value is None:
                raise pickle.UnpicklingError("a damaged array")
            return item.value
        if isinstance(item, dict):
            return {key: convert(child, depth + 1) for key, child in item.items()}
        if isinstance(item, (list, tuple)):
            children = [convert(child, depth + 1) for child in item]
            if isinstance(item, list):
                return children
            if len(children) == 2 and isinstance(children[0], str) and isinstance(children[1], np.ndarray):
                return children[1]  # a tensor that Paddle saved inside a structure
            return tuple(children)
        if item is None or type(item) in (bool, int, float, str):
            return item
        raise pickle.UnpicklingError(f"a {_kind(item)} is not allowed in a weight file")

    return convert(value, 0)
