"""Exported models and engines: each gives the network's probabilities, and nothing else is kept."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import toynet  # noqa: F401  adds its small networks
from fakes import ROOT, pixels, write_image

from paddle_medcls.cli import eval, export, predict
from paddle_medcls.core import hardware, openvino_setup
from paddle_medcls.core.errors import RunError, SetupError, WeightsError
from paddle_medcls.core.files import sha256
from paddle_medcls.core.paddle_setup import paddle
from paddle_medcls.data import synthetic
from paddle_medcls.deployment import export as exporting
from paddle_medcls.deployment import export_writers, exported_models, inference_engines, opening, parity
from paddle_medcls.deployment.predictor import PaddleNetwork, Predictor
from paddle_medcls.models.network import Network
from paddle_medcls.models.sidecar import Sidecar, find_model, sidecar_of
from paddle_medcls.models.weights import save_weights
from paddle_medcls.preprocessing.transforms import Preprocessing

LIBRARIES = {"paddle": (), "onnx": ("onnx", "onnxruntime"), "openvino": ("openvino",)}


def need(form: str) -> None:
    for library in LIBRARIES[form]:
        pytest.importorskip(library, reason=f"{library} is not installed")


def make_weights(folder: Path, seed: int = 0, model_name: str = "toy", **changes: object) -> Path:
    """COVID.pdparams and its sidecar: a network for 32 pixels whose batch norm has seen images."""
    paddle.seed(seed)
    network = Network(model_name, 4, 3, "small")
    model = network.build()
    for _ in range(3):
        model(paddle.randn([8, 3, 32, 32]))
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(model, folder / "COVID.pdparams")
    spec = Preprocessing(size_px=32, channels="bgr", mean=(120.0,) * 3, std=(60.0,) * 3)
    classes = ("COVID", "LungOpacity", "Normal", "ViralPneumonia")
    sidecar = Sidecar("covid", "covid", classes, "multi-class", "softmax", network, spec, temperature=1.3)
    sidecar = replace(sidecar, sha256=sha256(folder / "COVID.pdparams"), **changes)
    sidecar.write(folder / "COVID.json")
    return folder / "COVID.pdparams"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_weights(tmp_path_factory.mktemp("weights"), 0, "toy_resnet", flips=("flip", "flip_vertical"))


@pytest.fixture(scope="module", autouse=True)
def images_drawn_once() -> Iterator[None]:
    """An export draws a data set's images to compare on: those of the first serve all."""
    drawn: dict[str, list] = {}

    def synthetic_images(sidecar: Sidecar) -> list[np.ndarray]:
        key = f"{sidecar.dataset} {sidecar.labels} {sidecar.preprocessing.channels == 'gray'}"
        if key not in drawn:
            drawn[key] = draw(sidecar)
        return drawn[key]

    draw = exporting.synthetic_images
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporting, "synthetic_images", synthetic_images)
        patch.setattr(synthetic, "SIDE", 64)
        yield


