"""oneDNN's operators against Paddle's own: every layer of ResNet-18 (28 pixels) and ResNet-50 (224 pixels)."""

from __future__ import annotations

import functools
import gc
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import toynet
from fakes import ROOT, recipe

from paddle_medcls.cli import train as train_command
from paddle_medcls.core.errors import RunError, SetupError, Stopped
from paddle_medcls.core.hardware import has_bfloat16
from paddle_medcls.core.paddle_setup import paddle
from paddle_medcls.deployment.predictor import Predictor
from paddle_medcls.models.network import Network
from paddle_medcls.models.onednn import library, network
from paddle_medcls.models.onednn.network import Accelerated, obstacle
from paddle_medcls.models.onednn.operators import Operators
from paddle_medcls.models.onednn.speed import bf16_speedup
from paddle_medcls.models.weights import read_weights
from paddle_medcls.training import loop, run_directory
from paddle_medcls.training.loop import Options, train
from paddle_medcls.training.session import start_session
from paddle_medcls.training.setup import choose_kernels

SMALL = Network("resnet18", 3, 1, "small")
missing = obstacle(SMALL.build(), "cpu")
pytestmark = pytest.mark.skipif(bool(missing), reason=missing or "")
needs_bf16 = pytest.mark.skipif(not has_bfloat16(), reason="this processor has no instructions for bfloat16")

functional = paddle.nn.functional


@pytest.fixture(scope="module")
def operators() -> Operators:
    return Operators()


def error(found: object, expected: object) -> float:
    """Relative, in the Euclidean norm."""
    found, expected = (np.asarray(a.numpy() if hasattr(a, "numpy") else a, np.float64) for a in (found, expected))
    assert found.shape == expected.shape
    return float(np.linalg.norm(found - expected) / (np.linalg.norm(expected) or 1.0))


def nchw(array: np.ndarray) -> np.ndarray:
    return array.transpose(0, 3, 1, 2)


def leaf(*shape: int):
    tensor = paddle.randn(list(shape))
    tensor.stop_gradient = False
    return tensor


@functools.cache
def shapes_of(network: Network, side: int, kind: type) -> list[tuple]:
    """The different (channels, side, then for a convolution outputs, kernel, stride) that a network has."""
    with toynet.constant_values():
        model, found = network.build(), {}
    for layer in model.sublayers():
        if isinstance(layer, kind):
            layer.register_forward_post_hook(lambda layer, inputs, _: found.setdefault(shape(layer, inputs[0])))
    model.eval()
    with paddle.no_grad():
        model(paddle.zeros([1, network.in_channels, side, side]))
    return list(found)


def shape(layer, x) -> tuple[int, ...]:
    window = (*layer.weight.shape[::2][:2], layer._stride[0]) if isinstance(layer, paddle.nn.Conv2D) else ()
    return (x.shape[1], x.shape[2], *window)


