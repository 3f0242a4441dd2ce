"""Rows that are not a network's computation: starting a command, reading images, waiting for images, memory."""

from __future__ import annotations

import re
import sys
import tempfile
from importlib.metadata import Distribution, distributions
from pathlib import Path
from statistics import median

from benchmarks.cell import Job, medcls, rate, run, train_command

REPEATS = 5  # of short measurements; their median is the result
REQUIREMENTS = Path(__file__).parents[1] / "requirements.txt"
ANY_BUILD = {"paddle", "cv2", "paddle_medcls"}
"""Modules that several distributions provide, such as opencv-python-headless."""


def predict_seconds(job: Job, as_installed: bool = False) -> float:
    """Wall time of `predict.py` on one image, in a plain installation: with what requirements.txt installs.

    Args:
        as_installed: Paddle as it comes, with its own operators; else the engine that `predict.py` chooses.

    Returns:
        Seconds, the median of REPEATS calls after one that is not counted (it reads the libraries from the disk).
    """
    before = f"import sys; sys.modules.update(dict.fromkeys({sorted(not_required(REQUIREMENTS))})); "
    before += "import zlib, paddle; " if as_installed else ""
    arguments = [str(Path(job.folder) / "image.png"), "--weights", str(Path(job.folder) / "NET.pdparams")]
    arguments += ["--engine", "paddle"] if as_installed else []
    return _repeated(medcls("predict", *arguments, before=before))


def not_required(requirements: Path) -> set[str]:
    """Modules installed here that a requirements file does not install, itself or by a dependency."""
    installed = {_name(distribution.metadata["Name"]): distribution for distribution in distributions()}
    lines = requirements.read_text(encoding="utf-8").splitlines()
    to_do = [_name(line) for line in lines if line and not line.startswith("#")]
    required: set[str] = set()
    while to_do:
        name = to_do.pop()
        if name in installed and name not in required:
            required.add(name)
            needs = installed[name].requires or ()
            to_do += [_name(need) for need in needs if "extra ==" not in need]
    modules = {name: _modules(distribution) for name, distribution in installed.items()}
    kept = ANY_BUILD.union(*(modules[name] for name in required))
    return set().union(*modules.values()) - kept


def _name(requirement: str) -> str:
    """The distribution's name at the start of a requirement, normalised: "Opencv_Python>=4" -> "opencv-python"."""
    return re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", requirement, maxsplit=1)[0]).lower()


def _modules(distribution: Distribution) -> set[str]:
    """Top-level modules of an installed distribution."""
    files = [Path(str(file)) for file in distribution.files or () if file.suffix == ".py"]
    names = {file.stem if len(file.parts) == 1 else file.parts[0] for file in files}
    return {name for name in names if name.isidentifier() and not name.startswith("_")}


def help_seconds(job: Job, command: str) -> float:
    """Seconds that a command's --help takes; for the command "", seconds to import the package."""
    return _repeated(medcls(command, "--help") if command else [sys.executable, "-c", "import paddle_medcls"])


def _repeated(command: list[str]) -> float:
    run(command)
    return median(run(command) for _ in range(REPEATS))


# --- reading -------------------------------------------------------------------------------------


def read_photograph(job: Job, decode: str = "exact") -> float:
    """Milliseconds from the file of a synthetic fundus photograph, 2124 x 2056 pixels, to the network's input.

    Args:
        decode: "exact", or "reduced", see `decode.Preprocessing`.
    """
    import numpy as np

    from paddle_medcls.data.synthetic import fundus

    return _read_file(job, fundus(np.random.default_rng(0), True), (2124, 2056), ".jpg", decode)


def read_radiograph(job: Job) -> float:
    """Milliseconds from the file of a synthetic grey PNG, 299 x 299 pixels, to the network's input."""
    import numpy as np

    from paddle_medcls.data.synthetic import radiograph

    return _read_file(job, radiograph(np.random.default_rng(0), "Normal"), (299, 299), ".png", "exact")


def _read_file(job: Job, image, size: tuple[int, int], suffix: str, decode: str) -> float:
    import cv2

    from paddle_medcls.preprocessing.transforms import Preprocessing

    spec = Preprocessing(channels="bgr", interpolation="linear" if decode == "exact" else "area", decode=decode)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"synthetic{suffix}"
        cv2.imwrite(str(path), cv2.resize(image, size, interpolation=cv2.INTER_CUBIC))
        return _read(job, [path], spec)


def read_mapped(job: Job) -> float:
    """Milliseconds to read one image of 224 x 224 pixels from a uint8 array on disk, mapped into memory."""
    import numpy as np

    from paddle_medcls.preprocessing.transforms import Preprocessing

    shape = (64, 224, 224, 3)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "images"
        path.write_bytes(bytes(int(np.prod(shape))))
        return _read(job, np.memmap(path, np.uint8, "r", shape=shape), Preprocessing())


