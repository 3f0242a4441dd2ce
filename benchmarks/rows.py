"""The table of measurements: row -> variant -> the function that measures it in a fresh process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from benchmarks import networks, shards, system
from benchmarks.cell import Job
from benchmarks.networks import RESNET18, RESNET50, Work
from paddle_medcls.cli import COMMANDS
from paddle_medcls.core.hardware import usable_cores

Variants = dict[str, Callable[[Job], float]]

INSTALLED = "Paddle as installed"
TORCH = "PyTorch f32"
OPENVINO = "OpenVINO alone f32"


def _training(work: Work) -> Variants:
    training = partial(networks.training, work=work)
    cores = max(2, usable_cores())
    return {
        INSTALLED: partial(training, kernels="as installed"),
        "Paddle's kernels": partial(training, kernels="paddle"),
        f"Paddle's kernels, {cores} processes": partial(networks.processes, work=work, count=cores, kernels="paddle"),
        "own kernels f32": partial(training, kernels="onednn f32"),
        "own kernels bf16": partial(training, kernels="onednn bf16"),
        TORCH: partial(networks.pytorch, what="training", work=work, precision="f32"),
        "PyTorch bf16": partial(networks.pytorch, what="training", work=work, precision="bf16"),
    }


def _inference(batch: int) -> Variants:
    inference = partial(networks.inference, batch=batch)
    torch = partial(networks.pytorch, what="inference", work=replace(RESNET50, batch=batch))
    return {
        INSTALLED: partial(inference, engine="as installed"),
        "paddle": partial(inference, engine="paddle"),
        "onnxruntime f32": partial(inference, engine="onnxruntime"),
        "openvino f32": partial(inference, engine="openvino"),
        "openvino bf16": partial(inference, engine="openvino", precision="bf16"),
        "auto f32": partial(inference, engine="auto"),
        "auto bf16": partial(inference, engine="auto", precision="bf16"),
        "ONNX Runtime alone f32": partial(networks.onnxruntime_alone, batch=batch),
        OPENVINO: partial(networks.openvino_alone, batch=batch, precision="f32"),
        TORCH: partial(torch, precision="f32"),
        "PyTorch bf16": partial(torch, precision="bf16"),
    }


ROWS: dict[str, Variants] = {
    "training": _training(RESNET50),
    "training28": _training(RESNET18),
    "inference1": _inference(1),
    "inference32": _inference(32),
    "novelty": {
        "without the score": partial(networks.predictions, scored=False),
        "with it": partial(networks.predictions, scored=True),
    },
    "head": {
        "uncached": partial(system.head, cached=False),
        "cached": partial(system.head, cached=True),
    },
    "start": {
        INSTALLED: partial(system.predict_seconds, as_installed=True),
        "plain installation": system.predict_seconds,
    },
    "first": {
        f"{name}, {'decoded before' if cached else 'new images'}": partial(
            system.first_step_seconds, dataset=name, cached=cached
        )
        for name in ("palm", "covid")
        for cached in (False, True)
    },
    "help": {
        "import paddle_medcls": partial(system.help_seconds, command=""),
        **{f"{name} --help": partial(system.help_seconds, command=name) for name in COMMANDS},
    },
    "reading": {
        "JPEG 2124x2056": system.read_photograph,
        "JPEG, reduced": partial(system.read_photograph, decode="reduced"),
        "cached uint8": system.read_mapped,
        "grey PNG 299x299": system.read_radiograph,
        "MedMNIST 28x28": system.read_medmnist,
    },
    "shards": {
        f"{kind}{name}": partial(shards.to_network, kind=kind, whole=whole)
        for kind in shards.KINDS
        for name, whole in ((", without network", False), ("", True))
    },
    "waiting": {name: partial(system.waiting, dataset=name) for name in ("palm", "covid", "breastmnist")},
    "memory": {f"{count:,} images": partial(system.many_images, count=count) for count in (1000, 4000, 21165)},
    "limit": {
        INSTALLED: partial(networks.product, as_installed=True),
        "paddle f32": networks.product,
        "own kernels f32": partial(networks.onednn_product, bf16=False),
        "own kernels bf16": partial(networks.onednn_product, bf16=True),
        TORCH: partial(networks.pytorch, what="product", work=RESNET50, precision="f32"),
        "PyTorch bf16": partial(networks.pytorch, what="product", work=RESNET50, precision="bf16"),
    },
    "batch": {
        str(batch): partial(networks.step_seconds, work=replace(RESNET50, batch=batch))
        for batch in (1, 2, 4, 8, 16, 32, 64)
    },
    "side": {
        str(side): partial(networks.step_seconds, work=replace(RESNET50, batch=8, side=side))
        for side in (64, 96, 128, 224, 320, 448)
    },
    "processes": {
        str(count): partial(networks.processes, work=RESNET50, count=count)
        for count in range(1, min(8, max(2, usable_cores())) + 1)
    },
}
"""The other variants of a row are compared with its first one."""

UNITS = {
    "start": "s",
    "first": "s",
    "help": "s",
    "reading": "ms/image",
    "shards": "times the network's rate",
    "waiting": "share",
    "memory": "s",
    "limit": "GFLOP/s",
    "batch": "s/step",
    "side": "s/step",
}
"""Units of the rows that are not in images/s."""

PEERS = {"training": TORCH, "training28": TORCH, "inference1": OPENVINO, "inference32": OPENVINO}
"""The variant, another library, that the others of a row are also compared with."""

GFLOP = {"training": 3 * RESNET50.gflop, "training28": 3 * RESNET18.gflop}
GFLOP |= {"inference1": RESNET50.gflop, "inference32": RESNET50.gflop}
"""Cost of one image; a training step costs three times a forward pass."""

LIMITS = {"f32": "paddle f32", "bf16": "own kernels bf16"}
"""The variant of the row `limit` that each precision is compared with."""

GROWTH = {"batch": "batch size", "side": "image side, pixels", "memory": "images", "processes": "processes"}
"""Rows that show how cost grows, and the size that it grows with."""

ONCE = ("head", "start", "first", "help", "reading", "shards", "waiting", "memory", "batch", "side", "processes")
"""Rows that are measured once, not in rounds: they take long, or repeat their measurement themselves."""
