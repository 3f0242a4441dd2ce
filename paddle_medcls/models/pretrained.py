"""Download of the ImageNet weights that Paddle publishes, checked by MD5."""

from __future__ import annotations

import sys
from pathlib import Path

from paddle_medcls.core.errors import WeightsError
from paddle_medcls.data.download import download

FOLDER = Path.home() / ".cache/paddle/hapi/weights"
"""The cache of paddle.vision, so that its downloads are used too."""


def pretrained_file(source: str, model: str) -> Path:
    """The weight file of `--pretrained`.

    Args:
        source: "imagenet", or the path of a weight file.

    Raises:
        WeightsError: no ImageNet weights are published for this network.
        DataError: the download failed; the message says how to do it by hand.
    """
    if source != "imagenet":
        return Path(source)
    url, md5 = published(model)
    return download(url, FOLDER / url.rpartition("/")[2], md5=md5)


def published(model: str) -> tuple[str, str]:
    """URL and MD5 of a network's ImageNet weights, from the tables of the installed paddle.vision."""
    from paddle_medcls.core.paddle_setup import paddle

    table = sys.modules[getattr(paddle.vision.models, model).__module__].model_urls
    plain = model.replace("_", "")
    for name, entry in table.items():  # "mobilenet_v2" is "mobilenetv2_1.0" there: with the width of its layers
        if name.replace("_", "") in (plain, f"{plain}1.0", f"{plain}x1.0"):
            return entry
    raise WeightsError(f"no ImageNet weights are published for {model}", expected=", ".join(table))
