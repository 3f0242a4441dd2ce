"""Weight files: both notebooks' own, other layouts, and files made to harm."""

from __future__ import annotations

import builtins
import copy
import io
import json
import math
import os
import pickle
import re
import struct
import subprocess
import sys
import tracemalloc
from collections import OrderedDict
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import cv2
import numpy as np
import pytest
import safetensors.numpy
from fakes import ROOT, palm_tree, pixels, within, write_image
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toynet import without_values
from tutorial_networks import DEPTHS, Net001, Net003, trained

from paddle_medcls.core.errors import WeightsError
from paddle_medcls.core.files import sha256, write_json
from paddle_medcls.core.paddle_setup import paddle
from paddle_medcls.data.datasets import load_index
from paddle_medcls.data.index import Index
from paddle_medcls.deployment.predictor import PaddleNetwork, Predictor
from paddle_medcls.evaluation.evaluate import evaluate_split
from paddle_medcls.evaluation.outputs import score_split
from paddle_medcls.models import safe_pickle
from paddle_medcls.models.network import LOSSES, Network
from paddle_medcls.models.output_head import OutputHead
from paddle_medcls.models.sidecar import KIND, Sidecar
from paddle_medcls.models.weights import (
    load_pretrained,
    load_strict,
    read_pickle,
    read_weights,
    recognise,
    save_weights,
)
from paddle_medcls.preprocessing.loader import ImageDataset
from paddle_medcls.preprocessing.transforms import Preprocessing
from paddle_medcls.recipes import get_recipe

# --- the notebooks' files --------------------------------------------------------------------------


def test_palm_file_gives_the_notebooks_logits(tmp_path: Path) -> None:
    """PALM tutorial, from the image file to the logit: cv2.imread, resize, x / 255 * 2 - 1, its ResNet-50."""
    notebook = trained(Net001(50, 1))
    paddle.save(notebook.state_dict(), str(tmp_path / "palm.pdparams"))
    path = write_image(tmp_path / "V0001.jpg", pixels(1, size=256))
    x = cv2.resize(cv2.imread(str(path)), (224, 224)).transpose(2, 0, 1).astype("float32") / 255.0 * 2.0 - 1.0
    with paddle.no_grad():
        expected = notebook(paddle.to_tensor(x[None])).numpy()

    predictor = Predictor.from_weights(tmp_path / "palm.pdparams")
    assert predictor.sidecar.classes == ("non-pathologic", "pathologic") and predictor.sidecar.recipe == "palm_tutorial"
    assert any("PALM tutorial" in note for note in predictor.notes)
    logits = predictor.logits([path])
    assert logits.shape == (1, 1) and abs(expected).max() > 0.01
    print(f"PALM tutorial: logit {expected[0, 0]:.4f}, largest difference {abs(logits - expected).max():.1e}")
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    p = 1 / (1 + np.exp(-expected[0, 0]))
    np.testing.assert_allclose(predictor.head.probabilities(logits), [[1 - p, p]], atol=1e-5)


def test_covid_file_gives_the_notebooks_logits(tmp_path: Path) -> None:
    """COVID-19 tutorial, from the image file to the logits, with Paddle's own transforms and its ResNet-50."""
    notebook = trained(Net003(50, 4))
    paddle.save(notebook.state_dict(), str(tmp_path / "COVID.pdparams"))
    path = write_image(tmp_path / "COVID-1.png", cv2.resize(pixels(2, size=64), (299, 299))[:, :, 0])
    t = paddle.vision.transforms
    mean, std = [129.90909919] * 3, [59.0183735] * 3
    transform = t.Compose([t.Resize(size=224), t.ToTensor(), t.Normalize(mean=mean, std=std, data_format="CHW")])
    with paddle.no_grad():
        x = transform(cv2.imread(str(path)).astype("float32"))
        expected = notebook(paddle.reshape(x, [-1, 3, 224, 224])).numpy()

    predictor = Predictor.from_weights(tmp_path / "COVID.pdparams")
    assert predictor.sidecar.classes == ("COVID", "LungOpacity", "Normal", "ViralPneumonia")
    logits = predictor.logits([path])
    assert logits.shape == (1, 4) and abs(expected).max() > 0.1
    print(f"COVID-19 tutorial: logits {expected[0].round(4)}, largest difference {abs(logits - expected).max():.1e}")
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    assert predictor.head.probabilities(logits).sum() == pytest.approx(1)


# --- names and shapes of every layout at every depth -----------------------------------------------

UNIT = {  # layout -> names of a convolution's weight and of its batch norm's four
    "PALM tutorial": ("._conv.weight", "._batch_norm.", ("weight", "bias", "_mean", "_variance")),
    "COVID-19 tutorial": (".0.weight", ".1.", ("weight", "bias", "_mean", "_variance")),
    "PaddleClas": (".conv.weight", ".bn.", ("weight", "bias", "_mean", "_variance")),
}


def unit(layout: str, prefix: str, inputs: int, outputs: int, kernel: int) -> Iterator[tuple[str, tuple]]:
    if layout in UNIT:
        conv, norm, names = UNIT[layout]
        yield prefix + conv, (outputs, inputs, kernel, kernel)
        yield from ((prefix + norm + name, (outputs,)) for name in names)
        return
    names = ("weight", "bias", "_mean", "_variance")
    if layout == "torchvision":
        names = ("weight", "bias", "running_mean", "running_var")
    if prefix.endswith("downsample"):
        conv, norm = prefix + ".0", prefix + ".1"
    else:
        conv, norm = prefix, re.sub(r"conv(\d)$", r"bn\1", prefix)
    yield conv + ".weight", (outputs, inputs, kernel, kernel)
    yield from ((f"{norm}.{name}", (outputs,)) for name in names)
    if layout == "torchvision":
        yield f"{norm}.num_batches_tracked", ()


def layout_entries(layout: str, depth: int, outputs: int) -> Iterator[tuple[str, tuple]]:
    """Every name and shape of a ResNet in a layout, as its authors' code lists them."""
    bottleneck = depth >= 50
    first = 1 if layout in ("COVID-19 tutorial", "paddle.vision", "torchvision") else 0  # convolutions count from
    stem = {"PALM tutorial": "conv", "COVID-19 tutorial": "conv", "PaddleClas": "stem.0"}.get(layout, "conv1")
    shortcut = {"PALM tutorial": "short", "COVID-19 tutorial": "shortcut", "PaddleClas": "short"}.get(
        layout, "downsample"
    )
    yield from unit(layout, stem, 3, 64, 7)
    inputs, number = 64, 0
    for stage, count in enumerate(DEPTHS[depth]):
        width = 64 << stage
        outs = 4 * width if bottleneck else width
        for i in range(count):
            block = {
                "PALM tutorial": f"bb_{stage}_{i}",
                "COVID-19 tutorial": f"block.{number}",
                "PaddleClas": f"blocks.{number}",
            }.get(layout, f"layer{stage + 1}.{i}")
            sizes = [(inputs, width, 1), (width, width, 3), (width, outs, 1)]
            if not bottleneck:
                sizes = [(inputs, width, 3), (width, width, 3)]
            for k, size in enumerate(sizes, start=first):
                yield from unit(layout, f"{block}.conv{k}", *size)
            if inputs != outs or (layout == "PaddleClas" and number == 0):
                yield from unit(layout, f"{block}.{shortcut}", inputs, outs, 1)
            inputs, number = outs, number + 1
    head = "out" if layout == "PALM tutorial" else "fc"
    yield f"{head}.weight", (outputs, inputs) if layout == "torchvision" else (inputs, outputs)
    yield f"{head}.bias", (outputs,)


_SHAPES: dict[tuple, dict] = {}


def our_shapes(depth: int, project_first: bool = False) -> dict[str, tuple]:
    key = depth, project_first
    if key not in _SHAPES:
        model = without_values(Network(f"resnet{depth}", 4, project_first=project_first))
        _SHAPES[key] = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    return _SHAPES[key]