@pytest.fixture(scope="module")
def exports(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every form that can be made here, by the command."""
    folder = tmp_path_factory.mktemp("exports")
    made = {}
    for form, libraries in LIBRARIES.items():
        if all(importlib.util.find_spec(name) for name in libraries):
            code = export.main(["--weights", str(weights), "--format", form, "--output", str(folder / form)])
            if code == 0:
                made[form] = folder / form
    return made


@pytest.fixture(scope="module")
def resnet18(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network that a process without `toynet` knows, and that is recognised without its sidecar."""
    return make_weights(tmp_path_factory.mktemp("resnet18"), 0, "resnet18", flips=("flip", "flip_vertical"))


@pytest.fixture
def images() -> list[np.ndarray]:
    return [pixels(seed, 60 + 20 * seed) for seed in range(7)]


def by_hand(weights: Path, images: list[np.ndarray]) -> np.ndarray:
    """Probabilities, slowly: one image and one flip at a time, softmax written out."""
    sidecar = Sidecar.read(weights.with_suffix(".json"))
    model = sidecar.network.build()
    state = paddle.load(str(weights))
    model.set_state_dict(state)
    model.eval()
    rows = []
    for image in images:
        x = (image[:, :, ::-1].astype(np.float32) - 120) / 60  # the network learned BGR
        views = [x, x[:, ::-1], x[::-1], x[::-1, ::-1]] if sidecar.flips else [x]
        logits = [model(paddle.to_tensor(v.transpose(2, 0, 1)[None].copy())).numpy()[0] for v in views]
        z = np.mean(logits, axis=0) / 1.3
        rows.append(np.exp(z - z.max()) / np.exp(z - z.max()).sum())
    return np.array(rows)


def opened(export_folder: Path, **options: object) -> Predictor:
    return Predictor.from_weights(export_folder, allow_program=True, **options)


# --- what is written -------------------------------------------------------------------------------


@pytest.mark.parametrize("form", LIBRARIES)
def test_every_form_gives_the_probabilities_of_the_network(form: str, weights, exports, images) -> None:
    need(form)
    served = opened(exports[form])
    expected = by_hand(weights, images)
    for size in (1, 3, 5):
        parts = [served.head.probabilities(served.logits(images[k : k + size])) for k in range(0, len(images), size)]
        np.testing.assert_allclose(np.concatenate(parts), expected, atol=1e-5)
    assert (served.engine, served.precision) == (inference_engines.FORMS[form], "f32")


@pytest.mark.parametrize("form", LIBRARIES)
def test_the_folder_holds_the_model_and_all_that_is_needed_to_use_it(form: str, weights, exports) -> None:
    need(form)
    sidecar, own = Sidecar.read(exports[form] / "COVID.json"), Sidecar.read(weights.with_suffix(".json"))
    assert sidecar.form == form and sidecar.files and sidecar.sha256 == sha256(weights)
    assert {name: sha256(exports[form] / name) for name in sidecar.files} == sidecar.files
    assert replace(sidecar, form="", files={}, preprocessing=own.preprocessing, flips=own.flips) == own
    outside = sidecar.preprocessing
    assert (outside.channels, outside.mean, outside.std, sidecar.flips) == ("rgb", (0.0,) * 3, (1.0,) * 3, ())
    assert not list(exports[form].parent.glob(".*"))  # no half-made folder is left


def test_onnx_has_the_promised_ends(exports) -> None:
    need("onnx")
    import onnx

    model = onnx.load(str(exports["onnx"] / "COVID.onnx"))
    assert {item.domain: item.version for item in model.opset_import}[""] == 17
    ends = [*model.graph.input, *model.graph.output]
    dims = [[d.dim_param or d.dim_value for d in end.type.tensor_type.shape.dim] for end in ends]
    assert [end.name for end in ends] == ["image", "probabilities", "logits"]
    assert dims == [["batch", 32, 32, 3], ["batch", 4], ["batch", 4]]
    assert ends[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8


@pytest.mark.parametrize("flips", [(), ("flip_vertical",)])
@pytest.mark.parametrize("form", LIBRARIES)
@pytest.mark.parametrize("task", ["binary", "softmax binary", "multi-label", "gray"])
def test_pixels_in_probabilities_out(task: str, form: str, flips: tuple, tmp_path: Path) -> None:
    """Against the network on images prepared by hand; `compare` is left out of it."""
    need(form)
    if (form, task) not in {("paddle", "binary"), ("paddle", "multi-label")} and flips:
        pytest.skip("graphs with flips are tested in test_graph")
    outputs = {"binary": 1, "softmax binary": 2}.get(task, 3)
    network = Network("toy_resnet" if form != "paddle" else "toy", outputs, 1 if task == "gray" else 3, "small")
    paddle.seed(5)
    model = network.build()
    model.eval()
    channels, loss = (
        ("gray" if task == "gray" else "rgb"),
        "sigmoid" if task in ("binary", "multi-label") else "softmax",
    )
    kind = {"softmax binary": "binary", "gray": "multi-class"}.get(task, task)
    count = network.in_channels
    spec = Preprocessing(
        size_px=16 if form != "paddle" else 32, channels=channels, mean=(99.5,) * count, std=(41.0,) * count
    )
    sidecar = Sidecar("covid", "covid", tuple("abc"[: max(2, outputs)]), kind, loss, network, spec, flips, 0.7)
    export_writers.WRITERS[form](Predictor(sidecar, PaddleNetwork(model, flips)), tmp_path, "NET")
    backend = exported_models.open_model(tmp_path, "NET", form, "f32", outputs)
    pixels = np.random.default_rng(4).integers(0, 256, (3, spec.size_px, spec.size_px, count), np.uint8)
    found = backend.outputs(pixels.transpose(0, 3, 1, 2).astype(np.float32))
    x = (pixels.astype(np.float32).transpose(0, 3, 1, 2) - 99.5) / 41
    views = [x, x[:, :, ::-1].copy()] if flips else [x]
    with paddle.no_grad():
        logits = np.mean([model(paddle.to_tensor(view)).numpy() for view in views], axis=0)
    np.testing.assert_allclose(found["logits"], logits, atol=1e-4)
    np.testing.assert_allclose(found["probabilities"], sidecar.head.probabilities(logits), atol=1e-5)


@pytest.mark.parametrize("form", ["onnx", "openvino"])
def test_a_network_that_no_graph_is_known_of_goes_through_paddle(form: str, tmp_path: Path, images, capsys) -> None:
    need(form)
    weights = make_weights(tmp_path / "weights")
    arguments = ["--weights", str(weights), "--format", form, "--output", str(tmp_path / "out")]
    if form == "onnx" and not importlib.util.find_spec("paddle2onnx"):
        assert export.main(arguments) == 1
        assert "the network toy needs paddle2onnx" in capsys.readouterr().err and not (tmp_path / "out").exists()
        return
    assert export.main(arguments) == 0
    served = opened(tmp_path / "out")
    np.testing.assert_allclose(served.head.probabilities(served.logits(images)), by_hand(weights, images), atol=1e-5)


def test_an_export_is_replaced_but_nothing_else_is(tmp_path_factory, tmp_path: Path, capsys) -> None:
    weights = make_weights(tmp_path_factory.mktemp("weights"))
    arguments = ["--weights", str(weights), "--format", "paddle", "--output"]
    mine = tmp_path / "thesis"
    mine.mkdir()
    (mine / "chapter.txt").write_text("all of it")
    assert export.main([*arguments, str(mine)]) == 1
    assert "holds other files, not an export" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["thesis", "chapter.txt"]
    out = tmp_path / "out"
    for _ in range(2):
        assert export.main([*arguments, str(out)]) == 0
    assert "largest difference of a probability" in capsys.readouterr().out
    (out / "predictions").mkdir()
    for name in ("predictions/a.csv", "notes.txt"):
        (out / name).write_text("mine")
    (out / "README.md").write_text("# mine")
    assert export.main([*arguments, str(out)]) == 0
    assert [(out / name).read_text() for name in ("predictions/a.csv", "notes.txt", "README.md")] == ["mine"] * 2 + [
        "# mine"
    ]
    assert (out / "MODEL_CARD.md").is_file()
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    program = next(path for path in out.iterdir() if path.suffix == ".pdiparams")
    program.write_bytes(b"something of mine")
    assert export.main([*arguments, str(out)]) == 1
    assert f"{program.name} changed since the export" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in before if path != program} == {
        path: data for path, data in before.items() if path != program
    }


def test_a_file_in_the_place_of_a_new_one_is_not_overwritten(tmp_path: Path, capsys) -> None:
    """The earlier export was of another form, and a file of the user's has a name that this one needs."""
    need("onnx")
    need("openvino")
    weights = make_weights(tmp_path / "weights", 0, "toy_resnet")
    arguments = ["--weights", str(weights), "--output", str(tmp_path / "out"), "--format"]
    assert export.main([*arguments, "openvino"]) == 0
    (tmp_path / "out" / "COVID.onnx").write_text("mine")
    assert export.main([*arguments, "onnx"]) == 1
    assert "COVID.onnx would be overwritten, and no export wrote it" in capsys.readouterr().err
    assert (tmp_path / "out" / "COVID.onnx").read_text() == "mine"
    (tmp_path / "out" / "COVID.onnx").unlink()
    assert export.main([*arguments, "onnx"]) == 0
    assert not list((tmp_path / "out").glob("*.xml")) and (tmp_path / "out" / "COVID.onnx").is_file()


@pytest.mark.parametrize("fault", ["differs", "empty", "nothing", "full disk"])
def test_a_faulty_export_is_not_kept(fault: str, tmp_path: Path, images, monkeypatch) -> None:
    weights = make_weights(tmp_path / "weights")
    predictor = Predictor.from_weights(weights)
    folder = tmp_path / "out"
    exporting.export(predictor, "paddle", folder, images)
    before = {path.name: sha256(path) for path in folder.iterdir()}

    def write(predictor: Predictor, where: Path, name: str) -> None:
        if fault == "full disk":
            raise OSError(28, "No space left on device")
        if fault == "differs":
            predictor = Predictor.from_weights(make_weights(tmp_path / "other", 1))
        if fault != "nothing":
            export_writers._write_paddle(predictor, where, name)
        if fault == "empty":
            (where / f"{name}.inference.pdiparams").write_bytes(b"")

    monkeypatch.setitem(export_writers.WRITERS, "paddle", write)
    message = {"differs": "a probability differs", "full disk": "No space left"}.get(fault, "the export is empty")
    with pytest.raises(RunError, match=message):
        exporting.export(predictor, "paddle", folder, images)
    assert {path.name: sha256(path) for path in folder.iterdir()} == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("form", LIBRARIES)
def test_a_changed_export_is_refused(form: str, exports, tmp_path: Path) -> None:
    need(form)
    copy = Path(shutil.copytree(exports[form], tmp_path / "copy"))
    largest = max(copy.iterdir(), key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    with pytest.raises(WeightsError, match="sha256 differs"):
        opened(copy)
    largest.unlink()
    with pytest.raises(WeightsError, match="missing|one model"):
        opened(copy / largest.name if form == "onnx" else copy)


def test_garbage_with_a_right_checksum_is_one_message(exports, tmp_path: Path) -> None:
    for form, folder in exports.items():
        copy = Path(shutil.copytree(folder, tmp_path / form))
        sidecar = Sidecar.read(copy / "COVID.json")
        for name in sidecar.files:
            (copy / name).write_bytes(b"<html>not a model</html>")
        replace(sidecar, files={name: sha256(copy / name) for name in sidecar.files}).write(copy / "COVID.json")
        if form == "paddle":
            continue  # Paddle ends the process on such a file; the checksum is what stands before it
        with pytest.raises(WeightsError, match="cannot open the model"):
            Predictor.from_weights(copy)


def test_an_export_has_no_layers(exports, images) -> None:
    with pytest.raises(WeightsError, match="no layers to look into"):
        opened(exports["paddle"]).heatmaps(images[:1], 0)


@pytest.mark.parametrize("layout, form", [("triton", "onnx"), ("openvino-model-server", "openvino")])
def test_the_folders_of_model_servers(layout: str, form: str, weights, tmp_path: Path, images, capsys) -> None:
    """The layouts of their documentation; Triton's configuration beside what ONNX Runtime finds in the model."""
    need(form)
    repository = tmp_path / "repository"
    arguments = ["--weights", str(weights), "--format", form, "--layout", layout, "--output", str(repository)]
    assert export.main(arguments) == 0
    assert str(repository / "COVID" / "1") in capsys.readouterr().out
    assert Predictor.from_weights(repository / "COVID" / "1").logits(images).shape == (len(images), 4)
    assert {path.name for path in repository.iterdir()} == {"COVID"}
    beside = {path.name for path in (repository / "COVID").iterdir()}
    if layout != "triton":
        assert beside == {"1"}
        return
    assert beside == {"1", "config.pbtxt", "labels.txt"}
    config = (repository / "COVID" / "config.pbtxt").read_text()
    session = inference_engines.onnx_session((repository / "COVID" / "1" / "COVID.onnx").read_bytes())
    kinds = {"tensor(uint8)": "TYPE_UINT8", "tensor(float)": "TYPE_FP32"}
    ends = [
        (end.name, kinds[end.type], ", ".join(map(str, end.shape[1:])))
        for end in (*session.get_inputs(), *session.get_outputs())
    ]
    assert re.findall(r'name: "(\w+)", data_type: (\w+), dims: \[ ([\d, ]+) \]', config) == ends
    assert 'name: "COVID"\n' in config and 'default_model_filename: "COVID.onnx"' in config
    labels = (repository / "COVID" / "labels.txt").read_text().splitlines()
    assert labels == list(Predictor.from_weights(weights).sidecar.classes)
    (repository / "COVID" / "config.pbtxt").write_text(config.replace("16", "8"))
    assert export.main(arguments) == 1 and "config.pbtxt was changed" in capsys.readouterr().err


def test_what_no_server_loads(weights, tmp_path: Path, capsys) -> None:
    strange = Path(shutil.copytree(weights.parent, tmp_path / "strange"))
    for path in list(strange.iterdir()):
        path.rename(strange / path.name.replace("COVID", 'CO"VID'))
    for file, form in ((weights, "openvino"), (strange / 'CO"VID.pdparams', "onnx")):
        arguments = ["--weights", str(file), "--format", form, "--layout", "triton", "--output", str(tmp_path / "out")]
        assert export.main(arguments) == 1 and not (tmp_path / "out").exists()
    assert "has no --format openvino" in capsys.readouterr().err


def test_find_model(weights: Path, tmp_path: Path) -> None:
    for given in (weights, weights.parent, weights.with_suffix(".json")):
        assert find_model(given) == weights
    with pytest.raises(WeightsError, match="found: none"):
        find_model(tmp_path)
    assert sidecar_of(Path("a/PALM.inference.json")) == sidecar_of(Path("a/PALM.onnx")) == Path("a/PALM.json")
    assert sidecar_of(Path("a/v1.2.pdparams")) == Path("a/v1.2.json")


# --- engines ---------------------------------------------------------------------------------------


def count_of(engine: str) -> None:
    """Skips where the engine is not installed."""
    if not inference_engines.installed(engine):
        pytest.skip(f"{engine} is not installed")


@pytest.mark.parametrize("engine", inference_engines.FASTEST_FIRST)
def test_a_weight_file_in_every_engine(engine: str, weights: Path, images) -> None:
    count_of(engine)
    served, expected = Predictor.from_weights(weights, engine=engine), by_hand(weights, images)
    for size in (1, 3, 5):
        parts = [served.head.probabilities(served.logits(images[k : k + size])) for k in range(0, len(images), size)]
        np.testing.assert_allclose(np.concatenate(parts), expected, atol=1e-5)
    assert (served.engine, served.precision) == (engine, "f32")
    assert not [path for path in weights.parent.iterdir() if path.suffix not in (".pdparams", ".json")]


def test_f32_is_float32_where_the_processor_has_less(weights: Path, images) -> None:
    """Left to itself OpenVINO takes bfloat16 where the processor has it: differences of 1e-3 and more."""
    count_of("openvino")
    exact, served = (Predictor.from_weights(weights, engine=name) for name in ("paddle", "openvino"))
    np.testing.assert_allclose(served.logits(images), exact.logits(images), atol=1e-5)


def test_auto_takes_the_first_that_is_installed_and_knows_the_network(tmp_path: Path, monkeypatch) -> None:
    weights = make_weights(tmp_path, 0, "toy_resnet")
    for there, expected in (
        (("openvino", "onnxruntime"), "openvino"),
        (("onnxruntime",), "onnxruntime"),
        ((), "paddle"),
    ):
        if all(inference_engines.installed(name) for name in there):
            monkeypatch.setattr(
                "paddle_medcls.deployment.inference_engines.installed",
                lambda name, there=there: name in (*there, "paddle"),
            )
            assert Predictor.from_weights(weights, engine="auto").engine == expected
            monkeypatch.undo()
    monkeypatch.setattr("paddle_medcls.deployment.inference_engines.installed", lambda name: name == "paddle")
    with pytest.raises(SetupError, match="openvino is not installed"):
        Predictor.from_weights(weights, engine="openvino")


def test_a_network_that_no_graph_is_known_of(tmp_path: Path) -> None:
    weights = make_weights(tmp_path)
    assert Predictor.from_weights(weights, engine="auto").engine == "paddle"
    if inference_engines.installed("openvino"):
        with pytest.raises(SetupError, match="does not know the network toy"):
            Predictor.from_weights(weights, engine="openvino")
    with pytest.raises(SetupError, match="onednn runs exports"):
        Predictor.from_weights(weights, engine="onednn")


def test_auto_says_what_cannot_be_used(tmp_path: Path, monkeypatch) -> None:
    count_of("openvino")
    weights, said = make_weights(tmp_path, 0, "toy_resnet"), []
    monkeypatch.setattr("paddle_medcls.deployment.inference_engines.to_openvino", fail)
    monkeypatch.setattr("paddle_medcls.deployment.opening.FASTEST_FIRST", ("openvino",))
    assert Predictor.from_weights(weights, engine="auto", say=said.append).engine == "paddle"
    assert said == ["openvino cannot be used: openvino cannot compile the network: no such library"]


def fail(graph) -> None:
    raise ImportError("no such library")


@pytest.mark.parametrize("engine", ["paddle", "auto"])
def test_hostile_weights_are_refused_by_every_engine(engine: str, tmp_path: Path) -> None:
    weights = make_weights(tmp_path, 0, "toy_resnet")
    weights.write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    with pytest.raises(WeightsError, match="sha256 differs|not a weight file"):
        Predictor.from_weights(weights, engine=engine)
    weights.with_suffix(".json").unlink()
    with pytest.raises(WeightsError, match="not a weight file"):
        Predictor.from_weights(weights, engine=engine)
    assert not (tmp_path / "pwned").exists()


def test_nothing_that_lies_beside_the_weights_is_computed_with(exports, tmp_path: Path, images) -> None:
    """A folder that comes with a downloaded file: 0.1 answered with the model in it."""
    mine = make_weights(tmp_path / "mine", 1, "toy_resnet")
    for form, of_another in exports.items():
        folder = mine.parent / ".engines" / f"{mine.name}-{inference_engines.FORMS[form]}"
        shutil.copytree(of_another, folder)
        replace(Sidecar.read(folder / "COVID.json"), sha256=sha256(mine)).write(folder / "COVID.json")
    served = Predictor.from_weights(mine, engine="auto")
    np.testing.assert_allclose(served.head.probabilities(served.logits(images)), by_hand(mine, images), atol=1e-5)


@pytest.mark.parametrize("engine", ["paddle", "auto"])
def test_what_was_assumed_is_said_whatever_the_engine(engine: str, resnet18, tmp_path: Path, images, capsys) -> None:
    for file in resnet18.parent.iterdir():
        shutil.copy(file, tmp_path)
    weights, image = tmp_path / resnet18.name, write_image(tmp_path / "a.png", images[0])
    arguments = ["predict", str(image), "--weights", str(weights), "--engine", engine, "--recipe", "covid"]
    assert predict.main(arguments[1:]) == 1
    found = capsys.readouterr().err
    assert "recipe covid was given, but the sidecar says" in found and "leave --recipe out" in found
    weights.with_suffix(".json").unlink()
    assert predict.main(arguments[1:]) == 0
    found = capsys.readouterr().err
    assert "resnet18, 4 output(s)" in found and "assumed: recipe covid; BGR, 224 px, mean" in found
    assert "std" in found and "classes COVID, LungOpacity, Normal, ViralPneumonia" in found
    if engine == "auto":
        return  # what follows is the same for all
    assert predict.main([*arguments[1:-1], "covid_notebook"]) == 0
    assert "assumed: recipe covid_notebook" in capsys.readouterr().err


@pytest.mark.parametrize("engine", ["paddle", "onnxruntime"])
def test_no_bfloat16_where_the_engine_has_none(engine: str, weights: Path) -> None:
    if inference_engines.installed(engine):
        with pytest.raises(SetupError, match="has no bf16 on a CPU"):
            Predictor.from_weights(weights, engine=engine, precision="bf16")


def test_bfloat16_needs_a_processor_that_has_it(weights: Path, monkeypatch) -> None:
    count_of("openvino")
    monkeypatch.setattr("paddle_medcls.deployment.inference_engines.has_bfloat16", lambda: False)
    with pytest.raises(SetupError, match="no bfloat16"):
        Predictor.from_weights(weights, engine="openvino", precision="bf16")


def test_the_automatic_precision_is_the_processors(weights: Path, monkeypatch) -> None:
    """Its own bfloat16, which only some engines use, or float32."""
    count_of("openvino")

    def precision_of(engine: str) -> str:
        return Predictor.from_weights(weights, engine=engine, precision="auto").precision

    assert precision_of("auto") == ("bf16" if hardware.has_bfloat16() else "f32")
    assert precision_of("paddle") == "f32"
    monkeypatch.setattr("paddle_medcls.deployment.inference_engines.has_bfloat16", lambda: False)
    assert precision_of("openvino") == precision_of("auto") == "f32"


def test_bfloat16_is_close(weights: Path, images) -> None:
    count_of("openvino")
    if not hardware.has_bfloat16():
        pytest.skip("this processor has no bfloat16")
    exact, fast = (Predictor.from_weights(weights, engine="openvino", precision=one) for one in ("f32", "bf16"))
    p, q = (served.head.probabilities(served.logits(images)) for served in (exact, fast))
    assert fast.precision == "bf16" and 0 < np.abs(p - q).max() < 0.05


@pytest.mark.skipif(sys.platform != "linux", reason="the structure is that of Linux")
def test_ctrl_c_after_openvino_has_been_used_is_no_crash(weights: Path, images) -> None:
    """On a processor with AMX the signal stack was left pointing to memory that OpenVINO frees with the model."""
    count_of("openvino")

    def signal_stack() -> tuple:
        stack = openvino_setup._SignalStack()
        ctypes.CDLL(None).sigaltstack(None, ctypes.byref(stack))
        return stack.address, stack.flags, stack.size

    before = signal_stack()
    for precision in ("f32", "bf16")[: 1 + hardware.has_bfloat16()]:
        Predictor.from_weights(weights, engine="openvino", precision=precision).logits(images)
        assert signal_stack() == before


def test_an_operator_that_an_engine_lacks_is_one_message(exports, images, monkeypatch) -> None:
    """As Paddle 3.3.1 says of an average pool to 2 x 2 in bfloat16."""

    def run(x: np.ndarray) -> np.ndarray:
        raise RuntimeError("In user code:\n\n  NotFoundError: The kernel of `pool2d` is not registered\n  [Hint]")

    monkeypatch.setattr(exported_models, "_open_onednn", lambda path, precision: run)
    served = opened(exports["paddle"])
    with pytest.raises(SetupError, match="onednn cannot compute this model in f32: NotFoundError: The kernel of"):
        served.logits(images)


def test_the_wrong_engine_for_an_export(exports) -> None:
    with pytest.raises(SetupError, match="is an export for onednn, not for openvino"):
        opened(exports["paddle"], engine="openvino")


# --- commands --------------------------------------------------------------------------------------


def in_a_process(*command: object) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, timeout=120, env=environment
    )


def test_predict_says_the_same_through_every_door(weights, exports, tmp_path: Path, images, capsys) -> None:
    for number, image in enumerate(images):
        write_image(tmp_path / "images" / f"{number}.png", image)
    found = {}
    for door in (weights, *exports.values()):
        arguments = ["--weights", str(door), "--json", "--topk", "4", "--allow-program"]
        assert predict.main([str(tmp_path / "images"), *arguments]) == 0
        found[door] = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for rows in found.values():
        for row, expected in zip(rows, found[weights]):
            assert row["label"] == expected["label"] and row["image"] == expected["image"]
            shown, wanted = ({item["label"]: item["probability"] for item in r["topk"]} for r in (row, expected))
            assert shown == pytest.approx(wanted, abs=2e-6)


@pytest.mark.parametrize("form", ["onnx", "openvino"])
def test_prediction_needs_no_paddle(form: str, exports, tmp_path: Path, images) -> None:
    """A stand-in for a machine without Paddle: importing it fails."""
    need(form)
    image = write_image(tmp_path / "a.png", images[0])
    program = (
        "import sys; sys.modules['paddle'] = None\n"
        "from paddle_medcls.models.network import MODELS\nMODELS['toy_resnet'] = 'resnet'\n"
        "from paddle_medcls.cli.predict import main\n"
        f"sys.exit(main([{str(image)!r}, '--weights', {str(exports[form])!r}, '--json']))"
    )
    done = in_a_process("-c", program)
    assert done.returncode == 0 and json.loads(done.stdout)["image"] == str(image), done.stderr


def test_predict_by_default(resnet18: Path, tmp_path: Path, images) -> None:
    """What `predict.py img.png` does: no Paddle is imported, nothing is written, the answer is the network's."""
    count_of("openvino")
    weights = Path(shutil.copytree(resnet18.parent, tmp_path / "runs" / "one")) / resnet18.name
    image = write_image(tmp_path / "a.png", images[0])
    before = sorted(tmp_path.rglob("*"))
    program = (
        "import os, sys\n"
        f"os.chdir({str(tmp_path)!r})\n"
        "from paddle_medcls.cli.predict import main\n"
        f"code = main([{str(image)!r}, '--json', '--topk', '4'])\n"
        "print('paddle' in sys.modules, 'matplotlib' in sys.modules, 'pandas' in sys.modules)\n"
        "sys.exit(code)"
    )
    done = in_a_process("-c", program)
    assert done.returncode == 0, done.stderr
    row, imported = done.stdout.splitlines()
    found = {item["label"]: item["probability"] for item in json.loads(row)["topk"]}
    expected = dict(zip(Sidecar.read(weights.with_suffix(".json")).classes, by_hand(weights, images[:1])[0]))
    assert found == pytest.approx(expected, abs=2e-6) and imported == "False False False"
    assert done.stderr.splitlines()[0].startswith(f"weights: {Path('runs', 'one', 'COVID.pdparams')} (openvino, f32)")
    assert sorted(tmp_path.rglob("*")) == before


def test_heat_maps_are_drawn_beside_any_engine(tmp_path: Path, images, capsys) -> None:
    weights, image = make_weights(tmp_path, 0, "toy_resnet"), write_image(tmp_path / "a.png", images[0])
    arguments = [str(image), "--weights", str(weights), "--json", "--gradcam"]
    for engine in ("paddle", "auto"):
        assert predict.main([*arguments, str(tmp_path / engine), "--engine", engine]) == 0
    maps = [(tmp_path / engine / "a_gradcam.png").read_bytes() for engine in ("paddle", "auto")]
    assert maps[0] == maps[1]


def test_eval_takes_an_export_and_calibrates_weights_alone(exports, covid_root: Path, tmp_path: Path, capsys) -> None:
    arguments = ["--weights", str(exports["paddle"]), "--data-root", str(covid_root), "--output", str(tmp_path)]
    assert eval.main(arguments) == 1 and "give --allow-program if you exported it yourself" in capsys.readouterr().err
    arguments.append("--allow-program")
    assert eval.main(arguments) == 0
    assert json.loads((tmp_path / "metrics.json").read_text())["n"] == 4
    assert eval.main([*arguments, "--calibrate"]) == 1
    assert "calibrate the weights, export again" in capsys.readouterr().err


def test_an_export_is_not_exported_again(exports, tmp_path: Path, capsys) -> None:
    arguments = ["--weights", str(exports["paddle"]), "--format", "paddle", "--output", str(tmp_path / "out")]
    assert export.main(arguments) == 1 and "is an export itself" in capsys.readouterr().err


def test_too_few_images_to_compare_on(weights: Path, tmp_path: Path, images, capsys) -> None:
    image = write_image(tmp_path / "a.png", images[0])
    arguments = ["--weights", str(weights), "--format", "paddle", "--output", str(tmp_path / "out")]
    assert export.main([*arguments, "--images", str(image)]) == 1
    assert "1 image(s) to compare on" in capsys.readouterr().err


def test_the_table_of_all_ways_to_run_a_model(weights: Path, images, monkeypatch, capsys) -> None:
    """Weights in each engine and exports, in each precision; a way that is wrong shows its difference."""
    count_of("openvino")
    monkeypatch.setattr(parity, "FORMS", {"openvino": "openvino"})
    monkeypatch.setattr(parity, "FASTEST_FIRST", ("openvino",))
    monkeypatch.setattr("paddle_medcls.deployment.inference_engines.has_bfloat16", lambda: False)
    ways = list(parity.all_ways(weights, images))
    assert [(way.name, way.precision) for way in ways] == [
        *(("weights in openvino", "f32"), ("openvino export in openvino", "f32")),
        *(("weights in openvino", "bf16"), ("openvino export in openvino", "bf16")),
    ]
    for way in ways[:2]:
        assert way.difference < 1e-5 and way.same_labels == 1 and not way.reason
    assert all("no bfloat16" in way.reason for way in ways[2:])

    compiled = opening.compile_graph

    def wrong(graph, *rest):
        backend = compiled(graph, *rest)
        run = backend._run
        backend._run = lambda x: {"logits": -run(x)["logits"]}
        return backend

    monkeypatch.setattr(opening, "compile_graph", wrong)
    monkeypatch.setattr(parity, "PRECISIONS", ("f32",))
    monkeypatch.setattr(parity, "FORMS", {})
    (way,) = parity.all_ways(weights, images)
    assert way.difference > 0.01 and way.same_labels < 1
    assert export.main(["--parity", "--weights", str(weights)]) == 0
    assert "weights in openvino" in capsys.readouterr().out


@pytest.mark.parametrize("words", [[], ["--format", "onnx"], ["--output", "x"], ["--parity", "--format", "onnx"]])
def test_an_export_has_a_format_and_a_folder_or_the_table_neither(words: list[str], capsys) -> None:
    with pytest.raises(SystemExit):
        export.main(words)
    assert "--parity" in capsys.readouterr().err
