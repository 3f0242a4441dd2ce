"""The novelty score: its definition, its file, and every way out."""

from __future__ import annotations

import csv
import json
import os
from dataclasses import replace
from pathlib import Path

import fakes
import numpy as np
import pytest
import safetensors.numpy

from paddle_medcls.cli import eval, predict
from paddle_medcls.core.errors import RunError, WeightsError
from paddle_medcls.core.files import sha256
from paddle_medcls.deployment import opening
from paddle_medcls.deployment.export import export
from paddle_medcls.deployment.graph import logits_graph, stage_channels
from paddle_medcls.deployment.inference_engines import compile_graph
from paddle_medcls.deployment.opening import PaddleNetwork
from paddle_medcls.deployment.prediction import check_options
from paddle_medcls.deployment.predictor import Predictor
from paddle_medcls.models.network import Network
from paddle_medcls.models.novelty import DIMENSIONS, Novelty, novelty_path, read_novelty
from paddle_medcls.models.sidecar import Sidecar
from paddle_medcls.preprocessing.transforms import Preprocessing
from paddle_medcls.training.loop import Options, train


def features(n: int = 200, seed: int = 0) -> np.ndarray:
    """Two stages of 40 and 3 channels, with axes of very different width."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(n, 43)) * np.geomspace(1, 0.01, 43) + 5).astype(np.float32)


def slow_score(x: np.ndarray, train: np.ndarray, channels: list[int]) -> float:
    """The Mahalanobis distance under the covariance that the description names, inverted as a matrix."""
    total, start = 0.0, 0
    for count in channels:
        own, one = train[:, start : start + count].astype(float), x[start : start + count].astype(float)
        mean, covariance = own.mean(0), np.cov(own.T)
        values, vectors = np.linalg.eigh(covariance)
        values, vectors = values[::-1], vectors[:, ::-1]
        d = min(DIMENSIONS, count)
        along, beside = vectors[:, :d], vectors[:, d:]
        c = one - mean
        total += float(c @ along @ np.diag(1 / values[:d]) @ along.T @ c) / d
        total += float(c @ beside @ beside.T @ c) / values[d:].sum() if d < count else 0.0
        start += count
    return float(np.sqrt(total / (2 * len(channels))))


def test_the_score_is_that_of_the_definition() -> None:
    train, new, channels = features(), features(5, 1) + 0.3, [40, 3]
    found = Novelty.fit(train, channels).scores(new)
    np.testing.assert_allclose(found, [slow_score(x, train, channels) for x in new], rtol=1e-3)


def test_strangers_score_higher_in_every_stage() -> None:
    novelty = Novelty.fit(features(), [40, 3])
    usual = novelty.scores(features(100, 1))
    for column in (0, 39, 42):
        strange = features(100, 1)
        strange[:, column] += 20
        assert novelty.scores(strange).min() > usual.max()


def test_features_of_another_network_are_refused() -> None:
    with pytest.raises(WeightsError, match="features of shape"):
        Novelty.fit(features(), [40, 3]).scores(features()[:, :5])


def test_the_file_is_what_was_fitted(tmp_path: Path) -> None:
    novelty = Novelty.fit(features(), [40, 3])
    novelty.write(tmp_path / "a.safetensors")
    again = read_novelty(tmp_path / "a.safetensors")
    np.testing.assert_array_equal(again.scores(features(9, 2)), novelty.scores(features(9, 2)))


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("means.0", np.full(40, np.nan, np.float32)),
        ("means.0", np.zeros(39, np.float32)),
        ("means.0", np.zeros(40, np.float64)),
        ("means.0", np.zeros((40, 1), np.float32)),
        ("scales.0", np.zeros(32, np.float32)),
        ("scales.0", np.ones(31, np.float32)),
        ("axes.0", np.zeros((40, 40), np.float32)),
        ("axes.1", np.full((3, 3), np.inf, np.float32)),
        ("rests.0", -np.ones(1, np.float32)),
        ("rests.1", np.ones((0,), np.float32)),
        ("rests.1", None),
        ("other.1", np.ones(1, np.float32)),
        ("means.99", np.ones(1, np.float32)),
    ],
)
def test_a_hostile_file_is_refused(tmp_path: Path, name: str, array) -> None:
    with pytest.raises(WeightsError, match="not the features|cannot be used"):
        read_novelty(hostile_file(tmp_path, name, array))


def hostile_file(folder: Path, name: str, array: np.ndarray | None) -> Path:
    """A novelty file with one array in place of another; None: without it."""
    path = folder / "COVID.novelty.safetensors"
    Novelty.fit(features(), [40, 3]).write(path)
    arrays = safetensors.numpy.load(path.read_bytes())
    arrays.pop(name, None)
    path.write_bytes(safetensors.numpy.save(arrays if array is None else {**arrays, name: array}))
    return path


def test_a_file_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="at most 67,108,864"):
        read_novelty(huge_file(tmp_path))


def huge_file(folder: Path) -> Path:
    path = folder / "COVID.novelty.safetensors"
    with open(path, "wb") as file:
        file.truncate(5 << 30)
    return path


@pytest.mark.parametrize(
    "record",
    (
        {"limit": 2.0},
        {"limit": -1, "sha256": "0" * 64},
        {"limit": 2.0, "sha256": 5},
        {"limit": True, "sha256": "0" * 64},
        {"limit": 2.0, "sha256": "0" * 64, "more": 1},
    ),
)
def test_a_faulty_record_is_refused(record: dict) -> None:
    spec = Preprocessing(32)
    with pytest.raises(WeightsError, match="novelty"):
        Sidecar("covid", "covid", ("a", "b", "c"), "multi-class", "softmax", Network("toy", 3), spec, novelty=record)


@pytest.mark.parametrize(("model", "flips"), [("resnet18", ()), ("resnet18", ("flip",)), ("vgg16", ())])
def test_every_backend_gives_the_same_features(model: str, flips: tuple[str, ...]) -> None:
    from paddle_medcls.core.paddle_setup import paddle

    if model == "vgg16" and os.environ.get("MEDCLS_TEST_DATA") is None:
        pytest.skip("its 135 million parameters take long; with the tests on real data")
    paddle.seed(1)
    network = Network(model, 3)
    sidecar = Sidecar("covid", "covid", ("a", "b", "c"), "multi-class", "softmax", network, Preprocessing(32), flips)
    layer = network.build()
    state = {name: value.numpy() for name, value in layer.state_dict().items()}
    x = np.random.default_rng(0).normal(size=(2, 3, 32, 32)).astype(np.float32)
    expected = PaddleNetwork(layer, flips).outputs(x)
    backend = compile_graph(logits_graph(sidecar, state, "w", features=True), "openvino", "f32", 3)
    found = backend.outputs(x)
    assert found["features"].shape == (2, sum(stage_channels(network))) == expected["features"].shape
    assert layer.stage_channels == stage_channels(network)
    for name in ("logits", "features"):
        np.testing.assert_allclose(found[name], expected[name], atol=2e-4)


# --- a trained model ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy network's run directory, and a stranger beside it."""
    folder = tmp_path_factory.mktemp("novelty")
    recipe = fakes.recipe(epochs=1)
    options = Options(device="cpu", workers=1, say=lambda line: None)
    train(recipe, fakes.palm_tree(folder / "palm"), folder / "run", options)
    fakes.write_image(folder / "strange.png", np.random.default_rng(0).integers(0, 2, (32, 32, 3), np.uint8) * 255)
    return folder