@pytest.mark.parametrize("depth", [18, 34, 50, pytest.param(101, marks=pytest.mark.slow), 152])
@pytest.mark.parametrize("layout", ["PALM tutorial", "COVID-19 tutorial", "PaddleClas", "paddle.vision", "torchvision"])
def test_every_layout_at_every_depth(layout: str, depth: int) -> None:
    state = {name: np.zeros(shape, np.float32) for name, shape in layout_entries(layout, depth, 4)}
    network, renamed, found = recognise(state, "file")
    projected = layout == "PaddleClas" and depth < 50
    assert (found, network) == (layout, Network(f"resnet{depth}", 4, project_first=projected))
    assert {name: value.shape for name, value in renamed.items()} == our_shapes(depth, projected)


@pytest.mark.parametrize(("layout", "model"), [("PALM tutorial", Net001), ("COVID-19 tutorial", Net003)])
def test_the_layout_lists_are_those_of_the_networks(layout: str, model: type) -> None:
    """The generated names above are the rewritten notebooks' own."""
    with paddle.LazyGuard():
        own = {name: tuple(value.shape) for name, value in model(50, 4).state_dict().items()}
    assert dict(layout_entries(layout, 50, 4)) == own


def test_paddle_vision_names_are_paddles_own() -> None:
    with paddle.LazyGuard():
        own = paddle.vision.models.resnet18(num_classes=4).state_dict()
    assert dict(layout_entries("paddle.vision", 18, 4)) == {name: tuple(value.shape) for name, value in own.items()}


def test_values_follow_their_names() -> None:
    """Every entry of every layout lands on the entry of ours that does the same thing."""
    reference: dict[str, np.ndarray] = {}
    for layout in ("COVID-19 tutorial", "PALM tutorial", "paddle.vision", "torchvision"):
        entries = [(n, s) for n, s in layout_entries(layout, 50, 4) if not n.endswith("num_batches_tracked")]
        state = {name: np.full(shape, k, np.float32) for k, (name, shape) in enumerate(entries)}
        _, renamed, _ = recognise(state, layout)
        values = {name: float(value.flat[0]) for name, value in renamed.items()}
        reference = reference or values
        assert values == reference  # the lists above are in one order: stem, blocks, shortcut last, head


def test_torchvision_file_gives_the_same_logits(tmp_path: Path) -> None:
    """Linear weights lie transposed there; as safetensors, where such files are found."""
    theirs = trained(paddle.vision.models.resnet18(num_classes=3))
    state = {}
    for name, value in theirs.state_dict().items():
        renamed = name.replace("._mean", ".running_mean").replace("._variance", ".running_var")
        state[renamed] = np.ascontiguousarray(value.numpy().T if name == "fc.weight" else value.numpy())
        if renamed.endswith("running_var"):
            state[renamed.replace("running_var", "num_batches_tracked")] = np.array(2)
    safetensors.numpy.save_file(state, tmp_path / "model.safetensors")
    network, renamed, layout = recognise(read_weights(tmp_path / "model.safetensors"), "file")
    assert layout == "torchvision"
    ours = network.build()
    load_strict(ours, renamed, "file")
    ours.eval()
    x = paddle.randn([2, 3, 64, 64])
    with paddle.no_grad():
        np.testing.assert_allclose(ours(x).numpy(), theirs(x).numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": 1, "b": 2}, "file: the layout is not known; it begins with a, b"),
        ({"layer1.0.conv1.weight": np.zeros(3), f"layer{'1' * 5000}.0.x": np.zeros(3)}, "file: not a ResNet"),
        ({"conv.0.weight": np.zeros((64, 3, 7, 7))}, "not a ResNet-18.*0 basic blocks.*no last layer"),
        ({"conv1.weight": np.zeros(3), "layer1.0.conv1.weight": np.zeros(3)}, "not a ResNet.*1 basic blocks"),
    ],
)
def test_unknown_layouts(state: dict, message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        recognise(state, "file")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conv.0.weight": (64, 2, 7, 7)}, "a.pdparams: network in_channels: 2; expected 1 or 3"),
        ({"fc.weight": (512, 0)}, "a.pdparams: network num_outputs: 0; expected a number of 1 to 30000"),
    ],
)
def test_shapes_that_no_network_has_name_the_file(changes: dict, message: str) -> None:
    shapes = dict(layout_entries("COVID-19 tutorial", 18, 4)) | changes
    with pytest.raises(WeightsError, match=message):
        recognise({name: np.zeros(shape, np.float32) for name, shape in shapes.items()}, "a.pdparams")


def test_a_file_that_could_be_anything_asks_for_the_recipe(tmp_path: Path) -> None:
    model = Network("resnet18", 7).build()
    save_weights(model, tmp_path / "x.pdparams")
    with pytest.raises(WeightsError, match="could be anything"):
        Predictor.from_weights(tmp_path / "x.pdparams")
    with pytest.raises(WeightsError, match=r"has 7 output\(s\), recipe covid needs 4"):
        Predictor.from_weights(tmp_path / "x.pdparams", get_recipe("covid"))


# --- strict loading --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small() -> paddle.nn.Layer:
    paddle.seed(0)
    return paddle.nn.Sequential(paddle.nn.Conv2D(3, 4, 3), paddle.nn.BatchNorm2D(4), paddle.nn.Linear(4, 2))


def arrays(model: paddle.nn.Layer) -> dict[str, np.ndarray]:
    return {name: value.numpy().copy() for name, value in model.state_dict().items()}


def test_strict_loading_lists_every_fault_and_changes_nothing(small: paddle.nn.Layer) -> None:
    before = arrays(small)
    state = {name: value + 1 for name, value in before.items()}
    del state["0.bias"]
    state["extra"] = np.zeros(3, np.float32)
    state["2.weight"] = state["2.weight"].T
    state["1.weight"] = state["1.weight"].astype(np.float64)
    state["1._mean"] = state["1._mean"].astype(np.int64)
    state["1.bias"][2] = np.nan
    state["2.bias"][0] = np.inf
    with pytest.raises(WeightsError, match="7 of 8 entries differ") as caught:
        load_strict(small, state, "file.pdparams")
    for line in (
        "missing      0.bias",
        "unexpected   extra",
        "wrong shape  2.weight: file [2, 4], network [4, 2]",
        "wrong type   1.weight: float64, expected float32",
        "wrong type   1._mean: int64, expected float32",
        "not finite   1.bias",
        "not finite   2.bias",
    ):
        assert line in str(caught.value)
    for name, value in arrays(small).items():
        np.testing.assert_array_equal(value, before[name])


@pytest.mark.parametrize("fault", ["missing", "unexpected", "shape", "type", "nan"])
def test_each_fault_alone_is_refused(small: paddle.nn.Layer, fault: str) -> None:
    before = arrays(small)
    state = {name: value + 1 for name, value in before.items()}
    if fault == "missing":
        del state["2.bias"]
    elif fault == "unexpected":
        state["module.0.bias"] = state["0.bias"]
    elif fault == "shape":
        state["2.bias"] = state["2.bias"][None]  # as many numbers, another shape
    elif fault == "type":
        state["2.bias"] = state["2.bias"].astype(np.float16)
    else:
        state["2.bias"][1] = np.nan
    with pytest.raises(WeightsError, match="1 of 8"):
        load_strict(small, state, "file")
    for name, value in arrays(small).items():
        np.testing.assert_array_equal(value, before[name])


def test_an_empty_state_is_refused(small: paddle.nn.Layer) -> None:
    with pytest.raises(WeightsError, match="8 of 8"):
        load_strict(small, {}, "file")


def test_what_fits_is_set_to_the_bit(small: paddle.nn.Layer) -> None:
    state = {
        name: np.random.default_rng(1).normal(size=v.shape).astype(np.float32) for name, v in arrays(small).items()
    }
    state["2.weight"] = np.asfortranarray(state["2.weight"])
    load_strict(small, state, "file")
    for name, value in arrays(small).items():
        np.testing.assert_array_equal(value, state[name])


