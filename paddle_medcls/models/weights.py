"""Weight files: safe reading, strict loading, atomic saving."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from paddle_medcls.core.errors import WeightsError
from paddle_medcls.core.files import MAX_JSON_BYTES, atomic_write, parse_json, read_bounded
from paddle_medcls.models.network import MODELS, Network
from paddle_medcls.models.safe_pickle import read_pickle
from paddle_medcls.models.weight_layouts import recognise

MAX_BYTES = 4 << 30  # VGG-16 with an ImageNet head has 0.55 GB
_NAME_TABLE = "StructuredToParameterName@@"  # paddle.save's map to its own names; paddle.load drops it


def read_weights(path: str | Path) -> dict[str, np.ndarray]:
    """Reads a state dict from `.pdparams` (Paddle 2 and 3) or `.safetensors`; never runs code.

    Returns:
        Parameter name -> array.

    Raises:
        WeightsError: missing, truncated, larger than 4 GiB, not a weight file, or asking for anything but arrays.
    """
    return parse_weights(read_weight_file(Path(path)), Path(path))


def read_weight_file(path: Path) -> bytes:
    """The bytes of a weight file; errors as for `read_weights`."""
    try:
        data = read_bounded(path, MAX_BYTES)
    except OSError as error:
        raise WeightsError(f"{path}: {error.strerror or error}", fix="check the path given to --weights") from None
    if not data:
        raise WeightsError(f"{path}: the file is empty", fix="copy or download it again")
    return data


def parse_weights(data: bytes, path: Path) -> dict[str, np.ndarray]:
    """The arrays in the bytes of a weight file, read-only views of them; see `read_weights`.

    Args:
        path: of the file: its ending tells the format, messages name it.
    """
    if path.suffix == ".safetensors":
        return _read_safetensors(data, path)
    try:
        state = read_pickle(data)
    except pickle.UnpicklingError as error:
        raise WeightsError(f"{path}: {error}", fix="do not use this file unless you know who made it") from None
    if not isinstance(state, dict):
        raise WeightsError(f"{path}: holds a {type(state).__name__}", expected="a state dict: names and arrays")
    state.pop(_NAME_TABLE, None)
    not_arrays = [f"{key}: {type(value).__name__}" for key, value in state.items() if not isinstance(value, np.ndarray)]
    if not_arrays or not state:
        raise WeightsError(
            f"{path}: not a model's state dict", items=not_arrays, expected="names and arrays, as in model.state_dict()"
        )
    return {str(name): value for name, value in state.items()}


def _read_safetensors(data: bytes, path: Path) -> dict[str, np.ndarray]:
    import safetensors
    import safetensors.numpy

    length = int.from_bytes(data[:8], "little")
    try:
        if length > MAX_JSON_BYTES:
            raise ValueError(f"a header of {length:,} bytes; at most {MAX_JSON_BYTES:,} are read")
        parse_json(data[8 : 8 + length])  # the library takes the last of two tensors of one name
        return safetensors.numpy.load(data)
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{path}: not a safetensors file: {error}", fix="copy or download it again") from None


def check_arrays(state: dict[str, np.ndarray], shapes: Mapping[str, Sequence[int]], name: object) -> None:
    """Checks that arrays are those of a network: keys, shapes, types and values.

    Args:
        state: as read from the file, under our names.
        shapes: key -> shape of each array of the network.

    Raises:
        WeightsError: one message that lists missing and unexpected keys, wrong shapes and types, values not finite.
    """
    faults = [f"missing      {key}" for key in shapes if key not in state]
    faults += [f"unexpected   {key}" for key in state if key not in shapes]
    for key in shapes.keys() & state.keys():
        expected, actual = list(shapes[key]), list(state[key].shape)
        if expected != actual:
            faults.append(f"wrong shape  {key}: file {actual}, network {expected}")
        elif state[key].dtype != np.float32:
            faults.append(f"wrong type   {key}: {state[key].dtype}, expected float32")
        elif not np.isfinite(state[key]).all():
            faults.append(f"not finite   {key}")
    if faults:
        raise WeightsError(
            f"{name}: does not fit the network: {len(faults)} of {len(shapes)} entries differ",
            items=sorted(faults),
            fix="select the model that the file was trained with (--model), or use another file",
        )


def load_strict(model, state: dict[str, np.ndarray], name: object) -> None:
    """Sets a model's weights after checking all of them, see `check_arrays`; a refused file changes nothing."""
    check_arrays(state, {key: value.shape for key, value in model.state_dict().items()}, name)
    arrays = {key: np.require(value, requirements=["C", "A"]) for key, value in state.items()}
    missing, unexpected = model.set_state_dict(arrays)
    if missing or unexpected:  # cannot happen: `check_arrays` covers what Paddle checks
        raise WeightsError(f"{name}: Paddle did not take {', '.join([*missing, *unexpected])}", fix="report this")


def load_pretrained(model, network: Network, path: str | Path) -> str:
    """Initialises a model from a weight file; a head of another size is left out and stays random.

    Returns:
        One line for the log: the file's network and layout, and whether its head is used.

    Raises:
        WeightsError: the file holds another network, or does not fit it.
    """
    state = read_weights(path)
    if MODELS[network.model] == "vision":
        state, layout = model.own_names(state)
    else:
        source, state, layout = recognise(state, path)
        if (source.model, source.in_channels, source.stem) != (network.model, network.in_channels, network.stem):
            raise WeightsError(
                f"{path}: holds {source.model}, {source.in_channels} channel(s), {source.stem} stem",
                expected=f"{network.model}, {network.in_channels} channel(s), {network.stem} stem",
            )
    network_state = model.state_dict()
    head = {key for key in (*network_state, *state) if key.startswith(model.head_name + ".")}
    extent = "with its head"
    if any(
        key not in state or key not in network_state or list(state[key].shape) != list(network_state[key].shape)
        for key in head
    ):
        outputs = [len(value) for key, value in state.items() if key in head and value.ndim == 1][-1:]
        state = {key: value for key, value in state.items() if key not in head}
        state |= {key: network_state[key].numpy() for key in network_state if key in head}
        extent = f"without its head ({outputs[0] if outputs else 'no'} outputs; expected {network.num_outputs})"
    load_strict(model, state, path)
    return f"pretrained: {network.model} ({layout} names) from {path}, {extent}"


def save_weights(model, path: str | Path) -> None:
    """Writes `.pdparams` in Paddle's own format, see `files.atomic_write`."""
    from paddle_medcls.core.paddle_setup import paddle  # here: reading needs no Paddle

    state = model.state_dict()
    atomic_write(path, lambda temporary: paddle.save(state, temporary))
