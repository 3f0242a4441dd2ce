"""Several models as one: the average against a mean by hand, what does not fit together, its export, its heat maps."""

from __future__ import annotations

import csv
import json
import shutil
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fakes import covid_tree, pixels, write_image

from paddle_medcls.cli import eval as eval_command
from paddle_medcls.cli import export as export_command
from paddle_medcls.cli import gradcam as gradcam_command
from paddle_medcls.cli import predict as predict_command
from paddle_medcls.core.errors import RunError, WeightsError
from paddle_medcls.core.files import sha256
from paddle_medcls.core.paddle_setup import paddle
from paddle_medcls.deployment import export as exporting
from paddle_medcls.deployment import exported_models
from paddle_medcls.deployment.predictor import Predictor
from paddle_medcls.deployment.scoring import EvalOptions, evaluate
from paddle_medcls.deployment.trained_models import newest_weights
from paddle_medcls.models.network import Network
from paddle_medcls.models.output_head import OutputHead
from paddle_medcls.models.sidecar import Sidecar, sidecar_of
from paddle_medcls.models.weights import save_weights
from paddle_medcls.preprocessing.transforms import Preprocessing

CLASSES = ("COVID", "LungOpacity", "Normal", "ViralPneumonia")
TASKS = {
    "softmax": ("multi-class", "softmax", CLASSES, 4),
    "binary": ("binary", "sigmoid", CLASSES[:2], 1),
    "multi-label": ("multi-label", "sigmoid", CLASSES[:3], 3),
}


def make_model(folder: Path, seed: int, kind: str = "softmax", **changes: object) -> Path:
    """A weight file with its own temperature, threshold, mean and std."""
    task, loss, classes, outputs = TASKS[kind]
    paddle.seed(seed)
    network = Network("toy_resnet", outputs, 3, "small")
    model = network.build()
    model(paddle.randn([8, 3, 16, 16]))
    model.fc.weight.set_value(model.fc.weight * 4)  # else all probabilities are alike
    model.eval()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "COVID.pdparams"
    save_weights(model, path)
    spec = Preprocessing(size_px=16, channels="bgr", mean=(110.0 + 9 * seed,) * 3, std=(50.0 + seed, 60.0, 55.0))
    sidecar = Sidecar("covid", "covid", classes, task, loss, network, spec, temperature=0.5 + 0.4 * seed)
    flips = ("flip",) if seed == 1 else ()
    sidecar = replace(sidecar, threshold=0.4 + 0.1 * seed, flips=flips, sha256=sha256(path), metrics={"n": 5})
    replace(sidecar, **changes).write(sidecar_of(path))
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("images")
    return [write_image(folder / f"{k}.png", pixels(k, 30 + 32 * k)) for k in range(6)]