def test_pretrained_may_differ_in_the_last_layer_only(tmp_path: Path) -> None:
    source = Network("resnet18", 5).build()
    save_weights(source, tmp_path / "a.pdparams")
    network = Network("resnet18", 2)
    model = network.build()
    head = model.fc.weight.numpy().copy()
    said = load_pretrained(model, network, tmp_path / "a.pdparams")
    assert "without its head (5 outputs; expected 2)" in said
    np.testing.assert_array_equal(model.fc.weight.numpy(), head)
    np.testing.assert_array_equal(model.conv[0].weight.numpy(), source.conv[0].weight.numpy())
    same = Network("resnet18", 5).build()
    assert "with its head" in load_pretrained(same, Network("resnet18", 5), tmp_path / "a.pdparams")
    np.testing.assert_array_equal(same.fc.weight.numpy(), source.fc.weight.numpy())
    with pytest.raises(WeightsError, match="holds resnet18, 3 channel"):
        load_pretrained(model, Network("resnet34", 2), tmp_path / "a.pdparams")


# --- files that Paddle writes ----------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_real_files_of_each_protocol(tmp_path: Path, small: paddle.nn.Layer, protocol: int) -> None:
    path = str(tmp_path / "a.pdparams")
    paddle.save(small.state_dict(), path, protocol=protocol)
    found = read_weights(path)
    assert list(found) == list(small.state_dict())  # without Paddle's own table of names
    for name, value in small.state_dict().items():
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], value.numpy())


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_optimizer_files_and_nested_tensors(tmp_path: Path, small: paddle.nn.Layer, protocol: int) -> None:
    schedule = paddle.optimizer.lr.LinearWarmup(paddle.optimizer.lr.CosineAnnealingDecay(0.1, 4), 2, 0.0, 0.1)
    optimizer = paddle.optimizer.Momentum(schedule, parameters=small.parameters())
    small(paddle.ones([2, 3, 3, 6])[:, :, :, :6]).sum().backward()
    optimizer.step()
    nested = {"opt": optimizer.state_dict(), "one": paddle.ones([2]), "list": [paddle.zeros([1]), 3, None, "text"]}
    paddle.save(nested, str(tmp_path / "a.pdopt"), protocol=protocol)
    found = read_pickle((tmp_path / "a.pdopt").read_bytes())
    expected = paddle.load(str(tmp_path / "a.pdopt"), return_numpy=True)
    assert found.keys() == expected.keys() and found["opt"].keys() == expected["opt"].keys()
    assert found["opt"]["LR_Scheduler"] == expected["opt"]["LR_Scheduler"]
    for name, value in expected["opt"].items():
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(found["opt"][name], value)
    assert found["one"].tolist() == [1, 1] and found["list"][1:] == [3, None, "text"]


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_arrays_of_every_kind(protocol: int) -> None:
    state = {
        "f4": np.arange(6, dtype="<f4").reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "big endian": np.arange(3, dtype=">f8"),
        "f2": np.ones(2, np.float16),
        "i8": np.arange(3),
        "u1": np.arange(3, dtype=np.uint8),
        "bool": np.array([True, False]),
        "complex": np.array([1j]),
        "scalar": np.float64(2.5),
        "zero-dimensional": np.array(3.0),
        "empty": np.zeros((0, 3)),
        "high bytes": np.frombuffer(bytes(range(256)), np.uint8),
        "ordered": OrderedDict([("a", 1), ("b", np.int32(2))]),
        "shared": [],
    }
    state["shared"] = [state["f4"], state["f4"]]
    found = read_pickle(pickle.dumps(state, protocol))
    for name, value in state.items():
        if isinstance(value, np.ndarray):
            assert found[name].dtype == value.dtype and found[name].shape == value.shape, name
            np.testing.assert_array_equal(found[name], value)
    assert found["scalar"] == 2.5 and found["ordered"] == {"a": 1, "b": 2}
    np.testing.assert_array_equal(found["shared"][1], state["f4"])


@pytest.mark.parametrize("protocol", [2, 3])
def test_files_of_numpy_1(protocol: int) -> None:
    """Before NumPy 2 the module was numpy.core; the rest of the file is the same."""
    data = pickle.dumps({"a": np.arange(3.0), "b": np.float64(2)}, protocol)
    old = data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert old != data
    assert read_pickle(old)["a"].tolist() == [0, 1, 2]


def test_safetensors(tmp_path: Path) -> None:
    state = {"a": np.arange(3, dtype=np.float32), "b": np.ones((2, 2), np.float32)}
    safetensors.numpy.save_file(state, tmp_path / "a.safetensors")
    found = read_weights(tmp_path / "a.safetensors")
    assert found.keys() == state.keys() and all((found[name] == state[name]).all() for name in state)


def test_saving_is_paddles_own_format(tmp_path: Path, small: paddle.nn.Layer) -> None:
    save_weights(small, tmp_path / "deep" / "a.pdparams")
    loaded = paddle.load(str(tmp_path / "deep" / "a.pdparams"))
    assert list(loaded) == list(small.state_dict())
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a.pdparams"]


# --- hostile and broken files ----------------------------------------------------------------------


