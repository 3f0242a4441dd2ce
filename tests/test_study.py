"""The study of a model: error page, calibration and operating point, pictures of predictions."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import fakes
import numpy as np
import pytest

from paddle_medcls.cli import eval, predict
from paddle_medcls.core.errors import DataError, RunError
from paddle_medcls.data.datasets import load_index
from paddle_medcls.data.index import Index
from paddle_medcls.deployment import scoring
from paddle_medcls.deployment.heatmaps import HeatMapOptions, heat_maps
from paddle_medcls.deployment.predictor import Predictor, load_predictor
from paddle_medcls.deployment.scoring import EvalOptions, evaluate
from paddle_medcls.evaluation.calibration import fit_temperature, threshold_for
from paddle_medcls.evaluation.error_report import write_error_page
from paddle_medcls.evaluation.predictions import read_predictions
from paddle_medcls.evaluation.significance import compare
from paddle_medcls.models.output_head import OutputHead, sigmoid
from paddle_medcls.training.loop import Options, train


@pytest.fixture(scope="module")
def palm_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained PALM network with one sigmoid output, and its data beside it."""
    folder = tmp_path_factory.mktemp("palm")
    root = fakes.palm_tree(folder / "palm")
    options = Options(device="cpu", workers=0, say=lambda line: None)
    train(fakes.recipe(name="palm_tutorial", epochs=15, monitor="loss"), root, folder / "run", options)
    return folder / "run"


def made_index(tmp_path: Path, labels: np.ndarray, classes: tuple[str, ...], task: str) -> Index:
    paths = [fakes.write_image(tmp_path / f"{k}<b>.png", fakes.pixels(k)) for k in range(len(labels))]
    return Index("made", "test", tuple(path.name for path in paths), paths, labels, classes, task)


