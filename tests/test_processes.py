"""`train.py --processes`: how processes are counted, started, stopped, and how their ends are told."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import fakes
import pytest

from paddle_medcls import errors, processes, rundir, worker
from paddle_medcls.cpu import prepare_environment
from paddle_medcls.processes import choose, run_processes
from paddle_medcls.train import Options, train

PROGRAM = [sys.executable, str(fakes.TOOLS / "train.py")]


@pytest.mark.parametrize(
    "wanted, gpus, cores, batch, count",
    [
        ("auto", 0, 2, 16, 2),
        ("auto", 0, 2, 15, 1),  # each would get fewer than 8 images
        ("auto", 0, 1, 128, 1),
        ("auto", 0, 64, 128, 2),  # more than two were not measured
        ("auto", 4, 64, 128, 4),
        ("auto", 4, 64, 16, 2),
        ("auto", 1, 64, 128, 1),
        (3, 0, 2, 16, 3),
        (2, 2, 2, 2, 2),
    ],
)
def test_how_many(wanted, gpus, cores, batch, count) -> None:
    assert choose(wanted, gpus, cores, batch) == count


def test_too_many() -> None:
    with pytest.raises(errors.SetupError, match="there are 2"):
        choose(3, 2, 8, 128)
    with pytest.raises(errors.SetupError, match="batch of 4 has too few"):
        choose(5, 0, 8, 4)


def test_with_onednn_one_process_is_the_fastest_on_a_cpu() -> None:
    assert choose("auto", 0, 2, 16, onednn=True) == 1 and choose(2, 0, 2, 16, onednn=True) == 2


def test_the_cores_are_divided(monkeypatch) -> None:
    monkeypatch.setattr("paddle_medcls.cpu.usable_cores", lambda: 5)
    monkeypatch.setattr("paddle_medcls.cpu.sys.modules", {})
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


# --- the protocol, with programs that stand in for the workers ---------------------------------------


def fake(monkeypatch, tmp_path: Path, code: str) -> None:
    """Workers that run `code`; it has `rank`, `job`, and `report(**values)`, which does not return."""
    start = f"""
import json, os, signal, sys, time
rank, job = int(os.environ["PADDLE_TRAINER_ID"]), json.loads(os.read(0, 100000))
assert len(job.pop('screen')) == (rank == 0)
open({str(tmp_path)!r} + f"/pid{{rank}}", "w").write(str(os.getpid()))
def report(**values):
    os.write(1, json.dumps(values).encode() + b"\\n")
    os.read(0, 1)
    os._exit(0)
"""
    monkeypatch.setattr(processes, "WORKER", [sys.executable, "-c", start + code])


def go(count: int = 2) -> dict:
    return run_processes({"a": 1}, count, False, dict(os.environ))


def alive(tmp_path: Path) -> list[int]:
    """Which of the workers still run."""
    found = []
    for file in tmp_path.glob("pid*"):
        try:
            os.kill(int(file.read_text()), 0)
            found.append(int(file.read_text()))
        except ProcessLookupError:
            pass
    return found


def test_the_result_is_that_of_process_0(monkeypatch, tmp_path) -> None:
    fake(monkeypatch, tmp_path, 'report(ended="done", result={"rank": rank, "job": job, "auc": 0.1 + 0.2})')
    assert go(3) == {"rank": 0, "job": {"a": 1}, "auc": 0.1 + 0.2}
    assert alive(tmp_path) == []


def test_each_process_is_told_its_place(monkeypatch, tmp_path) -> None:
    fake(monkeypatch, tmp_path, 'report(ended="done", result=dict(os.environ))')
    of = go(3)
    assert of["PADDLE_TRAINERS_NUM"] == of["PADDLE_LOCAL_SIZE"] == "3" and of["PADDLE_DISTRI_BACKEND"] == "gloo"
    assert len(set(of["PADDLE_TRAINER_ENDPOINTS"].split(","))) == 3
    assert of["PADDLE_TRAINER_ENDPOINTS"].split(",")[0] == of["PADDLE_MASTER"] == of["PADDLE_CURRENT_ENDPOINT"]
    with_gpus = processes._place(1, ["a:1", "a:2"], gpus=True)
    assert with_gpus["FLAGS_selected_gpus"] == "1" and "PADDLE_DISTRI_BACKEND" not in with_gpus


FAILED = 'report(ended="failed", kind="DataError", text="P0001.jpg: the file is empty")'
UNEXPECTED = 'report(ended="unexpected", text="unexpected RuntimeError: connection closed")'


@pytest.mark.parametrize(
    "first, second, kind, text",
    [
        (FAILED, "time.sleep(99)", errors.DataError, "P0001.jpg: the file is empty"),
        ("time.sleep(99)", FAILED, errors.DataError, "P0001.jpg: the file is empty"),
        (UNEXPECTED, "time.sleep(0.2); " + FAILED, errors.DataError, "P0001.jpg"),  # the cause, not what followed
        ("os.kill(os.getpid(), 9)", UNEXPECTED, errors.RunError, "process 0 of 2 was ended by SIGKILL"),
        (UNEXPECTED, "print('no memory', file=sys.stderr); os._exit(3)", errors.RunError, "with exit code 3\n  no mem"),
        ("time.sleep(99)", UNEXPECTED, errors.RunError, "process 1 of 2: unexpected RuntimeError"),
    ],
)
def test_a_failure_ends_all_with_one_error(monkeypatch, tmp_path, first, second, kind, text) -> None:
    fake(monkeypatch, tmp_path, f"if rank == 0:\n {first}\nelse:\n {second}")
    started = time.monotonic()
    with pytest.raises(kind) as caught:
        go()
    assert text in str(caught.value) and type(caught.value) is kind
    assert time.monotonic() - started < 10 and alive(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_passed_on_once(monkeypatch, tmp_path, number) -> None:
    """Each stops at its leisure; the slowest, which saves, is waited for."""
    code = """