NETWORKS = {
    "resnet18, 28 px, 1 channel": (SMALL, 28),
    "resnet18, 28 px, 3 channels": (Network("resnet18", 3, 3, "small"), 28),
    "resnet50, 224 px": (Network("resnet50", 3), 224),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_convolutions(name: str, operators: Operators) -> None:
    paddle.seed(1)
    shapes = shapes_of(*NETWORKS[name], paddle.nn.Conv2D)
    assert len(shapes) == {"resnet18": 11, "resnet50": 23}[name.partition(",")[0]]
    for channels, side, outputs, kernel, stride in shapes:
        case = f"{channels} channels of {side} px to {outputs}, {kernel}x{kernel}, stride {stride}"
        x, weight, padding = leaf(2, channels, side, side), leaf(outputs, channels, kernel, kernel), kernel // 2
        y = functional.conv2d(x, weight, stride=stride, padding=padding)
        dy = paddle.randn(y.shape)
        y.backward(dy)

        inside, way_back = operators.to_nhwc(x), operators.to_nhwc(dy)
        assert error(nchw(operators.conv(inside, weight, stride, padding)), y) < 1e-5, case
        dw = paddle.empty(weight.shape)
        operators.conv_weight_gradient(way_back, inside, dw, stride, padding)
        assert error(dw, weight.grad) < 1e-5, case
        dx = operators.conv_data_gradient(way_back, inside.shape, weight, stride, padding)
        assert error(nchw(dx), x.grad) < 1e-5, case


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["resnet18, 28 px, 1 channel", "resnet50, 224 px"])
def test_batch_norm(name: str, training: bool, relu: bool, operators: Operators) -> None:
    """Outputs, gradients and the running statistics; the inputs have means and scales of their own."""
    paddle.seed(2)
    for channels, side in shapes_of(*NETWORKS[name], paddle.nn.BatchNorm2D):
        theirs, ours = (paddle.nn.BatchNorm2D(channels) for _ in range(2))
        for norm in (theirs, ours):
            paddle.seed(channels)
            for value in (norm.weight, norm.bias, norm._mean, norm._variance):
                value.set_value(paddle.rand(value.shape) + 0.5)
            norm.train() if training else norm.eval()
        x = (
            paddle.randn([2, channels, side, side]) * 3
            + paddle.arange(channels, dtype="float32").reshape([1, -1, 1, 1]) % 5
        )
        x.stop_gradient = False
        straight = theirs(x)
        y = functional.relu(straight) if relu else straight
        # Rounding may move a value across ReLU's corner, where the gradient jumps: none is asked for there.
        dy = paddle.randn(y.shape) * (straight.abs() > 1e-3).astype("float32")
        y.backward(dy)

        inside = operators.to_nhwc(x)
        found, state = operators.batch_norm(inside, ours, relu, training, keep=True)
        assert error(nchw(found), y) < 1e-5
        scale, shift = paddle.empty([channels]), paddle.empty([channels])
        dx = operators.batch_norm_backward(operators.to_nhwc(dy), state, scale, shift)
        assert error(nchw(dx), x.grad) < 1e-5
        assert error(scale, theirs.weight.grad) < 1e-5 and error(shift, theirs.bias.grad) < 1e-5
        assert error(ours._mean, theirs._mean) < 1e-5 and error(ours._variance, theirs._variance) < 1e-5
        if not training:
            assert error(nchw(operators.batch_norm(inside, ours, relu, False, keep=False)[0]), y) < 1e-5


def test_add_relu_pool_and_mean(operators: Operators) -> None:
    paddle.seed(3)
    a, b = leaf(3, 64, 13, 14), leaf(3, 64, 13, 14)
    total = functional.relu(a + b)
    pooled = functional.max_pool2d(total, 3, 2, 1)
    mean = pooled.mean([2, 3])
    dy = paddle.randn(mean.shape)
    mean.backward(dy)

    turned = a.transpose([0, 1, 3, 2])  # other strides, which Paddle may keep as a view
    assert error(nchw(operators.to_nhwc(turned)), turned) == 0.0
    inside = operators.add(operators.to_nhwc(a), operators.to_nhwc(b), relu=True)
    assert error(nchw(inside), total) == 0.0
    found, chosen = operators.max_pool(inside, 3, 2, 1)
    assert error(nchw(found), pooled) == 0.0
    assert error(operators.mean(found), mean) < 1e-6
    back = operators.max_pool_backward(operators.mean_backward(dy.numpy(), found.shape), inside.shape, 3, 2, 1, chosen)
    assert error(nchw(operators.relu_backward(back, inside)), a.grad) < 1e-6
    assert error(nchw(operators.add(operators.to_nhwc(a), operators.to_nhwc(b))), a + b) == 0.0


# --- networks --------------------------------------------------------------------------------------


