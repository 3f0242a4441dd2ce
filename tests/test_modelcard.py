"""Model cards: their figures against the run's own files, their code run as it stands, their words true."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import runpy
import subprocess
import sys
import types
from pathlib import Path

import fakes
import numpy as np
import pytest
from toynet import toy

from paddle_medcls.core.files import sha256, write_json
from paddle_medcls.core.paddle_setup import paddle
from paddle_medcls.data.datasets import dataset_names, is_own, load_index
from paddle_medcls.data.datasets.medmnist_cards import CARDS
from paddle_medcls.data.decode import read_image
from paddle_medcls.data.index import Index
from paddle_medcls.deployment.export_writers import WRITERS
from paddle_medcls.deployment.predictor import PaddleNetwork, Predictor, load_predictor
from paddle_medcls.evaluation import outputs
from paddle_medcls.evaluation.metrics import wilson
from paddle_medcls.evaluation.model_card import card_text, is_card, write_card
from paddle_medcls.evaluation.model_facts import dataset_card, run_facts
from paddle_medcls.evaluation.usage_code import export_code
from paddle_medcls.models.network import Network
from paddle_medcls.models.sidecar import Sidecar, pixels_spec
from paddle_medcls.models.weights import save_weights
from paddle_medcls.preprocessing.transforms import Preprocessing, fit
from paddle_medcls.training.loop import Options, train


def make_sidecar(**changes: object) -> Sidecar:
    spec = Preprocessing(size_px=32, channels="bgr")
    sidecar = Sidecar(
        "palm", "palm_tutorial", ("non-pathologic", "pathologic"), "binary", "sigmoid", Network("toy", 1), spec
    )
    return dataclasses.replace(sidecar, **changes)


def code_blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def tables(text: str) -> dict[str, list[list[str]]]:
    """Tables by their first header cell: rows of cells, header and rule left out."""
    found = {}
    for block in re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE):
        rows = [[cell.strip(" `") for cell in line.strip("| \n").split(" | ")] for line in block.strip().splitlines()]
        found[rows[0][0].strip("| ")] = rows[2:]
    return found


# --- what a run writes -------------------------------------------------------------------------------


@pytest.fixture
def trained(palm_root: Path, tmp_path: Path) -> Path:
    run_dir = tmp_path / "run"
    recipe = fakes.recipe(model="toy", name="palm_tutorial", lr=0.02, targets=(("val/accuracy", 0.94),))
    train(recipe, palm_root, run_dir, Options(device="cpu", workers=0, say=lambda line: None))
    return run_dir


def test_the_card_of_a_run_says_what_the_run_knows(trained: Path, palm_root: Path) -> None:
    text = (trained / "README.md").read_text(encoding="utf-8")
    found = json.loads((trained / "metrics.json").read_text())
    known = tables(text)
    low, high = found["intervals"]["accuracy"]
    assert known["metric"][0] == ["accuracy", f"{found['accuracy']:.4f}", f"{low:.4f} to {high:.4f}", "0.9400"]
    assert [row[1:] for row in known["true \\ predicted"]] == [[str(n) for n in row] for row in found["confusion"]]
    counts = [load_index("palm", palm_root, split).counts() for split in ("train", "val")]
    assert known["used here"][:2] == [[name, *(str(count[name]) for count in counts)] for name in counts[0]]
    for row, counted in zip(known["class"], np.array(found["confusion"])[::1]):
        assert row[1] == str(counted.sum())
    hits, of = found["confusion"][1][1], sum(found["confusion"][1])
    low, high = wilson(hits, of)
    assert known["class"][1][2] == f"{hits / of:.3f} ({low:.3f} to {high:.3f})"
    files = ("PALM.pdparams", "PALM.novelty.safetensors")
    assert known["file"] == [[name, sha256(trained / name)] for name in files]
    parameters = 3 * 6 * 25 + 6 + 6 + 6 + 24 + 1  # convolution and its bias, batch norm's two, linear and its bias
    assert f"{parameters:,} parameters" in text and "batch_size: 10 → 5" in text
    environment = json.loads((trained / "environment.json").read_text())
    assert f"Started on {environment['date']}" in text and environment["code"] in text
    assert "not for diagnosis" in text and "P0056 = V0163" in text and "optimistic" in text
    assert "`medcls predict " in text and "tools/" not in text  # its readers may have no clone
    assert str(palm_root) not in text and str(palm_root.parent) not in text  # no folder of the maker's machine


def test_a_calibration_is_in_the_card(trained: Path, palm_root: Path) -> None:
    weights = trained / "PALM.pdparams"
    sidecar, val = Sidecar.read(weights.with_suffix(".json")), load_index("palm", palm_root, "val")
    logits = Predictor.from_weights(weights).split_logits(val, 5, 0)
    before = (trained / "README.md").read_text(encoding="utf-8")
    assert "(temperature 1)" in before and "before this calibration" not in before
    new = outputs.keep_calibration(weights, outputs.calibrate(sidecar, 3 * logits + 1, val, 0.9, None))
    text = (trained / "README.md").read_text(encoding="utf-8")
    assert f"temperature {new.temperature:.4f}" in text and f"above {new.threshold:.4g}" in text
    assert "before this calibration" in text and new.temperature != 1


def test_a_readme_of_another_origin_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# mine\n")
    (tmp_path / "w.pdparams").write_bytes(b"w")
    path = write_card(tmp_path, make_sidecar(), "weights", ["w.pdparams"], {})
    assert path.name == "MODEL_CARD.md" and is_card(path) and (tmp_path / "README.md").read_text() == "# mine\n"
    (tmp_path / "README.md").unlink()
    for _ in range(2):  # ours is replaced
        assert write_card(tmp_path, make_sidecar(), "weights", ["w.pdparams"], {}) == tmp_path / "README.md"


def test_a_folder_of_another_run_tells_nothing(trained: Path) -> None:
    sidecar = Sidecar.read(trained / "PALM.json")
    assert {"recipe", "data", "environment", "metrics", "seconds"} <= run_facts(
        trained / "PALM.pdparams", sidecar
    ).keys()
    other = dataclasses.replace(sidecar, recipe="palm_constant")
    assert run_facts(trained / "PALM.pdparams", other).keys() == {"parameters"}


def test_what_is_not_known_is_said(tmp_path: Path) -> None:
    (tmp_path / "w.onnx").write_bytes(b"w")
    text = card_text(tmp_path, make_sidecar(dataset="unheard", recipe="of"), "onnx", ["w.onnx"], {})
    assert "None: this file was not evaluated" in text and "not known here" in text and "was not at hand" in text
    drawn = card_text(tmp_path, make_sidecar(drawn=True), "onnx", ["w.onnx"], {})
    assert "SYNTHETIC SAMPLE" in drawn and "P0056" not in drawn and "IEEE DataPort" not in drawn


@pytest.mark.parametrize("name", ["palm", "softmax", "softmax binary", "labels", "ordinal"])
def test_every_task_has_its_table(name: str, tmp_path: Path) -> None:
    """Figures as a run computes them, one class without images."""
    sidecar = variant("softmax" if name == "ordinal" else name)
    sidecar = dataclasses.replace(sidecar, task="ordinal") if name == "ordinal" else sidecar
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 2, (30, 3)) if name == "labels" else rng.integers(0, 2, 30)
    ids = tuple(map(str, range(30)))
    index = Index("palm", "val", ids, np.zeros((30, 4, 4), np.uint8), labels, sidecar.classes, sidecar.task)
    result = outputs.score_split(rng.normal(0, 1, (30, sidecar.network.num_outputs)), index, sidecar.head)
    write_json(tmp_path / "M.json", result)  # as a sidecar keeps them: what is not defined is null
    result = json.loads((tmp_path / "M.json").read_text())
    (tmp_path / "M.onnx").write_bytes(b"M")
    text = card_text(tmp_path, dataclasses.replace(sidecar, metrics=result), "onnx", ["M.onnx"], {"metrics": result})
    known = tables(text)
    assert [row[:2] for row in known["class"]] == [[row["class"], str(row["support"])] for row in result["per_class"]]
    assert [row[1] for row in known["metric"]][:2] == [f"{result['accuracy']:.4f}", f"{result['auc']:.4f}"]
    assert ("true \\ predicted" in known) == (name != "labels")
    assert not {"nan", "None"} & {
        word for row in known["class"] + known["metric"] for cell in row for word in cell.split()
    }
    assert ("quadratic kappa" in text) == (name == "ordinal")


def test_figures_of_another_split_are_not_mixed_in(trained: Path) -> None:
    """`eval.py --output <run>` replaces metrics.json by another split's."""
    sidecar = Sidecar.read(trained / "PALM.json")
    facts = run_facts(trained / "PALM.pdparams", sidecar)
    facts["metrics"]["split"] = "test"
    assert "true \\ predicted" not in card_text(trained, sidecar, "weights", ["PALM.pdparams"], facts)


