"""Runs a network over a split and gathers the whole of it: logits, labels, rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from paddle_medcls.augment import flip_axes
from paddle_medcls.data.index import Index
from paddle_medcls.data.loader import ImageDataset, cut, load_batches
from paddle_medcls.images import Preprocessing
from paddle_medcls.output_head import check_finite
from paddle_medcls.progress import progress
from paddle_medcls.runtime import paddle


def predict_logits(model, x: np.ndarray, flips: tuple[str, ...] = ()) -> np.ndarray:
    """Logits (N, outputs) of a batch x (N, C, H, W), averaged over the image and its flips."""
    axes = flip_axes(flips)
    with paddle.no_grad():
        image = paddle.to_tensor(x)
        total = sum(model(paddle.flip(image, list(axis)) if axis else image) for axis in axes)
        return (total / len(axes)).astype("float32").numpy()


def evaluate_split(
    model,
    index: Index,
    spec: Preprocessing,
    batch_size: int,
    workers: int,
    flips: tuple[str, ...] = (),
    rank: int = 0,
    world: int = 1,
    fitted: np.ndarray | None = None,
) -> np.ndarray:
    """Logits (N, outputs) of every image of an index, in its order; `fitted` as in `ImageDataset`.

    With several processes each takes every `world`-th batch and all get the whole; the padding that
    gathering needs is cut off again, so no image counts twice.

    Raises:
        WeightsError: logits that are not finite, see `output_head.check_finite`.
    """
    batches = cut(range(len(index)), batch_size)
    was_training = model.training
    model.eval()
    parts = forward_split(
        lambda x: predict_logits(model, x, flips), index, spec, batches[rank::world], workers, rank == 0, fitted
    )
    if was_training:
        model.train()
    logits = np.concatenate(parts) if world == 1 else _gather(parts, batches, world)
    return check_finite(logits, index.ids)  # after the gathering: all processes stop here, or none


def forward_split(
    forward: Callable[[np.ndarray], np.ndarray],
    index: Index,
    spec: Preprocessing,
    batches: Sequence[range],
    workers: int,
    show: bool = True,
    fitted: np.ndarray | None = None,
) -> list[np.ndarray]:
    """What `forward` gives for each of these batches of an index; `fitted` as in `ImageDataset`."""
    loaded = load_batches(ImageDataset(index, spec, fitted=fitted), batches, workers)
    with progress(loaded, f"evaluating {index.split}", len(batches), "batch", show) as bar:
        return [forward(batch.x) for batch in bar]


def _gather(parts: list[np.ndarray], batches: list, world: int) -> np.ndarray:
    import paddle.distributed as dist

    rounds = -(-len(batches) // world)
    size = len(batches[0])
    outputs = _number_of_outputs(parts, dist)
    padded = np.zeros((rounds, size, outputs), np.float32)
    for k, part in enumerate(parts):
        padded[k, : len(part)] = part
    gathered: list = []
    dist.all_gather(gathered, paddle.to_tensor(padded))
    arrays = [tensor.numpy() for tensor in gathered]
    ordered = [arrays[k % world][k // world][: len(rows)] for k, rows in enumerate(batches)]
    return np.concatenate(ordered)


def _number_of_outputs(parts: list[np.ndarray], dist) -> int:
    """A process without a batch learns the width of the logits from the others."""
    width = paddle.to_tensor([parts[0].shape[1] if parts else 0], dtype="int64")
    dist.all_reduce(width, op=dist.ReduceOp.MAX)
    return int(width.item())
