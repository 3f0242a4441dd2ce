"""Whose weight file is this? Layouts are told by their names, and the names become ours."""

from __future__ import annotations

import re

import numpy as np

from paddle_medcls.errors import WeightsError
from paddle_medcls.models import Network

_LAYOUTS = (  # (layout, a name only it has, patterns: theirs -> ours; <k> is the block's number)
    ("COVID-19 tutorial", "conv.0.weight", ()),
    (
        "PALM tutorial",
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
        The network, the state dict under our names, and the layout: "COVID-19 tutorial", "PALM tutorial",
        "paddle.vision", "torchvision" or "PaddleClas".
    """
    if "features.0.weight" in state and "classifier.0.weight" in state:
        return _recognise_vgg(state, name)
    layout, patterns = next(((name, found) for name, mark, found in _LAYOUTS if mark in state), ("", ()))
    if not layout:
        raise WeightsError(
            f"{name}: the layout is not known; it begins with {', '.join(list(state)[:4])}",
            expected="a ResNet of the PALM or COVID-19 tutorial, paddle.vision, torchvision or PaddleClas, or a VGG-16",
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
