"""Runs a network over a split: the logits of all its images, in their order."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from paddle_medcls.core.paddle_setup import paddle
from paddle_medcls.core.progress import progress
from paddle_medcls.models.output_head import check_finite
from paddle_medcls.preprocessing.augmentation import flip_axes
from paddle_medcls.preprocessing.loader import ImageDataset, cut, load_batches


def predict_logits(model, x: np.ndarray, flips: tuple[str, ...] = ()) -> np.ndarray:
    """Logits (N, outputs) of a batch x (N, C, H, W), averaged over the image and its flips."""
    axes = flip_axes(flips)
    with paddle.no_grad():
        image = paddle.to_tensor(x)
        total = sum(model(paddle.flip(image, list(axis)) if axis else image) for axis in axes)
        return (total / len(axes)).astype("float32").numpy()


def predict_features(model, x: np.ndarray, flips: tuple[str, ...] = ()) -> tuple[np.ndarray, np.ndarray]:
    """Logits as of `predict_logits`, and the features of the same images, averaged over the same flips.

    Returns:
        (N, outputs), and (N, channels): the maps that each stage of the network ends with, averaged over the image,
        one stage after the other; of a network without `stages` what its head reads.
    """
    parts: list = []
    stages = getattr(model, "stages", ())
    hooks = [layer.register_forward_post_hook(lambda _, x, y: parts.append(y.mean([2, 3]))) for layer in stages]
    if not stages:
        hooks = [model.head.register_forward_pre_hook(lambda _, inputs: parts.append(inputs[0].flatten(1)))]
    try:
        logits = predict_logits(model, x, flips)
    finally:
        for hook in hooks:
            hook.remove()
    views = len(parts) // len(hooks)
    features = sum(paddle.concat(parts[k * len(hooks) : (k + 1) * len(hooks)], 1) for k in range(views)) / views
    return logits, features.astype("float32").numpy()


def evaluate_split(
    model,
    dataset: ImageDataset,
    batch_size: int,
    workers: int,
    flips: tuple[str, ...] = (),
    process: tuple[int, int] = (0, 1),
) -> np.ndarray:
    """Logits (N, outputs) of every image of a split, in its order.

    With several processes each computes every `world`-th batch, and all get the logits of all images.

    Args:
        model: the network; its training mode is restored afterwards.
        dataset: the split with its preprocessing, without augmentation.
        process: rank and world: number of this process, and of all of them.

    Raises:
        DataError: an image that cannot be read.
        WeightsError: logits that are not finite, see `output_head.check_finite`.
    """
    rank, world = process
    batches = cut(range(len(dataset)), batch_size)
    was_training = model.training
    model.eval()
    own_logits = forward_split(
        lambda x: predict_logits(model, x, flips), dataset, batches[rank::world], workers, rank == 0
    )
    if was_training:
        model.train()
    logits = np.concatenate(own_logits) if world == 1 else _gather(own_logits, batches, world)
    return check_finite(logits, dataset.index.ids)  # after the gathering: all processes stop here, or none


def forward_split(
    forward: Callable[[np.ndarray], np.ndarray],
    dataset: ImageDataset,
    batches: Sequence[range] | Sequence[np.ndarray],
    workers: int,
    show: bool = True,
) -> list[np.ndarray]:
    """The logits of each of these batches.

    Args:
        forward: x (N, C, S, S) -> logits (N, outputs).
    """
    loaded = load_batches(dataset, batches, workers)
    with progress(loaded, f"evaluating {dataset.index.split}", len(batches), "batch", show) as bar:
        return [forward(batch.x) for batch in bar]


def _gather(own_logits: list[np.ndarray], batches: list[range], world: int) -> np.ndarray:
    """The logits of all processes, in the order of the split; padded for the transfer, the padding cut off again."""
    import paddle.distributed as dist

    rounds = -(-len(batches) // world)
    size = len(batches[0])
    outputs = _number_of_outputs(own_logits, dist)
    padded = np.zeros((rounds, size, outputs), np.float32)
    for k, logits in enumerate(own_logits):
        padded[k, : len(logits)] = logits
    gathered: list = []
    dist.all_gather(gathered, paddle.to_tensor(padded))
    arrays = [tensor.numpy() for tensor in gathered]
    ordered = [arrays[k % world][k // world][: len(rows)] for k, rows in enumerate(batches)]
    return np.concatenate(ordered)


def _number_of_outputs(own_logits: list[np.ndarray], dist) -> int:
    """A process without a batch learns the number of outputs from the others."""
    width = paddle.to_tensor([own_logits[0].shape[1] if own_logits else 0], dtype="int64")
    dist.all_reduce(width, op=dist.ReduceOp.MAX)
    return int(width.item())
