"""The contract of a Predictor, and of the command: what goes in, what is refused, what comes out."""

from __future__ import annotations

import csv
import json
import os
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import toynet  # noqa: F401  adds its small networks
from fakes import import_openvino_or_skip, pixels, write_image

from paddle_medcls.cli import predict
from paddle_medcls.core.errors import DataError, WeightsError
from paddle_medcls.core.files import sha256
from paddle_medcls.core.paddle_setup import paddle
from paddle_medcls.data.decode import read_image
from paddle_medcls.deployment import exported_models
from paddle_medcls.deployment.predictor import PaddleNetwork, Predictor
from paddle_medcls.explanation import gradcam
from paddle_medcls.models.network import Network
from paddle_medcls.models.sidecar import Sidecar, find_model
from paddle_medcls.models.weights import save_weights
from paddle_medcls.preprocessing.transforms import Preprocessing, preprocess

SIDECAR = Sidecar("covid", "covid", ("a", "b", "c"), "multi-class", "softmax", Network("toy", 3), Preprocessing(32))
CHANNELS = ("rgb", "bgr", "gray")
SMALL = Preprocessing(8, mean=(0.0,) * 3, std=(1.0,) * 3)


def saved(folder: Path, name: str = "COVID", **changes: object) -> Path:
    """A weight file with its sidecar."""
    sidecar = replace(SIDECAR, **changes)
    paddle.seed(2)
    model = sidecar.network.build()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.pdparams"
    save_weights(model, path)
    replace(sidecar, sha256=sha256(path)).write(path.with_suffix(".json"))
    return path


def predictor_of(channels: str) -> Predictor:
    count = 1 if channels == "gray" else 3
    spec = Preprocessing(32, channels=channels, mean=(90.0,) * count, std=(50.0,) * count)
    paddle.seed(0)
    network = Network("toy", 3, count)
    return Predictor(replace(SIDECAR, network=network, preprocessing=spec), PaddleNetwork(network.build()))


def test_an_image_too_narrow_to_be_scaled(tmp_path: Path) -> None:
    """A network that crops scales the shorter side: 60,000 pixels of one line would take 3 GB."""
    predictor = Predictor(
        replace(SIDECAR, preprocessing=Preprocessing(8, fit="crop")), PaddleNetwork(Network("toy", 3).build())
    )
    path = write_image(tmp_path / "line.png", np.zeros((1, 60_000), np.uint8))
    for image in (path, path.read_bytes(), np.zeros((60_000, 1), np.uint8)):
        with pytest.raises(DataError, match="too narrow"):
            predictor.predict(image)
    ((_, _, error),) = predictor.predict_decoded([path])
    assert isinstance(error, DataError) and str(path) in error.what


@pytest.mark.parametrize("channels", CHANNELS)
def test_pixels_a_path_and_bytes_are_one_image(channels: str, tmp_path: Path) -> None:
    """Pixels are RGB whatever the network learned; the Predictor puts the channels in its order."""
    predictor = predictor_of(channels)
    drawn = pixels(3, size=48)
    if channels == "gray":  # decoders turn colours to grey each in its own way
        drawn = drawn[:, :, :1].repeat(3, axis=2)
    path = write_image(tmp_path / "a.png", drawn)
    rgb = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
    spec = predictor.sidecar.preprocessing
    expected = predictor.backend.logits(preprocess(read_image(path, channels), spec)[None])
    for image in (path, str(path), path.read_bytes(), rgb):
        np.testing.assert_allclose(predictor.logits([image]), expected, atol=1e-6)


@pytest.mark.parametrize("channels", CHANNELS)
def test_grey_pixels(channels: str) -> None:
    predictor, grey = predictor_of(channels), pixels(4)[:, :, 0].copy()
    expected = predictor.logits([grey])
    for image in (grey[:, :, None], np.repeat(grey[:, :, None], 3, axis=2)):
        np.testing.assert_array_equal(predictor.logits([image]), expected)


