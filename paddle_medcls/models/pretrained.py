"""Download of the ImageNet weights that Paddle publishes, checked by MD5."""

from __future__ import annotations

from pathlib import Path

from paddle_medcls.core.errors import WeightsError
from paddle_medcls.data.download import download

URL = "https://paddle-hapi.bj.bcebos.com/models/{model}.pdparams"
MD5 = {
    "resnet18": "cf548f46534aa3560945be4b95cd11c4",
    "resnet34": "8d2275cf8706028345f78ac0e1d31969",
    "resnet50": "ca6f485ee1ab0492d38f323885b0ad80",
    "vgg16": "89bbffc0f87d260be9b8cdc169c991c4",
}
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
    if model not in MD5:
        raise WeightsError(f"no ImageNet weights are published for {model}", expected=", ".join(MD5))
    return download(URL.format(model=model), FOLDER / f"{model}.pdparams", md5=MD5[model])