def weights_of(trained: Path) -> Path:
    return trained / "run" / "PALM.pdparams"


def test_training_writes_the_score(trained: Path) -> None:
    weights = weights_of(trained)
    record = Sidecar.read(weights.with_suffix(".json")).novelty
    assert record["sha256"] == sha256(novelty_path(weights)) and record["limit"] > 0
    text = (trained / "run" / "README.md").read_text(encoding="utf-8")
    assert "Every image gets an answer" not in text and f"score above {record['limit']:.4g}" in text
    assert "PALM.novelty.safetensors" in text


def test_predict_says_which_image_is_unlike(trained: Path, capsys) -> None:
    weights, usual = str(weights_of(trained)), str(trained / "palm" / "PALM-Validation400" / "V0001.jpg")
    strange = str(trained / "strange.png")
    limit = Sidecar.read(weights_of(trained).with_suffix(".json")).novelty["limit"]
    csv_file = trained / "out.csv"
    assert predict.main([usual, strange, "--weights", weights, "--json", "--refuse", "--csv", str(csv_file)]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    by_name = {Path(row["image"]).name: row for row in rows}
    assert by_name["V0001.jpg"]["in_distribution"] is True and isinstance(by_name["V0001.jpg"]["label"], str)
    stranger = by_name["strange.png"]
    assert stranger["in_distribution"] is False and stranger["label"] is None and stranger["novelty"] > limit
    with open(csv_file, newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["in_distribution"] for row in table] == [str(row["in_distribution"]) for row in rows]
    assert {row["label"] for row in table} == {"", by_name["V0001.jpg"]["label"]}
    assert predict.main([strange, "--weights", weights]) == 0
    said = capsys.readouterr().out
    assert f"unlike the training images (score {stranger['novelty']:.4g}, limit {limit:.4g})" in said
    result = Predictor.from_weights(weights).predict(strange)
    assert result.in_distribution is False and result.novelty == pytest.approx(stranger["novelty"], abs=1e-3)


def test_eval_reports_what_passes(trained: Path, capsys) -> None:
    arguments = ["--weights", str(weights_of(trained)), "--data-root", str(trained / "palm")]
    assert eval.main([*arguments, "--output", str(trained / "out")]) == 0
    assert "like the training images" in capsys.readouterr().out
    report = json.loads((trained / "out" / "metrics.json").read_text())["novelty"]
    assert report["passed"] >= 6 / 7 and report["accuracy_passed"] is not None  # the limit comes from these images


def copy(trained: Path, folder: Path) -> Path:
    for path in (trained / "run").glob("PALM.*"):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder / "PALM.pdparams"


def test_without_its_file_a_model_works_and_says_so(trained: Path, tmp_path: Path, capsys) -> None:
    weights = copy(trained, tmp_path)
    novelty_path(weights).unlink()
    assert predict.main([str(trained / "strange.png"), "--weights", str(weights), "--json"]) == 0
    said = capsys.readouterr()
    assert "PALM.novelty.safetensors is missing" in said.err and "in_distribution" not in json.loads(said.out)
    assert predict.main([str(trained / "strange.png"), "--weights", str(weights), "--refuse"]) == 1
    assert "cannot tell which images are unlike" in capsys.readouterr().err


def test_another_file_is_refused(trained: Path, tmp_path: Path) -> None:
    weights = copy(trained, tmp_path)
    Novelty.fit(features(), [40, 3]).write(novelty_path(weights))
    with pytest.raises(WeightsError, match="sha256 differs"):
        Predictor.from_weights(weights)


def test_an_average_has_the_mean_share_of_the_limits(trained: Path, tmp_path: Path, capsys) -> None:
    options = Options(device="cpu", workers=1, say=lambda line: None)
    train(fakes.recipe(epochs=1, seed=1), trained / "palm", tmp_path / "other", options)
    files = [weights_of(trained), tmp_path / "other" / "PALM.pdparams"]
    images = [str(trained / "strange.png"), str(trained / "palm" / "PALM-Validation400" / "V0001.jpg")]
    average, models = Predictor.from_weights(files), [Predictor.from_weights(file) for file in files]
    for image in images:
        shares = [model.predict(image).novelty / model.sidecar.novelty["limit"] for model in models]
        found = average.predict(image)
        assert found.novelty == pytest.approx(np.mean(shares), rel=1e-5)
        assert found.in_distribution == (np.mean(shares) <= 1) and found.disagreement.models == 2
    assert predict.main([*images, "--weights", *map(str, files), "--json", "--refuse"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["in_distribution"] for row in rows] == [False, True] and rows[0]["label"] is None
    assert eval.main(["--weights", *map(str, files), "--data-root", str(trained / "palm")]) == 0
    assert "like the training images" in capsys.readouterr().out
    novelty_path(files[1]).unlink()  # one model without the score: the average has none
    assert Predictor.from_weights(files).predict(images[0]).novelty is None
    with pytest.raises(RunError, match="cannot tell which images are unlike"):
        check_options(Predictor.from_weights(files), None, refuse=True)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A ResNet-18 of random weights with a novelty file, and its OpenVINO export."""
    from paddle_medcls.core.paddle_setup import paddle

    folder, network, spec = tmp_path_factory.mktemp("export"), Network("resnet18", 3), Preprocessing(32)
    paddle.seed(1)
    layer = network.build()
    weights = folder / "COVID.pdparams"
    paddle.save(layer.state_dict(), str(weights))
    x = np.random.default_rng(0).normal(size=(24, 3, 32, 32)).astype(np.float32)
    Novelty.fit(PaddleNetwork(layer).outputs(x)["features"], stage_channels(network)).write(novelty_path(weights))
    record = {"limit": 2.0, "sha256": sha256(novelty_path(weights))}
    head = ("covid", "covid", ("a", "b", "c"), "multi-class", "softmax")
    Sidecar(*head, network, spec, sha256=sha256(weights), novelty=record).write(folder / "COVID.json")
    fakes.import_openvino_or_skip()
    assert export(weights, "openvino", folder / "export").novelty < 1e-4
    return weights, folder / "export"


def test_an_export_gives_the_score(exported: tuple[Path, Path]) -> None:
    weights, folder = exported
    images = [fakes.pixels(seed, level) for seed, level in enumerate((20, 128, 230))]
    network, served = Predictor.from_weights(weights), Predictor.from_weights(folder)
    for one, other in zip(map(network.predict, images), map(served.predict, images)):
        assert other.novelty == pytest.approx(one.novelty, rel=1e-4)
        assert other.in_distribution == one.in_distribution == (one.novelty <= 2)
    assert served.sidecar.novelty == {"limit": 2.0}
    assert "`novelty`, float32 (N, 1)" in (folder / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("scores", ({}, {"novelty": np.zeros((1, 1))}, {"novelty": np.full((2, 1), np.nan)}))
def test_an_export_without_the_promised_score_is_refused(scores: dict) -> None:
    with pytest.raises(WeightsError, match="novelty score that its sidecar promises"):
        opening._exported_novelty({"logits": np.zeros((2, 3)), **scores})


def test_coverage_in_every_way_out(trained: Path, tmp_path: Path, capsys) -> None:
    weights, image = copy(trained, tmp_path), str(trained / "strange.png")
    assert predict.main([image, "--weights", str(weights), "--coverage", "0.9"]) == 1
    assert "eval --calibrate" in capsys.readouterr().err
    arguments = ["--weights", str(weights), "--data-root", str(trained / "palm"), "--calibrate"]
    assert eval.main([*arguments, "--sets", "aps", "--coverage", "0.6", "--output", str(tmp_path / "out")]) == 0
    assert "prediction sets for a coverage of 0.6 (aps)" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "metrics.json").read_text())["prediction_sets"]
    assert report["target"] == 0.6 and report["images"] == 3 and len(report["by_class"]) == 2
    assert predict.main([image, "--weights", str(weights), "--coverage", "0.9", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert set(row["prediction_set"]) <= {"non-pathologic", "pathologic"} and row["label"] in row["prediction_set"]
    found = Predictor.from_weights(weights).predict(image, coverage=0.9).prediction_set
    assert list(found) == row["prediction_set"]


def test_a_calibration_belongs_to_its_temperature(trained: Path, tmp_path: Path) -> None:
    """Training's sidecar keeps the calibration of the same weights."""
    sidecar = Sidecar.read(weights_of(trained).with_suffix(".json"))
    assert sidecar.prediction_sets == {} and replace(sidecar, temperature=2.0).novelty == sidecar.novelty
