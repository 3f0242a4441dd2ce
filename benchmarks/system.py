"""Rows around the computing: start of a command, reading of images, waiting for them, memory."""

from __future__ import annotations

import os
import shutil
import site
import sys
import tempfile
from pathlib import Path
from statistics import median

from benchmarks.cell import Job, medcls, rate, run, train_command

REPEATS = 5  # of what takes a moment; the median counts


PLAIN = "import sys; sys.modules.update(dict.fromkeys(('onnx', 'onnxruntime', 'paddle2onnx'))); "
"""Hides what requirements.txt does not bring."""


def predict_seconds(job: Job, setup: str) -> float:
    """Wall time of `predict.py` on one image, in a plain installation: what requirements.txt brings.

    Args:
        setup: "as installed" (Paddle as it comes, with its own operators), "first" (a new copy of the weights and an
            empty cache for each call) or "later" (each call finds what an earlier one may have kept).
    """
    repeats = REPEATS if job.divide == 1 else 1  # a first call may take a minute
    before = PLAIN + ("import zlib, paddle; " if setup == "as installed" else "")
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(repeats + 1):
            place = Path(folder) / (str(number) if setup == "first" else "0")
            place.mkdir(exist_ok=True)
            for name in ("image.png", "NET.pdparams", "NET.json"):
                if not (place / name).exists():
                    shutil.copy(Path(job.folder) / name, place)
            arguments = [str(place / "image.png"), "--weights", str(place / "NET.pdparams")]
            arguments += ["--engine", "paddle"] if setup == "as installed" else []
            caches = {"HOME": str(place), "XDG_CACHE_HOME": str(place), "PYTHONUSERBASE": site.getuserbase()}
            seconds.append(run(medcls("predict", *arguments, before=before), {**os.environ, **caches}))
    return median(seconds[1:])  # the first one reads the programs from the disk


def help_seconds(job: Job, command: str) -> float:
    """Wall time of a command's --help; of importing the package for the command ""."""
    return _repeated(medcls(command, "--help") if command else [sys.executable, "-c", "import paddle_medcls"])


def _repeated(command: list[str]) -> float:
    run(command)
    return median(run(command) for _ in range(REPEATS))


# --- reading -------------------------------------------------------------------------------------


def read_photograph(job: Job, decode: str = "exact") -> float:
    """Milliseconds from the file of a drawn fundus photograph, 2124 x 2056, to the network's input.

    Args:
        decode: "exact", or "reduced", see `images.Preprocessing`.
    """
    import numpy as np

    from paddle_medcls.data.synthetic import fundus

    return _read_file(job, fundus(np.random.default_rng(0), True), (2124, 2056), ".jpg", decode)


def read_radiograph(job: Job) -> float:
    """Milliseconds from the file of a drawn grey PNG, 299 x 299, to the network's input."""
    import numpy as np

    from paddle_medcls.data.synthetic import radiograph

    return _read_file(job, radiograph(np.random.default_rng(0), "Normal"), (299, 299), ".png", "exact")


def _read_file(job: Job, image, size: tuple[int, int], suffix: str, decode: str) -> float:
    import cv2

    from paddle_medcls.errors import SetupError
    from paddle_medcls.images import Preprocessing

    spec = {"channels": "bgr", "interpolation": "linear" if decode == "exact" else "area"}
    if decode != "exact":
        if "decode" not in Preprocessing.__dataclass_fields__:
            raise SetupError("this version decodes whole images alone")
        spec["decode"] = decode
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"drawn{suffix}"
        cv2.imwrite(str(path), cv2.resize(image, size, interpolation=cv2.INTER_CUBIC))
        return _read(job, [path], Preprocessing.from_json({**Preprocessing().to_json(), **spec}))