class Call:
    """Pickles as a call of `function(*arguments)`."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.parts = function, arguments

    def __reduce__(self) -> tuple:
        return self.parts


def short(text: str) -> bytes:
    """SHORT_BINUNICODE."""
    return b"\x8c" + bytes([len(text)]) + text.encode()


def array_opcodes(shape: bytes, content: bytes, kind: str = "f4", dtype_state: bytes = b"") -> bytes:
    """An array by hand, with any shape (opcodes of a tuple), any content and any state of its type."""
    return b"".join(
        [
            b"cnumpy._core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R",
            b"(K\x01" + shape + b"cnumpy\ndtype\n" + short(kind) + b"\x89\x88\x87R" + dtype_state + b"\x89" + content,
            b"tb",
        ]
    )


def array_pickle(shape: bytes, content: bytes, kind: str = "f4", dtype_state: bytes = b"") -> bytes:
    """{"w": array}."""
    return b"\x80\x04}" + short("w") + array_opcodes(shape, content, kind, dtype_state) + b"s."


def doubled(levels: int, opcode: bytes = b"\x86") -> bytes:
    """t = (t, t), `levels` times, through the memo."""
    return b")\x94" + b"".join(b"h" + bytes([k]) + b"h" + bytes([k]) + opcode + b"\x94" for k in range(levels))


def endless() -> dict[str, bytes]:
    """Programs that ended the process, or kept it busy for minutes or for ever, while tuples were hashed."""
    numbers = (b"J\xff\xff\xff\xff", b"J\xfe\xff\xff\xff")  # -1 and -2 have one hash, and so have tuples of them
    tuples = b"".join(b"(" + b"".join(key) + b"t\x94" for key in product(numbers, repeat=8))
    keys = [b"h" + bytes([a, 104, b]) + b"\x86" for a in range(256) for b in range(256)]
    pairs = b"".join(b"(" + b"N".join(keys[start : start + 256]) + b"Nu" for start in range(0, len(keys), 256))
    doubling = b"".join(b"h" + bytes([k]) + b"\x86Nb\x94" for k in range(60))
    return {
        "tuples in tuples, each with a state of None": b"\x80\x04})" + b"\x85Nb" * 600_000 + b"Ns.",
        "doubled tuples, each with a state of None": b"\x80\x04})\x94" + doubling + b"Ns.",
        "65,536 keys of one hash": b"\x80\x04}" + short("w") + b"](" + tuples + b"es" + pairs + b".",
        "a list in a list, 100,000 times": b"\x80\x04]\x94]\x94"
        + b"".join(b"]j" + struct.pack("<I", k) + b"a\x94a" for k in range(1, 99_000))
        + b"a.",
        "500,001 numbers": b"\x80\x04]" + b"K\x01a" * 500_001 + b".",
    }


class _Persistent(pickle.Pickler):
    def persistent_id(self, value: object) -> object:
        return "module" if isinstance(value, bytes) else None


def persistent(protocol: int) -> bytes:
    file = io.BytesIO()
    _Persistent(file, protocol).dump({"w": b"x"})
    return file.getvalue()


def hostile(canary: Path) -> dict[str, bytes]:
    """Name -> file; each of the first group would make the canary if anything ran."""
    touch = f"true && touch {canary}"  # messages show the first bytes of a file, and must not show this folder
    code = f"open({str(canary)!r}, 'w').close()"
    weights = np.zeros(3, np.float32)
    files: dict[str, bytes] = {}
    for protocol in (0, 1, 2, 3, 4, 5):
        files[f"os.system, protocol {protocol}"] = pickle.dumps(Call(os.system, touch), protocol)
        files[f"eval, protocol {protocol}"] = pickle.dumps({"conv.0.weight": Call(builtins.eval, code)}, protocol)
    nested = {"conv.0.weight": weights, "state": {"more": [1, (2, Call(os.system, touch))]}}
    objects = np.empty(2, object)
    objects[:] = [Call(os.system, touch), None]
    global_ = b"\x80\x04}" + short("w")
    files |= {
        "nested": pickle.dumps(nested, 4),
        "as a key": b"\x80\x04}cos\nsystem\n" + short(touch) + b"\x85RNs.",
        "object array": pickle.dumps({"w": objects}, 4),
        "exec": pickle.dumps({"w": Call(builtins.exec, code)}, 4),
        "getattr": pickle.dumps({"w": Call(getattr, "", "join")}, 4),
        "dotted name": global_ + short("collections") + short("OrderedDict.fromkeys.__self__") + b"\x93s.",
        "dotted name in numpy": global_ + short("numpy") + short("ndarray.tofile") + b"\x93s.",
        "numpy.load": global_ + b"cnumpy\nload\n" + short("x.npy") + b"\x85Rs.",
        "old-style instance": b"\x80\x02(S'" + touch.encode() + b"'\nios\nsystem\n.",
        "object opcode": b"\x80\x04(cos\nsystem\n" + short(touch) + b"o.",
        "extension registry": b"\x80\x02\x82\x01.",
        "persistent id": persistent(4),
        "persistent id as text": persistent(0),
        "an instance by NEWOBJ": b"\x80\x04}" + short("w") + b"cbuiltins\ntuple\n)\x81s.",
        "another codec": global_ + b"c_codecs\nencode\n" + short("68656c6c6f") + short("hex") + b"\x86Rs.",
        "state set on a function": global_
        + b"c_codecs\nencode\nN}"
        + short("__defaults__")
        + short("hex")
        + b"\x85s\x86bs.",
        "state set on a class": global_
        + b"ccollections\nOrderedDict\nN}"
        + short("items")
        + b"cnumpy\ndtype\ns\x86bs.",
        "state set on an instance": global_
        + b"ccollections\nOrderedDict\n)RN}"
        + short("items")
        + b"cnumpy\ndtype\ns\x86bs.",
        # memory and time
        "memo index": b"\x80\x02}r\xff\xff\xff\x7f.",
        "memo index as text": b"}p2000000000\n.",
        "length of bytes": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b"abc.",
        "length of text": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 62) + b"abc.",
        "length of a bytearray": b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b"abc.",
        "length of a frame": b"\x80\x04\x95" + struct.pack("<Q", 1 << 60) + b"}.",
        "length of a number": b"\x80\x04\x8b" + struct.pack("<i", 0x7FFFFFFF) + b"1.",
        "100 GB declared": array_pickle(
            b"J" + struct.pack("<i", 25_000) + b"J" + struct.pack("<i", 1_000_000) + b"\x86", b"C\x04abcd"
        ),
        "shape of huge numbers": array_pickle(b"(" + b"\x8a\x08" + b"\xff" * 7 + b"\x7f" + b"K\x02t", b"C\x04abcd"),
        "negative shape": array_pickle(b"J\xff\xff\xff\xffJ\xfc\xff\xff\xff\x86", b"C\x10" + b"a" * 16),
        "shape of 40 axes": array_pickle(b"(" + b"K\x01" * 40 + b"t", b"C\x04abcd"),
        "shape that is no tuple": array_pickle(b"]K\x01a", b"C\x04abcd"),
        "content that is a number": array_pickle(b"K\x01\x85", b"K\x07"),
        "object dtype": array_pickle(b"K\x01\x85", b"C\x08" + b"a" * 8, "O8"),
        "string dtype": array_pickle(b"K\x01\x85", b"C\x04abcd", "S4"),
        "structured dtype": array_pickle(b"K\x01\x85", b"C\x04abcd", "f4,f4"),
        "array without a state": b"\x80\x04}" + short("w") + b"cnumpy._core.multiarray\n_reconstruct\n)Rs.",
        "billion laughs in lists": b"\x80\x04]\x94"
        + b"".join(b"](" + (b"h" + bytes([k])) * 10 + b"e\x94" for k in range(40))
        + b".",
        "billion laughs in lists of a list": b"\x80\x04](]\x94"
        + b"".join(b"](" + (b"h" + bytes([k])) * 10 + b"e\x94" for k in range(40))
        + b"e.",
        "billion laughs in tuples": b"\x80\x04" + doubled(60) + b".",
        "billion laughs as a key": b"\x80\x04}" + doubled(60) + b"Ns.",
        "billion laughs by copies": b"\x80\x04X"
        + struct.pack("<I", 100_000)
        + b"a" * 100_000
        + b"\x94]("
        + b"c_codecs\nencode\nh\x00\x8c\x06latin1\x86R" * 3000
        + b"e.",
        "deep lists": b"\x80\x04" + b"]" * 100_000 + b"a" * 99_999 + b".",
        "deep dicts": b"\x80\x04" + b"}K\x00" * 50_000 + b"N" + b"s" * 50_000 + b".",
        "deep tuples": b"\x80\x04)" + b"\x85" * 100_000 + b".",
        "deep tuple as a key": b"\x80\x04})" + b"\x85" * 1_000_000 + b"K\x00s.",
        "list in itself": b"\x80\x04]\x94h\x00a.",
        "dict in itself": b"\x80\x04}\x94" + short("a") + b"h\x00s.",
        "colliding keys": b"\x80\x04}("
        + b"".join(b"\x8a\x0a" + (((1 << 61) - 1) * k).to_bytes(10, "little") + b"N" for k in range(1, 20_000))
        + b"u.",
        "a call with a tuple of lists": global_ + b"cbuiltins\ntuple\n](]]]e\x85Rs.",
        "an array made twice": array_pickle(b"K\x01\x85", b"C\x04abcd").replace(b"tb", b"t\x94bh\x00b"),
        "arrays of one another's bytes": b"\x80\x04]("
        + array_opcodes(b"M\x10\x27\x85", b"B\x10\x27\x00\x00" + bytes(10_000) + b"\x94", "u1")
        + array_opcodes(b"M\x10\x27\x85", b"h\x00", "u1") * 200
        + b"e.",
        "a name twice": b"\x80\x04}(" + (short("w") + b"N") * 2 + b"u.",
        "array type with fields": array_pickle(
            b"K\x01\x85",
            b"C\x04abcd",
            dtype_state=b"(K\x03" + short("<") + b"N" + short("a") * 2 + b"K\x01K\x01K\x00tb",
        ),
        **endless(),
        # no weight files
        "a list": pickle.dumps([weights], 4),
        "a text": pickle.dumps("weights", 4),
        "an empty dict": pickle.dumps({}, 4),
        "a dict of numbers": pickle.dumps({"a": 1}, 4),
        "a set": pickle.dumps({"a": {1}}, 4),
        "bytes": pickle.dumps({"a": b"abc"}, 4),
        "keys that are no names": pickle.dumps({(1, 2): weights}, 4),
        "HTML": b"<!DOCTYPE html>\n<html><head><title>404 Not Found</title></head></html>\n",
        "empty": b"",
        "one byte": b"\x80",
        "stop": b".",
        "a stack that runs dry": b"\x80\x04}ssss.",
        "a mark that is missing": b"\x80\x04}u.",
        "a memo that is missing": b"\x80\x04h\x07.",
        "zeros": bytes(1000),
        "PNG": b"\x89PNG\r\n\x1a\n" + bytes(100),
        "ZIP": b"PK\x03\x04" + bytes(100),
    }
    return files


NAMES = list(hostile(Path("canary")))


@pytest.fixture(scope="module")
def hostile_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """The canary, and the files that would make it."""
    canary = tmp_path_factory.mktemp("hostile") / "canary"
    return canary, hostile(canary)


@pytest.mark.parametrize("name", NAMES)
def test_hostile_files(name: str, hostile_files: tuple[Path, dict[str, bytes]], tmp_path: Path) -> None:
    """Each is refused in one message, runs nothing, and takes neither memory nor time."""
    canary, files = hostile_files
    path = tmp_path / "weights.pdparams"
    path.write_bytes(files[name])

    def read() -> None:
        tracemalloc.start()
        try:
            with pytest.raises(WeightsError, match="weights.pdparams"):
                read_weights(path)
            assert tracemalloc.get_traced_memory()[1] < 100 * path.stat().st_size + 2_000_000
        finally:
            tracemalloc.stop()

    within(20, read)
    if canary.exists():
        canary.unlink()
        pytest.fail("the file ran a program")
    valid = pickle.dumps({"w": np.arange(3.0)}, 2)  # the reader is as it was
    assert read_pickle(valid)["w"].tolist() == [0, 1, 2]


def test_array_opcodes_can_be_right() -> None:
    """The faults above are the ones that their names say, since the same opcodes without them are an array."""
    state = b"(K\x03" + short("<") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    for data in (array_pickle(b"K\x01\x85", b"C\x04\0\0\x80?", dtype_state=part) for part in (b"", state)):
        assert read_pickle(data)["w"].tolist() == pickle.loads(data)["w"].tolist() == [1]


@pytest.mark.parametrize("name", endless())
def test_no_program_runs_for_long(name: str, tmp_path: Path) -> None:
    """In a process of its own, which a stack overflow or an endless loop in C would end or hold up."""
    (tmp_path / "file").write_bytes(endless()[name])
    code = """
