"""Weight files: safe reading, recognition of other people's layouts, strict loading.

`paddle.load` is `pickle.load`: a weight file can run any program. Here a `.pdparams` file is first
walked opcode by opcode, then read by an unpickler that knows a handful of names, each mapped to a
stand-in of ours; no object of the file's choosing is ever made, and no more memory is taken than the
file has bytes.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from paddle_medcls.errors import WeightsError
from paddle_medcls.files import atomic_write
from paddle_medcls.models import Network
from paddle_medcls.runtime import paddle

MAX_OPCODES = 2_000_000  # ResNet-152 has about 30,000
MAX_NODES = 200_000
MAX_DEPTH = 8
MAX_TUPLE = 1000
_NAME_TABLE = "StructuredToParameterName@@"  # paddle.save's map to its own names; paddle.load drops it


# --- reading -------------------------------------------------------------------------------------


def read_weights(path: str | Path) -> dict[str, np.ndarray]:
    """Reads a state dict from `.pdparams` (Paddle 2 and 3) or `.safetensors`; never runs code.

    Returns:
        Parameter name -> array.

    Raises:
        WeightsError: missing, truncated, not a weight file, or asking for anything but arrays.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise WeightsError(f"{path}: {error.strerror or error}", do="check the path given to --weights") from None
    if not data:
        raise WeightsError(f"{path}: the file is empty", do="copy or download it again")
    if path.suffix == ".safetensors":
        return _read_safetensors(data, path)
    try:
        state = read_pickle(data)
    except pickle.UnpicklingError as error:
        raise WeightsError(f"{path}: {error}", do="do not use this file unless you know who made it") from None
    if not isinstance(state, dict):
        raise WeightsError(f"{path}: holds a {type(state).__name__}", expected="a state dict: names and arrays")
    state.pop(_NAME_TABLE, None)
    strange = [f"{key}: {type(value).__name__}" for key, value in state.items() if not isinstance(value, np.ndarray)]
    if strange or not state:
        raise WeightsError(
            f"{path}: not a model's state dict", items=strange, expected="names and arrays, as model.state_dict() gives"
        )
    return {str(name): value for name, value in state.items()}


def _read_safetensors(data: bytes, path: Path) -> dict[str, np.ndarray]:
    import safetensors
    import safetensors.numpy

    try:
        return safetensors.numpy.load(data)
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{path}: not a safetensors file: {error}", do="copy or download it again") from None


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
        for count, (opcode, argument, _) in enumerate(pickletools.genops(data), start=1):
            name = opcode.name
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


# --- layouts -------------------------------------------------------------------------------------

_LAYOUTS = (  # (layout, a name only it has, patterns: theirs -> ours; <k> is the block's number)
    ("document 003", "conv.0.weight", ()),
    (
        "document 001",
        "conv._conv.weight",
        (
            (r"bb_(\d+)_(\d+)\.", "stage"),
            (r"\bconv2\._", "conv3._"),
            (r"\bconv1\._", "conv2._"),
            (r"\bconv0\._", "conv1._"),
            (r"\bshort\._", "shortcut._"),
            (r"\._conv\.", ".0."),
            (r"\._batch_norm\.", ".1."),
            (r"^out\.", "fc."),
        ),
    ),
    (
        "PaddleClas",
        "stem.0.conv.weight",
        (
            (r"^stem\.0\.", "conv."),
            (r"^blocks\.", "block."),
            (r"\.conv2\.(conv|bn)\.", r".conv3.\1."),
            (r"\.conv1\.(conv|bn)\.", r".conv2.\1."),
            (r"\.conv0\.(conv|bn)\.", r".conv1.\1."),
            (r"\.short\.", ".shortcut."),
            (r"conv\.conv\.weight$", "conv.0.weight"),
            (r"\.conv\.weight$", ".0.weight"),
            (r"\.bn\.", ".1."),
        ),
    ),
    (
        "paddle.vision",
        "layer1.0.conv1.weight",
        (
            (r"layer(\d+)\.(\d+)\.", "stage"),
            (r"\.(conv\d)\.", r".\1.0."),
            (r"\.bn(\d)\.", r".conv\1.1."),
            (r"\.downsample\.", ".shortcut."),
            (r"^conv1\.", "conv.0."),
            (r"^bn1\.", "conv.1."),
            (r"\.running_mean$", "._mean"),
            (r"\.running_var$", "._variance"),
        ),
    ),
)
_DEPTHS = {(8, False): 18, (16, False): 34, (16, True): 50, (33, True): 101, (50, True): 152}


def recognise(state: dict[str, np.ndarray], name: object) -> tuple[Network, dict[str, np.ndarray], str]:
    """Tells a network and its layout by the names and gives it ours.

    Args:
        state: as read.
        name: the file, for messages.

    Returns:
        The network, the state dict under our names, and the layout: "document 003", "document 001",
        "paddle.vision", "torchvision" or "PaddleClas".
    """
    if "features.0.weight" in state and "classifier.0.weight" in state:
        return _recognise_vgg(state, name)
    layout, patterns = next(((name, found) for name, mark, found in _LAYOUTS if mark in state), ("", ()))
    if not layout:
        raise WeightsError(
            f"{name}: the layout is not known; it begins with {', '.join(list(state)[:4])}",
            expected="a ResNet of document 001 or 003, of paddle.vision, torchvision or PaddleClas, or a VGG-16",
        )
    torch = any(key.endswith("running_mean") for key in state)
    stages: dict[int, int] = {}
    for key in state:
        if found := re.match(r"(?:bb_|layer)(\d+)[._](\d+)\.", key):
            stages[int(found[1])] = max(stages.get(int(found[1]), 0), int(found[2]) + 1)
    renamed = {}
    for key, value in state.items():
        if key.endswith("num_batches_tracked"):
            continue
        ours = key
        for pattern, replacement in patterns:
            if replacement == "stage":
                ours = re.sub(pattern, lambda found: f"block.{_block_number(found, stages)}.", ours)
            else:
                ours = re.sub(pattern, replacement, ours)
        renamed[ours] = value.T if torch and ours == "fc.weight" else value
    return _network(renamed, name), renamed, "torchvision" if torch else layout