def test_hostile_names_stay_in_their_cells(tmp_path: Path) -> None:
    (tmp_path / "w.onnx").write_bytes(b"w")
    names = ("a|b # head <script>", "``` print(1)")
    row = {"precision": 1.0, "recall": None, "f1": 1.0, "specificity": None, "support": 3, "predicted": 3}
    sidecar = make_sidecar(
        classes=names, metrics={"n": 3, "accuracy": None, "auc": None, "per_class": [{"class": names[0], **row}]}
    )
    text = card_text(tmp_path, sidecar, "onnx", ["w.onnx"], {})
    assert "\n# head" not in text and "| a|b" not in text and "<script>" not in text.replace(repr(list(names)), "")
    (code,) = code_blocks(text)
    assert f"classes = {list(names)!r}" in code


# --- the data sets' cards ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in dataset_names() if "_" not in name and not is_own(name)])
def test_every_published_data_set_has_a_licence_and_faults(name: str) -> None:
    rows, faults = dataset_card(name)
    assert rows["licence"] and rows["what"] and rows["title"] and rows["from"]
    if name in CARDS:
        assert rows["licence"] == CARDS[name].licence
        others = [flag for flag in CARDS if flag != name]
        assert not any(flag in rows["what"] for flag in others)
    if name in ("palm", "covid", "oct", "pneumoniamnist", "dermamnist", "breastmnist", "organamnist"):
        assert faults and not any(fault.startswith("-") or "\n" in fault for fault in faults)