class Page(HTMLParser):
    """Collects what a page shows, and what it would fetch from elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.images: list[str] = []
        self.outside: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        values = dict(attrs)
        if tag == "img":
            self.images.append(values["alt"])
        for name in ("src", "href"):
            if name in values and not values[name].startswith("data:"):
                self.outside.append(values[name])


def test_error_page_shows_the_most_confident_mistakes_first(tmp_path: Path) -> None:
    labels = np.array([0, 1, 2, 0, 1])
    probs = np.array([[0.9, 0.1, 0], [0.6, 0.3, 0.1], [0.99, 0.005, 0.005], [0.1, 0.8, 0.1], [0.2, 0.45, 0.35]])
    index = made_index(tmp_path, labels, ("a", "b<i>", "c"), "multi-class")
    head = OutputHead("multi-class", "softmax", index.classes)
    write_error_page(tmp_path / "errors.html", index, probs, head, "A & B", 2)
    text = (tmp_path / "errors.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.images[:2] == ["2<b>.png", "3<b>.png"]  # of the three mistakes, the two with the surest error
    assert page.outside == []  # self-contained
    assert "3 wrong" in text and "A &amp; B" in text and "<i>c" not in text and "b&lt;i&gt;" in text
    assert "prefers-color-scheme: dark" in text and "@media print" in text


def test_error_page_of_many_labels(tmp_path: Path) -> None:
    labels = np.array([[1, 0], [0, 0], [1, 1]])
    probs = np.array([[0.9, 0.2], [0.7, 0.1], [0.8, 0.9]])
    index = made_index(tmp_path, labels, ("left", "right"), "multi-label")
    head = OutputHead("multi-label", "sigmoid", index.classes)
    write_error_page(tmp_path / "errors.html", index, probs, head, "many", 5)
    text = (tmp_path / "errors.html").read_text(encoding="utf-8")
    assert Page(text).images == ["1<b>.png", "1<b>.png"]  # once a mistake, once a suspected label
    assert "true <b>none</b>, predicted <b>left</b>" in text


@pytest.mark.pictures
def test_calibrate_writes_the_sidecar_and_every_door_uses_it(palm_run: Path, tmp_path: Path, capsys) -> None:
    weights = palm_run / "PALM.pdparams"
    before = json.loads(weights.with_suffix(".json").read_text())
    assert (before["temperature"], before["threshold"]) == (1.0, 0.5)
    arguments = ["--weights", str(weights), "--calibrate", "--sensitivity", "1.0", "--prevalence", "0.1"]
    arguments += ["--engine", "paddle"]  # the digits below are those of the network in Paddle
    assert eval.main([*arguments, "--output", str(tmp_path / "out"), "--errors", "3"]) == 0
    said = capsys.readouterr().out
    after = json.loads(weights.with_suffix(".json").read_text())
    index = load_index("palm", palm_run.parent / "palm", "val")
    logits = Predictor.from_weights(weights).split_logits(index, 32, 0)
    temperature = fit_temperature(logits, index.labels, "sigmoid")
    threshold = threshold_for(sigmoid(logits / temperature)[:, 0], index.labels, 1.0)
    assert after["temperature"] == pytest.approx(temperature) and temperature != 1.0
    assert after["threshold"] == pytest.approx(threshold)
    fitted = dict.fromkeys(("temperature", "threshold", "prediction_sets"))
    assert {**before, **fitted} == {**after, **fitted}
    assert after["prediction_sets"]["images"] == 4 and "coverage" in said and "which also chose the temperature" in said
    assert re.search(r"PPV \d\.\d+, NPV (1\.0000|nan) at 10\.00% prevalence", said)
    result = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert result["sensitivity"] == 1.0 and result["temperature"] == after["temperature"]
    assert (tmp_path / "out" / "calibration.png").stat().st_size > 1000
    assert (tmp_path / "out" / "errors.html").is_file()

    assert (
        predict.main([str(path) for path in index.images] + ["--weights", str(weights), "--json", "--topk", "2"]) == 0
    )
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for row, label in zip(rows, index.labels):
        probs = {item["label"]: item["probability"] for item in row["topk"]}
        assert (row["label"] == "pathologic") == (probs["pathologic"] > after["threshold"])
        assert label == 0 or row["label"] == "pathologic"  # the sensitivity that was asked for


@pytest.mark.pictures
def test_evaluate_is_a_function(palm_run: Path, tmp_path: Path) -> None:
    """What the command prints and writes, for a notebook."""
    found = evaluate(str(palm_run / "PALM.pdparams"), split="val", options=EvalOptions(output=tmp_path, errors=2))
    assert found.metrics == json.loads((tmp_path / "metrics.json").read_text()) and found.metrics["n"] == 7
    assert "val: 7 images" in found.table() and "sensitivity" in found.table()
    assert {"errors.html", "predictions_val.csv", "roc_val.png"} <= {path.name for path in tmp_path.iterdir()}
    again = evaluate(palm_run)  # the folder, and the data set's last split
    assert again.metrics == found.metrics
    opened = evaluate(load_predictor(palm_run), "val")
    assert opened.metrics == found.metrics and opened.weights == palm_run / "PALM.pdparams"
    written = read_predictions(tmp_path)
    assert found.predictions.ids == written.ids and found.predictions.task == written.task == "binary"
    np.testing.assert_allclose(found.predictions.probs, written.probs, atol=1e-8)
    assert compare(found.predictions, again.predictions)["auc"]["difference"] == 0


def test_a_network_in_memory_cannot_be_calibrated(palm_run: Path) -> None:
    opened = Predictor.from_weights(palm_run)
    in_memory = Predictor(opened.sidecar, opened.backend)
    with pytest.raises(RunError, match="written beside the weight file"):
        evaluate(in_memory, data_root=palm_run.parent / "palm", options=EvalOptions(calibrate=True))
    assert evaluate(in_memory, data_root=palm_run.parent / "palm").metrics["n"] == 7


def test_a_split_is_run_once_also_to_calibrate(palm_run: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    for name in ("PALM.pdparams", "PALM.json", "data.json", "recipe.json"):
        (tmp_path / name).write_bytes((palm_run / name).read_bytes())
    runs: list[str] = []
    whole = Predictor.split_outputs
    monkeypatch.setattr(
        Predictor, "split_outputs", lambda self, index, *rest: runs.append(index.split) or whole(self, index, *rest)
    )
    assert eval.main(["--weights", str(tmp_path / "PALM.pdparams"), "--calibrate"]) == 0
    assert runs == ["val"]
    first, *_, summed = capsys.readouterr().out.split("\n", 1)
    assert first.startswith("on val: temperature ") and f"(temperature {first.split()[3][:5]}" in summed


def never(*_, **__):
    raise AssertionError("work has begun")


def test_options_that_do_not_fit_the_model_are_refused_before_any_work(
    palm_run: Path, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(Predictor, "from_weights", never)
    sidecar = json.loads((palm_run / "PALM.json").read_text())
    (tmp_path / "M.pdparams").write_bytes(b"")
    four = {**sidecar, "task": "multi-class", "loss": "softmax", "classes": list("abcd"), "dataset": "oct"}
    four["network"] = {**sidecar["network"], "num_outputs": 4}
    (tmp_path / "M.json").write_text(json.dumps(four))
    for words in (["--calibrate", "--sensitivity", "0.9"], ["--prevalence", "0.1"]):
        assert eval.main(["--weights", str(tmp_path / "M.pdparams"), *words]) == 1
        said = capsys.readouterr().err
        assert "needs two classes" in said and "multi-class: a, b, c, d" in said


def test_a_threshold_needs_positives(palm_run: Path, monkeypatch, capsys) -> None:
    """It was an IndexError, after the whole validation split."""
    monkeypatch.setattr(Predictor, "split_outputs", never)
    before = (palm_run / "PALM.json").read_bytes()
    normal = load_index("palm", palm_run.parent / "palm", "val")
    normal = normal.subset(np.flatnonzero(normal.labels == 0))
    monkeypatch.setattr(scoring, "load_index", lambda *_: normal)
    words = ["--weights", str(palm_run / "PALM.pdparams"), "--calibrate", "--sensitivity", "0.9"]
    assert eval.main(words) == 1
    assert "no positive image" in capsys.readouterr().err and (palm_run / "PALM.json").read_bytes() == before


@pytest.mark.parametrize(
    "arguments",
    [["--sensitivity", "0.9"], ["--calibrate", "--sensitivity", "1.5"], ["--prevalence", "1"], ["--errors", "5"]],
)
def test_wrong_usage(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        eval.main(["--weights", "x.pdparams", *arguments])
    assert stop.value.code == 2


def test_pictures_of_predictions(palm_run: Path, tmp_path: Path, capsys) -> None:
    image = palm_run.parent / "palm" / "PALM-Validation400" / "V0001.jpg"
    arguments = [str(image), "--weights", str(palm_run / "PALM.pdparams"), "--topk", "2"]
    assert predict.main([*arguments, "--pictures", str(tmp_path / "out")]) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["V0001_prediction.png"]


def test_predictions_are_printed_where_no_layer_suits(palm_run: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("paddle_medcls.explanation.gradcam.MIN_SIDE", 99)
    images = [str(palm_run.parent / "palm" / "PALM-Validation400" / f"V000{k}.jpg") for k in (1, 2)]
    arguments = [*images, "--weights", str(palm_run / "PALM.pdparams"), "--gradcam", str(tmp_path / "out")]
    assert predict.main([*arguments, "--csv", str(tmp_path / "p.csv")]) == 1
    said = capsys.readouterr()
    assert "V0001.jpg" in said.out and "V0002.jpg" in said.out and len((tmp_path / "p.csv").read_text().split()) == 3
    assert said.err.count("suits a heat map") == 1 and "Traceback" not in said.err
    assert not (tmp_path / "out").exists()


def test_heat_maps_are_a_function(palm_run: Path, tmp_path: Path) -> None:
    """What the command writes, for a notebook."""
    paths = [palm_run.parent / "palm" / "PALM-Validation400" / f"V000{k}.jpg" for k in (1, 2)]
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    predictor = Predictor.from_weights(palm_run / "PALM.pdparams")
    options = HeatMapOptions(tmp_path / "out", layer="conv", class_name="pathologic", measure=True)
    found = heat_maps(predictor, [paths[0], broken, paths[1]], options)
    assert found.layer == "conv" and found.made == paths and [path for path, _ in found.failed] == [broken]
    assert [row["class"] for row in found.measurement.rows] == ["pathologic"] * 2
    assert {"contact_sheet.png", "measures.csv"} <= {path.name for path in (tmp_path / "out").iterdir()}
    with pytest.raises(DataError, match="unknown class 'pathologik'; did you mean 'pathologic'"):
        heat_maps(predictor, paths, HeatMapOptions(layer="conv", class_name="pathologik"))
    named = heat_maps(str(palm_run), [str(paths[0])], HeatMapOptions(str(tmp_path / "more"), layer="conv"))
    assert named.made == paths[:1] and (tmp_path / "more" / "V0001_gradcam.png").is_file()


def test_pictures_of_files_with_the_same_name_are_all_kept(palm_run: Path, tmp_path: Path) -> None:
    for folder in ("CNV", "DME"):
        fakes.write_image(tmp_path / "scans" / folder / "1.png", fakes.pixels(1))
    arguments = [str(tmp_path / "scans"), "--weights", str(palm_run / "PALM.pdparams")]
    assert predict.main([*arguments, "--pictures", str(tmp_path / "out")]) == 0
    found = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.png"))
    assert found == ["CNV/1_prediction.png", "DME/1_prediction.png"]


def test_evaluation_without_leaked_images(palm_run: Path, capsys) -> None:
    root = palm_run.parent / "palm"
    copied = root / "PALM-Validation400" / "V0003.jpg"
    original = copied.read_bytes()
    copied.write_bytes((root / "PALM-Training400" / "P0001.jpg").read_bytes())
    try:
        assert eval.main(["--weights", str(palm_run / "PALM.pdparams"), "--without-leaks"]) == 0
    finally:
        copied.write_bytes(original)
    said = capsys.readouterr().out
    assert "without the 1 images that are in the training split as well" in said
    assert "val: 7 images" in said and "val: 6 images" in said