def read_mapped(job: Job) -> float:
    """Milliseconds of one image of 224 pixels out of an uint8 array on disk that is mapped into memory."""
    import numpy as np

    from paddle_medcls.images import Preprocessing

    shape = (64, 224, 224, 3)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "images"
        path.write_bytes(bytes(int(np.prod(shape))))
        return _read(job, np.memmap(path, np.uint8, "r", shape=shape), Preprocessing())


def read_medmnist(job: Job) -> float:
    """Milliseconds an image of batches of 128 images of 28 pixels in memory."""
    import numpy as np

    from paddle_medcls.images import Preprocessing

    return _read(job, np.zeros((128, 28, 28, 3), np.uint8), Preprocessing(size_px=28))


def _read(job: Job, sources, spec) -> float:
    """Milliseconds an image, from its source to the network's input, in one thread."""
    import numpy as np

    from paddle_medcls.data.index import Index
    from paddle_medcls.data.loader import ImageDataset

    count = len(sources)
    ids = tuple(str(row) for row in range(count))
    dataset = ImageDataset(
        Index("drawn", "train", ids, sources, np.zeros(count, np.int64), ("a",), "multi-class"), spec
    )
    rows = np.random.default_rng(0).permutation(count)
    return 1000 / rate(lambda: dataset.batch(rows) if dataset.whole_batches else dataset[0], count, job.seconds)


def waiting(job: Job, dataset: str) -> float:
    """Share of an epoch's training that waits for images: drawn ones, at the size of the real ones."""
    import cv2
    import numpy as np

    from paddle_medcls.data.sample import draw

    sides = {"palm": (2124, 2056), "covid": (299, 299)}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "data"
        draw(dataset, root)
        for path in [*root.rglob("*.jpg"), *root.rglob("*.png")]:
            image = np.asarray(cv2.imread(str(path), cv2.IMREAD_UNCHANGED))
            cv2.imwrite(str(path), cv2.resize(image, sides[dataset], interpolation=cv2.INTER_CUBIC))
        given = ["--dataset", dataset, "--data-root", str(root), "--epochs", "1"]
        if dataset == "palm":
            given += ["--recipe", "palm_tutorial"]
        return train_command(Path(folder) / "run", *given)["waiting_share"]


# --- memory, and the number of images ------------------------------------------------------------


def many_images(job: Job, count: int) -> float:
    """Seconds of statistics and evaluation of generated PNGs, with a network that computes next to nothing."""
    import cv2
    import numpy as np

    from paddle_medcls.data.index import Index
    from paddle_medcls.data.statistics import scan
    from paddle_medcls.evaluate import evaluate_split
    from paddle_medcls.images import Preprocessing
    from paddle_medcls.runtime import paddle

    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{number}.png" for number in range(count)]
        for number, path in enumerate(paths):
            image = np.full((96, 96), number % 256, np.uint8)
            image[number % 96] = 255 - number % 256
            path.write_bytes(cv2.imencode(".png", image)[1].tobytes())
        labels = np.arange(count) % 2
        ids = tuple(path.name for path in paths)
        index = Index("drawn", "test", ids, paths, labels, ("a", "b"), "multi-class", drawn=True)
        model = paddle.nn.Sequential(paddle.nn.AdaptiveAvgPool2D(1), paddle.nn.Flatten(), paddle.nn.Linear(3, 2))

        def both() -> None:
            assert scan(index, 2)["count"] == count
            assert len(evaluate_split(model, index, Preprocessing(), 32, 2)) == count

        return 1 / rate(both, 1, 0, warm_up=lambda: None)


def head(job: Job, cached: bool) -> float:
    """Images a second of training VGG-16's head on drawn OCT scans, second epoch; making the cache is not counted."""
    from paddle_medcls.data.sample import draw

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "data"
        draw("oct", root, 0)
        given = ["--dataset", "oct", "--data-root", str(root), "--epochs", "2", "--batch-size", "32"]
        given += ["--set", "pretrained=", "patience=0", f"cache_views={int(cached)}"]
        return train_command(Path(folder) / "runs" / "run", *given)["images_per_second"]