import pathlib, pickle, sys
from paddle_medcls.models.safe_pickle import read_pickle
try:
    read_pickle(pathlib.Path(sys.argv[1]).read_bytes())
except pickle.UnpicklingError:
    print("refused")
"""
    command = [sys.executable, "-c", code, str(tmp_path / "file")]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert (done.returncode, done.stdout) == (0, "refused\n"), done.stderr


def test_the_canary_would_sing(tmp_path: Path) -> None:
    """The same files, read by pickle, do run: the test above can fail."""
    canary = tmp_path / "canary"
    files = hostile(canary)
    for name in ("os.system, protocol 4", "eval, protocol 2", "nested", "object array", "as a key", "object opcode"):
        pickle.loads(files[name])
        assert canary.exists(), name
        canary.unlink()


def test_refusal_names_what_was_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "evil.pdparams"
    path.write_bytes(pickle.dumps(Call(os.system, "true"), 4))
    with pytest.raises(WeightsError, match="asks for posix.system, which no weight file needs; nothing was run"):
        read_weights(path)


def test_a_name_is_read_as_it_stands() -> None:
    r"""Python's own reader turns \x73 into an s, and warns of \q on the user's screen."""
    with pytest.raises(pickle.UnpicklingError, match=r"asks for o\\q\.\\x73ystem, which"):
        read_pickle(b"\x80\x02co\\q\n\\x73ystem\n.")


@pytest.mark.parametrize("protocol", [2, 4])
def test_truncated_at_every_point(small: paddle.nn.Layer, protocol: int) -> None:
    data = pickle.dumps({name: value.numpy() for name, value in small.state_dict().items()}, protocol)
    for end in range(0, len(data), 7 if len(data) > 500 else 1):
        with pytest.raises(pickle.UnpicklingError):
            read_pickle(data[:end])
    assert len(read_pickle(data)) == 8


def test_missing_and_directory(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="none.pdparams: No such file"):
        read_weights(tmp_path / "none.pdparams")
    with pytest.raises(WeightsError, match="directory"):
        read_weights(tmp_path)


@pytest.mark.parametrize("name", ["pipe.pdparams", "pipe.safetensors", "pipe.json"])
def test_a_pipe_is_refused_at_once(name: str, tmp_path: Path) -> None:
    """Opening it would wait for a writer for ever."""
    os.mkfifo(tmp_path / name)
    read = Sidecar.read if name.endswith(".json") else read_weights
    with pytest.raises(WeightsError, match="not a regular file"):
        within(20, lambda: read(tmp_path / name))


@pytest.mark.parametrize("name", ["a.pdparams", "a.safetensors"])
def test_an_empty_file_and_one_too_large(name: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    with pytest.raises(WeightsError, match="the file is empty"):
        read_weights(tmp_path / name)
    os.truncate(tmp_path / name, 1 << 40)  # takes no space on the disk
    with pytest.raises(WeightsError, match="1,099,511,627,776 bytes; at most 4,294,967,296 are read"):
        read_weights(tmp_path / name)


def test_a_file_that_is_not_the_sidecars_is_refused(tmp_path: Path) -> None:
    """One flipped byte inside an array loads silently in Paddle; the sidecar's sha256 finds it."""
    path = tmp_path / "COVID.pdparams"
    save_weights(Network("resnet18", 4).build(), path)
    sidecar = Sidecar(**{**vars(SIDECAR), "sha256": sha256(path)})
    sidecar.write(path.with_suffix(".json"))
    assert Predictor.from_weights(path).sidecar == sidecar
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert len(read_weights(path)) == 102  # it can still be read: the sum alone tells
    with pytest.raises(WeightsError, match="sha256 differs"):
        Predictor.from_weights(path)


@pytest.mark.parametrize(
    "name",
    [
        *("garbage", "header of 2^60 bytes", "truncated", "overlap", "unknown type", "not JSON"),
        *("header longer than the file", "metadata that is a list", "bytes used twice", "shape of 2^64", "brackets"),
        *("a name twice", "a header of 5 MB"),
    ],
)
def test_hostile_safetensors(name: str, tmp_path: Path) -> None:
    good = safetensors.numpy.save({"a": np.arange(100, dtype=np.float32)})
    entry = '"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'

    def file(header: str, content: bytes = b"") -> bytes:
        return struct.pack("<Q", len(header)) + header.encode() + content

    content = {
        "garbage": b"garbage garbage garbage",
        "header of 2^60 bytes": struct.pack("<Q", 1 << 60) + b"{}",
        "truncated": good[:-50],
        "overlap": file('{"a":{"dtype":"F32","shape":[25000000000],"data_offsets":[0,100000000000]}}', b"abcd"),
        "unknown type": file('{"a":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}}', b"abcd"),
        "not JSON": file("{{{{"),
        "header longer than the file": struct.pack("<Q", 99_999) + b"{}",
        "metadata that is a list": file(
            '{"__metadata__":[1],"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"abcd"
        ),
        "bytes used twice": file(
            '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
            b"abcdefgh",
        ),
        "shape of 2^64": file('{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}}'),
        "brackets": file("[" * 100_000),
        "a name twice": file(f"{{{entry},{entry}}}", b"abcd"),
        "a header of 5 MB": file(f"{{{entry}}}" + " " * 5_000_000, b"abcd"),
    }[name]
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match="not a safetensors file"):
        within(10, lambda: read_weights(path))


