"""Training checkpoints: atomic save and bit-exact resume.

One safetensors file holds the weights, the optimizer's tensors and the history; what is not a tensor
(step, learning-rate scheduler, best metric) is JSON in its header. No random generator is stored:
the loop reseeds Paddle at every step from (seed, step), and readers from (seed, epoch, row).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from paddle_medcls.core.errors import RunError
from paddle_medcls.core.files import atomic_write
from paddle_medcls.core.paddle_setup import paddle

FILE = "last/state.safetensors"


def save_state(run_dir: Path, tensors: dict[str, dict], scalars: dict) -> None:
    """Writes the state of a run.

    Args:
        tensors: groups ("model", "optimizer", …), each a (nested) dict of tensors, arrays and numbers.
    """
    import safetensors.numpy

    def write(temporary: str) -> None:
        try:
            safetensors.numpy.save_file(arrays, temporary, metadata=metadata)
        except safetensors.SafetensorError as error:  # a full disk, too
            raise OSError(str(error)) from None

    arrays: dict[str, np.ndarray] = {}
    plain: dict[str, object] = {}
    for group, values in tensors.items():
        _flatten(group, values, arrays, plain)
    metadata = {"scalars": json.dumps(scalars), "plain": json.dumps(plain)}
    atomic_write(run_dir / FILE, write)


def _flatten(prefix: str, value: object, arrays: dict, plain: dict) -> None:
    if isinstance(value, dict) and value:
        for key, child in value.items():
            _flatten(f"{prefix}/{key}", child, arrays, plain)
    elif isinstance(value, paddle.Tensor):
        arrays[prefix] = np.ascontiguousarray(value.numpy())
    elif isinstance(value, np.ndarray):
        arrays[prefix] = np.ascontiguousarray(value)
    else:
        plain[prefix] = value


def load_state(run_dir: Path) -> tuple[dict[str, Any], dict]:
    """Reads what `save_state` wrote: (groups, scalars).

    Raises:
        RunError: no such file, or one that cannot be read.
    """
    import safetensors

    path = run_dir / FILE
    if not path.is_file():
        raise RunError(
            f"{run_dir} holds nothing to resume",
            expected=FILE,
            fix="give the run directory of an interrupted training",
        )
    groups: dict[str, Any] = {}
    try:
        with safetensors.safe_open(path, framework="np") as file:
            metadata = file.metadata()
            entries = {key: file.get_tensor(key) for key in file.keys()}
        plain, scalars = json.loads(metadata["plain"]), json.loads(metadata["scalars"])
        for key, value in {**plain, **entries}.items():
            *parents, last = key.split("/")
            group = groups
            for parent in parents:
                group = group.setdefault(parent, {})
            group[last] = value
    except (safetensors.SafetensorError, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise RunError(f"the state of the run cannot be read: {error}", path=path) from None
    except RecursionError:
        raise RunError("the state of the run cannot be read: it is nested too deep", path=path) from None
    return groups, scalars
