"""A GPU gives what the CPU gives; if asked, the same bits again, also in mixed precision and after a resume.

GPUs with TF32 compute convolutions with 10 bits of each factor. It is off here, so that the two devices can be
compared closely.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import fakes
import numpy as np
import pytest
import toynet  # noqa: F401  registers its networks

from paddle_medcls import cli
from paddle_medcls.core.errors import SetupError, Stopped
from paddle_medcls.core.paddle_setup import configure_gpu, count_gpus, select_device
from paddle_medcls.deployment.export import export, synthetic_images
from paddle_medcls.deployment.predictor import Predictor
from paddle_medcls.evaluation import plots
from paddle_medcls.models.weights import read_weights
from paddle_medcls.recipes.recipe import Recipe
from paddle_medcls.training import loop, setup
from paddle_medcls.training.checkpoint import load_state
from paddle_medcls.training.loop import Options, train

pytestmark = pytest.mark.gpu

os.environ["NVIDIA_TF32_OVERRIDE"] = "0"  # read when CUDA's libraries are first used

BATCH_NORM = {"model": "resnet18", "lr": 0.01}
PLAIN = {"model": "toy_plain", "lr": 0.05}
RICH = {
    "model": "toy",  # with dropout
    "optimizer": "adam",
    "lr": 0.01,
    "warmup_epochs": 1.0,
    "flip": 0.5,
    "ema_decay": 0.9,
    "test_flips": True,
    "class_weights": "balanced",
}


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No pictures; afterwards the device is the CPU again, for the other tests."""
    for name in ("curves", "confusion", "roc"):
        monkeypatch.setattr(plots, name, lambda *_: None)
    yield
    configure_gpu(deterministic=False, amp=False)
    select_device("cpu")


def go(root: Path, run: Path, changes: dict | None = None, resume: bool = False, **options) -> None:
    """Trains two epochs of two batches on a GPU; a resume takes the run's own recipe, as the command does."""
    recipe = (
        Recipe.from_file(run / "recipe.json")
        if resume
        else fakes.recipe(**{"model": "resnet18", "batch_size": 6, **(changes or {})})
    )
    options = {"device": "gpu", "workers": 0, "kernels": "paddle", "say": lambda line: None, **options}
    train(recipe, root, run, Options(**options), resume)


def one_step(root: Path, run: Path, changes: dict | None = None, **options) -> None:
    with pytest.raises(Stopped):
        go(root, run, changes, deadline=-1.0, **options)  # it has passed


def steps(run: Path) -> np.ndarray:
    """(steps, 4): step, lr, loss, accuracy."""
    return np.array(list(csv.reader((run / "steps.csv").read_text().splitlines()))[1:], float)


def learned(run: Path) -> np.ndarray:
    """All parameters and batch-norm statistics after the last step, in one vector."""
    model = load_state(run)[0]["model"]
    return np.concatenate([np.asarray(model[name], np.float64).ravel() for name in sorted(model)])