def test_known_faults_reach_the_card_they_belong_to() -> None:
    assert any("P0056 = V0163" in fault for fault in dataset_card("palm")[1])
    assert any("outer 10%" in fault for fault in dataset_card("covid")[1])
    assert dataset_card("dermamnist")[0]["licence"] == "CC BY-NC 4.0"
    assert any("886 test images" in fault for fault in dataset_card("dermamnist")[1])
    assert not any("886 test images" in fault for fault in dataset_card("breastmnist")[1])


# --- the code in it ----------------------------------------------------------------------------------

VARIANTS = {
    "palm": {},
    "float": {"preprocessing": {"resize_dtype": "float32", "interpolation": "linear"}, "temperature": 1.7},
    "crop": {"preprocessing": {"fit": "crop", "resize_px": 41, "channels": "rgb", "interpolation": "cubic"}},
    "means": {"preprocessing": {"mean": (1.5, 129.62932943429487, 77.0), "std": (58.3, 57.0, 55.1)}},
    "gray": {"preprocessing": {"channels": "gray", "interpolation": "area", "mean": (100.25,), "std": (33.3,)}},
    "gray crop": {
        "preprocessing": {"channels": "gray", "fit": "crop", "resize_px": 32, "mean": (1.0,), "std": (2.0,)},
        "threshold": 0.9,
    },
    "softmax": {"loss": "softmax", "task": "multi-class", "classes": ("a", "b", "c"), "temperature": 0.6},
    "softmax binary": {"loss": "softmax", "threshold": 0.123},
    "labels": {"task": "multi-label", "classes": ("a", "b", "c"), "threshold": 0.4},
}


def variant(name: str) -> Sidecar:
    changes = dict(VARIANTS[name])
    spec = Preprocessing(**{"size_px": 32, "channels": "bgr", **changes.pop("preprocessing", {})})
    outputs = len(changes.get("classes", "ab")) if changes.get("loss") == "softmax" or "task" in changes else 1
    return make_sidecar(preprocessing=spec, network=Network("toy", outputs, spec.num_channels), **changes)


def picture(folder: Path, suffix: str = ".png") -> Path:
    rng = np.random.default_rng(5)
    return fakes.write_image(folder / f"image{suffix}", rng.integers(0, 256, (57, 83, 3), np.uint8))


def printed(code: str, folder: Path, monkeypatch, capsys) -> str:
    """What the code prints when it is run in the folder, as a file of its own."""
    (folder / "snippet.py").write_text(code, encoding="utf-8")
    monkeypatch.chdir(folder)
    capsys.readouterr()
    runpy.run_path("snippet.py")
    return capsys.readouterr().out


