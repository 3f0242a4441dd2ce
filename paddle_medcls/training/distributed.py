"""Data-parallel training: ranks, gradients and values that the processes of one run exchange.

Each process computes its share of every batch, and all have the same weights, so that the loop decides
the same in each of them. With one process nothing is exchanged.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from paddle_medcls.core.paddle_setup import paddle

_CALLS = itertools.count()  # of `from_first`, which all processes call in the same order


def join() -> tuple[int, int]:
    """Joins the process group that this process was started in: (rank, number of processes)."""
    import paddle.distributed as dist

    rank, world = dist.get_rank(), dist.get_world_size()
    if world > 1 and not dist.is_initialized():
        paddle_output = io.StringIO()
        with contextlib.redirect_stderr(paddle_output):  # Paddle lists the flags that it has set itself
            dist.init_parallel_env()
        for line in paddle_output.getvalue().splitlines():
            if line.strip() and not line.startswith(("====", "FLAGS(")):
                print(line, file=sys.stderr)
    return rank, world


def pieces(rows: np.ndarray, rank: int, world: int, accumulate: int) -> list[tuple[np.ndarray, float]]:
    """This process's rows of a batch, in as many pieces as the gradient is accumulated over.

    A process without rows computes the first image with weight 0: all must take part in the exchange of gradients.

    Returns:
        The rows of each piece, and its share of the batch; the shares of all processes add up to 1.
    """
    process_rows = rows[rank::world]
    if not len(process_rows):
        return [(rows[:1], 0.0)]
    return [
        (piece, len(piece) / len(rows)) for piece in np.array_split(process_rows, min(accumulate, len(process_rows)))
    ]


def exchange_gradients(parallel, world: int, last: bool):
    """Context of a piece's forward and backward pass: gradients are exchanged once a batch, with the last piece."""
    return contextlib.nullcontext() if world == 1 or last else parallel.no_sync()


def synchronised_batch_norm(model, world: int):
    """The network with SyncBatchNorm on GPUs: batch statistics over the images of all processes.

    Each process weighs the same, also in a last batch with unequal shares. Parameters keep their names.
    """
    if world > 1 and paddle.get_device().startswith("gpu"):
        return paddle.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model


def synchronise(network, world: int) -> None:
    """Gives every process the batch-norm statistics of process 0, so that all validate the same network."""
    if world > 1:
        for tensor in network.state_dict().values():
            paddle.distributed.broadcast(tensor, src=0)


def sum_over_processes(step_metrics, stop_requested: bool, world: int):
    """Sums a step's metrics over the processes, and counts those that are to stop.

    Args:
        step_metrics: (2,) loss and accuracy, each times this process's share of the batch.

    Returns:
        (3,) loss, accuracy, number of processes; a tensor, so that the host need not wait for a GPU.
    """
    step_metrics = paddle.concat([step_metrics, paddle.full([1], float(stop_requested))])
    if world > 1:
        paddle.distributed.all_reduce(step_metrics)
    return step_metrics


def from_first(make: Callable[[], Any], rank: int, world: int, first: int = 0) -> Any:
    """The JSON value that one process computes; the others wait for it, without a time limit.

    A barrier would not do: gloo's gives up after 30 seconds.

    Args:
        first: the process that computes it, for example the first one of each node for its node.
    """
    if world == 1:
        return make()
    store = paddle.base.core.create_or_get_global_tcp_store()
    key = f"paddle_medcls/{next(_CALLS)}/{first}"
    if rank == first:
        store.set(key, json.dumps(make()).encode())
        store.add(f"{key}/set", 1)
    while not store.add(f"{key}/set", 0):
        time.sleep(0.05)  # inside one long request a signal would not be noticed
    return json.loads(store.get(key))


def from_all(value: Any, rank: int, world: int) -> list[Any]:
    """The JSON values of all processes, in their order, once all are there."""
    return [from_first(lambda: value, rank, world, first) for first in range(world)]