def read_medmnist(job: Job) -> float:
    """Milliseconds per image, in batches of 128 images of 28 x 28 pixels in memory."""
    import numpy as np

    from paddle_medcls.preprocessing.transforms import Preprocessing

    return _read(job, np.zeros((128, 28, 28, 3), np.uint8), Preprocessing(size_px=28))


def _read(job: Job, sources, spec) -> float:
    """Milliseconds per image, from its source to the network's input, in one thread."""
    import numpy as np

    from paddle_medcls.data.index import Index
    from paddle_medcls.preprocessing.loader import ImageDataset

    count = len(sources)
    ids = tuple(str(row) for row in range(count))
    dataset = ImageDataset(
        Index("synthetic", "train", ids, sources, np.zeros(count, np.int64), ("a",), "multi-class"), spec
    )
    rows = np.random.default_rng(0).permutation(count)
    return 1000 / rate(lambda: dataset.batch(rows) if dataset.whole_batches else dataset[0], count, job.seconds)


FIRST_STEP = """
import os
from paddle_medcls.training import loop
train_step = loop.train_step
def first_step(*arguments):
    train_step(*arguments)
    os._exit(0)
loop.train_step = first_step
"""


def first_step_seconds(job: Job, dataset: str, cached: bool) -> float:
    """Seconds from the start of `train.py` to the end of its first step, on synthetic images as large as real ones.

    Args:
        cached: an earlier run has decoded the images.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "data"
        _draw(dataset, root)
        arguments = ["--dataset", dataset, "--data-root", str(root), "--batch-size", "8", "--device", "cpu"]

        def start(number: int) -> float:
            cache = Path(folder) / ("images" if cached else f"images{number}")
            places = ["--output", str(Path(folder) / f"run{number}"), "--image-cache", str(cache)]
            return run(medcls("train", *arguments, *places, before=FIRST_STEP))

        start(0)
        return median(start(number) for number in range(1, REPEATS + 1))


def _draw(dataset: str, root: Path) -> None:
    """Synthetic images of a data set, as large as its real ones."""
    import cv2
    import numpy as np

    from paddle_medcls.data.sample import draw

    sides = {"palm": (2124, 2056), "covid": (299, 299)}
    draw(dataset, root)
    for path in [*root.rglob("*.jpg"), *root.rglob("*.png")] if dataset in sides else ():
        image = np.asarray(cv2.imread(str(path), cv2.IMREAD_UNCHANGED))
        cv2.imwrite(str(path), cv2.resize(image, sides[dataset], interpolation=cv2.INTER_CUBIC))


def waiting(job: Job, dataset: str) -> float:
    """Share of an epoch's training time spent waiting for images: synthetic ones, as large as the real ones."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "data"
        _draw(dataset, root)
        arguments = ["--dataset", dataset, "--data-root", str(root), "--epochs", "1"]
        if dataset == "palm":
            arguments += ["--recipe", "palm_tutorial"]
        return train_command(Path(folder) / "run", *arguments)["waiting_share"]


# --- memory by number of images ------------------------------------------------------------


def many_images(job: Job, count: int) -> float:
    """Seconds of statistics and evaluation of synthetic PNG images, with a network of one linear layer."""
    import cv2
    import numpy as np

    from paddle_medcls.core.paddle_setup import paddle
    from paddle_medcls.data.index import Index
    from paddle_medcls.evaluation.evaluate import evaluate_split
    from paddle_medcls.preprocessing.loader import ImageDataset
    from paddle_medcls.preprocessing.statistics import image_statistics
    from paddle_medcls.preprocessing.transforms import Preprocessing

    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{number}.png" for number in range(count)]
        for number, path in enumerate(paths):
            image = np.full((96, 96), number % 256, np.uint8)
            image[number % 96] = 255 - number % 256
            path.write_bytes(cv2.imencode(".png", image)[1].tobytes())
        labels = np.arange(count) % 2
        ids = tuple(path.name for path in paths)
        index = Index("synthetic", "test", ids, paths, labels, ("a", "b"), "multi-class", synthetic=True)
        model = paddle.nn.Sequential(paddle.nn.AdaptiveAvgPool2D(1), paddle.nn.Flatten(), paddle.nn.Linear(3, 2))

        def scan_and_evaluate() -> None:
            assert image_statistics(index, 2)["count"] == count
            assert len(evaluate_split(model, ImageDataset(index, Preprocessing()), 32, 2)) == count

        return 1 / rate(scan_and_evaluate, 1, 0, warm_up=lambda: None)


def head(job: Job, cached: bool) -> float:
    """Images per second of training VGG-16's head on synthetic OCT scans, in the second epoch (caching is done)."""
    from paddle_medcls.data.sample import draw

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "data"
        draw("oct", root, 0)
        arguments = ["--dataset", "oct", "--data-root", str(root), "--epochs", "2", "--batch-size", "32"]
        arguments += ["--set", "pretrained=", "patience=0", f"cache_views={int(cached)}"]
        return train_command(Path(folder) / "runs" / "run", *arguments)["images_per_second"]