def test_bfloat16_safetensors_are_refused_not_misread(tmp_path: Path) -> None:
    header = '{"a":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]}}'
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + b"\x80\x3f\x80\x3f")
    try:
        found = read_weights(path)["a"]
    except WeightsError:
        return
    assert found.dtype != np.float32  # load_strict then says "wrong type"


def test_a_network_that_gives_nan_is_refused_by_the_image(tmp_path: Path) -> None:
    """In training's validation, and behind a Predictor."""
    index = load_index("palm", palm_tree(tmp_path), "val")
    model = Network("toy", 1).build()
    model.fc.bias.set_value(paddle.full([1], math.nan))
    with pytest.raises(WeightsError, match=r"for 7 of 7 image\(s\)\n  \S*V0001.jpg: logits nan"):
        evaluate_split(model, ImageDataset(index, Preprocessing(32)), 3, 0)
    sidecar = Sidecar("palm", "toy", index.classes, "binary", "sigmoid", Network("toy", 1), Preprocessing(32))
    with pytest.raises(WeightsError, match=r"for 7 of 7 image\(s\)\n  \S*V0001.jpg: logits nan"):
        Predictor(sidecar, PaddleNetwork(model)).split_logits(index, 3, 0)


# --- sidecars --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        "{}",
        '{"kind": "other"}',
        f'{{"kind": "{KIND}"}}',
        f'{{"kind": "{KIND}", "classes": 3, "flips": []}}',
    ],
)
def test_faulty_sidecars(content: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(WeightsError, match="the sidecar cannot be read"):
        Sidecar.read(path)


# --- fuzzing ---------------------------------------------------------------------------------------

SEEDS = [
    pickle.dumps({"conv.0.weight": np.arange(4, dtype=np.float32), "n": OrderedDict(a=np.float64(1))}, protocol)
    for protocol in (2, 3, 4)
]
SEEDS.append(pickle.dumps({"w": [("name", np.ones(2)), {"a": 1, "b": None}], "x": 2.5}, 4))


@st.composite
def mutations(draw: st.DrawFn) -> bytes:
    data = bytearray(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, len(data)))
        kind = draw(st.sampled_from(["flip", "insert", "delete", "copy"]))
        if kind == "flip" and at < len(data):
            data[at] = draw(st.integers(0, 255))
        elif kind == "insert":
            data[at:at] = draw(st.binary(max_size=9))
        elif kind == "delete":
            del data[at : at + draw(st.integers(1, 12))]
        else:
            start = draw(st.integers(0, len(data)))
            data[at:at] = data[start : start + draw(st.integers(1, 30))]
    return bytes(data)


def read_or_refuse(data: bytes) -> None:
    try:
        value = within(60, lambda: read_pickle(data))
    except pickle.UnpicklingError:
        return
    found: dict[int, np.ndarray] = {}
    plain(value, found)
    assert sum(array.nbytes for array in found.values()) <= len(data)


def plain(value: object, arrays: dict[int, np.ndarray]) -> None:
    """What comes out is made of plain things alone; gathers the arrays."""
    if type(value) is dict:
        for key, child in value.items():
            assert type(key) in (str, int)
            plain(child, arrays)
    elif type(value) in (list, tuple):
        for child in value:
            plain(child, arrays)
    else:
        assert value is None or type(value) in (bool, int, float, complex, str, np.ndarray)
        if isinstance(value, np.ndarray):
            assert value.dtype.kind in "biufc"
            arrays[id(value)] = value


FRAGMENTS = {  # what can be put down anywhere
    "NONE": b"N",
    "BOOL": b"\x88",
    "INT": b"K\x02",
    "NEGATIVE": b"J\xfe\xff\xff\xff",
    "FLOAT": b"G?\xf0\0\0\0\0\0\0",
    "TEXT": short("f4"),
    "LATIN1": short("latin1"),
    "BYTES": b"C\x04abcd",
    "LIST": b"]",
    "DICT": b"}",
    "EMPTY": b")",
    "ARRAY": array_opcodes(b"K\x01\x85", b"C\x04abcd"),
    "PAIR": short("name") + array_opcodes(b"K\x00\x85", b"C\x00") + b"\x86",
    **{name: b"c" + name.replace(" ", "\n").encode() + b"\n" for name in safe_pickle._NAMES},
}
POPS = {b"\x85": 1, b"\x86": 2, b"\x87": 3, b"a": 2, b"s": 3, b"R": 2, b"b": 2}  # each leaves one value


@st.composite
def programs(draw: st.DrawFn) -> bytes:
    """Well-formed opcodes: nothing is missing on the stack, every mark is closed, and one value is left.

    The types are any, so most programs are refused for what they do; pieces that leave the stack as high as it
    was are repeated, up to 3000 times.
    """
    steps: list[bytes] = []
    heights = [0]  # values on the stack; below the last mark, those under each mark
    since: list[tuple[int, list[int]]] = []  # number of steps, and the heights then
    memo = 0
    for _ in range(draw(st.integers(1, 40))):
        fitting = [code for code, needs in POPS.items() if heights[-1] >= needs]
        closing = [b"t"] + [b"u", b"e"] * (len(heights) > 1 and heights[-2] > 0)
        kind = draw(st.sampled_from(["put"] * 4 + ["pop"] * 6 + ["mark", "close", "memo", "get", "repeat"]))
        since.append((len(steps), list(heights)))
        if kind == "put":
            steps.append(draw(st.sampled_from(list(FRAGMENTS.values()))))
            heights[-1] += 1
        elif kind == "pop" and fitting:
            steps.append(draw(st.sampled_from(fitting)))
            heights[-1] += 1 - POPS[steps[-1]]
        elif kind == "mark" and len(heights) < 6:
            steps.append(b"(")
            heights.append(0)
        elif kind == "close" and len(heights) > 1:
            steps.append(draw(st.sampled_from(closing)))
            heights.pop()
            heights[-1] += steps[-1] == b"t"
        elif kind == "memo" and heights[-1]:
            steps.append(b"\x94")
            memo += 1
        elif kind == "get" and memo:
            steps.append(b"h" + bytes([draw(st.integers(0, memo - 1))]))
            heights[-1] += 1
        elif kind == "repeat":
            same = [steps[start:] for start, before in since if before == heights and start < len(steps)]
            piece = draw(st.sampled_from(same or [[]]))
            steps += piece * draw(
                st.sampled_from([times for times in (0, 1, 2, 9, 3000) if times * len(piece) < 10_000])
            )
    while len(heights) > 1:
        steps.append(b"t")
        heights.pop()
        heights[-1] += 1
    steps += [b"N"] * (heights[-1] == 0) + [b"\x86"] * (heights[-1] - 1)
    return b"\x80\x04" + b"".join(steps) + b"."


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.one_of(mutations(), programs()))
def test_fuzzed_weight_files(data: bytes) -> None:
    """Any exception but UnpicklingError is a defect."""
    read_or_refuse(data)


@pytest.mark.slow
@settings(max_examples=50_000, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.one_of(mutations(), programs(), st.binary(max_size=200).map(lambda tail: b"\x80\x04" + tail)))
def test_fuzzed_weight_files_for_minutes(data: bytes) -> None:
    read_or_refuse(data)


PRESET = get_recipe("covid_notebook")
SIDECAR = Sidecar(
    dataset="covid",
    recipe=PRESET.name,
    classes=("a", "b", "c", "d"),
    task="multi-class",
    loss="softmax",
    network=Network("resnet18", 4),
    preprocessing=PRESET.preprocessing,
)


def fields_of(sidecar: Sidecar) -> dict:
    """What `Sidecar.write` writes, to be changed by hand."""
    values = {
        "kind": KIND,
        **vars(sidecar),
        "network": vars(sidecar.network),
        "preprocessing": vars(sidecar.preprocessing),
    }
    return json.loads(json.dumps(values))