def _recognise_vgg(state: dict[str, np.ndarray], name: object) -> tuple[Network, dict[str, np.ndarray], str]:
    """VGG-16 of paddle.vision or torchvision (whose linear weights are transposed), with its head or ours.

    Both flatten the features in the order C, H, W, so the first linear layer needs nothing more.
    """
    torch = state["classifier.0.weight"].shape == (4096, 25088)
    if torch:
        state = {k: v.T if k.startswith("classifier") and v.ndim == 2 else v for k, v in state.items()}
    last = state.get("classifier.6.3.weight", state.get("classifier.6.weight"))
    first = state["features.0.weight"]
    if last is None or last.ndim != 2 or first.ndim != 4 or "features.28.weight" not in state:
        raise WeightsError(
            f"{name}: not a VGG-16: {len(state)} entries, {'a' if last is not None else 'no'} last layer"
        )
    return Network("vgg16", last.shape[1], first.shape[1]), state, "torchvision" if torch else "paddle.vision"


def _block_number(found: re.Match, stages: dict[int, int]) -> int:
    return sum(count for stage, count in stages.items() if stage < int(found[1])) + int(found[2])


def _network(state: dict[str, np.ndarray], name: object) -> Network:
    blocks = {int(found[1]) for key in state if (found := re.match(r"block\.(\d+)\.", key))}
    bottleneck = "block.0.conv3.0.weight" in state
    depth = _DEPTHS.get((len(blocks), bottleneck))
    stem, head = state.get("conv.0.weight"), state.get("fc.weight")
    if depth is None or stem is None or head is None or stem.ndim != 4 or head.ndim != 2:
        raise WeightsError(
            f"{name}: not a ResNet-18, 34, 50, 101 or 152: {len(blocks)} "
            f"{'bottleneck' if bottleneck else 'basic'} blocks, "
            f"{'a' if stem is not None else 'no'} stem, {'a' if head is not None else 'no'} last layer"
        )
    return Network(
        model=f"resnet{depth}",
        num_outputs=head.shape[1],
        in_channels=stem.shape[1],
        stem="imagenet" if stem.shape[2] == 7 else "small",
        project_first=not bottleneck and "block.0.shortcut.0.weight" in state,
    )


# --- loading and saving --------------------------------------------------------------------------


def load_strict(model, state: dict[str, np.ndarray], name: object) -> None:
    """Sets a model's weights, or changes nothing: names, shapes, types and values are checked first.

    Raises:
        WeightsError: one message that lists all that is missing, left over, mis-shaped or not finite.
    """
    own = model.state_dict()
    faults = [f"missing      {key}" for key in own if key not in state]
    faults += [f"left over    {key}" for key in state if key not in own]
    for key in own.keys() & state.keys():
        want, got = list(own[key].shape), list(state[key].shape)
        if want != got:
            faults.append(f"wrong shape  {key}: file {got}, network {want}")
        elif state[key].dtype != np.float32:
            faults.append(f"wrong type   {key}: {state[key].dtype}, expected float32")
        elif not np.isfinite(state[key]).all():
            faults.append(f"not finite   {key}")
    if faults:
        raise WeightsError(
            f"{name}: does not fit the network: {len(faults)} of {len(own)} entries differ",
            items=sorted(faults),
            do="give the model that the file was made with (--model), or another file",
        )
    missing, unexpected = model.set_state_dict({key: np.ascontiguousarray(value) for key, value in state.items()})
    assert not missing and not unexpected, "the checks above cover what Paddle checks"


def load_pretrained(model, network: Network, path: str | Path) -> str:
    """Starts a model from a file's weights; only the head may differ, and then stays random.

    Returns:
        One line that says what was taken.
    """
    found, state, layout = recognise(read_weights(path), path)
    if (found.model, found.in_channels, found.stem) != (network.model, network.in_channels, network.stem):
        raise WeightsError(
            f"{path}: holds {found.model}, {found.in_channels} channel(s), {found.stem} stem",
            expected=f"{network.model}, {network.in_channels} channel(s), {network.stem} stem",
        )
    own = model.state_dict()
    head = {key for key in (*own, *state) if key.startswith(model.head_name + ".")}
    taken = "with its last layers"
    if any(key not in state or key not in own or list(state[key].shape) != list(own[key].shape) for key in head):
        state = {key: value for key, value in state.items() if key not in head}
        state |= {key: own[key].numpy() for key in own if key in head}
        taken = f"without its last layers ({found.num_outputs} outputs; {network.num_outputs} wanted)"
    load_strict(model, state, path)
    return f"pretrained: {found.model} ({layout} names) from {path}, {taken}"


def save_weights(model, path: str | Path) -> None:
    """Writes `.pdparams` in Paddle's own format; the file is whole or the old one stays."""
    state = model.state_dict()
    atomic_write(path, lambda temporary: paddle.save(state, temporary))
