"""Tiny data sets, recipes and networks for the tests."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from paddle_medcls.core.openvino_setup import import_openvino
from paddle_medcls.recipes.recipe import Recipe

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT / "tools"


def pixels(seed: int, level: int = 128, size: int = 32) -> np.ndarray:
    """A noisy RGB image (size, size, 3) around a grey level; smooth enough to survive JPEG."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(-40, 41, (size // 8, size // 8, 3)) + level
    return cv2.resize(np.clip(coarse, 0, 255).astype(np.uint8), (size, size), interpolation=cv2.INTER_CUBIC)


def write_image(path: Path, image: np.ndarray) -> Path:
    """Writes an RGB or grey image in the format that its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    bgr = image if image.ndim == 2 else image[:, :, ::-1]
    path.write_bytes(cv2.imencode(path.suffix, np.ascontiguousarray(bgr))[1].tobytes())
    return path


def palm_tree(root: Path, pathologic: int = 6, normal: int = 4, myopic: int = 2, val: int = 7) -> Path:
    """PALM as the three archives give it; pathologic images are bright, so that a network can learn them."""
    train = root / "PALM-Training400"
    for letter, count, level in (("P", pathologic, 190), ("N", normal, 60), ("H", myopic, 80)):
        for number in range(1, count + 1):
            write_image(train / f"{letter}{number:04}.jpg", pixels(1000 * ord(letter) + number, level))
    rows = ["ID,imgName,Label,Fovea_X,Fovea_Y"]
    for number in range(1, val + 1):
        label = number % 2
        write_image(root / "PALM-Validation400" / f"V{number:04}.jpg", pixels(number, 190 if label else 60))
        rows.append(f"{number},V{number:04}.jpg,{label},1157.74,1019.87")
    (root / "labels.csv").write_text("\n".join(rows) + "\n")
    return root


COVID_FOLDERS = {
    "tutorial": ("COVID", "LungOpacity", "Normal", "ViralPneumonia"),
    "kaggle": ("COVID", "Lung_Opacity", "Normal", "Viral Pneumonia"),
}


def covid_images(root: Path, layout: str = "tutorial", count: int = 4) -> Path:
    """The four folders of the COVID set, `count` images each; masks beside them in Kaggle's layout."""
    for label, folder in enumerate(COVID_FOLDERS[layout]):
        inside = root / folder / "images" if layout == "kaggle" else root / folder
        for number in range(1, count + 1):
            image = pixels(100 * label + number, 40 + 55 * label)[:, :, 0]
            write_image(inside / f"{folder}-{number}.png", image)
            if layout == "kaggle":
                write_image(root / folder / "masks" / f"{folder}-{number}.png", image)
    return root


def covid_tree(root: Path) -> Path:
    """The COVID set with its split files: of each class two images for training, one for each other split."""
    covid_images(root)
    for split, numbers in {"train": (1, 2), "val": (3,), "test": (4,)}.items():
        lines = [
            f"{folder}/{folder}-{number}.png {label}\n"
            for label, folder in enumerate(COVID_FOLDERS["tutorial"])
            for number in numbers
        ]
        (root / f"{split}.txt").write_text("".join(lines))
    return root


def recipe(dataset: str = "palm", **changes: object) -> Recipe:
    """A recipe that trains in a moment: `toynet`'s network, where nothing else is asked for."""
    loss = "sigmoid" if dataset == "palm" else "softmax"
    base = Recipe(name="toy", source="tests", dataset=dataset, model="toy", loss=loss, epochs=2, batch_size=5)
    return base.replace(**{"size_px": 32, **changes})


def within(seconds: float, work: Callable[[], object]) -> object:
    """The result of `work`, or its error; a test fails, and does not hang, when it takes longer."""
    box: dict = {}

    def call() -> None:
        try:
            box["result"] = work()
        except BaseException as error:  # noqa: B036  handed to the caller, whatever it is
            box["error"] = error

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), f"still running after {seconds} s"
    if "error" in box:
        raise box["error"]
    return box["result"]


def import_openvino_or_skip():
    """OpenVINO as the package imports it, or the test is skipped; a plain import reports itself to its makers."""
    try:
        return import_openvino()
    except ImportError:
        pytest.skip("OpenVINO is not installed")


class Store:
    """The store of a process group, as Paddle's TCPStore, without a server."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.sums: dict[str, int] = {}
        self.lock = threading.Lock()

    def set(self, key: str, value: str | bytes) -> None:
        self.values[key] = value.encode() if isinstance(value, str) else value

    def get(self, key: str) -> bytes:
        return self.values[key]

    def add(self, key: str, number: int) -> int:
        with self.lock:
            self.sums[key] = self.sums.get(key, 0) + number
            return self.sums[key]