def written(path: Path, changes: dict) -> Path:
    """A genuine sidecar with these fields changed; "network stem" is a field of `network`."""
    values = fields_of(SIDECAR)
    for name, value in changes.items():
        outer, _, inner = name.partition(" ")
        if inner:
            values[outer][inner] = value
        else:
            values[outer] = value
    path.write_text(json.dumps(values))
    return path


HOSTILE_FIELDS: list[tuple[dict, str]] = [  # changes of a sidecar of four classes -> what the message says
    ({"dataset": ""}, "dataset: ''"),
    ({"dataset": "../covid"}, "dataset: '../covid'"),
    ({"recipe": "x/../../elsewhere/evil"}, "recipe: 'x/../../elsewhere/evil'"),
    ({"recipe": "*"}, r"recipe: '\*'"),
    ({"recipe": ".."}, r"recipe: '\.\.'"),
    ({"recipe": "a\n"}, "recipe: "),
    ({"labels": None}, "labels: None"),
    ({"classes": []}, r"classes: \(\)"),
    ({"classes": ["a", "b", "c"]}, "network num_outputs: 4; expected 3 for 3 classes"),
    ({"classes": ["a", "b", "c", "c"]}, "classes: "),
    ({"classes": ["a", "b", "c", ""]}, "classes: "),
    ({"classes": ["a", "b", "c", "x" * 201]}, "classes: "),
    ({"classes": ["a", "b", "c", "\x1b[2J"]}, "classes: "),
    ({"classes": ["a", "b", "c", 4]}, "classes: "),
    ({"classes": "abcd"}, "classes: 'abcd'"),
    ({"classes": [str(k) for k in range(1001)], "network num_outputs": 1001}, "classes: "),
    ({"task": "nonsense"}, "task: 'nonsense'"),
    ({"task": ["binary"]}, "task: "),
    ({"task": "binary"}, "classes: "),
    ({"loss": "sigmoid"}, "loss: 'sigmoid'"),
    ({"loss": "mse"}, "loss: 'mse'"),
    ({"network": 3}, "network: 3"),
    ({"network model": "../resnet18"}, "network model: '../resnet18'"),
    ({"network model": 18}, "network model: 18"),
    ({"network model": "resnet19"}, "network model: 'resnet19'; expected .*; did you mean 'resnet18'"),
    ({"network num_outputs": 10**9}, "network num_outputs: 1000000000"),
    ({"network num_outputs": 2}, "network num_outputs: 2; expected 4"),
    ({"network num_outputs": 4.0}, "network num_outputs: 4.0"),
    ({"network num_outputs": True}, "network num_outputs: True"),
    ({"network in_channels": 1}, "network in_channels: 1; expected 3"),
    ({"network in_channels": 4}, "network in_channels: 4"),
    ({"network stem": "large"}, "network stem: 'large'"),
    ({"network project_first": 1}, "network project_first: 1"),
    ({"network dept": 18}, "unknown field network 'dept'"),
    ({"preprocessing": None}, "preprocessing: None"),
    ({"preprocessing size_px": 4096}, "preprocessing size_px: 4096"),
    ({"preprocessing size_px": 2048, "network stem": "small"}, "preprocessing size_px: 2048; expected at most 1024"),
    ({"preprocessing size_px": 2048, "network model": "vgg16"}, "preprocessing size_px: 2048; expected at most 1024"),
    ({"preprocessing size_px": 0}, "preprocessing size_px: 0"),
    ({"preprocessing size_px": True}, "preprocessing size_px: True"),
    ({"preprocessing resize_px": 10**6}, "preprocessing resize_px: 1000000"),
    ({"preprocessing mean": [1e308] * 3}, "preprocessing mean: "),
    ({"preprocessing mean": [1.0]}, "preprocessing mean: "),
    ({"preprocessing mean": 1.0}, "preprocessing mean: 1.0"),
    ({"preprocessing std": [0, 0, 0]}, r"preprocessing std: \(0, 0, 0\)"),
    ({"preprocessing std": [-1, 1, 1]}, r"preprocessing std: \(-1, 1, 1\)"),
    ({"preprocessing std": [1, True, 1]}, r"preprocessing std: \(1, True, 1\)"),
    ({"preprocessing channels": "cmyk"}, "preprocessing channels: 'cmyk'"),
    ({"preprocessing channels": []}, "preprocessing channels: "),
    ({"preprocessing sizepx": 224}, "unknown field preprocessing 'sizepx'; did you mean 'size_px'?"),
    ({"flips": ["flip"] * 40}, "flips: "),
    ({"flips": ["flip", "turn"]}, "flips: "),
    ({"flips": [["flip"]]}, "flips: "),
    ({"temperature": 0}, "temperature: 0"),
    ({"temperature": -1.5}, "temperature: -1.5"),
    ({"temperature": "1"}, "temperature: '1'"),
    ({"threshold": 1.5}, "threshold: 1.5"),
    ({"threshold": None}, "threshold: None"),
    ({"drawn": 0}, "drawn: 0"),
    ({"sha256": "0" * 63}, "sha256: '0000"),
    ({"sha256": 5}, "sha256: 5"),
    ({"versions": {"paddle": {}}}, "versions: "),
    ({"versions": []}, r"versions: \(\)"),
    ({"metrics": {"n": 3, "auc": "high"}}, "metrics: "),
    ({"metrics": {"n": 3, "auc": 1.5}}, "metrics: "),
    ({"metrics": {"n": -1}}, "metrics: "),
    ({"metrics": {"n": 3, "speed": 1}}, "metrics: "),
    ({"metrics": {"auc": 0.5}}, "metrics: "),
    ({"metrics": {"n": 3, "per_class": [{"per_class": []}]}}, "metrics: "),
    ({"metrics": {"n": 3, "per_class": [{"class": "a", "f1": 0.5}]}}, "metrics: "),
    ({"metrics": {"n": 3, "confusion": [[1, 2]]}}, "metrics: "),
    ({"metrics": {"n": 3, "intervals": {"auc": [0.5]}}}, "metrics: "),
    ({"metrics": {str(k): 1 for k in range(101)}}, "metrics: "),
    ({"form": "pickle", "files": {"a": "0" * 64}}, "form: 'pickle'"),
    ({"form": "onnx"}, "files: {}"),
    ({"files": {"a.onnx": "0" * 64}}, "files: "),
    ({"form": "onnx", "files": {"../a.onnx": "0" * 64}}, "files: "),
    ({"form": "onnx", "files": {"a.onnx": ""}}, "files: "),
    ({"form": "onnx", "files": {"a.onnx": 1}}, "files: "),
    ({"precision": "int8"}, "precision: 'int8'"),
    ({"temprature": 2.0}, "unknown field 'temprature'; did you mean 'temperature'?"),
]


@pytest.mark.parametrize(("changes", "message"), HOSTILE_FIELDS)
def test_a_value_that_no_sidecar_has_is_refused(changes: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=f"the sidecar cannot be read: .*{message}"):
        Sidecar.read(written(tmp_path / "a.json", changes))


