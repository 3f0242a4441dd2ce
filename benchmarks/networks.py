"""Rows of network computations: training steps, inference, and a matrix product as their speed limit."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import subprocess
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.cell import Job, rate, train_command
from paddle_medcls.core.errors import RunError, SetupError
from paddle_medcls.core.hardware import has_bfloat16, usable_cores
from paddle_medcls.core.openvino_setup import import_openvino

if TYPE_CHECKING:
    from paddle_medcls.models.sidecar import Sidecar

CLASSES = 4


@dataclass(frozen=True)
class Work:
    """A network and its batches.

    Attributes:
        model, stem: see `models.Network`.
        side: of the images, in pixels.
        batch: images per batch.
        gflop: cost of one image's forward pass; training costs three times that.
    """

    model: str
    stem: str
    side: int
    batch: int
    gflop: float

    def smaller(self, job: Job) -> Work:
        """The same with the batch size divided by `job.divide`."""
        return replace(self, batch=max(1, self.batch // job.divide))


RESNET50 = Work("resnet50", "imagenet", 224, 16, 8.2)
RESNET18 = Work("resnet18", "small", 28, 128, 0.914)


def import_as_installed() -> None:
    """Imports Paddle before `paddle_setup` does, so that `paddle_setup` cannot configure it."""
    importlib.import_module("zlib")  # Paddle 2.6.2 crashes in zlib if it is imported first
    importlib.import_module("paddle")


def training(job: Job, work: Work, kernels: str) -> float:
    """Images per second of training steps.

    Args:
        kernels: "as installed" (Paddle's, not configured), "paddle" (Paddle's, configured by `paddle_setup`),
            "onednn f32" or "onednn bf16" (this package's), "auto" (oneDNN's if they are available, else Paddle's).
    """
    if kernels == "as installed":
        import_as_installed()
    from paddle_medcls.core.paddle_setup import paddle
    from paddle_medcls.models.network import Network

    work = work.smaller(job)
    paddle.seed(0)
    model = Network(work.model, CLASSES, stem=work.stem).build()
    network = model if kernels in ("as installed", "paddle") else _on_onednn(model, kernels)
    optimizer = paddle.optimizer.Momentum(0.001, parameters=model.parameters())

    def step(x, labels) -> None:
        loss = paddle.nn.functional.cross_entropy(network(x), labels)
        loss.backward()
        optimizer.step()
        optimizer.clear_grad()
        loss.item()

    def batch(size: int) -> tuple:
        return paddle.randn([size, 3, work.side, work.side]), paddle.arange(size) % CLASSES

    full, small = batch(work.batch), batch(2)
    # A step as installed takes many seconds and compiles nothing for its shapes: two images are enough to warm up.
    warm_up = (lambda: step(*small)) if kernels == "as installed" else None
    return rate(lambda: step(*full), work.batch, job.seconds, warm_up)


def step_seconds(job: Job, work: Work) -> float:
    """Seconds per training step, with the kernels that `train.py` chooses."""
    return work.smaller(job).batch / training(job, work, "auto")


def _on_onednn(model, kernels: str):
    """The network with this package's own oneDNN kernels."""
    from paddle_medcls.models.onednn.network import Accelerated, obstacle
    from paddle_medcls.models.onednn.operators import Operators

    fault = obstacle(model, "cpu")
    if not fault:
        return Accelerated(model, Operators(bf16=kernels == "onednn bf16"))
    if kernels == "auto":
        return model
    raise SetupError(fault)


def processes(job: Job, work: Work, count: int, kernels: str = "auto") -> float:
    """Images per second of `train.py --processes` in the second epoch, of four batches, on synthetic images."""
    if count > usable_cores():
        raise SetupError(f"{usable_cores()} core(s) here")
    from paddle_medcls.data.index import SYNTHETIC_MARK
    from paddle_medcls.data.sample import draw_npz

    work = work.smaller(job)
    name = "bloodmnist" if work.side == 28 else f"bloodmnist_{work.side}"
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "data"
        root.mkdir()
        (root / SYNTHETIC_MARK).touch()
        draw_npz(name, root, 0, (4 * work.batch, 16, 16))
        settings = [f"stem={work.stem}", f"size_px={work.side}", "lr=0.0001", "monitor=accuracy"]
        row = train_command(
            Path(folder) / "run",
            *("--dataset", name, "--recipe", "medmnist_sgd", "--model", work.model, "--data-root", str(root)),
            *("--epochs", "2", "--batch-size", str(work.batch), "--processes", str(count), "--kernels", kernels),
            *("--set", *settings),
        )
    return row["images_per_second"]


# --- inference -----------------------------------------------------------------------------------


def prepare(job: Job) -> float:
    """Writes a network, its inference graphs and an image into the job's folder, for inference and `predict.py`."""
    import cv2
    import numpy as np

    from paddle_medcls.core.files import sha256
    from paddle_medcls.core.paddle_setup import paddle
    from paddle_medcls.data.synthetic import radiograph
    from paddle_medcls.deployment.graph import logits_graph
    from paddle_medcls.deployment.graph_models import to_onnx, to_openvino
    from paddle_medcls.models.network import Network
    from paddle_medcls.models.sidecar import Sidecar
    from paddle_medcls.models.weights import read_weights, save_weights
    from paddle_medcls.preprocessing.transforms import Preprocessing

    folder = Path(job.folder)
    picture = cv2.resize(radiograph(np.random.default_rng(0), "Normal"), (299, 299))
    (folder / "image.png").write_bytes(cv2.imencode(".png", picture)[1].tobytes())
    paddle.seed(0)
    network = Network("resnet50", CLASSES)
    model = network.build()
    for layer in model.sublayers():
        if isinstance(layer, paddle.nn.BatchNorm2D):
            layer._momentum = 0.0  # take the statistics of the next batch, so that activations stay in range
    model(paddle.randn([4, 3, 224, 224]))
    save_weights(model, folder / "NET.pdparams")
    classes = tuple(f"class {k}" for k in range(CLASSES))
    sidecar = Sidecar("covid", "covid", classes, "multi-class", "softmax", network, Preprocessing(), drawn=True)
    sidecar = replace(sidecar, sha256=sha256(folder / "NET.pdparams"))
    sidecar.write(folder / "NET.json")
    _prepare_scored(folder, sidecar)
    (folder / "graphs").mkdir()
    graph = logits_graph(sidecar, read_weights(folder / "NET.pdparams"), "NET")
    with contextlib.suppress(ImportError):  # not installed: reported when it would be measured
        openvino = import_openvino()

        openvino.save_model(to_openvino(graph), folder / "graphs" / "NET.xml", compress_to_fp16=False)
    with contextlib.suppress(ImportError):
        import onnx

        onnx.save(to_onnx(graph), folder / "graphs" / "NET.onnx")
    return 0.0


def inference(job: Job, batch: int, engine: str, precision: str = "f32") -> float:
    """Images per second of ResNet-50 at 224 pixels in a Predictor.

    Args:
        engine: an engine of `predictor.Predictor.from_weights`, or "as installed".
    """
    if engine == "as installed":
        import_as_installed()
    from paddle_medcls.deployment.predictor import Predictor

    name = None if engine == "as installed" else engine
    predictor = Predictor.from_weights(Path(job.folder) / "NET.pdparams", engine=name, precision=precision)
    x, small = _noise(job, batch), _noise(job, 1)
    warm_up = (lambda: predictor.backend.logits(small)) if engine == "as installed" else None
    return rate(lambda: predictor.backend.logits(x), len(x), job.seconds, warm_up)


def _prepare_scored(folder: Path, sidecar: Sidecar) -> None:
    """The same weights in `scored/`, with a novelty score, which costs the same whatever it was fitted to."""
    import numpy as np

    from paddle_medcls.core.files import sha256
    from paddle_medcls.deployment.graph import stage_channels
    from paddle_medcls.models.novelty import Novelty, novelty_path

    (folder / "scored").mkdir()
    weights = folder / "scored" / "NET.pdparams"
    os.link(folder / "NET.pdparams", weights)
    channels = stage_channels(sidecar.network)
    features = np.random.default_rng(0).standard_normal((64, sum(channels))).astype(np.float32)
    Novelty.fit(features, channels).write(novelty_path(weights))
    novelty = {"limit": 1.0, "sha256": sha256(novelty_path(weights))}
    replace(sidecar, novelty=novelty).write(weights.with_suffix(".json"))


def predictions(job: Job, scored: bool) -> float:
    """Images per second of `Predictor.predictions`, ResNet-50 at 224 pixels, with or without the novelty score."""
    from paddle_medcls.deployment.predictor import Predictor

    folder = Path(job.folder) / ("scored" if scored else "")
    predictor = Predictor.from_weights(folder / "NET.pdparams", engine="auto")
    x = _noise(job, 16)
    return rate(lambda: predictor.predictions(x, ["noise"] * len(x)), len(x), job.seconds)


def openvino_alone(job: Job, batch: int, precision: str) -> float:
    """Images per second of OpenVINO without this package; only the precision is set."""
    _module("openvino")
    openvino = import_openvino()
    settings = {"INFERENCE_PRECISION_HINT": precision}
    model = openvino.Core().compile_model(str(_export(job, "*.xml")), "CPU", settings)
    x = _noise(job, batch)
    return rate(lambda: model(x), len(x), job.seconds)


def onnxruntime_alone(job: Job, batch: int) -> float:
    """Images per second of ONNX Runtime without this package, with its default settings."""
    session = _module("onnxruntime").InferenceSession(str(_export(job, "*.onnx")))
    x = _noise(job, batch)
    return rate(lambda: session.run(None, {"image": x}), len(x), job.seconds)


def _noise(job: Job, batch: int):
    import numpy as np

    size = max(1, batch // job.divide)
    return np.random.default_rng(0).standard_normal((size, 3, 224, 224)).astype(np.float32)


def _module(name: str):
    if importlib.util.find_spec(name) is None:
        raise SetupError(f"{name} is not installed")
    return importlib.import_module(name)


def _export(job: Job, pattern: str) -> Path:
    found = next(iter(Path(job.folder).rglob(pattern)), None)
    if found is None:
        raise SetupError("the library that writes this format is not installed")
    return found


# --- PyTorch, and the limit ----------------------------------------------------------------------


def pytorch(job: Job, what: str, work: Work, precision: str) -> float:
    """Images (or GFLOP) per second of PyTorch in its own interpreter; see `pytorch.py`."""
    work = replace(work, batch=max(1, work.batch // job.divide))
    task = {"what": what, "model": work.model, "stem": work.stem, "side": work.side, "batch": work.batch}
    task |= {"precision": precision, "seconds": job.seconds, "threads": usable_cores()}
    script = Path(__file__).with_name("pytorch.py")
    try:  # -I: do not inherit this interpreter's paths
        command = [job.torch_python, "-I", str(script), json.dumps(task)]
        done = subprocess.run(command, capture_output=True, text=True)
        result = json.loads(done.stdout.splitlines()[-1])
    except OSError as error:
        raise SetupError(f"{job.torch_python} cannot be run: {error.strerror}") from None
    except (IndexError, ValueError):
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise RunError(f"PyTorch: exit code {done.returncode}: {last[0]}") from None
    if "missing" in result:
        raise SetupError(result["missing"])
    return result["value"]


def product(job: Job, as_installed: bool = False) -> float:
    """GFLOP per second of square float32 matrix products in Paddle."""
    if as_installed:
        import_as_installed()
    from paddle_medcls.core.paddle_setup import paddle

    side = 2048
    a, b = paddle.randn([side, side]), paddle.randn([side, side])
    return rate(lambda: paddle.matmul(a, b), 2 * side**3 / 1e9, job.seconds)


def onednn_product(job: Job, bf16: bool) -> float:
    """GFLOP per second of a matrix product in oneDNN, as a convolution of one pixel: 8192 x 2048 times 2048 x 2048."""
    import numpy as np

    from paddle_medcls.models.onednn.operators import Operators

    if bf16 and not has_bfloat16():
        raise SetupError("this processor has no bfloat16")
    operators, side = Operators(bf16), 2048
    x = np.zeros((32, 16, 16, side), np.uint16 if bf16 else np.float32)
    weight = np.zeros((side, side, 1, 1), np.float32)
    return rate(lambda: operators.conv(x, weight, 1, 0), 2 * 8192 * side**2 / 1e9, job.seconds)