if rank == 0:
    while not os.path.exists(pids + "/pid1"):
        time.sleep(0.01)
    os.kill(os.getppid(), int(number))
assert os.read(0, 100) == b"stop\\n"
time.sleep(0.4 * (1 - rank))
open(pids + f"/saved{rank}", "x")
report(ended="stopped", text="stopped; the state is saved")
"""
    fake(monkeypatch, tmp_path, f"pids, number = {str(tmp_path)!r}, {int(number)}\n{code}")
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(errors.Stopped, match="the state is saved"):
        go()
    assert (tmp_path / "saved0").exists() and (tmp_path / "saved1").exists() and alive(tmp_path) == []
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers


def test_a_second_signal_ends_what_does_not_stop(monkeypatch, tmp_path) -> None:
    code = """
if rank == 1:
    for _ in range(2):
        os.kill(os.getppid(), signal.SIGINT)
        time.sleep(0.3)
time.sleep(99)
"""
    fake(monkeypatch, tmp_path, code)
    with pytest.raises(KeyboardInterrupt):
        go()
    assert alive(tmp_path) == []


@pytest.mark.parametrize(
    "error, end",
    [
        (errors.Stopped("stopped", do="x"), {"ended": "stopped", "text": "stopped\n  fix        x"}),
        (
            errors.DataError("empty", where="y"),
            {"ended": "failed", "kind": "DataError", "text": "empty\n  path       y"},
        ),
        (KeyboardInterrupt(), {"ended": "interrupted"}),
        (
            ValueError("z"),
            {"ended": "unexpected", "text": "unexpected ValueError: z\n  fix        run again with --debug"},
        ),
    ],
)
def test_how_a_worker_tells_its_end(monkeypatch, error, end) -> None:
    def fail(job):
        raise error

    monkeypatch.setattr(worker, "_train", fail)
    assert worker._end_of({"debug": False}) == end
    if end["ended"] in ("failed", "unexpected"):
        assert "Traceback" in worker._end_of({"debug": True})["text"]


def test_a_worker_reads_its_job_and_no_further() -> None:
    """A stop that comes at once is not lost in what was read ahead."""
    reading, writing = os.pipe()
    os.write(writing, b'{"a": 1}\nstop\n')
    assert worker._line(reading) == b'{"a": 1}\n' and os.read(reading, 100) == b"stop\n"
    os.write(writing, b'{"a"')
    os.close(writing)
    with pytest.raises(SystemExit):
        worker._line(reading)
    os.close(reading)


# --- real runs ---------------------------------------------------------------------------------------


def wait_for(what, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def start(*arguments: object) -> subprocess.Popen:
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*PROGRAM, *map(str, arguments)]
    return subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def children(pid: int) -> list[int]:
    return [int(text) for text in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def running(pid: int) -> bool:
    """Whether a process is there, and not one that has ended and that nobody has asked about."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


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
    output, said = process.communicate(timeout=120)
    return folder, subprocess.CompletedProcess([], process.returncode, output, said)


def arguments(folder: Path, name: str) -> list:
    return ["--recipe", folder / "recipe.json", "--data-root", folder / "palm", "--output", folder / name]