@pytest.mark.parametrize("name", VARIANTS)
def test_the_code_without_the_package_prepares_and_decides_alike(name, tmp_path, monkeypatch, capsys) -> None:
    """A stub in the place of ONNX Runtime shows the input and answers with known probabilities."""
    sidecar, path = variant(name), picture(tmp_path)
    sidecar = dataclasses.replace(sidecar, preprocessing=pixels_spec(sidecar.preprocessing))
    logits = np.random.default_rng(len(name)).normal(0, 2, (1, sidecar.network.num_outputs)).astype(np.float32)
    probs = sidecar.head.probabilities(logits)
    seen: dict = {}

    class Session:
        def __init__(self, model: str, providers: list[str]) -> None:
            seen["model"] = model

        def run(self, outputs: list[str], inputs: dict) -> list[np.ndarray]:
            seen.update(inputs)
            assert outputs == ["probabilities"]
            return [probs]

    monkeypatch.setitem(sys.modules, "onnxruntime", types.SimpleNamespace(InferenceSession=Session))
    out = printed(export_code(sidecar, "onnx", ["m.onnx"]), tmp_path, monkeypatch, capsys)
    expected = fit(read_image(path, sidecar.preprocessing.channels), sidecar.preprocessing)
    assert seen["model"] == "m.onnx" and seen["image"].dtype == np.uint8
    assert (seen["image"] == expected[None]).all() and seen["image"].flags.c_contiguous
    decided = sidecar.head.decide(probs)[0]
    answer = (
        [n for n, yes in zip(sidecar.classes, decided) if yes]
        if sidecar.task == "multi-label"
        else sidecar.classes[int(decided)]
    )
    assert out.startswith(f"{answer} [")
    np.testing.assert_allclose(json.loads(out[len(str(answer)) :]), probs[0], atol=1e-12)


def weights_of(sidecar: Sidecar, folder: Path):
    """A network with random weights, saved with its sidecar as M."""
    paddle.seed(1)
    model = toy(sidecar.network)
    model.eval()
    save_weights(model, folder / "M.pdparams")
    dataclasses.replace(sidecar, sha256=sha256(folder / "M.pdparams")).write(folder / "M.json")
    return model


def test_the_code_with_the_package(tmp_path, monkeypatch, capsys) -> None:
    sidecar, path = variant("softmax"), picture(tmp_path)
    weights_of(sidecar, tmp_path)
    text = write_card(tmp_path, sidecar, "weights", ["M.pdparams"], {}).read_text(encoding="utf-8")
    (code,) = code_blocks(text)
    out = printed(code, tmp_path, monkeypatch, capsys)
    expected = load_predictor(tmp_path / "M.pdparams").predict(path)
    label, _, probabilities = out.partition(" ")
    assert label == expected.label and json.loads(probabilities.replace("'", '"')) == expected.probabilities
    assert tuple(expected.probabilities) == sidecar.classes


CODE_OF_0_1 = """from pathlib import Path
from paddle_medcls.predict import Predictor

predictor = Predictor.from_weights('M.pdparams')
for path, probs in predictor.predict_files([Path("image.png")]):
    print(path, dict(zip(predictor.card.classes, probs.tolist())))
"""
"""As version 0.1 wrote it into model cards: `weights_code` of commit f8ae4a0."""


@pytest.mark.filterwarnings("ignore:paddle_medcls.predict is now:DeprecationWarning")
def test_the_code_of_0_1_still_runs(tmp_path, monkeypatch, capsys) -> None:
    sidecar, path = variant("softmax"), picture(tmp_path)
    weights_of(sidecar, tmp_path)
    out = printed(CODE_OF_0_1, tmp_path, monkeypatch, capsys)
    predictor = Predictor.from_weights(tmp_path / "M.pdparams")
    expected = predictor.predict(path).probabilities
    assert out == f"image.png {expected}\n"


BLOCKED = """import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names!r}:
            raise ImportError(name + " is not there")

sys.meta_path.insert(0, Blocked())
"""
"""A machine that has the engine, OpenCV and NumPy, and nothing of ours."""