def step(layer, model, x, labels) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Logits and the gradients of one batch."""
    logits = layer(x)
    functional.cross_entropy(logits, labels).backward()
    gradients = {name: p.grad.numpy() for name, p in model.named_parameters() if not p.stop_gradient}
    model.clear_gradients()
    return logits.numpy(), gradients


NETS = [
    (Network("toy_resnet", 3, 1, "small"), 20),
    (Network("toy_bottleneck", 3), 32),
    pytest.param(SMALL, 20, marks=pytest.mark.slow),  # more of the same blocks
    pytest.param(Network("resnet50", 3), 32, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("network, side", NETS)
@pytest.mark.parametrize("training", [True, False])
def test_a_network(network: Network, side: int, training: bool, operators: Operators) -> None:
    """Bounds allow for float32: Paddle's gradients differ as much from those in float64."""
    paddle.seed(4)
    theirs, ours = network.build(), network.build()
    ours.set_state_dict(theirs.state_dict())
    x, labels = paddle.randn([6, network.in_channels, side, side]), paddle.arange(6) % 3
    for model in (theirs, ours):
        model.train() if training else model.eval()
    logits, expected = step(theirs, theirs, x, labels)
    found, gradients = step(Accelerated(ours, operators), ours, x, labels)
    assert error(found, logits) < 1e-3
    assert gradients.keys() == expected.keys()
    assert all(error(gradients[name], expected[name]) < 0.15 for name in expected)
    assert error(gradients["fc.weight"], expected["fc.weight"]) < 1e-3
    for name, value in theirs.state_dict().items():
        assert error(ours.state_dict()[name], value) < 1e-3, name
    ours.eval()
    theirs.eval()
    with paddle.no_grad():
        assert error(Accelerated(ours, operators)(x), theirs(x)) < 1e-3


def without_corners(model) -> None:
    """No value near ReLU's corner, where rounding changes a gradient: a quarter of all channels is off, the rest on.

    Batch norm's outputs are -100 or 5, plus or minus a few halves.
    """
    for layer in model.sublayers():
        if isinstance(layer, paddle.nn.BatchNorm2D):
            off = paddle.arange(layer.bias.shape[0]) % 4 == 1
            layer.bias.set_value(paddle.where(off, paddle.to_tensor(-100.0), paddle.to_tensor(5.0)))
            layer.weight.set_value(0.5 * paddle.ones_like(layer.weight))


def gradient_errors(network: Network, side: int, training: bool, operators: Operators) -> dict[str, float]:
    """Of the logits and of each parameter's gradient, against Paddle's operators."""
    paddle.seed(4)
    theirs, ours = network.build(), network.build()
    x, labels = paddle.randn([6, network.in_channels, side, side]), paddle.arange(6) % 3
    without_corners(theirs)
    for layer in theirs.sublayers():  # running statistics that fit, for the pass that uses them
        if isinstance(layer, paddle.nn.BatchNorm2D):
            layer._momentum = 0.0
    theirs.train()
    with paddle.no_grad():
        theirs(x)
    ours.set_state_dict(theirs.state_dict())
    for model in (theirs, ours):
        model.train() if training else model.eval()
    logits, expected = step(theirs, theirs, x, labels)
    found, gradients = step(Accelerated(ours, operators), ours, x, labels)
    least = 1e-3 * max(np.linalg.norm(value) for value in expected.values())
    errors = {"logits": error(found, logits)}
    for name, value in expected.items():  # a shift before another batch norm has no effect: its gradient is rounding
        size = max(np.linalg.norm(value), least)
        errors[name] = float(np.linalg.norm(gradients[name] - value)) / size
    return errors


WIRING_BOUND = 0.003


@pytest.mark.parametrize("network, side", NETS)
@pytest.mark.parametrize("training", [True, False])
def test_the_wiring_of_a_network(network: Network, side: int, training: bool, operators: Operators) -> None:
    """A hundredth of a gradient's norm is three times the bound: the next tests fail it."""
    errors = gradient_errors(network, side, training, operators)
    assert len(errors) > 28 and max(errors.values()) < WIRING_BOUND, errors


