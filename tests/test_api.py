"""The public API: its names, that it is lazy, and that the documented lines run outside the repository."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import fakes
import numpy as np
import pytest
from fakes import ROOT

import paddle_medcls as medcls
from paddle_medcls.core.errors import DataError, RunError
from paddle_medcls.core.paddle_setup import paddle
from paddle_medcls.data import synthetic

DOCUMENT = (ROOT / "docs/python-api.md").read_text(encoding="utf-8")


def test_the_names_are_those_of_the_document() -> None:
    table = DOCUMENT.partition("| name | does |")[2]
    assert sorted(re.findall(r"^\| `(\w+)", table, re.M)) == sorted(medcls.__all__)


@pytest.mark.parametrize("name", medcls.__all__)
def test_every_name_is_there_and_explained(name: str) -> None:
    value = getattr(medcls, name)
    assert value.__name__ == name and inspect.getdoc(value) and name in dir(medcls)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'predictt'"):
        _ = medcls.predictt


def test_the_import_is_light() -> None:
    code = "import sys, paddle_medcls; assert not {'numpy', 'paddle', 'cv2', 'matplotlib'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


def test_the_types_that_an_editor_completes_are_the_names() -> None:
    source = (ROOT / "paddle_medcls/__init__.py").read_text(encoding="utf-8")
    assert set(re.findall(r"import (\w+) as \1\n", source)) == set(medcls.__all__)
    assert (ROOT / "paddle_medcls/py.typed").is_file()


def test_the_documented_lines_run_outside_the_repository(palm_root: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(synthetic, "SIDE", 64)  # of the images that `export` compares on
    (lines,) = re.findall(r"```python\n(.*?)```", DOCUMENT, re.S)
    names = {
        "DATA": str(palm_root),
        "IMAGES": fakes.covid_images(tmp_path / "images"),
        "OUTPUT": tmp_path,
        "EYE": str(next(palm_root.rglob("V0001.jpg"))),
    }
    lines = lines.replace('"resnet18"', '"toy_resnet"')
    lines += "print(len(images), pixels.shape, label, images.counts(), images.show())\n"
    lines += "assert images.show()._repr_png_().startswith(b'\\x89PNG')\n"
    exec(compile(lines, "docs/python-api.md", "exec"), names)
    shown = capsys.readouterr().out
    assert "PALM.pdparams" in shown and "auc" in shown.lower() and "pathologic" in shown
    assert "12 (32, 32, 3)" in shown and "Figure(" in shown
    assert (tmp_path / "eye_cam.png").is_file() and list((tmp_path / "export").glob("*.xml"))


def test_synthetic_images_can_be_asked_for(tmp_path: Path) -> None:
    images = medcls.load_dataset("breastmnist", "val", tmp_path / "new", sample=True)
    assert images.synthetic and len(images) == 64 and (tmp_path / "new" / "DRAWN.txt").is_file()
    medcls.load_dataset("breastmnist", "val", tmp_path / "new", sample=True)  # again is no fault
    with pytest.raises(DataError, match="no folder is named"):
        medcls.load_dataset("breastmnist", sample=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo.png").write_bytes(b"mine")
    with pytest.raises(DataError, match="not empty"):
        medcls.load_dataset("breastmnist", "val", tmp_path / "mine", sample=True)


def test_a_split_is_a_sequence(palm_root: Path) -> None:
    images = medcls.load_dataset("palm", "val", palm_root)
    pairs = list(images)
    assert len(pairs) == len(images) == 7 and [label for _, label in pairs] == images.labels.tolist()
    np.testing.assert_array_equal(images[-1][0], pairs[6][0])
    with pytest.raises(IndexError, match="row 7 of 7 images"):
        images[7]
    with pytest.raises(DataError, match="no split 'valid'"):
        medcls.load_dataset("palm", "valid", palm_root)


def test_models_are_layers_with_pretrained_weights(tmp_path: Path) -> None:
    model = medcls.create_model("resnet18", num_classes=3, in_channels=1, stem="small")
    assert isinstance(model, paddle.nn.Layer) and list(model(paddle.zeros([2, 1, 28, 28])).shape) == [2, 3]
    paddle.save(model.state_dict(), str(tmp_path / "a.pdparams"))
    again = medcls.create_model("resnet18", 5, pretrained=tmp_path / "a.pdparams", in_channels=1, stem="small")
    old, new = model.state_dict(), again.state_dict()
    same = [name for name in old if old[name].shape == new[name].shape]
    assert all(np.array_equal(old[name].numpy(), new[name].numpy()) for name in same)
    assert len(old) - len(same) == 2  # the head


def test_refusals_are_exceptions_with_the_texts_of_the_commands(palm_root: Path, tmp_path: Path) -> None:
    with pytest.raises(medcls.MedclsError, match="unknown recipe 'pallm'; did you mean 'palm'"):
        medcls.train("pallm", palm_root, tmp_path / "run")
    with pytest.raises(RunError, match="none is named"):
        medcls.train(fakes.recipe(), palm_root, resume=True)
    with pytest.raises(RunError, match="unknown form 'onx'; did you mean 'onnx'"):
        medcls.export(tmp_path, "onx", tmp_path / "out")


def test_one_image_as_path_bytes_or_pixels(palm_root: Path, tmp_path: Path) -> None:
    run = medcls.train(fakes.recipe(model="toy_resnet", epochs=1), palm_root, tmp_path / "run")
    predictor = medcls.load_predictor(run.weights)
    path = next(palm_root.rglob("V0001.jpg"))
    from_path, from_bytes = predictor.predict(path), predictor.predict(path.read_bytes())
    from_pixels = predictor.predict(medcls.load_dataset("palm", "val", palm_root)[0][0])
    assert from_path == from_bytes == from_pixels == predictor.predict(str(path))
    assert from_path.label in predictor.sidecar.classes and 0.5 <= from_path.probability <= 1
    assert sum(from_path.probabilities.values()) == pytest.approx(1)
    heat = predictor.gradcam(path, label="pathologic")
    assert heat.label == "pathologic" and heat.values.shape == (32, 32) and heat.overlay().shape == (32, 32, 3)
    for figure, axes in ((heat.show(), 2), (run.show(), 2)):
        assert len(figure.axes) == axes and figure._repr_png_().startswith(b"\x89PNG")
    with pytest.raises(DataError, match="unknown class 'patologic'; did you mean 'pathologic'"):
        predictor.gradcam(path, label="patologic")


def test_the_import_of_version_0_1_still_works() -> None:
    sys.modules.pop("paddle_medcls.predict", None)
    with pytest.warns(DeprecationWarning, match="load_predictor"):
        from paddle_medcls.predict import Predictor
    from paddle_medcls.deployment import predictor

    assert issubclass(Predictor, predictor.Predictor)