def test_two_processes_one_run(whole) -> None:
    folder, done = whole
    assert done.returncode == 0, done.stderr
    assert "2 processes share each batch of 4; batch-norm statistics are each process's own" in done.stderr
    assert [line.split()[1] for line in done.stderr.splitlines() if line.startswith("epoch ")] == ["1/3", "2/3", "3/3"]
    assert done.stdout.count("val: 7 images") == 1 and "best epoch" in done.stdout
    assert "FLAGS" not in done.stderr + done.stdout
    assert json.loads((folder / "whole" / "environment.json").read_text())["processes"] == 2
    assert {path.name for path in folder.iterdir()} == {
        "images",
        "palm",
        "recipe.json",
        "whole",
    }  # no logs of a launcher
    assert len(steps(folder / "whole").splitlines()) == 1 + 3 * 4


def test_interrupted_and_resumed_it_is_the_same_run(whole) -> None:
    """SIGTERM to the command saves in the middle of an epoch; --resume knows the number of processes."""
    folder, _ = whole
    process = start(*arguments(folder, "parts"), "--processes", 2)
    wait_for(lambda: (folder / "parts" / "history.csv").exists() or process.poll() is not None)
    workers = children(process.pid)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1 and len(workers) == 2 and not any(map(running, workers))
    assert said.count("Stopped: stopped; the state is saved") == 1 and "--resume" in said, said
    assert "Traceback" not in said and "Error" not in said
    facts = json.loads((folder / "parts" / "data.json").read_text())
    with pytest.raises(errors.RunError, match="processes: 2 then, 1 now"):
        rundir.refuse_changes(folder / "parts", facts, 1, force=False)
    rundir.refuse_changes(folder / "parts", facts, 1, force=True)
    resumed = start("--resume", folder / "parts")
    _, said = resumed.communicate(timeout=120)
    assert resumed.returncode == 0 and "resumed after" in said, said
    assert steps(folder / "parts") == steps(folder / "whole")
    for name in ("history.csv", "PALM.pdparams", "predictions_val.csv"):
        assert (folder / "parts" / name).read_bytes() == (folder / "whole" / name).read_bytes(), name


@pytest.mark.slow
def test_a_killed_process_ends_the_run(whole) -> None:
    folder, _ = whole
    process = start(*arguments(folder, "killed"), "--processes", 2)
    wait_for(lambda: (folder / "killed" / "recipe.json").exists() or process.poll() is not None)
    first, second = children(process.pid)
    os.kill(second, signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1 and not running(first)
    assert "RunError: process 1 of 2 was ended by SIGKILL" in said and "Traceback" not in said, said


@pytest.mark.slow
def test_processes_outlive_no_command(whole) -> None:
    """Where the command itself is killed, the processes save, as on Ctrl-C, and go."""
    folder, _ = whole
    process = start(*arguments(folder, "orphans"), "--processes", 2)
    wait_for(lambda: (folder / "orphans" / "recipe.json").exists() or process.poll() is not None)
    workers = children(process.pid)
    process.kill()
    process.communicate()
    wait_for(lambda: not any(map(running, workers)))
    assert (folder / "orphans" / "last" / "state.safetensors").exists()


@pytest.mark.slow
def test_a_damaged_image_is_told_once(whole) -> None:
    folder, _ = whole
    root = fakes.palm_tree(folder / "damaged")
    (root / "PALM-Training400" / "P0001.jpg").write_bytes(b"")
    process = start("--recipe", folder / "recipe.json", "--data-root", root, "--processes", 2, "--output", folder / "x")
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1 and said.count("P0001.jpg: the file is empty") == 1 and "Traceback" not in said


def test_a_frozen_network_trains_as_in_one_process(whole, tmp_path) -> None:
    """Without batch norm in training: the same figures; the features are computed once, by process 0."""
    folder, _ = whole
    recipe = fakes.recipe(model="resnet18", freeze=True, cache_views=1, flip=0.5, epochs=1, batch_size=4)
    (tmp_path / "recipe.json").write_text(json.dumps(recipe.to_json()))
    root = ["--data-root", folder / "palm", "--output", tmp_path / "2" / "run"]
    process = start("--recipe", tmp_path / "recipe.json", *root, "--processes", 2)
    train(recipe, folder / "palm", tmp_path / "1" / "run", Options("cpu", 0, say=lambda line: None))
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    one, two = (steps(tmp_path / count / "run").splitlines()[1:] for count in "12")
    for a, b in zip(one, two):
        assert [float(x) for x in a.split(",")] == pytest.approx([float(x) for x in b.split(",")], rel=1e-4)
    names = [{path.name for path in (tmp_path / count / "features").iterdir()} for count in "12"]
    assert names[0] == names[1] and len(names[0]) == 2


@pytest.mark.parametrize("value", ["0", "-1", "two", ""])
def test_wrong_numbers(value, capsys) -> None:
    from paddle_medcls.commands.train import main

    with pytest.raises(SystemExit) as caught:
        main(["--dataset", "palm", "--processes", value])
    assert caught.value.code == 2 and "auto" in capsys.readouterr().err