@pytest.mark.parametrize("form", ["paddle", "onnx", "openvino"])
@pytest.mark.parametrize("name", ["crop", "gray", "labels", "float"])
def test_the_code_runs_a_real_export_alone(form, name, tmp_path) -> None:
    """In a process of its own, where neither this package nor (but for its own form) Paddle can be imported."""
    needed = {"paddle": "paddle", "onnx": "onnx onnxruntime", "openvino": "openvino"}[form].split()
    missing = [library for library in needed if importlib.util.find_spec(library) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    if form == "paddle" and name != "crop":
        pytest.skip("starting Paddle takes seconds; once is enough")
    sidecar, path = variant(name), picture(tmp_path, ".jpg" if name == "gray" else ".png")
    if form != "paddle":
        sidecar = dataclasses.replace(
            sidecar, network=dataclasses.replace(sidecar.network, model="toy_resnet", stem="small")
        )
    paddle.seed(1)
    network = Predictor(sidecar, PaddleNetwork(sidecar.network.build()))
    WRITERS[form](network, tmp_path, "M")
    opener = {"onnx": [".onnx"], "openvino": [".xml"], "paddle": [".inference.json", ".inference.pdmodel"]}[form]
    files = [f"M{suffix}" for suffix in opener if (tmp_path / f"M{suffix}").exists()] + ["M.inference.pdiparams"]
    sidecar = dataclasses.replace(sidecar, preprocessing=pixels_spec(sidecar.preprocessing))
    (code,) = code_blocks(card_text(tmp_path, sidecar, form, files[: 2 if form == "paddle" else 1], {}))
    blocked = BLOCKED.format(names={"paddle_medcls", *(() if form == "paddle" else ("paddle", "paddle2onnx"))})
    code = blocked + code.replace("image.png", path.name)
    command = [sys.executable, "-I", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert form == "paddle" or done.stderr == ""
    rounded = Predictor(with_rounded_pixels(network.sidecar), network.backend)
    probs = network.head.probabilities(rounded.logits([path]))[0]
    answer, _, found = done.stdout.strip().splitlines()[-1].rpartition("[")
    np.testing.assert_allclose(json.loads(f"[{found}"), probs, atol=1e-5)
    yes, _ = sidecar.head.decide_one(probs)
    names = [sidecar.classes[k] for k in yes]
    assert answer.strip() == (str(names) if sidecar.task == "multi-label" else names[0])


def with_rounded_pixels(sidecar: Sidecar) -> Sidecar:
    """An export takes rounded pixels, also of a recipe that does not round."""
    return dataclasses.replace(sidecar, preprocessing=dataclasses.replace(sidecar.preprocessing, resize_dtype="uint8"))


def test_the_card_of_an_evaluated_model_does_not_say_that_it_was_not(tmp_path: Path) -> None:
    """The figures are of one split; whether another was scored since, by `eval.py`, the card cannot know."""
    row = {
        "class": "a",
        **dict.fromkeys(("precision", "recall", "f1", "specificity"), 1.0),
        "support": 3,
        "predicted": 3,
    }
    sidecar = make_sidecar(metrics={"n": 3, "split": "val", "accuracy": 1.0, "auc": 1.0, "per_class": [row]})
    (tmp_path / "w.pdparams").write_bytes(b"w")
    recipe = dataclasses.replace(fakes.recipe(name="palm_tutorial"), targets=(("test/accuracy", 0.94),))
    text = card_text(tmp_path, sidecar, "weights", ["w.pdparams"], {"recipe": recipe.to_json()})
    assert "not measured" not in text.partition("## Training")[0] and "test accuracy 0.9400" in text


def test_the_front_matter_is_plain(tmp_path: Path) -> None:
    """Keys, and lists whose items are words or JSON strings: YAML, whatever a data set is called."""
    (tmp_path / "w.onnx").write_bytes(b"w")
    text = card_text(tmp_path, make_sidecar(dataset="no"), "onnx", ["w.onnx"], {})
    empty, front, _ = text.split("---\n", 2)
    tags = [json.loads(line[2:]) for line in front.splitlines() if line.startswith('- "')]
    assert not empty and tags == ["medical-imaging", "no", "toy", "onnx"] and "license: other\n" in front
    assert all(re.fullmatch(r"# .*|[a-z_]+:( [a-z-]+)?|- [a-z_]+|- \".*\"", line) for line in front.splitlines())
    assert "metrics:" not in front  # none are known