@pytest.mark.parametrize("network, side", NETS)
@pytest.mark.parametrize("fault", ["all 1% too large", "the way round a block 2% too small", "no way round a block"])
def test_faulty_wiring_fails_the_bound(
    network: Network, side: int, fault: str, operators: Operators, monkeypatch: pytest.MonkeyPatch
) -> None:
    add, mean_backward = Operators.add, Operators.mean_backward

    def faulty_add(self, a: np.ndarray, b: np.ndarray, relu: bool = False) -> np.ndarray:
        share = np.float32(0 if fault.startswith("no") else 0.98)
        return add(self, a, b if relu else b * share, relu)  # without ReLU: the sum of a block's gradients

    if fault.startswith("all"):
        monkeypatch.setattr(Operators, "mean_backward", lambda self, dy, shape: mean_backward(self, dy * 1.01, shape))
    else:
        monkeypatch.setattr(Operators, "add", faulty_add)
    errors = gradient_errors(network, side, True, operators)
    assert errors["logits"] < WIRING_BOUND < max(errors.values())


def test_all_that_onednn_makes_is_destroyed(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the operators are collected, at once, without the garbage collector; or when they are closed."""
    dnnl, calls = library.open_library(), []

    class Counting:
        def __getattr__(self, name: str):
            calls.append(name)
            return getattr(dnnl, name)

    def live() -> dict[str, int]:
        kinds = (
            "engine",
            "stream",
            "memory_desc",
            "primitive_desc",
            "primitive_attr",
            "post_ops",
            "primitive",
            "memory",
        )
        left = {}
        for kind in kinds:
            made = re.compile(
                rf"dnnl_(\w+_)?{kind}_create(_with_\w+)?$"
                if kind == "primitive_desc"
                else rf"dnnl_{kind}_create(_with_\w+)?$"
            )
            left[kind] = sum(bool(made.match(name)) for name in calls) - calls.count(f"dnnl_{kind}_destroy")
        return left

    monkeypatch.setattr(library, "open_library", Counting)
    model, x, labels = SMALL.build(), paddle.randn([4, 1, 12, 12]), paddle.arange(4) % 3
    own = Operators()
    step(Accelerated(model, own), model, x, labels)
    assert live()["engine"] == 1 and all(live().values()) and live()["primitive"] > 40
    gc.disable()
    try:
        del own
        assert not any(live().values()), live()
    finally:
        gc.enable()
    own = Operators()
    step(Accelerated(model, own), model, x, labels)
    own.close()
    own.close()
    assert not any(live().values()), live()
    with pytest.raises(SetupError, match="failed with status"):
        own.to_nhwc(x)


def test_frozen_parameters_and_repeats(operators: Operators) -> None:
    """Frozen weights get no gradient, the others the same as before; equal batches give equal bits."""
    paddle.seed(5)
    model = SMALL.build()
    layer, x, labels = Accelerated(model, operators), paddle.randn([5, 1, 16, 16]), paddle.arange(5) % 3
    logits, full = step(layer, model, x, labels)
    for part in (model.conv, model.block[0], model.block[3].conv1[0]):
        for parameter in part.parameters():
            parameter.stop_gradient = True
    again, rest = step(layer, model, x, labels)
    assert again.tobytes() == logits.tobytes()
    assert full.keys() - rest.keys() == {name for name in full if name.startswith(("conv.", "block.0."))} | {
        "block.3.conv1.0.weight"
    }
    assert all(rest[name].tobytes() == full[name].tobytes() for name in rest)


def test_memory_does_not_grow(operators: Operators) -> None:
    """Also with a smaller batch now and then, as at the end of an epoch."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    model = SMALL.build()
    layer = Accelerated(model, operators)
    batches = [(paddle.randn([n, 1, 12, 12]), paddle.arange(n) % 3) for n in (8, 8, 8, 5)]

    def epoch() -> None:
        for x, labels in batches:
            step(layer, model, x, labels)

    for _ in range(2):
        epoch()
    before = resident()
    for _ in range(2):
        epoch()
    assert resident() - before < 20 * 2**20  # weights and gradients of one step are 90 MB


@needs_bf16
def test_bfloat16_is_near(operators: Operators) -> None:
    paddle.seed(6)
    model = SMALL.build()
    x, labels = paddle.randn([8, 1, 20, 20]), paddle.arange(8) % 3
    logits, expected = step(Accelerated(model, operators), model, x, labels)
    found, gradients = step(Accelerated(model, Operators(bf16=True)), model, x, labels)
    assert 0 < error(found, logits) < 0.1
    assert 0 < error(gradients["fc.weight"], expected["fc.weight"]) < 0.1
    for name, value in gradients.items():
        assert value.dtype == np.float32 and np.sum(value * expected[name]) > 0, name


# --- runs ------------------------------------------------------------------------------------------


def go(root: Path, run_dir: Path, resume: bool = False, epochs: int = 1, **options: object) -> list[str]:
    lines: list[str] = []
    own = recipe(model="toy_resnet", size_px=16, stem="small", lr=0.01, epochs=epochs)
    train(own, root, run_dir, Options("cpu", 0, say=lines.append, **options), resume)
    return lines


@pytest.mark.parametrize("precision", ["f32", pytest.param("bf16", marks=[needs_bf16, pytest.mark.slow])])
def test_a_run_repeats_resumes_and_is_read(precision: str, palm_root: Path, tmp_path: Path) -> None:
    """Bit-identical with an interruption between; a resume takes the run's own operators."""
    chosen = {"kernels": "onednn", "precision": precision}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    lines = go(palm_root, whole, **chosen)
    assert sum(line.startswith("kernels: oneDNN's") for line in lines) == 1
    with pytest.raises(Stopped):
        go(palm_root, parts, **chosen, deadline=-1.0)
    go(palm_root, parts, resume=True)
    for name in ("steps.csv", "history.csv", "predictions_val.csv", "PALM.pdparams", "metrics.json"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes(), name
    assert json.loads((parts / "environment.json").read_text())["kernels"] == f"onednn {precision}"

    # The weight file has the same parameters as Paddle's network.
    predictor = Predictor.from_weights(whole / "PALM.pdparams")
    assert read_weights(whole / "PALM.pdparams").keys() == predictor.model.state_dict().keys()


def test_missing_operators(palm_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go(palm_root, tmp_path / "run", kernels="onednn")

    def fail() -> None:
        raise SetupError("this Paddle brings no oneDNN that can be called: gone")

    monkeypatch.setattr(network, "open_library", fail)
    lines = go(palm_root, tmp_path / "auto", kernels="auto")
    assert [line for line in lines if "Paddle's own" in line and "gone" in line]
    assert json.loads((tmp_path / "auto" / "environment.json").read_text())["kernels"] == "paddle"
    with pytest.raises(SetupError, match="gone"):
        go(palm_root, tmp_path / "asked", kernels="onednn")
    with pytest.raises(SetupError, match="began with oneDNN"):
        go(palm_root, tmp_path / "run", resume=True)
    go(palm_root, tmp_path / "run", resume=True, force=True)


def test_bfloat16_needs_its_instructions(palm_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SetupError, match="float32"):
        go(palm_root, tmp_path / "run", kernels="paddle", precision="bf16")
    monkeypatch.setattr("paddle_medcls.training.session.has_bfloat16", lambda: False)
    with pytest.raises(SetupError, match="no instructions for bfloat16"):
        go(palm_root, tmp_path / "run", kernels="auto", precision="bf16")


def kernels_of(run_dir: Path) -> str:
    return json.loads((run_dir / "environment.json").read_text())["kernels"]


def test_the_automatic_precision_is_the_processors_and_stays(palm_root: Path, tmp_path: Path, monkeypatch) -> None:
    """bf16 where processor and kernels have it; what was chosen is written, and a resume keeps it."""
    monkeypatch.setattr("paddle_medcls.training.setup.has_bfloat16", lambda: False)
    go(palm_root, tmp_path / "f32", precision="auto")
    assert kernels_of(tmp_path / "f32") == "onednn f32"
    go(palm_root, tmp_path / "paddle", precision="auto", kernels="paddle")
    assert kernels_of(tmp_path / "paddle") == "paddle"

    monkeypatch.setattr("paddle_medcls.training.setup.has_bfloat16", lambda: True)
    lines = go(palm_root, tmp_path / "f32", resume=True, precision="auto")
    assert "kernels: oneDNN's, in float32" in lines
    model = SMALL.build()
    for precision, expected in (("auto", "onednn bf16"), ("f32", "onednn f32")):
        session = start_session(Options("cpu", precision=precision, say=lambda line: None))
        assert choose_kernels(model, session, resume=False) == expected
    toy = Network("toy", 2).build()  # no ResNet: oneDNN's kernels cannot compute it
    session = start_session(Options("cpu", precision="auto", say=lambda line: None))
    assert choose_kernels(toy, session, resume=False) == "paddle"


@needs_bf16
def test_bfloat16_is_measured() -> None:
    assert 0.1 < bf16_speedup() < 50


@pytest.mark.parametrize(
    ("minutes", "speedup", "options", "told"),
    [
        (0.0, 2.0, {}, True),
        (10.0, 2.0, {}, False),
        (0.0, 1.1, {}, False),
        (0.0, 2.0, {"kernels": "paddle"}, False),
        pytest.param(0.0, 2.0, {"precision": "bf16"}, False, marks=needs_bf16),
    ],
)
def test_a_long_run_in_float32_is_told_of_bfloat16_once(
    minutes: float, speedup: float, options: dict, told: bool, palm_root: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(loop, "LONG_MINUTES", minutes)
    monkeypatch.setattr(loop, "bf16_speedup", lambda: speedup)
    monkeypatch.setattr("paddle_medcls.training.run.has_bfloat16", lambda: True)
    lines = [line for line in go(palm_root, tmp_path / "run", epochs=2, **options) if "--precision bf16" in line]
    assert len(lines) == told
    assert not told or "convolutions 2.0 times as fast" in lines[0]


def test_other_networks_and_devices() -> None:
    assert "ResNet" in obstacle(Network("toy", 2).build(), "cpu")
    assert "gpu:0" in obstacle(SMALL.build(), "gpu:0")


def test_another_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(library, "MAJOR", 99)
    with pytest.raises(SetupError, match="brings oneDNN 3"):
        library.open_library()
    monkeypatch.setattr(library.paddle, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(SetupError, match="no oneDNN"):
        library.open_library()


def test_a_refusal_of_the_library_is_an_error(operators: Operators) -> None:
    with pytest.raises(SetupError, match="convolution_forward_primitive_desc_create failed with status"):
        operators.conv(np.zeros((1, 8, 8, 3), np.float32), paddle.zeros([4, 5, 3, 3]), 1, 1)  # 3 channels, not 5


def test_a_resume_refuses_the_option_kernels(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        train_command.main(["--resume", "run", "--kernels", "paddle"])
    assert "run's own" in capsys.readouterr().err


def test_a_grid_keeps_its_precision(palm_root: Path, tmp_path: Path) -> None:
    from paddle_medcls.training.grid import Cell
    from paddle_medcls.training.reproduce import run_grid

    own = recipe()
    (tmp_path / "cell").mkdir()
    run_directory.describe(tmp_path / "cell", own, {}, {"device": "cpu", "kernels": "onednn bf16"})
    with pytest.raises(RunError, match="another recipe") as fault:
        run_grid([Cell(own, palm_root, tmp_path / "cell")], tmp_path, Options("cpu", kernels="auto"))
    assert "onednn bf16 then, auto f32 now" in str(fault.value)


def test_one_line_of_output_is_removed() -> None:
    """One known line is removed; all other output of a library goes to standard error."""
    code = (
        "import os, sys, ctypes\n"
        "from paddle_medcls.deployment.exported_models import stdout_to_stderr\n"
        "with stdout_to_stderr():\n"
        "    ctypes.CDLL(None).puts(b'ReduceMeanCheckIfOneDNNSupport')\n"
        "    os.write(1, b'something else\\nhalf a line')\n"
        "print('a result')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout == "a result\n"
    assert done.stderr == "something else\nhalf a line"
