"""Several processes on one run: who they are, and what they exchange.

Each computes its share of every batch, and all hold the same weights, so that every decision of the
loop falls alike in each of them. With one process nothing is exchanged.
"""

from __future__ import annotations

import numpy as np

from paddle_medcls.runtime import paddle


def join() -> tuple[int, int]:
    """Meets the processes that were started with this one: (its rank, their number)."""
    import paddle.distributed as dist

    world = dist.get_world_size()
    if world > 1:
        dist.init_parallel_env()
    return dist.get_rank(), world


def share(rows: np.ndarray, rank: int, world: int) -> tuple[np.ndarray, float]:
    """This process's rows of a batch, and the part of the batch that they are.

    A process that would have none computes the first image, for nothing: all must take part in the
    exchange of gradients.
    """
    mine = rows[rank::world]
    return (mine, len(mine) / len(rows)) if len(mine) else (rows[:1], 0.0)


def synchronise(network, world: int) -> None:
    """Gives every process the batch-norm statistics of process 0, so that all judge the same network."""
    if world > 1:
        for tensor in network.state_dict().values():
            paddle.distributed.broadcast(tensor, src=0)


def over_processes(loss, correct, world: int):
    """(loss, accuracy) of the whole batch as a tensor (2,), from each process's share of it."""
    figures = paddle.stack([loss, correct])
    if world > 1:
        paddle.distributed.all_reduce(figures)
    return figures


def wait_for_all(world: int) -> None:
    if world > 1:
        paddle.distributed.barrier()
