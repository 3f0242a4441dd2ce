"""Recognises checkpoints of other projects by their parameter names, and renames the parameters to this package's."""

from __future__ import annotations

import re

import numpy as np

from paddle_medcls.core.errors import WeightsError
from paddle_medcls.models.network import Network

_LAYOUTS = (  # (layout, a parameter only it has, patterns: name in the file -> name in this package)
    ("COVID-19 tutorial", "conv.0.weight", ()),
    (
        "PALM tutorial",
        "conv._conv.weight",
        (
            (r"bb_(\d{1,3})_(\d{1,3})\.", "stage"),
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
            (r"layer(\d{1,3})\.(\d{1,3})\.", "stage"),
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
    """Recognises the network and the layout of a weight file.

    Args:
        state: parameter name -> array, as read from the file.

    Returns:
        The network, the state dict under this package's names, and the layout: "COVID-19 tutorial", "PALM tutorial",
        "paddle.vision", "torchvision" or "PaddleClas".

    Raises:
        WeightsError: an unknown layout, or shapes of no network of this package; names the file.
    """
    vgg = "features.0.weight" in state and "classifier.0.weight" in state
    fields, renamed, layout = (_recognise_vgg if vgg else _recognise_resnet)(state, name)
    try:
        return Network(**fields), renamed, layout
    except WeightsError as error:
        raise WeightsError(f"{name}: {error.what}", fix="use the weights of a network that this package has") from None


def _recognise_resnet(state: dict[str, np.ndarray], name: object) -> tuple[dict, dict[str, np.ndarray], str]:
    """Returns the fields of the network, the renamed state and the layout."""
    layout, patterns = next(((layout, patterns) for layout, mark, patterns in _LAYOUTS if mark in state), ("", ()))
    if not layout:
        raise WeightsError(
            f"{name}: the layout is not known; it begins with {', '.join(list(state)[:4])}",
            expected="a ResNet of the PALM or COVID-19 tutorial, paddle.vision, torchvision or PaddleClas, or a VGG-16",
        )
    is_torch = any(key.endswith("running_mean") for key in state)
    stages: dict[int, int] = {}
    for key in state:
        if match := re.match(r"(?:bb_|layer)(\d{1,3})[._](\d{1,3})\.", key):
            stages[int(match[1])] = max(stages.get(int(match[1]), 0), int(match[2]) + 1)
    renamed = {}
    for key, value in state.items():
        if key.endswith("num_batches_tracked"):
            continue
        our_key = key
        for pattern, replacement in patterns:
            if replacement == "stage":
                our_key = re.sub(pattern, lambda match: f"block.{_block_number(match, stages)}.", our_key)
            else:
                our_key = re.sub(pattern, replacement, our_key)
        renamed[our_key] = value.T if is_torch and our_key == "fc.weight" else value
    return _resnet_fields(renamed, name), renamed, "torchvision" if is_torch else layout


def _recognise_vgg(state: dict[str, np.ndarray], name: object) -> tuple[dict, dict[str, np.ndarray], str]:
    """Recognises a VGG-16 of paddle.vision or torchvision; returns as `_recognise_resnet`.

    torchvision's linear weights are transposed. Both projects flatten the features in the order C, H, W, so the
    columns of the first linear layer need no permutation.
    """
    is_torch = state["classifier.0.weight"].shape == (4096, 25088)
    if is_torch:
        state = {k: v.T if k.startswith("classifier") and v.ndim == 2 else v for k, v in state.items()}
    last_weight = state.get("classifier.6.3.weight", state.get("classifier.6.weight"))
    first_weight = state["features.0.weight"]
    if last_weight is None or last_weight.ndim != 2 or first_weight.ndim != 4 or "features.28.weight" not in state:
        raise WeightsError(
            f"{name}: not a VGG-16: {len(state)} entries, {'a' if last_weight is not None else 'no'} last layer"
        )
    fields = {"model": "vgg16", "num_outputs": last_weight.shape[1], "in_channels": first_weight.shape[1]}
    return fields, state, "torchvision" if is_torch else "paddle.vision"


def _block_number(match: re.Match, stages: dict[int, int]) -> int:
    """Converts (stage, block of the stage) to the number of the block in the network; `stages`: stage -> blocks."""
    return sum(count for stage, count in stages.items() if stage < int(match[1])) + int(match[2])


def _resnet_fields(state: dict[str, np.ndarray], name: object) -> dict:
    """Returns the fields of `Network` for the state dict of a ResNet under this package's names."""
    blocks = {match[1] for key in state if (match := re.match(r"block\.(\d+)\.", key))}
    bottleneck = "block.0.conv3.0.weight" in state
    depth = _DEPTHS.get((len(blocks), bottleneck))
    stem, head = state.get("conv.0.weight"), state.get("fc.weight")
    if depth is None or stem is None or head is None or stem.ndim != 4 or head.ndim != 2:
        raise WeightsError(
            f"{name}: not a ResNet-18, 34, 50, 101 or 152: {len(blocks)} "
            f"{'bottleneck' if bottleneck else 'basic'} blocks, "
            f"{'a' if stem is not None else 'no'} stem, {'a' if head is not None else 'no'} last layer"
        )
    return {
        "model": f"resnet{depth}",
        "num_outputs": head.shape[1],
        "in_channels": stem.shape[1],
        "stem": "imagenet" if stem.shape[2] == 7 else "small",
        "project_first": not bottleneck and "block.0.shortcut.0.weight" in state,
    }
