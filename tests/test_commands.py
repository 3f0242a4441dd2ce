"""The commands as users call them: exit codes, standard output and error, messages."""

from __future__ import annotations

import csv
import io
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import fakes
import numpy as np
import pytest
from fakes import TOOLS, pixels, write_image
from PIL import Image

from paddle_medcls import __version__
from paddle_medcls.cli import COMMANDS, eval, gradcam, medcls, predict, train
from paddle_medcls.core.errors import DataError, MedclsError, RecipeError, did_you_mean
from paddle_medcls.data.datasets import load_index
from paddle_medcls.data.decode import read_image
from paddle_medcls.evaluation import overview
from paddle_medcls.evaluation.tables import SYNTHETIC_NOTICE

HEAVY = ("paddle", "matplotlib", "sklearn", "pandas", "cv2", "scipy", "numpy", "streamlit")


def tool(name: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess:
    """Runs `python tools/NAME.py …` in a process of its own."""
    command = [sys.executable, str(TOOLS / f"{name}.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, **environment})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory beside its data: COVID, a small ResNet at 32 px, two epochs, by the command itself."""
    folder = tmp_path_factory.mktemp("trained")
    root = fakes.covid_tree(folder / "covid")
    recipe = fakes.recipe(
        "covid", name="covid", model="toy_resnet", channels="bgr", epochs=2, targets=(("test/accuracy", 0.9651),)
    )
    (folder / "recipe.json").write_text(json.dumps(recipe.to_json()))
    arguments = ["--recipe", folder / "recipe.json", "--data-root", root, "--output", folder / "run", "--device", "cpu"]
    assert train.main(list(map(str, arguments))) == 0
    return folder / "run"


# --- help and usage --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_help_imports_nothing_heavy(name: str) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(TOOLS.parent)!r})\n"
        f"from paddle_medcls.cli import medcls\n"
        f"try: medcls([{name!r}, '--help'])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        f"print('heavy:', [name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "heavy: []" in done.stdout and f"usage: medcls {name}" in done.stdout and "not for diagnosis" in done.stdout
    assert "document 0" not in done.stdout


def test_the_tools_answer_help_by_the_name_that_they_were_called_by() -> None:
    assert {path.stem for path in TOOLS.glob("*.py")} == COMMANDS.keys()
    for name in COMMANDS:
        done = tool(name, "--help")
        assert done.returncode == 0 and not done.stderr
        assert done.stdout.startswith(f"usage: python tools/{name}.py [-h]")


@pytest.mark.parametrize("arguments", [["--help"], ["-h"]])
def test_medcls_lists_its_commands(arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    assert medcls(arguments) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        ([], "a command is needed"),
        (["trian"], "unknown command 'trian'; did you mean 'train'?"),
        (["nonsense\x1b[2J"], r"unknown command 'nonsense\x1b[2J'"),
    ],
)
def test_medcls_without_a_command_is_wrong_usage(arguments: list[str], fault: str, capsys) -> None:
    assert medcls(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and "usage: medcls" in shown.err and shown.err.endswith(f"medcls: error: {fault}\n")


def test_version_is_told_without_importing_paddle() -> None:
    code = "import sys; from paddle_medcls.cli import medcls; medcls(['--version']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=TOOLS.parent)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"paddle_medcls {__version__}, paddlepaddle")
    line, modules = done.stdout.splitlines()
    assert line.endswith(f", Python {platform.python_version()}") and "paddle" not in modules.split()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["train", "--recipe", "list"], "palm_tutorial"),
        (["train", "--model", "list"], "resnet18 "),
        (["train", "--dataset", "list"], "breastmnist_224 "),
        (["train", "--set", "list"], "schedule         str; default 'cosine'; one of cosine, "),
        (["predict", "--recipe", "list"], "covid_notebook "),
        (["reproduce", "--sets", "list"], "breastmnist "),
        (["prepare", "--dataset", "list"], "palm "),
    ],
)
def test_names_can_be_listed(arguments: list[str], line: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        medcls(arguments)
    shown = capsys.readouterr()
    assert stop.value.code == 0 and shown.err == ""
    assert any(text.startswith(line) for text in shown.out.splitlines())
    assert all(len(text.split(maxsplit=1)) == 2 for text in shown.out.splitlines())  # a name and what it is


def test_the_argument_list_of_the_medmnist_tutorial(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The MedMNIST baseline's: also with a value after --download, and the data set's name in any case."""
    arguments = ["--data_name", "BreastMNIST", "--input_root", str(tmp_path), "--output_root", str(tmp_path / "o")]
    arguments += ["--num_epoch", "1", "--download"]
    assert train.main([*arguments, "False"]) == 1
    assert "no file breastmnist.npz" in capsys.readouterr().err  # read, and neither refused nor fetched
    with pytest.raises(SystemExit):
        train.main([*arguments, "maybe"])
    assert "'maybe' is neither True nor False" in capsys.readouterr().err


def test_download_with_and_without_a_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    fetched = []
    monkeypatch.setattr("paddle_medcls.data.datasets.fetch", lambda name, root: fetched.append(name) or "")
    for value in ([], ["True"], ["true"], ["False"]):
        train.main(["--dataset", "breastmnist", "--data-root", str(tmp_path), "--download", *value])
    assert fetched == ["breastmnist"] * 3


def test_medcls_passes_on(run: Path, capsys: pytest.CaptureFixture) -> None:
    assert medcls(["predict", "--weights", str(run / "COVID.pdparams"), "/no/such/image.png"]) == 1
    assert "/no/such/image.png: no such file or folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [
        (train.main, [], "--dataset or --recipe is needed"),
        (train.main, ["--dataset", "palm", "--epochs", "many"], "invalid int value"),
        (train.main, ["--dataset", "palm", "--device", "tpu"], "invalid choice"),
        (train.main, ["--dataset", "palm", "--workers", "-1"], "--workers must be 0 or more"),
        (train.main, ["--dataset", "palm", "--epoch", "2"], "unrecognized arguments"),  # no abbreviations
        (train.main, ["--resume", "runs/a", "--epochs", "3"], "leave the other options out"),
        (eval.main, [], "one of the arguments --weights --compare is required"),
        (eval.main, ["--weights", "a", "--split", "all"], "invalid choice"),
        (predict.main, [], "required: IMAGE"),
        (predict.main, ["a.png", "--topk", "0"], "must be at least 1"),
        (predict.main, ["a.png", "--output", "o", "--shard-rows", "0"], "must be at least 1"),
        (predict.main, ["a.png", "--output", "o", "--json"], "--output: not with --json"),
        (predict.main, ["a.png", "--shard-rows", "5"], "need --output"),
        (gradcam.main, [], "images are needed"),
        (gradcam.main, ["a.png"], "--output DIR, --measure or --masks"),
        (gradcam.main, ["a.png", "--output", "o", "--batch-size", "0"], "must be at least 1"),
        (gradcam.main, ["a.png", "--masks", "--overview"], "--overview needs --output DIR"),
    ],
)
def test_wrong_usage_is_2(main, arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    shown = capsys.readouterr()
    assert message in shown.err and shown.out == ""


# --- failures --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [
        (train.main, ["--dataset", "pallm"], "DataError: unknown data set 'pallm'; did you mean 'palm'"),
        (train.main, ["--recipe", "pallm"], "RecipeError: unknown recipe 'pallm'; did you mean 'palm'"),
        (
            train.main,
            ["--dataset", "palm", "--data-root", "/no/where"],
            "DataError: palm: the data root does not exist",
        ),
        (train.main, ["--dataset", "palm", "--model", "resnet51"], "resnet51"),
        (train.main, ["--dataset", "palm", "--set", "learning_rate=1"], "unknown recipe field 'learning_rate'"),
        (train.main, ["--dataset", "palm", "--lr", "0"], "lr: 0.0; expected a number above 0"),
        (train.main, ["--dataset", "palm", "--epochs", "0"], "epochs: 0; expected at least 1"),
        (train.main, ["--dataset", "palm", "--recipe", "covid"], "recipe covid is for covid, not for --dataset palm"),
        (train.main, ["--recipe", "none.json"], "RecipeError: the recipe cannot be read"),
        (train.main, ["--resume", "/no/where"], "the recipe cannot be read"),
        (eval.main, ["--weights", "/no/where.pdparams"], "WeightsError: /no/where.pdparams: No such file"),
        (eval.main, ["--weights", "x", "--recipe", "pallm"], "did you mean 'palm'"),
    ],
)
def test_a_failure_is_1_and_one_message(
    main, arguments: list[str], message: str, capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if "resnet51" in arguments:  # which is built after the data are found
        arguments = [*arguments, "--data-root", str(fakes.palm_tree(tmp_path / "palm"))]
    assert main(arguments) == 1
    shown = capsys.readouterr()
    assert message in shown.err and "Traceback" not in shown.err and shown.out == ""


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    short = tool("predict", tmp_path / "none.png")
    assert short.returncode == 1 and short.stdout == ""
    assert short.stderr.startswith("DataError: ") and "Traceback" not in short.stderr
    full = tool("predict", tmp_path / "none.png", "--debug")
    assert full.returncode == 1 and "Traceback" in full.stderr and "none.png: no such file" in full.stderr


def test_an_error_that_nobody_foresaw_is_short_too(monkeypatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr("paddle_medcls.data.image_files.ImageFiles", lambda *_: 1 / 0)
    assert predict.main(["a.png"]) == 1
    assert capsys.readouterr().err.startswith("unexpected ZeroDivisionError: division by zero\n  fix")
    with pytest.raises(ZeroDivisionError):
        predict.main(["a.png", "--debug"])


def test_a_terminal_without_unicode_ends_no_command(run: Path, tmp_path: Path, monkeypatch) -> None:
    """Names and texts that the terminal lacks are escaped: nothing is lost, and nothing fails."""
    image = write_image(tmp_path / "眼底é.png", pixels(0))
    words = ["predict", str(image), "--weights", str(run / "COVID.pdparams"), "--engine", "paddle"]
    for arguments, code, text in (
        (words, 0, r"\u773c\u5e95\xe9.png"),
        (["train", "--help"], 0, "usage: "),
        (["train", "--recipe", "list"], 0, "palm_tutorial"),
        (["train", "--dataset", "眼"], 1, r"unknown data set '\u773c'"),
    ):
        screen = io.TextIOWrapper(io.BytesIO(), "ascii")
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", screen)
            patch.setattr(sys, "stderr", screen)
            try:
                assert medcls(arguments) == code
            except SystemExit as stop:
                assert stop.code == code
        screen.flush()
        assert text in screen.buffer.getvalue().decode("ascii")
    old = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}  # as before Python 3.7
    old["PYTHONPATH"] = os.pathsep.join([str(fakes.ROOT), str(fakes.ROOT / "tests")])
    program = "import sys, toynet; from paddle_medcls.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, env={**os.environ, **old})
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("moment", ["while importing", "at work", "at exit"])
def test_ctrl_c_is_one_line(moment: str, tmp_path: Path) -> None:
    """Also while the process ends, when Python waits for threads."""
    press = "os.kill(os.getpid(), signal.SIGINT); time.sleep(5)"
    wait = "threading.Thread(target=time.sleep, args=(5,)).start()"
    code = {
        "while importing": f"cli.importlib.import_module = lambda _: exec({press!r})",
        "at work": f"i.ImageFiles = lambda *_: exec({press!r})",
        "at exit": f"i.ImageFiles = lambda *_: exec({wait!r}) or sys.exit(3)",
    }[moment]
    code = f"import paddle_medcls.data.image_files as i; {code}"
    start = "import os, signal, sys, threading, time; from paddle_medcls import cli\n"
    start += "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background job ignores Ctrl-C
    end = "try: code = cli.main(['predict', 'x'])\nfinally: print('over', flush=True)\nsys.exit(code)"
    command = [sys.executable, "-c", f"{start}{code}\n{end}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=TOOLS.parent)
    assert process.stdout is not None and process.stdout.readline() == "over\n"
    if moment == "at exit":
        process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert (process.returncode, said) == ((-signal.SIGINT, "") if moment == "at exit" else (1, "interrupted\n"))


def test_without_paddle_the_message_says_what_to_install(tmp_path: Path) -> None:
    """A stand-in for a machine without Paddle: a module of its name that cannot be imported."""
    (tmp_path / "paddle").mkdir()
    (tmp_path / "paddle" / "__init__.py").write_text("raise ImportError(\"No module named 'paddle'\")")
    image = write_image(tmp_path / "a.png", pixels(0))
    for name, arguments in (
        ("train", ["--dataset", "palm", "--sample", "--output", tmp_path / "run"]),
        ("gradcam", [image, "--weights", "x.pdparams", "--output", "o"]),
        ("train", ["--dataset", "palm", "--summary"]),
    ):
        done = tool(name, *arguments, PYTHONPATH=str(tmp_path))
        assert done.returncode == 1 and done.stdout == ""
        assert done.stderr.startswith("SetupError: PaddlePaddle cannot be loaded") and "pip install" in done.stderr
        assert "Traceback" not in done.stderr


def test_gpu_on_a_cpu_build(run: Path, capsys: pytest.CaptureFixture) -> None:
    from paddle_medcls.core.paddle_setup import paddle

    if paddle.is_compiled_with_cuda():
        pytest.skip("a GPU build of Paddle")
    assert eval.main(["--weights", str(run / "COVID.pdparams"), "--device", "gpu"]) == 1
    assert "SetupError: --device gpu: this Paddle is the CPU build" in capsys.readouterr().err


# --- train -----------------------------------------------------------------------------------------


def test_summary_prints_the_documents_size(capsys: pytest.CaptureFixture) -> None:
    """The COVID-19 tutorial's table ends with 23,569,348 parameters."""
    assert train.main(["--dataset", "covid", "--summary"]) == 0
    assert "Total params: 23,569,348" in capsys.readouterr().out


def test_options_change_the_recipe(tmp_path: Path, palm_root: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ["--dataset", "palm", "--recipe", "palm_tutorial", "--data-root", str(palm_root)]
    arguments += ["--model", "toy_resnet", "--epochs", "1", "--batch-size", "6", "--lr", "0.002", "--seed", "3"]
    arguments += ["--set", "size_px=32", "flip=0.5", "--set", "momentum=0.8", "--output", str(tmp_path / "run")]
    assert train.main([*arguments, "--workers", "0"]) == 0
    shown = capsys.readouterr()
    assert "best epoch 1" in shown.out and "Precision" in shown.out and "research" in shown.out
    own = json.loads((tmp_path / "run" / "recipe.json").read_text())
    expected = {"model": "toy_resnet", "epochs": 1, "batch_size": 6, "lr": 0.002, "seed": 3}
    expected |= {"size_px": 32, "flip": 0.5, "momentum": 0.8, "decay_epochs": [0.25]}
    assert {name: own[name] for name in expected} == expected


def test_a_run_directory_is_not_overwritten(run: Path, capsys: pytest.CaptureFixture) -> None:
    assert train.main(["--dataset", "palm", "--output", str(run)]) == 1
    assert "already holds a run" in capsys.readouterr().err


def test_resume_needs_nothing_but_the_directory(run: Path, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    before = (run / "metrics.json").read_bytes()
    assert train.main(["--resume", str(copy), "--device", "cpu"]) == 0
    assert "resumed after 2 of 2 epochs" in capsys.readouterr().err
    assert (copy / "metrics.json").read_bytes() == before


# --- eval ------------------------------------------------------------------------------------------


@pytest.mark.pictures
def test_eval_writes_what_the_contract_says(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The test split, found from the run directory alone."""
    assert eval.main(["--weights", str(run / "COVID.pdparams"), "--output", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "test: 4 images" in shown and "ViralPneumonia" in shown and "Precision" in shown
    assert "published 0.9651" in shown and ("inside the interval" in shown or "outside the interval" in shown)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "metrics.json",
        "predictions_test.csv",
        "confusion_test.png",
        "roc_test.png",
        "risk_coverage_test.png",
    }
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (metrics["split"], metrics["n"]) == ("test", 4)
    rows = list(csv.reader((tmp_path / "out" / "predictions_test.csv").read_text().splitlines()))
    guesses = np.array([int(row[2]) for row in rows[1:]])
    assert np.mean(guesses == [int(row[1]) for row in rows[1:]]) == pytest.approx(metrics["accuracy"])


def test_eval_of_the_validation_split_is_what_training_wrote(run: Path, tmp_path: Path, capsys) -> None:
    arguments = ["--weights", str(run / "COVID.pdparams"), "--split", "val", "--output", str(tmp_path / "out")]
    assert eval.main([*arguments, "--batch-size", "3", "--workers", "1"]) == 0
    found, written = (json.loads((folder / "metrics.json").read_text()) for folder in (tmp_path / "out", run))
    assert found["loss"] == pytest.approx(written["loss"], rel=1e-5)
    assert (found["accuracy"], found["confusion"]) == (written["accuracy"], written["confusion"])


def test_eval_lists_unreadable_images_and_scores_nothing(run: Path, tmp_path: Path, capsys) -> None:
    root = fakes.covid_tree(tmp_path / "covid")
    for name in ("COVID/COVID-4.png", "Normal/Normal-4.png"):
        (root / name).write_bytes(b"<html>")
    assert eval.main(["--weights", str(run / "COVID.pdparams"), "--data-root", str(root)]) == 1
    shown = capsys.readouterr()
    assert shown.out == "" and "2 of 4 test image(s)" in shown.err
    assert "COVID-4.png" in shown.err and "Normal-4.png" in shown.err


def test_drawn_images_are_said_to_be_drawn(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from paddle_medcls.data.index import SYNTHETIC_MARK

    root = fakes.covid_tree(tmp_path / "covid")
    (root / SYNTHETIC_MARK).write_text("")
    assert eval.main(["--weights", str(run / "COVID.pdparams"), "--data-root", str(root)]) == 0
    shown = capsys.readouterr().out
    assert SYNTHETIC_NOTICE in shown and "published" not in shown  # no figure was published on synthetic images


# --- predict ---------------------------------------------------------------------------------------


def test_json_is_one_object_a_line_and_nothing_else(run: Path, capsys: pytest.CaptureFixture) -> None:
    folder = run.parent / "covid" / "Normal"
    assert predict.main(["--weights", str(run / "COVID.pdparams"), str(folder), "--json", "--topk", "3"]) == 0
    shown = capsys.readouterr()
    rows = [json.loads(line) for line in shown.out.splitlines()]
    assert [Path(row["image"]).name for row in rows] == [f"Normal-{k}.png" for k in (1, 2, 3, 4)]
    for row in rows:
        assert set(row) == {"image", "label", "probability", "topk", "in_distribution", "novelty"}
        assert [set(item) for item in row["topk"]] == [{"label", "probability"}] * 3
        probabilities = [item["probability"] for item in row["topk"]]
        assert probabilities == sorted(probabilities, reverse=True)
        assert (row["label"], row["probability"]) == (row["topk"][0]["label"], probabilities[0])
    assert "not for diagnosis" in shown.err


def test_predictions_are_those_of_eval(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """`predict` and `eval` give the same probabilities for the validation images."""
    val = load_index("covid", run.parent / "covid", "val")
    arguments = ["--weights", str(run / "COVID.pdparams"), *map(str, val.images), "--csv", str(tmp_path / "p.csv")]
    assert predict.main([*arguments, "--batch-size", "3"]) == 0
    rows = list(csv.reader((tmp_path / "p.csv").read_text().splitlines()))
    assert rows[0] == ["image", "label", *val.classes, "in_distribution", "novelty"] and [
        row[0] for row in rows[1:]
    ] == list(map(str, val.images))
    written = list(csv.reader((run / "predictions_val.csv").read_text().splitlines()))
    found = np.array([[float(p) for p in row[2:-2]] for row in rows[1:]])
    np.testing.assert_allclose(found, [[float(p) for p in row[3:]] for row in written[1:]], atol=1e-6)
    assert [val.classes[int(row[2])] for row in written[1:]] == [row[1] for row in rows[1:]]


def test_the_table_is_all_of_standard_output(run: Path, capsys: pytest.CaptureFixture) -> None:
    image = run.parent / "covid" / "COVID" / "COVID-1.png"
    assert predict.main(["--weights", str(run / "COVID.pdparams"), str(image)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and all(line[0] in "+|" for line in lines) and "COVID-1.png" in lines[3]


def test_globs_and_folders_below(run: Path, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    root = run.parent / "covid"
    weights = ["--weights", str(run / "COVID.pdparams"), "--json"]
    counts = []
    monkeypatch.chdir(root)
    for argument in (str(root), "COVID/*-[12].png", str(root / "*" / "*-3.png"), "**/Normal-*.png"):
        assert predict.main([*weights, argument]) == 0
        counts.append(len(capsys.readouterr().out.splitlines()))
    assert counts == [16, 2, 4, 4]


def test_unreadable_files_are_reported_and_the_others_predicted(run: Path, tmp_path: Path, capsys) -> None:
    good = [write_image(tmp_path / "a.png", pixels(1)), write_image(tmp_path / "d.jpg", pixels(2))]
    (tmp_path / "b.png").write_bytes(b"<html>")
    (tmp_path / "c.jpg").write_bytes(good[1].read_bytes()[:-40])
    arguments = ["--weights", str(run / "COVID.pdparams"), str(tmp_path), "--json", "--csv", str(tmp_path / "p.csv")]
    assert predict.main(arguments) == 1
    shown = capsys.readouterr()
    assert [json.loads(line)["image"] for line in shown.out.splitlines()] == list(map(str, good))
    assert "b.png: not an image" in shown.err and "c.jpg: the image is truncated" in shown.err
    assert "2 of 4 file(s) could not be read" in shown.err and "Traceback" not in shown.err
    assert len((tmp_path / "p.csv").read_text().splitlines()) == 3


def test_nothing_but_unreadable_files(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "b.png").write_bytes(b"")
    assert predict.main(["--weights", str(run / "COVID.pdparams"), str(tmp_path / "b.png")]) == 1
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("what", ["nothing.png", "no*.png", "empty folder"])
def test_an_argument_that_is_nothing(what: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "empty folder").mkdir()
    assert predict.main(["--weights", str(run / "COVID.pdparams"), str(tmp_path / what)]) == 1
    shown = capsys.readouterr()
    assert shown.err.startswith("DataError: ") and what in shown.err and shown.out == ""


def test_the_newest_run_is_the_default(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    image = str(write_image(tmp_path / "a.png", pixels(1)))
    assert predict.main([image]) == 1
    assert "no trained model yet" in capsys.readouterr().err
    for name, age in (("old", 100), ("new", 0)):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        for suffix in (".pdparams", ".json"):
            shutil.copy(run / f"COVID{suffix}", folder)
            os.utime(folder / f"COVID{suffix}", (time.time() - age,) * 2)
    assert predict.main([image]) == 0
    assert f"weights: {Path('runs', 'new', 'COVID.pdparams')}" in capsys.readouterr().err


def test_one_image_alone_is_predicted_as_among_many(run: Path, capsys: pytest.CaptureFixture) -> None:
    images = sorted((run.parent / "covid").rglob("*.png"))
    weights = ["--weights", str(run / "COVID.pdparams"), "--json", "--topk", "4"]
    assert predict.main([*weights, *map(str, images)]) == 0
    together = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert predict.main([*weights, str(images[5])]) == 0
    alone = json.loads(capsys.readouterr().out)
    for one, other in zip(alone["topk"], together[5]["topk"]):
        assert one["label"] == other["label"] and one["probability"] == pytest.approx(other["probability"], abs=2e-6)


# --- gradcam ---------------------------------------------------------------------------------------


def test_gradcam_writes_overlays_of_the_images_own_size(run: Path, tmp_path: Path, capsys) -> None:
    """One class a folder, as COVID has them; the sheet is eight of the sixteen."""
    wide = np.repeat(pixels(3), 2, axis=1)
    root = shutil.copytree(run.parent / "covid", tmp_path / "covid")
    write_image(root / "Normal" / "wide.jpg", wide)
    write_image(root / "Normal" / "wide.png", wide[:, :, 0])
    output = root / "maps"
    arguments = ["--weights", str(run / "COVID.pdparams"), str(root), "--output", str(output)]
    assert gradcam.main(arguments) == 0
    assert f"18 heat map(s) and contact_sheet.png written to {output}" in capsys.readouterr().out
    written = sorted(path.relative_to(output).as_posix() for path in output.rglob("*.png"))
    assert len(written) == 19 and "COVID/COVID-1_gradcam.png" in written
    assert {"Normal/wide_gradcam.png", "Normal/wide.png_gradcam.png"} <= set(written)
    assert read_image(output / "Normal" / "wide_gradcam.png").shape == (32, 64, 3)
    assert gradcam.main(arguments) == 0  # its own pictures are no images to explain
    shown = capsys.readouterr()
    assert "18 heat map(s)" in shown.out and "left out: 19 file(s)" in shown.err


def test_gradcam_draws_the_overview_of_a_run(run: Path, tmp_path: Path, monkeypatch) -> None:
    """Its curves are those of history.csv, its images the first four; weights outside a run have no curves."""
    drawn: list[tuple] = []
    monkeypatch.setattr("paddle_medcls.deployment.overview.write_overview", lambda *all: drawn.append(all))
    images = sorted(map(str, (run.parent / "covid").rglob("COVID-*.png"))) * 2
    arguments = [*images[:5], "--output", str(tmp_path / "maps"), "--overview"]
    for suffix in ("pdparams", "json"):
        shutil.copy(run / f"COVID.{suffix}", tmp_path / f"COVID.{suffix}")
    assert gradcam.main(["--weights", str(run), *arguments]) == 0
    assert gradcam.main(["--weights", str(tmp_path / "COVID.pdparams"), *arguments]) == 0
    assert gradcam.main(["--weights", str(run), *arguments, "--class", "Normal", "--method", "gradcam++"]) == 0
    (path, history, items, title, maps, _), (_, none, same, *_), (_, _, others, _, other_maps, _) = drawn
    assert (maps, other_maps) == ("Grad-CAM", "Grad-CAM++, Normal")
    assert not any(np.array_equal(one.overlay, other.overlay) for one, other in zip(items, others))
    assert path == tmp_path / "maps" / "overview.png" and title == "covid: toy_resnet, 32 × 32 pixels"
    rows = (run / "history.csv").read_text().splitlines()[1:]
    assert [row["val_loss"] for row in history] == [float(row.split(",")[5]) for row in rows] and none == []
    assert len(items) == len(same) == 4 and items[0].bars == same[0].bars
    values = [value for _, value in items[0].bars]
    assert values == sorted(values, reverse=True) and sum(values) == pytest.approx(1)
    named = [items[0]._replace(bars=[("no $\\formula$", 1.0)]), *items[1:]]
    overview.write_overview(path, history, named, title, maps, "a note")
    with Image.open(path) as picture:
        assert picture.size == (1337, 731) and path.stat().st_size < 200_000


def test_gradcam_reports_an_unreadable_image_and_does_the_others(run: Path, tmp_path: Path, capsys) -> None:
    write_image(tmp_path / "in" / "a.png", pixels(1))
    (tmp_path / "in" / "b.png").write_bytes(b"<html>")
    write_image(tmp_path / "in" / "c.png", pixels(2))
    arguments = ["--weights", str(run / "COVID.pdparams"), str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    assert gradcam.main([*arguments, "--class", "Normal", "--layer", "block.1"]) == 1
    shown = capsys.readouterr()
    assert "b.png: not an image" in shown.err and "1 of 3 file(s) could not be read" in shown.err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "a_gradcam.png",
        "c_gradcam.png",
        "contact_sheet.png",
    }


def test_gradcam_measures_beside_chance_and_masks(run: Path, tmp_path: Path, capsys) -> None:
    root = fakes.covid_images(tmp_path / "covid", "kaggle", 2)
    arguments = ["--weights", str(run / "COVID.pdparams"), str(root), "--measure", "--output", str(tmp_path / "out")]
    assert gradcam.main(arguments) == 0
    shown = capsys.readouterr()
    for text in ("deletion area", "insertion area", "random weights", "inside the mask"):
        assert text in shown.out
    assert "left out: 8 file(s) in masks/" in shown.err
    rows = list(csv.DictReader((tmp_path / "out" / "measures.csv").read_text().splitlines()))
    assert len(rows) == 8 and {"image", "class", "deletion", "deletion_chance", "inside"} <= set(rows[0])
    assert all(0 <= float(row["deletion"]) <= 1 for row in rows if row["deletion"])
    arguments[3:4] = ["--masks"]
    assert gradcam.main(arguments) == 0
    shown = capsys.readouterr()
    assert "inside the mask" in shown.out and "deletion" not in shown.out
    alone = list(csv.DictReader((tmp_path / "out" / "measures.csv").read_text().splitlines()))
    for name in ("inside", "inside_chance"):
        assert [float(row[name] or -1) for row in alone] == pytest.approx([float(row[name] or -1) for row in rows])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layer", "block.77"], "RecipeError: unknown layer 'block.77'; did you mean 'block.2'"),
        (["--layer", "fc"], "RecipeError: layer 'fc' gives the shape (4, 4), which is no map"),
        (["--class", "normal"], "DataError: unknown class 'normal'; did you mean 'Normal'?"),
    ],
)
def test_gradcam_refuses_what_is_not_there(run: Path, tmp_path: Path, capsys, arguments: list, message: str) -> None:
    images = str(run.parent / "covid" / "COVID")
    given = ["--weights", str(run / "COVID.pdparams"), images, "--output", str(tmp_path / "out"), *arguments]
    assert gradcam.main(given) == 1
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_gradcam_lists_layers(run: Path, capsys: pytest.CaptureFixture) -> None:
    assert medcls(["gradcam", "--weights", str(run / "COVID.pdparams"), "--list-layers"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["|", "block.1", "(default)", "|", "BasicBlock", "|", "128", "|", "4", "x", "4", "|"] in lines
    assert not any("fc" in line for line in lines)


def test_predict_with_heat_maps_predicts_the_same(run: Path, tmp_path: Path, capsys) -> None:
    images = [str(run.parent / "covid" / name / f"{name}-1.png") for name in ("COVID", "Normal")]
    arguments = ["--weights", str(run / "COVID.pdparams"), *images, "--json"]
    assert predict.main(arguments) == 0
    plain = capsys.readouterr().out
    assert predict.main([*arguments, "--gradcam", str(tmp_path)]) == 0
    assert capsys.readouterr().out == plain
    pictures = [tmp_path / name / f"{name}-1_gradcam.png" for name in ("COVID", "Normal")]
    assert all(read_image(picture).shape == (32, 32, 3) for picture in pictures)


def test_errors_are_the_projects_own() -> None:
    assert issubclass(RecipeError, MedclsError)
    error = MedclsError("what", path="there", expected="that", fix="this", items=[str(k) for k in range(25)])
    lines = str(error).splitlines()
    assert lines[0] == "what" and lines[-3:] == ["  path       there", "  expected   that", "  fix        this"]
    assert "  19" in lines and "  20" not in lines and "  … and 5 more" in lines


def test_nothing_from_outside_reaches_the_terminal_as_a_control_character() -> None:
    name = "eye\x1b[2J\n  fix  rm\u202egpj\u2028\udcff\x9b 图　像é.png"
    error = DataError(f"{name}: not an image", path=name, expected=name, fix=name, items=[name])
    lines = str(error).split("\n")
    assert len(lines) == 5 and all("图　像é.png" in line for line in lines)
    assert not any(c in str(error) for c in "\x1b\u202e\u2028\udcff\x9b") and "\n" not in error.what
    assert r"eye\x1b[2J\n  fix  rm\u202egpj\u2028\udcff\x9b" in error.what


def test_a_near_name_is_offered() -> None:
    assert did_you_mean("palmm", ["covid", "palm"]) == "; did you mean 'palm'?"
    assert did_you_mean("blok.5", ["block.5", "block.4"], n=3) == "; did you mean 'block.5' or 'block.4'?"
    assert did_you_mean("qqqq", ["covid", "palm"]) == ""