@pytest.fixture(scope="module", params=TASKS)
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp(request.param.replace("-", ""))
    return [make_model(folder / f"fold{seed + 1}", seed, request.param) for seed in range(3)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cross_validation(tmp_path_factory.mktemp("cv"))


def cross_validation(root: Path) -> Path:
    """The folder of a cross-validation, with run directories as training leaves them."""
    for seed in range(3):
        path = make_model(root / f"fold{seed + 1}", seed)
        (path.parent / "recipe.json").write_text(json.dumps({"folds": 3, "fold": seed + 1}))
        (path.parent / "metrics.json").write_text("{}")
    return root


def by_hand(models: list[Path], images: list[Path]) -> tuple[list[list[list[float]]], list[list[float]]]:
    """Probabilities of each model, opened on its own, and their mean: (models, images, classes), (images, classes)."""
    each = []
    for path in models:
        single = Predictor.from_weights(path)
        each.append([list(single.predict(image).probabilities.values()) for image in images])
    mean = [[sum(column) / len(models) for column in zip(*rows)] for rows in zip(*each)]
    return each, mean


@pytest.mark.parametrize("engine", [None, "openvino", "onnxruntime"])
def test_the_average_is_the_mean_by_hand(engine: str | None, models: list[Path], images: list[Path]) -> None:
    if engine:
        pytest.importorskip(engine)
        pytest.importorskip("onnx" if engine == "onnxruntime" else engine)
    each, mean = by_hand(models, images)
    predictor = Predictor.from_weights(models, engine=engine)
    found = [predictor.predict(image) for image in images]
    np.testing.assert_allclose([list(one.probabilities.values()) for one in found], mean, atol=2e-6)
    logits = predictor.logits(images)
    np.testing.assert_allclose(predictor.head.probabilities(logits), mean, atol=2e-6)
    for (_, _, one), other in zip(predictor.predict_decoded(images, 4), found):
        np.testing.assert_allclose(list(one.probabilities.values()), list(other.probabilities.values()), atol=1e-6)
        assert one.disagreement.same_label == other.disagreement.same_label


def test_the_disagreement_by_hand(models: list[Path], images: list[Path]) -> None:
    each, mean = by_hand(models, images)
    sidecars = [Sidecar.read(sidecar_of(path)) for path in models]
    predictor = Predictor.from_weights(models)
    threshold = statistics.mean(one.threshold for one in sidecars)
    assert predictor.sidecar.threshold == pytest.approx(threshold) and predictor.sidecar.temperature == 1

    def label(probs: list[float], limit: float) -> str:
        if predictor.sidecar.task == "multi-label":
            return "; ".join(name for name, p in zip(predictor.sidecar.classes, probs) if p > limit)
        if predictor.sidecar.task == "binary":
            return predictor.sidecar.classes[probs[1] > limit]
        return predictor.sidecar.classes[probs.index(max(probs))]

    counts = set()
    for row, image in enumerate(images):
        found = predictor.predict(image)
        assert found.label == label(mean[row], threshold)
        alike = [label(probs[row], one.threshold) == found.label for probs, one in zip(each, sidecars)]
        k = list(found.probabilities.values()).index(found.probability)
        assert found.disagreement.sd == pytest.approx(statistics.stdev(probs[row][k] for probs in each), abs=1e-6)
        assert (found.disagreement.same_label, found.disagreement.models) == (sum(alike), 3)
        counts.add(sum(alike))
    assert Predictor.from_weights(models[0]).predict(images[0]).disagreement is None


def test_logits_of_probabilities_that_are_certain() -> None:
    for kind, loss, classes, _ in TASKS.values():
        head = OutputHead(kind, loss, classes)
        certain = np.zeros((1, len(classes)))
        certain[0, 0] = 1
        logits = head.logits_of(certain)
        assert np.isfinite(logits).all()
        np.testing.assert_allclose(head.probabilities(logits), certain, atol=1e-12)


# --- commands --------------------------------------------------------------------------------------


def predicted(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[dict]:
    assert predict_command.main([str(one) for one in arguments] + ["--json", "--engine", "paddle"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_predict_says_how_far_the_models_agree(
    folder: Path, images: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = [folder / f"fold{k}" for k in (1, 2, 3)]
    rows = predicted(capsys, *images, "--weights", folder, "--csv", tmp_path / "p.csv")
    assert rows == predicted(capsys, *images, "--weights", *models)
    single = predicted(capsys, images[0], "--weights", models[0])
    assert set(rows[0]) - set(single[0]) == {"disagreement"}
    average = Predictor.from_weights(models)
    for row, image in zip(rows, images):
        found = average.predict(image).disagreement
        assert row["disagreement"] == {"sd": round(found.sd, 6), "same_label": found.same_label, "models": 3}
    with open(tmp_path / "p.csv", encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    assert list(table[0]) == ["image", "label", *CLASSES, "sd", "same_label", "models"]
    assert [float(row["sd"]) for row in table] == [row["disagreement"]["sd"] for row in rows]
    assert predict_command.main([str(images[0]), "--weights", str(folder), "--engine", "paddle"]) == 0
    printed = capsys.readouterr()
    assert f"{rows[0]['disagreement']['same_label']} of 3" in printed.out and "±" in printed.out
    assert "average of 3 models" in printed.err


def test_images_may_stand_behind_the_weights(
    folder: Path, images: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    one = folder / "fold1" / "COVID.pdparams"
    expected = predicted(capsys, images[0], images[1], "--weights", one)
    assert predicted(capsys, "--weights", one, images[0], images[1]) == expected
    assert predicted(capsys, "--weights", folder, images[0].parent)[0]["disagreement"]["models"] == 3
    with pytest.raises(SystemExit):
        predict_command.main(["--weights", str(one)])


def test_evaluate_scores_the_average(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = covid_tree(tmp_path / "covid")
    models = [folder / f"fold{k}" for k in (1, 2, 3)]
    found = evaluate(Predictor.from_weights(folder), "test", root)
    _, mean = by_hand(models, found.index.images)
    np.testing.assert_allclose(found.predictions.probs, mean, atol=2e-6)
    assert found.metrics["accuracy"] == np.mean(np.argmax(mean, axis=1) == found.index.labels)
    arguments = ["--weights", str(folder), "--data-root", str(root), "--engine", "paddle", "--workers", "0"]
    assert eval_command.main(arguments) == 0
    assert f"accuracy     {found.metrics['accuracy']:.4f}" in capsys.readouterr().out
    with pytest.raises(RunError, match="an average of models is not calibrated"):
        evaluate(Predictor.from_weights(folder), "test", root, EvalOptions(calibrate=True))


def test_the_newest_run_may_be_a_cross_validation(folder: Path, tmp_path: Path) -> None:
    root = shutil.copytree(folder, tmp_path / "runs" / "cv")
    assert newest_weights(tmp_path / "runs").parent.parent == root  # its training is not finished: one of its models
    (root / "metrics.json").write_text("{}")
    assert newest_weights(tmp_path / "runs") == root


def test_heat_maps_are_averaged(folder: Path, images: list[Path], tmp_path: Path) -> None:
    models = [folder / f"fold{k}" for k in (1, 2, 3)]
    average = Predictor.from_weights(folder)
    found = average.gradcam(images[2])
    maps = [Predictor.from_weights(path).gradcam(images[2], found.label).values for path in models]
    expected = sum(maps) / len(maps)
    np.testing.assert_allclose(found.values, expected / expected.max(), atol=1e-5)
    arguments = [str(images[2]), "--weights", str(folder), "--output", str(tmp_path / "cam")]
    assert gradcam_command.main(arguments) == 0
    assert list((tmp_path / "cam").rglob("2_gradcam.png"))


def test_an_average_has_no_layers_of_its_own(folder: Path, images: list[Path], capsys) -> None:
    assert gradcam_command.main(["--weights", str(folder), "--measure", str(images[0])]) == 1
    assert "an average of 3 models has no layers of its own" in capsys.readouterr().err


# --- what does not fit together --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"classes": (*CLASSES[:3], "Healthy")}, r"classes \('COVID', 'LungOpacity', 'Normal', 'Healthy'\), not"),
        ({"dataset": "oct"}, "dataset 'oct', not 'covid'"),
        ({"task": "ordinal"}, "task 'ordinal', not 'multi-class'"),
    ],
)
def test_models_that_do_not_fit_together(changes: dict, fault: str, folder: Path, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", 4, **changes)
    with pytest.raises(WeightsError, match=rf"2 models do not fit together\n  .*COVID.pdparams: {fault}"):
        Predictor.from_weights([folder / "fold1", other])


@pytest.mark.parametrize("field", ["size_px", "channels", "fit", "interpolation", "resize_dtype", "decode"])
def test_other_preprocessing(field: str, folder: Path, tmp_path: Path) -> None:
    value = {"size_px": 24, "channels": "rgb", "fit": "crop", "interpolation": "area", "resize_dtype": "float32"}
    spec = Sidecar.read(folder / "fold1" / "COVID.json").preprocessing
    other = make_model(tmp_path / "other", 4, preprocessing=replace(spec, **{field: value.get(field, "reduced")}))
    with pytest.raises(WeightsError, match=rf"do not fit together\n  .*: {field} ") as error:
        Predictor.from_weights([folder / "fold1", other])
    assert str(error.value).count("COVID.pdparams:") == 1  # mean and std may differ


def test_one_model_twice(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder / "fold1", tmp_path / "copy")
    with pytest.raises(WeightsError, match="the same weights are named twice"):
        Predictor.from_weights([folder / "fold1", copy])


def a_fold_is_missing(root: Path) -> None:
    shutil.rmtree(root / "fold2")


def a_fold_is_not_finished(root: Path) -> None:
    (root / "fold3" / "metrics.json").unlink()


def a_fold_twice(root: Path) -> None:
    shutil.copytree(root / "fold1", root / "fold4")


def two_folds_exchanged(root: Path) -> None:
    for one, other in (("fold1", "x"), ("fold2", "fold1"), ("x", "fold2")):
        (root / one).rename(root / other)


def a_recipe_of_nested_lists(root: Path) -> None:
    (root / "fold2" / "recipe.json").write_text("[" * 10**5)


def one_fold_alone(root: Path) -> None:
    for number in (2, 3):
        shutil.rmtree(root / f"fold{number}")


def a_fold_without_weights(root: Path) -> None:
    (root / "fold2" / "COVID.pdparams").unlink()


def weights_of_another_fold(root: Path) -> None:
    (root / "fold2" / "COVID.pdparams").write_bytes((root / "fold1" / "COVID.pdparams").read_bytes())


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (a_fold_is_missing, "fold2 is missing"),
        (a_fold_is_not_finished, "fold3 is not finished"),
        (a_fold_twice, "fold4 is not fold 4 of 4"),
        (two_folds_exchanged, "fold1 is not fold 1 of 3"),
        (a_recipe_of_nested_lists, r"fold2/recipe\.json: "),
        (one_fold_alone, "no complete cross-validation"),
        (a_fold_without_weights, "one model is expected in a folder, found: none"),
        (weights_of_another_fold, "sha256 differs"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_damaged_folder(damage: Callable[[Path], None], fault: str, folder: Path, tmp_path: Path) -> None:
    root = shutil.copytree(folder, tmp_path / "cv")
    damage(root)
    with pytest.raises(WeightsError, match=fault):
        Predictor.from_weights(root)


def test_files_of_others_in_the_folder_are_left_alone(folder: Path, tmp_path: Path, images: list[Path]) -> None:
    root = shutil.copytree(folder, tmp_path / "cv")
    (root / "folder").mkdir()
    (root / "fold01").mkdir()
    (root / "fold9.txt").write_text("")
    for number in (1, 2, 3):  # weights alone, as someone passes them on
        for name in ("recipe.json", "metrics.json"):
            (root / f"fold{number}" / name).unlink()
    assert Predictor.from_weights(root).predict(images[0]) == Predictor.from_weights(folder).predict(images[0])


# --- export ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["onnx", "openvino", "paddle"])
def test_one_file_holds_the_average(form: str, models: list[Path], images: list[Path], tmp_path: Path) -> None:
    """Opened without the models, and without `compare`, it gives the mean by hand."""
    for library in {"onnx": ("onnx", "onnxruntime"), "openvino": ("openvino",)}.get(form, ()):
        pytest.importorskip(library)
    models = models[:2] if form == "paddle" else models  # tracing takes seconds
    agreement = exporting.export(models, form, tmp_path / "out", images)
    assert agreement.difference < 1e-5 and agreement.same_labels == 1
    shutil.move(tmp_path / "out", tmp_path / "moved")
    served = Predictor.from_weights(tmp_path / "moved", allow_program=True)
    _, mean = by_hand(models, images)
    outputs = served.backend.outputs(served.input_of(images))
    np.testing.assert_allclose(outputs["probabilities"], mean, atol=1e-5)
    np.testing.assert_allclose(served.head.probabilities(outputs["logits"]), mean, atol=1e-5)
    expected = {sha256(path): "toy_resnet" for path in models}
    assert served.sidecar.members == expected and served.sidecar.sha256 == ""
    card = (tmp_path / "moved" / "README.md").read_text()
    assert f"An average of {len(models)} models" in card and all(digest in card for digest in expected)


def test_the_export_command_takes_a_cross_validation(folder: Path, images: list[Path], tmp_path: Path, capsys) -> None:
    pytest.importorskip("openvino")
    arguments = ["--weights", str(folder), "--format", "openvino", "--output", str(tmp_path / "out"), "--images"]
    assert export_command.main([*arguments, *map(str, images)]) == 0
    assert "compared with the network on 6 images" in capsys.readouterr().out
    assert exported_models.open_model(tmp_path / "out", "COVID", "openvino", "f32", 4).engine == "openvino"
    with pytest.raises(WeightsError, match="is an export itself"):
        exporting.export([folder / "fold1", tmp_path / "out"], "openvino", tmp_path / "again")


@pytest.mark.parametrize(
    "members",
    [[], {"a" * 64: "x"}, {"a" * 64: "x", "b" * 63: "x"}, {"a" * 64: "x", "b" * 64: 3}, {"a" * 64: "", "b" * 64: "x"}],
    ids=str,
)
def test_a_hostile_list_of_members(members: object, folder: Path, tmp_path: Path) -> None:
    root = shutil.copytree(folder / "fold1", tmp_path / "run")
    values = json.loads((root / "COVID.json").read_text())
    (root / "COVID.json").write_text(json.dumps({**values, "members": members}))
    with pytest.raises(WeightsError, match="members: .* expected sha256 of two or more weight files"):
        Predictor.from_weights(root)