def assert_same_bits(first: Path, second: Path) -> None:
    for name in ("steps.csv", "history.csv", "predictions_val.csv", "PALM.pdparams"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    assert np.array_equal(learned(first), learned(second))


def amp_is(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets the type of mixed precision, whatever the package would take on this GPU."""
    if kind == "bfloat16" and setup.amp_type() != kind:
        pytest.skip("this GPU has no bfloat16")
    for module in (loop, setup):
        monkeypatch.setattr(module, "amp_type", lambda: kind)


# --- what the CPU gives ----------------------------------------------------------------------------


def second_steps(root: Path, folder: Path, changes: dict, amp: bool) -> tuple[np.ndarray, ...]:
    """The second step on each device, after a first one on the CPU: losses, and how it moves the parameters."""
    runs = folder / "cpu", folder / "gpu"
    one_step(root, runs[0], {**changes, "epochs": 1}, device="cpu")
    start = learned(runs[0])
    shutil.copytree(*runs)
    go(root, runs[0], resume=True, device="cpu")
    go(root, runs[1], resume=True, amp=amp, force=True)
    assert [len(steps(run)) for run in runs] == [2, 2]
    return np.array([steps(run)[1, 2] for run in runs]), *(learned(run) - start for run in runs)


@pytest.mark.parametrize("changes", [PLAIN, BATCH_NORM], ids=["plain", "batch norm"])
def test_a_step_is_the_cpus(changes: dict, palm_root: Path, tmp_path: Path) -> None:
    losses, cpu, gpu = second_steps(palm_root, tmp_path, changes, amp=False)
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert np.linalg.norm(cpu) > 0.01 and np.linalg.norm(gpu - cpu) < 0.01 * np.linalg.norm(cpu)


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_a_step_in_mixed_precision_is_nearly_the_cpus(
    kind: str, palm_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nearly, not exactly: it was in mixed precision."""
    amp_is(kind, monkeypatch)
    losses, cpu, gpu = second_steps(palm_root, tmp_path, BATCH_NORM, amp=True)
    assert 1e-6 < abs(losses[1] / losses[0] - 1) < 0.05
    assert cpu @ gpu / np.linalg.norm(cpu) / np.linalg.norm(gpu) > 0.95


@pytest.mark.parametrize("amp", [False, True])
def test_the_cpu_gives_the_same_answers(amp: bool, palm_root: Path, tmp_path: Path) -> None:
    """The network on both devices with its heat maps, and its export; weights are float32 after mixed precision too."""
    go(palm_root, tmp_path / "run", {**BATCH_NORM, "flip": 0.5, "test_flips": True}, amp=amp)
    weights = tmp_path / "run" / "PALM.pdparams"
    assert {value.dtype for value in read_weights(weights).values()} == {np.dtype("float32")}
    found = []
    for device in ("gpu", "cpu"):
        select_device(device)
        predictor = Predictor.from_weights(weights)
        images = synthetic_images(predictor.sidecar)
        logits = predictor.logits(images)
        found.append((predictor.head.probabilities(logits), np.stack(predictor.heatmaps(images, 1))))
    np.testing.assert_allclose(found[0][0], found[1][0], atol=1e-4)
    np.testing.assert_allclose(found[0][1], found[1][1], atol=0.01)
    export(predictor, "paddle", tmp_path / "exported", images)
    exported = Predictor.from_weights(tmp_path / "exported", allow_program=True)
    np.testing.assert_allclose(exported.head.probabilities(exported.logits(images)), found[0][0], atol=1e-4)


def test_eval_and_predict_on_both_devices(palm_root: Path, tmp_path: Path) -> None:
    go(palm_root, tmp_path / "run", BATCH_NORM)
    images, found = str(palm_root / "PALM-Validation400"), []
    for device in ("gpu", "cpu"):
        to = tmp_path / device
        common = ["--weights", str(tmp_path / "run" / "PALM.pdparams"), "--device", device]
        assert cli.medcls(["eval", *common, "--data-root", str(palm_root), "--output", str(to)]) == 0
        assert cli.medcls(["predict", *common, images, "--csv", str(to / "p.csv"), "--gradcam", str(to / "maps")]) == 0
        assert len(list((to / "maps").iterdir())) == 7
        rows = list(csv.reader((to / "p.csv").read_text().splitlines()))[1:]
        found.append((json.loads((to / "metrics.json").read_text()), rows))
    (gpu, gpu_rows), (cpu, cpu_rows) = found
    assert gpu["accuracy"] == cpu["accuracy"] and gpu["loss"] == pytest.approx(cpu["loss"], rel=1e-3)
    assert [row[:2] for row in gpu_rows] == [row[:2] for row in cpu_rows]
    probabilities = [np.array([row[2:] for row in rows], float) for rows in (gpu_rows, cpu_rows)]
    np.testing.assert_allclose(*probabilities, atol=1e-4)


# --- the same bits ---------------------------------------------------------------------------------


@pytest.mark.parametrize("amp", ["", "bfloat16", "float16"])
@pytest.mark.parametrize("changes", [RICH, BATCH_NORM], ids=["rich", "batch norm"])
def test_a_deterministic_run_repeats_and_resumes_to_the_bit(
    changes: dict, amp: str, palm_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The resumed run stops after each of its steps; it is resumed without options, as by `--resume DIR`."""
    if amp:
        amp_is(amp, monkeypatch)
    how = {"amp": bool(amp), "deterministic": True}
    for name in ("first", "second"):
        go(palm_root, tmp_path / name, changes, **how)
    assert_same_bits(tmp_path / "first", tmp_path / "second")
    one_step(palm_root, tmp_path / "parts", changes, **how)
    if amp == "float16":  # without the scaler's state a resume would begin with the first scale
        assert float(np.ravel(load_state(tmp_path / "parts")[0]["scaler"]["scale"])[0]) >= 1
    for _ in range(2):
        one_step(palm_root, tmp_path / "parts", resume=True)
    go(palm_root, tmp_path / "parts", resume=True)
    assert_same_bits(tmp_path / "first", tmp_path / "parts")


@pytest.mark.parametrize("amp, tolerance", [(False, 1e-3), (True, 0.05)])
def test_pieces_of_a_batch_add_up(amp: bool, tolerance: float, palm_root: Path, tmp_path: Path) -> None:
    for name, accumulate in (("whole", 1), ("pieces", 4)):
        go(palm_root, tmp_path / name, {**PLAIN, "accumulate": accumulate}, amp=amp, deterministic=True)
    np.testing.assert_allclose(steps(tmp_path / "pieces")[:, 2], steps(tmp_path / "whole")[:, 2], rtol=tolerance)
    pieces, whole = learned(tmp_path / "pieces"), learned(tmp_path / "whole")
    assert np.linalg.norm(pieces - whole) < tolerance * np.linalg.norm(whole)


# --- settings --------------------------------------------------------------------------------------


def test_the_gpu_is_found_and_named(palm_root: Path, tmp_path: Path) -> None:
    """Without --device; oneDNN's operators are the CPU's."""
    go(palm_root, tmp_path / "run", {**BATCH_NORM, "epochs": 1}, device="auto", kernels="auto")
    surroundings = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert surroundings["device"] == "gpu:0" and surroundings["kernels"] == "paddle"
    with pytest.raises(SetupError, match="they need a CPU"):
        go(palm_root, tmp_path / "onednn", BATCH_NORM, kernels="onednn")


def test_more_processes_than_gpus_are_refused(palm_root: Path, capsys: pytest.CaptureFixture) -> None:
    count = count_gpus() + 1
    arguments = ["train", "--dataset", "palm", "--data-root", str(palm_root), "--processes", str(count)]
    assert cli.medcls(arguments) == 1
    assert f"each needs a GPU, and there are {count - 1}" in capsys.readouterr().err