@pytest.mark.parametrize(
    ("image", "fault"),
    [
        (np.zeros((8, 8, 3), np.float32), "float32(.|\n)*image \\* 255"),
        (np.zeros((8, 8, 3), np.uint16), "uint16(.|\n)*uint8"),
        (np.zeros((3, 8, 8), np.uint8), r"shape \(3, 8, 8\)(.|\n)*transpose\(1, 2, 0\)"),
        (np.zeros((8, 8, 4), np.uint8), r"alpha channel(.|\n)*\[:, :, :3\]"),
        (np.zeros((0, 8, 3), np.uint8), "shape"),
        (np.zeros((1, 8, 8, 3), np.uint8), "shape"),
        ([[1, 2]], "a list is no image"),
    ],
)
def test_other_arrays_are_refused_with_the_fix(image: object, fault: str) -> None:
    with pytest.raises(DataError, match=fault):
        predictor_of("rgb").logits([image])


def test_one_image_in_place_of_a_list(tmp_path: Path) -> None:
    for image in (pixels(0), tmp_path / "a.png", "a.png"):
        with pytest.raises(DataError, match=r"pass \[image\]"):
            predictor_of("rgb").logits(image)


def test_logits_that_are_not_finite_name_the_image(tmp_path: Path) -> None:
    predictor = predictor_of("rgb")
    predictor.model.fc.bias.set_value(paddle.full([3], float("nan")))
    path = write_image(tmp_path / "a.png", pixels(0))
    with pytest.raises(WeightsError, match=r"a\.png: logits nan"):
        predictor.logits([path])
    with pytest.raises(WeightsError, match=r"a\.png: logits nan"):
        list(predictor.predict_decoded([path]))


def test_the_default_layer_is_found_once(monkeypatch) -> None:
    predictor, calls = predictor_of("rgb"), []
    find = gradcam.default_layer
    monkeypatch.setattr("paddle_medcls.explanation.gradcam.default_layer", lambda *a: calls.append(1) or "conv")
    for _ in range(3):
        predictor.heatmaps([pixels(0)], 1)
    assert len(calls) == 1 and find is not None


# --- weights are weights -----------------------------------------------------------------------------


def test_a_sidecar_does_not_turn_a_weight_file_into_a_program(tmp_path: Path) -> None:
    """The program beside it is never opened: neither by the weights' path nor by the folder's."""
    weights = weights_called_an_export(tmp_path)
    program = tmp_path / "COVID.inference.json"
    for given in (weights, tmp_path, weights.with_suffix(".json")):
        assert find_model(given) == weights
        with pytest.raises(WeightsError, match="describes an export, not them"):
            Predictor.from_weights(given)
    with pytest.raises(WeightsError, match="exported by version 0.1|is a Paddle program"):
        Predictor.from_weights(program)


def weights_called_an_export(folder: Path) -> Path:
    """A weight file whose sidecar says that it is an export, with a program beside it."""
    weights = saved(folder)
    program = folder / "COVID.inference.json"
    program.write_text("{}")
    sidecar = Sidecar.read(weights.with_suffix(".json"))
    replace(sidecar, form="paddle", files={program.name: sha256(program)}).write(weights.with_suffix(".json"))
    return weights


def paddle_program(folder: Path) -> Path:
    """A folder with an export in Paddle's format."""
    program = folder / "M.inference.json"
    program.write_text("{}")
    replace(SIDECAR, preprocessing=SMALL, form="paddle", files={program.name: sha256(program)}).write(folder / "M.json")
    return folder


def test_a_paddle_program_needs_the_flag(tmp_path: Path, capsys) -> None:
    paddle_program(tmp_path)
    image = write_image(tmp_path / "images" / "a.png", pixels(0))
    assert predict.main([str(image), "--weights", str(tmp_path)]) == 1
    found = capsys.readouterr().err
    assert "is a Paddle program, and operators of a program can write any file" in found and "--allow-program" in found


ONNX_FAULTS = {
    "loop": "a loop",
    "branch": "a branch",
    "domain": "an operator of another domain",
    "function": "a function of its own",
    "external": "weights in another file",
    "0.1": "float32 input, as version 0.1 exported",
    "nan": "logits that are NaN",
    "rows": "two rows of logits for an image",
    "columns": "two logits for three classes",
}


@pytest.mark.parametrize("fault", ONNX_FAULTS)
def test_a_hostile_onnx_export(fault: str, tmp_path: Path) -> None:
    expected = {"0.1": "export the weights again", "nan": "computes nan", "rows": "gives logits of shape"}
    expected |= {"columns": "gives logits of shape"}
    with pytest.raises(WeightsError, match=expected.get(fault, "operators that are not allowed")):
        Predictor.from_weights(strange_export(tmp_path, fault)).logits([np.zeros((8, 8, 3), np.uint8)])