@pytest.mark.parametrize("labels", ["all classes", "one class"])
@pytest.mark.parametrize(
    ("task", "loss"),
    [("binary", "softmax"), ("binary", "sigmoid"), *((task, LOSSES[task][0]) for task in LOSSES if task != "binary")],
)
def test_the_metrics_that_evaluation_writes_are_read(task: str, loss: str, labels: str, tmp_path: Path) -> None:
    """With undefined values where a class has no image; several images a patient."""
    classes = ("a", "b") if task == "binary" else ("a", "b", "c")
    head = OutputHead(task, loss, classes)
    rng = np.random.default_rng(0)
    truth = np.arange(12) % len(classes) if labels == "all classes" else np.zeros(12, int)
    truth = np.eye(3, dtype=int)[truth] if task == "multi-label" else truth
    names = tuple(f"{number}.png" for number in range(12))
    index = Index(
        *("covid", "val", names, [tmp_path / name for name in names], truth, classes, task),
        groups=tuple(str(number // 2) for number in range(12)),
        note="other bytes: md5 0, published 1",
    )
    logits = rng.normal(size=(12, head.num_outputs)).astype(np.float32)
    write_json(tmp_path / "metrics.json", score_split(logits, index, head) | {"epoch": 3})
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    fields = {**vars(SIDECAR), "classes": classes, "task": task, "loss": loss}
    sidecar = Sidecar(**{**fields, "network": Network("resnet18", head.num_outputs), "metrics": metrics})
    sidecar.write(tmp_path / "a.json")
    assert Sidecar.read(tmp_path / "a.json").metrics == metrics
    assert ("confusion" in metrics) == (task != "multi-label") and metrics["patients"] == 6


@pytest.mark.parametrize("name", ["dataset", "network model"])
def test_a_missing_value(name: str, tmp_path: Path) -> None:
    values = fields_of(SIDECAR)
    outer, _, inner = name.partition(" ")
    del (values[outer] if inner else values)[inner or outer]
    (tmp_path / "a.json").write_text(json.dumps(values))
    with pytest.raises(WeightsError, match=f"{name} is missing"):
        Sidecar.read(tmp_path / "a.json")


HOSTILE_JSON = {
    "100,000 brackets": b"[" * 100_000,
    "brackets in a field": json.dumps(fields_of(SIDECAR))[:-1].encode() + b', "metrics": ' + b"[" * 100_000,
    "NaN": json.dumps({**fields_of(SIDECAR), "temperature": math.nan}).encode(),
    "Infinity": json.dumps({**fields_of(SIDECAR), "temperature": math.inf}).encode(),
    "1e999": json.dumps(fields_of(SIDECAR)).replace('"temperature": 1.0', '"temperature": 1e999').encode(),
    "a number of a million digits": b'{"kind": ' + b"9" * 1_000_000 + b"}",
    "a key twice": json.dumps(fields_of(SIDECAR))[:-1].encode() + b', "temperature": 2.0}',
    "not UTF-8": b'{"kind": "\xff"}',
    "half a surrogate": json.dumps({**fields_of(SIDECAR), "recipe": "\ud800"}).encode(),
    "5 MB": b" " * 5_000_000,
}


@pytest.mark.parametrize("name", HOSTILE_JSON)
def test_hostile_json(name: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(HOSTILE_JSON[name])
    with pytest.raises(WeightsError, match="the sidecar cannot be read"):
        within(20, lambda: Sidecar.read(tmp_path / "a.json"))


def test_a_sidecar_of_version_0_1_is_read(tmp_path: Path) -> None:
    """Written by 0.1 after an epoch of training."""
    sidecar = Sidecar.read(Path(__file__).with_name("sidecar_of_0_1.json"))
    assert sidecar.classes == ("non-pathologic", "pathologic") and sidecar.flips == ("flip",)
    assert sidecar.network == Network("toy", 1) and sidecar.preprocessing == Preprocessing(32)
    assert sidecar.metrics["epoch"] == 1 and sidecar.versions["paddle_medcls"] == "0.1.0"
    sidecar.write(tmp_path / "again.json")
    assert Sidecar.read(tmp_path / "again.json") == sidecar


def test_a_file_that_the_sidecar_does_not_list_is_refused(tmp_path: Path) -> None:
    """A list of other files' hashes checks nothing."""
    (tmp_path / "a.onnx").write_bytes(b"another model")
    (tmp_path / "note.txt").write_bytes(b"")
    sidecar = Sidecar(**{**vars(SIDECAR), "form": "onnx", "files": {"note.txt": sha256(tmp_path / "note.txt")}})
    with pytest.raises(WeightsError, match="a.onnx is not listed in a.json"):
        sidecar.check(tmp_path / "a.onnx")


def assert_sane(path: Path) -> None:
    """The invariants of an accepted sidecar once more, from its JSON, slow and plain."""
    values = json.loads(path.read_text())
    for name in ("dataset", "recipe", "labels"):
        text = values.get(name, "default")
        assert 0 < len(text) <= 100 and not text.startswith(".")
        assert set(text) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-")
    classes = values["classes"]
    assert len(classes) == len(set(classes)) <= 1000 and all(0 < len(name) <= 200 for name in classes)
    assert (values["task"], values["loss"]) in [
        *(("binary", "softmax"), ("binary", "sigmoid"), ("multi-class", "softmax")),
        *(("ordinal", "softmax"), ("multi-label", "sigmoid")),
    ]
    assert len(classes) == 2 if values["task"] == "binary" else len(classes) >= (values["task"] != "multi-label") + 1
    network, spec = values["network"], values["preprocessing"]
    single = (values["task"], values["loss"]) == ("binary", "sigmoid")
    assert type(network["num_outputs"]) is int and network["num_outputs"] == (1 if single else len(classes))
    channels = 1 if spec.get("channels") == "gray" else 3
    assert network.get("in_channels", 3) == channels and network.get("stem", "imagenet") in ("imagenet", "small")
    assert 1 <= spec.get("size_px", 224) <= 2048 and 1 <= spec.get("resize_px", 256) <= 2048
    mean, std = spec.get("mean", [0] * 3), spec.get("std", [1] * 3)
    assert len(mean) == len(std) == channels
    assert all(math.isfinite(number) and abs(number) <= 1000 for number in (*mean, *std)) and min(std) > 0
    flips = values.get("flips", [])
    assert sorted(flips) == sorted(set(flips) & {"flip", "flip_vertical"})
    assert 0 < values.get("temperature", 1) <= 1000 and 0 <= values.get("threshold", 0.5) <= 1
    assert type(values.get("drawn", False)) is bool and values.get("precision", "f32") in ("f32", "bf16")
    form, files = values.get("form", ""), values.get("files", {})
    assert form in ("", "paddle", "onnx", "openvino") and bool(form) == bool(files)
    for name, digest in (*files.items(), *[("-", digest) for digest in [values.get("sha256")] if digest]):
        assert "/" not in name and name not in (".", "..")
        assert len(digest) == 64 and set(digest) <= set("0123456789abcdef")
    json.dumps(values, allow_nan=False)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)
NEAR_VALUES = st.one_of(
    st.sampled_from([0, 1, 2, 3, 4, 224, 0.5, -1, 1e308, True, None, "", "a", "flip", "small", "gray", "binary"]),
    st.sampled_from(
        ["multi-label", "ordinal", "sigmoid", "softmax", "onnx", "bf16", "0" * 64, "../x", "*", "resnet50"]
    ),
    st.sampled_from([[], {}, ["a", "b"], ["a", "a"], ["flip"], ["flip"] * 2, [1.0], [0, 1, 2], [1, 2, 3.5]]),
    st.sampled_from([{"a.onnx": "0" * 64}, {"auc": 0.5}, {"paddle": "3"}, {"per_class": [{"class": "a", "f1": 0.5}]}]),
)


@settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_fuzzed_sidecars(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Up to four fields of a genuine sidecar replaced: what is accepted holds every invariant."""
    path = tmp_path_factory.getbasetemp() / "fuzzed.json"
    base = fields_of(SIDECAR)
    names = [*base, *(f"{outer} {name}" for outer in ("network", "preprocessing") for name in base[outer]), "more"]
    for name in data.draw(st.lists(st.sampled_from(names), max_size=4, unique=True)):
        outer, _, inner = name.partition(" ")
        target, key = (base[outer], inner) if inner and isinstance(base.get(outer), dict) else (base, outer)
        if data.draw(st.integers(0, 5)) == 0:
            target.pop(key, None)
        else:
            target[key] = copy.deepcopy(data.draw(NEAR_VALUES | JSON_VALUES))  # the samples are never changed
    path.write_text(json.dumps(base))
    try:
        sidecar = Sidecar.read(path)
    except WeightsError:
        return
    assert_sane(path)
    sidecar.write(path)
    assert Sidecar.read(path) == sidecar
