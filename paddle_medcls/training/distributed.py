"""Several processes on one run: who they are, and what they exchange.

Each computes its share of every batch, and all hold the same weights, so that every decision of the
loop falls alike in each of them. With one process nothing is exchanged.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from paddle_medcls.core.paddle_setup import paddle

_CALLS = itertools.count()  # of `from_first`, which all processes call in the same order


def join() -> tuple[int, int]:
    """Meets the processes that were started with this one: (its rank, their number)."""
    import paddle.distributed as dist

    world = dist.get_world_size()
    if world > 1 and not dist.is_initialized():
        said = io.StringIO()
        with contextlib.redirect_stderr(said):  # Paddle lists the flags that it has set itself
            dist.init_parallel_env()
        for line in said.getvalue().splitlines():
            if line.strip() and not line.startswith(("====", "FLAGS(")):
                print(line, file=sys.stderr)
    return dist.get_rank(), world


def pieces(rows: np.ndarray, rank: int, world: int, accumulate: int) -> list[tuple[np.ndarray, float]]:
    """This process's rows of a batch, in as many pieces as the gradient is accumulated over.

    A process that would have none computes the first image, for nothing: all must take part in the
    exchange of gradients.

    Returns:
        Each piece's rows, and the part of the batch that they are; the parts of all processes add up to 1.
    """
    mine = rows[rank::world]
    if not len(mine):
        return [(rows[:1], 0.0)]
    return [(piece, len(piece) / len(rows)) for piece in np.array_split(mine, min(accumulate, len(mine)))]


def exchange(parallel, world: int, last: bool):
    """Around a piece's forward and backward pass: gradients are exchanged once a batch, with the last piece."""
    return contextlib.nullcontext() if world == 1 or last else parallel.no_sync()


def whole_batch_norm(model, world: int):
    """The network with batch-norm statistics over all processes' images, where Paddle has that: on GPUs.

    They are exact where the processes' shares are equal; in a last batch that cannot be shared
    equally each share weighs the same. Parameters and their names stay what they were.
    """
    if world > 1 and paddle.get_device().startswith("gpu"):
        return paddle.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model


def synchronise(network, world: int) -> None:
    """Gives every process the batch-norm statistics of process 0, so that all judge the same network."""
    if world > 1:
        for tensor in network.state_dict().values():
            paddle.distributed.broadcast(tensor, src=0)


def over_processes(figures, asked: bool, world: int):
    """Adds up what each process has of a batch, and the number of those that were asked to stop.

    Args:
        figures: (2,) loss and accuracy, each times this process's part of the batch.
        asked: whether this process was asked to stop.

    Returns:
        (3,) loss, accuracy, number; a tensor, so that a GPU need not be waited for.
    """
    figures = paddle.concat([figures, paddle.full([1], float(asked))])
    if world > 1:
        paddle.distributed.all_reduce(figures)
    return figures


def from_first(make: Callable[[], Any], rank: int, world: int) -> Any:
    """What process 0 makes, a JSON value; the others wait for it, however long it takes.

    A barrier would not do: gloo's gives up after 30 seconds.
    """
    if world == 1:
        return make()
    store = paddle.base.core.create_or_get_global_tcp_store()
    key = f"paddle_medcls/{next(_CALLS)}"
    if rank == 0:
        text = json.dumps(make())
        store.set(key, text.encode())
    else:
        text = store.get(key)
    return json.loads(text)