def strange_export(folder: Path, fault: str, **changes: object) -> Path:
    """A folder with an ONNX export for images of 8 pixels, as somebody else could write it, and its sidecar."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "M.onnx"
    onnx.save(strange_model(onnx, fault), str(path))
    changes = {"preprocessing": SMALL, "form": "onnx", "files": {path.name: sha256(path)}, **changes}
    replace(SIDECAR, **changes).write(folder / "M.json")
    return folder


def strange_model(onnx, fault: str):
    """A model that takes pixels, and the fault."""
    helper, kinds = onnx.helper, onnx.TensorProto
    columns = 2 if fault == "columns" else 3
    weight = onnx.numpy_helper.from_array(np.zeros((3, columns), np.float32), "w")
    if fault == "nan":
        weight = onnx.numpy_helper.from_array(np.full((3, columns), np.nan, np.float32), "w")
    nodes = [
        helper.make_node("Cast", ["image"], ["x"], to=1),
        helper.make_node("ReduceMean", ["x"], ["mean"], axes=[1, 2], keepdims=0),
        helper.make_node("MatMul", ["mean", "w"], ["one"]),
        helper.make_node("Concat", ["one", "one"] if fault == "rows" else ["one"], ["logits"], axis=0),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
    ]
    body = helper.make_graph([helper.make_node("Identity", ["c"], ["d"])], "body", [], [])
    extra = {
        "loop": helper.make_node("Loop", ["", ""], ["v"], body=body),
        "branch": helper.make_node("If", ["image"], ["v"], then_branch=body, else_branch=body),
        "domain": helper.make_node("Anything", ["image"], ["v"], domain="other"),
    }
    nodes += [extra[fault]] if fault in extra else []
    if fault == "external":
        weight.data_location = kinds.EXTERNAL
        weight.external_data.add(key="location", value="secret.bin")
    image = helper.make_tensor_value_info("image", kinds.FLOAT if fault == "0.1" else kinds.UINT8, ["n", 8, 8, 3])
    ends = [helper.make_tensor_value_info(name, kinds.FLOAT, None) for name in ("probabilities", "logits")]
    graph = helper.make_graph(nodes, "g", [image], ends, [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("other", 1)])
    model.ir_version = 8
    if fault == "function":
        node = helper.make_node("Identity", ["a"], ["b"])
        model.functions.append(helper.make_function("other", "F", ["a"], ["b"], [node], model.opset_import))
    return model


def test_an_openvino_export_with_a_loop(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"not allowed\n  Loop"):
        Predictor.from_weights(openvino_loop(tmp_path))


def openvino_loop(folder: Path) -> Path:
    """A folder with an OpenVINO export that would never end."""
    openvino = import_openvino_or_skip()
    ops = openvino.opset13

    image = ops.parameter([-1, 8, 8, 3], np.uint8, name="image")
    image.output(0).get_tensor().set_names({"image"})
    x = ops.parameter([1], np.float32)
    body = openvino.Model([ops.result(ops.add(x, x)), ops.result(ops.constant(True))], [x])
    loop = ops.loop(ops.constant(2**62), ops.constant(True))
    loop.set_function(body)
    loop.set_special_body_ports([-1, 1])
    loop.set_merged_input(x, ops.constant(np.ones(1, np.float32)).output(0), body.results[0].output(0))
    end = loop.get_iter_value(body.results[0].output(0), -1)
    model = openvino.Model([ops.result(end)], [image])
    openvino.save_model(model, folder / "M.xml", compress_to_fp16=False)
    files = {name: sha256(folder / name) for name in ("M.xml", "M.bin")}
    replace(SIDECAR, preprocessing=SMALL, form="openvino", files=files).write(folder / "M.json")
    return folder


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("onnxruntime")
    path = tmp_path / "M.onnx"
    path.write_bytes(b"x" * 100)
    monkeypatch.setitem(exported_models.MAX_BYTES, "onnx", 99)
    with pytest.raises(WeightsError, match="100 bytes"):
        exported_models.open_model(tmp_path, "M", "onnx", "f32", 3)


# --- the command -------------------------------------------------------------------------------------


def test_the_newest_run_only_where_all_are_of_one_data_set(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    image = str(write_image(tmp_path / "a.png", pixels(0)))
    first = saved(tmp_path / "runs" / "one")
    second = saved(tmp_path / "runs" / "suite" / "cell")  # as `reproduce` lays them
    os.utime(second, (4e9, 4e9))
    assert predict.main([image]) == 0
    line = capsys.readouterr().err.splitlines()[0]
    assert line == f"weights: {second.relative_to(tmp_path)} (paddle, f32); data set covid; classes a, b, c"
    other = saved(tmp_path / "runs" / "eye", "PALM", dataset="palm", recipe="palm")
    assert predict.main([image]) == 1
    found = capsys.readouterr()
    assert "trained models of 2 data sets" in found.err and found.out == ""
    for path in (second, other):
        assert str(path.relative_to(tmp_path)) in found.err
    assert str(first.relative_to(tmp_path)) not in found.err and "give --weights FILE" in found.err


def test_labels_in_the_table_are_text(tmp_path: Path) -> None:
    weights = saved(tmp_path / "m", task="multi-label", loss="sigmoid", threshold=0.0)
    image = write_image(tmp_path / "a.png", pixels(0))
    assert predict.main([str(image), "--weights", str(weights), "--csv", str(tmp_path / "p.csv")]) == 0
    with open(tmp_path / "p.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["label"] == "a; b; c"


def test_names_that_are_not_utf8_or_act_on_a_terminal(tmp_path: Path, capsys) -> None:
    """Nothing is lost, and no control character is printed."""
    weights, folder = saved(tmp_path / "m"), tmp_path / "images"
    data = write_image(folder / "plain.png", pixels(0)).read_bytes()
    for name in (b"a\xff.png", b"b\x1b[31m.png", "c\u202e$x$.png".encode()):
        (folder / os.fsdecode(name)).write_bytes(data)
    arguments = [str(folder), "--weights", str(weights)]
    outputs = ["--csv", str(tmp_path / "p.csv"), "--pictures", str(tmp_path / "pictures"), "--json"]
    assert predict.main([*arguments, *outputs]) == 0
    shown = capsys.readouterr()
    names = [json.loads(line)["image"] for line in shown.out.splitlines()]
    assert {os.fsencode(Path(name).name) for name in names} == set(os.listdir(os.fsencode(folder)))
    assert len(list((tmp_path / "pictures").iterdir())) == 4
    assert len((tmp_path / "p.csv").read_text(encoding="utf-8").splitlines()) == 5
    assert predict.main(arguments) == 0
    for text in (shown.out, shown.err, capsys.readouterr().out):
        assert "\x1b" not in text and "\u202e" not in text


def test_each_image_is_decoded_once(tmp_path: Path, monkeypatch) -> None:
    weights = saved(tmp_path / "m", network=Network("resnet18", 3, 3, "small"))
    image, read = write_image(tmp_path / "a.png", pixels(0)), []
    real = read_image
    monkeypatch.setattr("paddle_medcls.deployment.predictor.read_image", lambda *a: read.append(a) or real(*a))
    arguments = ["--pictures", str(tmp_path / "p"), "--gradcam", str(tmp_path / "g")]
    assert predict.main([str(image), "--weights", str(weights), *arguments]) == 0
    assert len(read) == 1 and (tmp_path / "p" / "a_prediction.png").is_file()
    assert (tmp_path / "g" / "a_gradcam.png").is_file()


def test_overlays_are_rgb_of_a_network_that_learned_bgr(tmp_path: Path) -> None:
    spec = Preprocessing(32, channels="bgr")
    weights = saved(tmp_path / "m", preprocessing=spec, network=Network("resnet18", 3, 3, "small"))
    red = np.zeros((32, 32, 3), np.uint8)
    red[:, :, 0] = 250
    image = write_image(tmp_path / "red.png", red)
    assert predict.main([str(image), "--weights", str(weights), "--pictures", str(tmp_path / "p")]) == 0
    shown = cv2.imread(str(tmp_path / "p" / "red_prediction.png"))[:, :, ::-1].reshape(-1, 3)
    assert (np.abs(shown.astype(int) - (250, 0, 0)).max(axis=1) < 8).any()


def test_a_pattern_that_is_none(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert predict.main(["x**.png", "--weights", "x.pdparams"]) == 1
    assert capsys.readouterr().err.startswith("DataError: x**.png: ")
