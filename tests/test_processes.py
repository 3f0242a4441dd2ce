"""`train --processes N`: Paddle's launcher behind one command: results, messages, stopping and resuming."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import fakes
import pytest

from paddle_medcls.core.hardware import prepare_environment
from paddle_medcls.training import launcher
from paddle_medcls.training.loop import Options, train

PROGRAM = [sys.executable, str(fakes.TOOLS / "train.py")]


def test_the_cores_are_divided(monkeypatch) -> None:
    monkeypatch.setattr("paddle_medcls.core.hardware.usable_cores", lambda: 5)
    monkeypatch.setattr("paddle_medcls.core.hardware.sys.modules", {})
    for size, threads in ((None, "5"), ("2", "2"), ("9", "1")):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        monkeypatch.delenv("PADDLE_LOCAL_SIZE", raising=False)
        if size:
            monkeypatch.setenv("PADDLE_LOCAL_SIZE", size)
        prepare_environment()
        assert os.environ["OMP_NUM_THREADS"] == threads
    monkeypatch.setenv("OMP_NUM_THREADS", "7")  # the user's own
    prepare_environment()
    assert os.environ["OMP_NUM_THREADS"] == "7"


# --- what is told of a process that has ended without a message ---------------------------------------

KILLED = "Container rank 1 status failed cmd ['python'] code -9 log workerlog.1\n"


@pytest.mark.parametrize(
    ("of_launcher", "text"),
    [
        (KILLED, "process 1 of 2 was ended by SIGKILL\n  loading\n  no memory\n  fix "),
        (KILLED.replace("-9", "3"), "process 1 of 2 ended with exit code 3\n  loading\n  no memory\n  fix "),
        ("\ncannot bind\n", "process 0 of 2 ended with exit code 1\n  cannot bind\n  fix "),
    ],
)
def test_a_silent_end(tmp_path: Path, of_launcher: str, text: str) -> None:
    (tmp_path / "launcher.log").write_text(of_launcher)
    (tmp_path / "workerlog.1").write_text("loading\n\nno memory\n")
    assert str(launcher._silent_end(tmp_path / "launcher.log", 2)).startswith(text)


# --- real runs ---------------------------------------------------------------------------------------


def start(*arguments: object) -> subprocess.Popen:
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*PROGRAM, *map(str, arguments)]
    return subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def steps(run: Path) -> str:
    return (run / "steps.csv").read_text()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """A run of two processes that nothing interrupted; its folder also holds the data and the recipe."""
    folder = tmp_path_factory.mktemp("two")
    fakes.palm_tree(folder / "palm", pathologic=7, normal=4, myopic=2)
    recipe = fakes.recipe(model="resnet18", epochs=3, batch_size=4, lr=0.01, flip=0.5)
    (folder / "recipe.json").write_text(json.dumps(recipe.to_json()))
    process = start(*arguments(folder, "whole"), "--processes", 2)
    output, said = process.communicate(timeout=180)
    return folder, subprocess.CompletedProcess([], process.returncode, output, said)


def arguments(folder: Path, name: str) -> list:
    return ["--recipe", folder / "recipe.json", "--data-root", folder / "palm", "--output", folder / name]


def test_two_processes_one_run(whole) -> None:
    folder, done = whole
    assert done.returncode == 0, done.stderr
    assert "2 processes share each batch of 4; batch-norm statistics are each process's own" in done.stderr
    assert [line.split()[1] for line in done.stderr.splitlines() if line.startswith("epoch ")] == ["1/3", "2/3", "3/3"]
    assert done.stdout.count("val: 7 images") == 1 and "best epoch" in done.stdout
    assert "val: 7 images" not in done.stderr and "LAUNCH" not in done.stderr + done.stdout
    assert json.loads((folder / "whole" / "environment.json").read_text())["processes"] == 2
    assert {path.name for path in folder.iterdir()} == {"images", "palm", "recipe.json", "whole"}  # no logs
    assert len(steps(folder / "whole").splitlines()) == 1 + 3 * 4


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_interrupted_and_resumed_it_is_the_same_run(whole, number: int) -> None:
    """A signal to the command saves in the middle of an epoch; --resume knows the number of processes."""
    folder, _ = whole
    run = folder / f"parts{int(number)}"
    process = start(*arguments(folder, run.name), "--processes", 2)
    deadline = time.monotonic() + 60
    while not (run / "history.csv").exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    _, said = process.communicate(timeout=90)
    assert process.returncode == 1, said
    assert said.splitlines()[-1].startswith(f"interrupted; state saved in {run}; resume with: python"), said
    assert said.count("interrupted") == 1 and "Traceback" not in said and "Error" not in said
    resumed = start("--resume", run)
    _, said = resumed.communicate(timeout=180)
    assert resumed.returncode == 0 and "resumed after" in said, said
    assert steps(run) == steps(folder / "whole")
    for name in ("history.csv", "PALM.pdparams", "predictions_val.csv"):
        assert (run / name).read_bytes() == (folder / "whole" / name).read_bytes(), name


@pytest.mark.slow  # the choice of the message is tested above
def test_a_damaged_image_is_told_once(whole) -> None:
    folder, _ = whole
    root = fakes.palm_tree(folder / "damaged")
    (root / "PALM-Training400" / "P0001.jpg").write_bytes(b"")
    process = start("--recipe", folder / "recipe.json", "--data-root", root, "--processes", 2, "--output", folder / "x")
    _, said = process.communicate(timeout=120)
    assert process.returncode == 1 and said.count("P0001.jpg: the file is empty") == 1 and "Traceback" not in said
    assert "DataError: " in said and not (folder / "x").exists()


@pytest.mark.slow
def test_a_killed_process_ends_the_run(whole) -> None:
    folder, _ = whole
    process = start(*arguments(folder, "killed"), "--processes", 2)
    deadline = time.monotonic() + 60
    while not (folder / "killed" / "recipe.json").exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (launcher_pid,) = children(process.pid)
    os.kill(children(launcher_pid)[1], signal.SIGKILL)
    _, said = process.communicate(timeout=90)
    assert process.returncode == 1
    assert said.count("RunError: process 1 of 2 was ended by SIGKILL") == 1 and said.count("Error") == 1, said
    assert "Traceback" not in said and "gloo" not in said, said


def children(pid: int) -> list[int]:
    return [int(text) for text in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
def test_a_frozen_network_trains_as_in_one_process(whole, tmp_path) -> None:
    """Without batch norm in training: the same losses; the features are computed once, by process 0."""
    folder, _ = whole
    recipe = fakes.recipe(model="resnet18", freeze=True, cache_views=1, flip=0.5, epochs=1, batch_size=4)
    (tmp_path / "recipe.json").write_text(json.dumps(recipe.to_json()))
    root = ["--data-root", folder / "palm", "--output", tmp_path / "2" / "run"]
    process = start("--recipe", tmp_path / "recipe.json", *root, "--processes", 2)
    train(recipe, folder / "palm", tmp_path / "1" / "run", Options("cpu", 0, say=lambda line: None))
    _, said = process.communicate(timeout=180)
    assert process.returncode == 0, said
    one, two = (list(csv.reader(steps(tmp_path / count / "run").splitlines()[1:])) for count in "12")
    for a, b in zip(one, two):
        assert list(map(float, a)) == pytest.approx(list(map(float, b)), rel=1e-4)
    names = [{path.name for path in (tmp_path / count / "features").iterdir()} for count in "12"]
    assert names[0] == names[1] and len(names[0]) == 2


@pytest.mark.slow  # `test_distributed` launches another program by hand, and tests `from_first`
def test_launched_by_hand_all_processes_use_one_run_directory(whole, tmp_path: Path) -> None:
    """Without --output process 0 names it, by the clock; the others, started later, get its name."""
    folder, _ = whole
    late = tmp_path / "late.py"
    late.write_text(
        "import os, sys, time\n"
        "time.sleep(2 * int(os.environ['PADDLE_TRAINER_ID']))\n"
        "from paddle_medcls.cli.train import main\nsys.exit(main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-m", "paddle.distributed.launch", "--nproc_per_node=2", "--log_dir", tmp_path / "log"]
    command += [late, "--recipe", folder / "recipe.json", "--data-root", folder / "palm", "--epochs", 1]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(fakes.ROOT)}
    done = subprocess.run(
        list(map(str, command)), cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (run,) = [path for path in (tmp_path / "runs").iterdir() if path.name != "images"]
    assert (run / "metrics.json").is_file() and "best epoch" in done.stdout


@pytest.mark.parametrize("value", ["0", "-1", "two", ""])
def test_wrong_numbers(value, capsys) -> None:
    from paddle_medcls.cli.train import main

    with pytest.raises(SystemExit) as caught:
        main(["--dataset", "palm", "--processes", value])
    assert caught.value.code == 2 and "auto" in capsys.readouterr().err


def test_more_processes_than_a_batch_has_images(whole, tmp_path: Path, capsys) -> None:
    from paddle_medcls.cli.train import main

    folder, _ = whole
    words = ["--recipe", folder / "recipe.json", "--device", "cpu", "--processes", 5, "--output", tmp_path / "run"]
    assert main(list(map(str, words))) == 1
    assert "a batch of 4 has too few images to share" in capsys.readouterr().err
