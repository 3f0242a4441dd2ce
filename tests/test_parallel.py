"""Several trainings at a time, in processes and in a cluster: how each may end, and that all of them give the same."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import jobs_of_tests as work
import numpy as np
import pytest
from fakes import ROOT, palm_tree, recipe

from paddle_medcls.cli import reproduce as command
from paddle_medcls.cli import train as train_command
from paddle_medcls.core.errors import DataError, RunError, SetupError, Stopped
from paddle_medcls.core.files import locked_folder, sha256
from paddle_medcls.data.index import SYNTHETIC_MARK
from paddle_medcls.data.sample import draw_npz
from paddle_medcls.training import folds, jobs, parallel, places, reproduce
from paddle_medcls.training.folds import train_folds
from paddle_medcls.training.grid import Cell, Grid, plan
from paddle_medcls.training.jobs import Job, run_job
from paddle_medcls.training.loop import Options
from paddle_medcls.training.parallel import Parallel, run_jobs
from paddle_medcls.training.reproduce import run_grid
from paddle_medcls.training.run_directory import write_timing


def job(folder: Path, name: str, function: object, *arguments: object) -> Job:
    return Job(folder / name, folder, 1, function, arguments)


def ends(jobs: list[Job], count: int, **options: object) -> dict[str, str]:
    """The error of each job that has ended, by name."""
    quiet = Options("cpu", say=lambda line: None, **options)
    return {one.name: error for one, error in run_jobs(jobs, Parallel(count), quiet, Path())}


# --- how a job ends --------------------------------------------------------------------------------


def test_a_job_that_fails_or_dies_does_not_stop_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    several = [
        job(tmp_path, "nan", work.fail, "nan"),
        job(tmp_path, "bug", work.fail, "bug"),
        job(tmp_path, "dies", work.die_until, tmp_path / "once", 1),
        job(tmp_path, "dead", work.die_until, tmp_path / "always", 9),
        job(tmp_path, "good", work.note, tmp_path / "good.txt"),
    ]
    found = ends(several, 2)
    assert found["nan"] == "RunError: the loss is nan\n  fix        lower --lr"
    assert found["bug"] == "unexpected ValueError: a bug; log.txt has its traceback"
    assert "in fail" in (tmp_path / "bug" / "log.txt").read_text()
    assert found["dies"] == found["good"] == "" and (tmp_path / "once").read_text() == "xx"
    assert found["dead"].startswith("its process ended with exit code -9, 3 times")
    assert (tmp_path / "always").read_text() == "xxx" and (tmp_path / "good.txt").read_text() == "x"
    assert "dies: its process ended with exit code -9; it is resumed" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_begins_no_more(tmp_path: Path) -> None:
    """The next training would meet it too; on a cluster one such node would fail all that wait."""
    several = [job(tmp_path, "full", work.fill_the_disk)]
    several += [job(tmp_path, f"{k}", work.note, tmp_path / "later") for k in range(5)]
    found = ends(several, 1)
    assert list(found) == ["full"] and "No space left on device" in found["full"]


def test_errors_of_a_training(tmp_path: Path) -> None:
    def fault(error: BaseException) -> tuple[str, str]:
        def function() -> None:
            raise error

        return run_job(job(tmp_path, "a", function))

    assert run_job(job(tmp_path, "a", lambda: None)) == ("done", "")
    assert fault(Stopped("x")) == fault(KeyboardInterrupt()) == ("stopped", "")
    assert fault(SetupError("no GPU"))[0] == fault(OSError(28, "full"))[0] == "machine"
    assert fault(RunError("x"))[0] == fault(ValueError("x"))[0] == "failed"


def test_a_training_waits_for_the_lock_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a process that still saves its state, or of a machine that died, which a network disk releases later."""
    monkeypatch.setattr(os, "dup2", lambda *_: None)  # the output stays that of the tests
    one, locked = job(tmp_path, "a", work.note, tmp_path / "a.txt"), threading.Event()

    def hold() -> None:
        with locked_folder(one.directory, "trains there", jobs.LOCK):
            locked.set()
            time.sleep(0.3)

    thread = threading.Thread(target=hold)
    thread.start()
    locked.wait()
    with monkeypatch.context() as patch:
        patch.setattr(jobs, "LOCK_SECONDS", -1)
        kind, message = jobs.run_logged(one, os.getcwd())
        assert kind == "failed" and "another process trains there" in message
    assert jobs.run_logged(one, os.getcwd()) == ("done", "") and (tmp_path / "a.txt").read_text() == "x"
    thread.join()
    kind, message = jobs.run_logged(one, str(tmp_path / "none"))
    assert kind == "machine" and "No such file" in message


def interrupt_when(files: list[Path]) -> None:
    """Presses Ctrl-C when these files are there."""
    until = time.monotonic() + 60
    while not all(file.exists() for file in files) and time.monotonic() < until:
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_saves_all_states(tmp_path: Path) -> None:
    several = [job(tmp_path, f"{k}", work.work_until_stopped, tmp_path / f"{k}.txt") for k in range(3)]
    thread = threading.Thread(target=interrupt_when, args=([tmp_path / f"{k}.txt" for k in (0, 1)],))
    thread.start()
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Stopped, match="interrupted in 0, 1; the state is saved"):
        ends(several, 2)
    thread.join()
    assert all((tmp_path / f"{k}.txt").read_text().endswith("saved") for k in (0, 1))
    assert not (tmp_path / "2.txt").exists()
    assert signal.getsignal(signal.SIGINT) is before


def test_the_deadline_ends_jobs_as_ctrl_c_does(tmp_path: Path) -> None:
    several = [job(tmp_path, f"{k}", work.work_until_stopped, tmp_path / f"{k}.txt") for k in range(2)]
    assert ends(several, 1, deadline=time.monotonic() + 2) == {}
    assert not (tmp_path / "1.txt").exists()


def test_jobs_end_with_a_command_that_is_killed(tmp_path: Path) -> None:
    code = (
        "from test_parallel import *\n"
        f"if __name__ == '__main__':\n path = Path({str(tmp_path)!r})\n"
        " ends([job(path, 'a', work.work_until_stopped, path / 'a.txt')], 1)\n"
    )
    (tmp_path / "program.py").write_text(code)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    process = subprocess.Popen([sys.executable, str(tmp_path / "program.py")], env=environment)
    until = time.monotonic() + 60
    while not (tmp_path / "a.txt").exists() and time.monotonic() < until:
        time.sleep(0.05)
    process.kill()
    process.wait()
    while not (tmp_path / "a.txt").read_text().endswith("saved") and time.monotonic() < until:
        time.sleep(0.05)
    assert (tmp_path / "a.txt").read_text().endswith("saved")


# --- cores and GPUs --------------------------------------------------------------------------------


def test_processes_share_the_cores_or_have_a_gpu_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "_gpus", lambda: ["3", "GPU-5"])
    monkeypatch.setattr(places, "usable_cores", lambda: 9)
    monkeypatch.setattr(places, "NOTES", [])
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    several = [job(tmp_path, f"{k}", work.tell_environment, tmp_path / f"{k}.txt") for k in range(2)]
    options = Options("auto", say=lambda line: None)
    assert [error for _, error in run_jobs(several, Parallel(2), options, tmp_path)] == ["", ""]
    texts = sorted((tmp_path / f"{k}.txt").read_text() for k in range(2))
    assert texts == [f"4 3 {os.getcwd()}", f"4 GPU-5 {os.getcwd()}"]
    assert "OMP_NUM_THREADS" not in os.environ and "CUDA_VISIBLE_DEVICES" not in os.environ
    with pytest.raises(SetupError, match="--parallel 3: each needs a GPU, and there are 2"):
        places.Processes(3, "auto")
    assert places.Processes(3, "cpu").threads == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert places.Processes(3, "cpu").threads == 5  # the user's choice
    monkeypatch.setattr(places, "NOTES", ["OMP_NUM_THREADS=5"])  # not the user's, but all cores
    assert places.Processes(3, "cpu").threads == 3


# --- the display -----------------------------------------------------------------------------------


def test_the_line_of_the_display(tmp_path: Path) -> None:
    """Two epochs of 4 are done in 6 s each, and one of another kind in 2 s: 2 x 6 + 3 x 2 + 4 x 4 = 34 s for two."""

    class Bar:
        n, text = 0, ""

        def set_description_str(self, text: str, refresh: bool) -> None:
            self.text = text

        def update(self, n: int) -> None:
            self.n += n

    futures = {}
    for name, rows in (("a", [[1, 5, 100, 0, 6], [2, 5, 110, 0, 6]]), ("b", [[1, 1, 900, 0, 2]]), ("c", [])):
        one = Job(tmp_path / name, tmp_path, 4, print, ())
        for row in rows:
            write_timing(one.directory, row)
        future: Future = Future()
        if rows:
            future.set_running_or_notify_cancel()
        futures[future] = one
    bar, timing = Bar(), {}
    parallel._show(bar, futures, 5, timing)
    assert bar.text == "runs: 1 waiting, 2 running, 5 done; 1,010 images/s, 0:00:17 left" and bar.n == 3
    write_timing(tmp_path / "b", [2, 1, 700, 0, 2])
    parallel._show(bar, futures, 5, timing)
    assert "810 images/s, 0:00:16 left" in bar.text and bar.n == 4


# --- grids -----------------------------------------------------------------------------------------


def test_two_commands_do_not_run_one_grid(root: Path, tmp_path: Path) -> None:
    cells = plan(Grid("medmnist", 1, sets=("breast",), models=("toy",)), tmp_path / "grid", root)
    with locked_folder(tmp_path / "grid", "runs this grid", jobs.LOCK):
        with pytest.raises(RunError, match="grid: another process runs this grid"):
            run_grid(cells, tmp_path / "grid", Options("cpu"), Parallel(2))
    assert not cells[0].folder.exists()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / SYNTHETIC_MARK).touch()
    draw_npz("breastmnist", folder, counts=(8, 8, 8))
    return folder


def test_a_cell_that_fails(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """The other cells go on; the command ends with the reason, after the table. The next one runs it again."""

    def run_cell(cell: Cell, options: Options) -> None:
        if cell.recipe.seed == 1:
            raise RunError("the loss is nan", fix="lower --lr")
        row = {"recipe": cell.recipe.name, "auc": 0.9, "accuracy": 0.8, "split": "test", "note": ""}
        reproduce.write_json(cell.folder / "cell.json", row | {"parameters": 1e6, "minutes": 1.0})

    monkeypatch.setattr(reproduce, "_run_cell", run_cell)
    words = ["--suite", "medmnist", "--sets", "breast", "--models", "resnet18", "--data-root", str(root)]
    words += ["--output", str(tmp_path / "grid"), "--device", "cpu", "--results", str(tmp_path / "results")]
    assert command.main(words) == 1
    said = capsys.readouterr()
    assert "2 of 3 runs are done" in said.out and "Not run: medmnist-breastmnist-resnet18-seed1" in said.out
    assert "1 of 3 runs failed\n  medmnist-breastmnist-resnet18-seed1: RunError: the loss is nan\n" in said.err
    monkeypatch.setattr(reproduce, "_run_cell", lambda cell, options: run_cell(replace_seed(cell), options))
    assert command.main(words) == 0
    monkeypatch.setattr(reproduce, "_run_cell", full_disk)
    words[-1] = str(tmp_path / "other")
    words[words.index("--output") + 1] = str(tmp_path / "full")
    assert command.main(words) == 1
    assert capsys.readouterr().err.count("No space left") == 1  # one error, and not one for each cell


def replace_seed(cell: Cell) -> Cell:
    return replace(cell, recipe=cell.recipe.replace(seed=0))


def full_disk(cell: Cell, options: Options) -> None:
    raise SetupError("cannot write: No space left on device")


def without_minutes(output: Path) -> tuple[list[dict], list[str]]:
    """`results.csv` and `table.md`, but for the time that a run took."""
    with open(output / "results.csv", encoding="utf-8") as file:
        rows = [{**row, "minutes": ""} for row in csv.DictReader(file)]
    lines = (output / "table.md").read_text().splitlines()
    return rows, [line.rpartition(" | ")[0] if line.startswith("| breast") else line for line in lines]


def test_a_grid_in_processes_gives_the_same_table(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of them is killed at its third step."""
    options = Options("cpu", 0, say=lambda line: None)
    grid = Grid("medmnist", 2, sets=("breast",), models=("toy",), epochs=4)
    cells = plan(grid, tmp_path / "one", root)
    assert run_grid(cells, tmp_path / "one", options) == ([], {})
    monkeypatch.setattr(reproduce, "_run_cell", work.cell)
    cells = plan(grid, tmp_path / "two", root)
    assert run_grid(cells, tmp_path / "two", options, Parallel(2)) == ([], {})
    assert without_minutes(tmp_path / "one") == without_minutes(tmp_path / "two")
    assert (cells[1].folder / "begun").exists() and "epoch   4/4" in (cells[1].folder / "log.txt").read_text()


def test_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert parallel.chosen(None, None) is parallel.chosen(1, None) is None
    assert parallel.chosen(3, None) == Parallel(3) and parallel.chosen(None, "auto") == Parallel(None, "auto")
    for count in ("0", "-1", "two"):
        with pytest.raises(SystemExit):
            command.main(["--suite", "palm", "--parallel", count])
    assert train_command.main(["--dataset", "palm", "--parallel", "2"]) == 1
    assert "add --folds K" in capsys.readouterr().err
    assert train_command.main(["--dataset", "palm", "--folds", "2", "--parallel", "2", "--processes", "2"]) == 1
    assert "leave --processes out" in capsys.readouterr().err


def test_a_row_of_runs_with_different_images_is_refused(root: Path, tmp_path: Path) -> None:
    """As on machines with copies of their own; each run alone looks right."""
    cells = plan(Grid("medmnist", 3, sets=("breast",), models=("toy",), epochs=1), tmp_path / "grid", root)
    options = Options("cpu", 0, say=lambda line: None)
    run_grid(cells[:2], tmp_path / "grid", options)
    arrays = dict(np.load(root / "breastmnist.npz"))
    arrays["train_images"][0, 0, 0] ^= 1
    np.savez(root / "breastmnist.npz", **arrays)
    with pytest.raises(DataError, match="different images") as caught:
        run_grid(cells, tmp_path / "grid", options)
    assert f"\n  {cells[0].name}, {cells[1].name}\n  {cells[2].name}\n" in str(caught.value)


# --- folds -----------------------------------------------------------------------------------------


def test_folds_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one after the other, byte for byte; a fold that failed is trained by the next command, and only that one."""
    lines: list[str] = []
    options = Options("cpu", 0, image_cache="off", say=lines.append)
    data, toy = palm_tree(tmp_path / "data"), recipe(epochs=1)
    train_folds(toy, 2, data, tmp_path / "one", options)
    begun = []

    def run_here(jobs: list[Job], *_: object) -> Iterator[tuple[Job, str]]:
        for one in jobs:
            begun.append(one.name)
            yield one, run_job(one)[1] if len(begun) > 1 else "RunError: the loss is nan"

    monkeypatch.setattr(folds, "run_jobs", run_here)
    with pytest.raises(RunError, match=r"1 fold\(s\) failed\n  fold1: RunError: the loss is nan\n.* --resume"):
        train_folds(toy, 2, data, tmp_path / "two", options, Parallel(2))
    assert not (tmp_path / "two" / "metrics.json").exists()
    train_folds(toy, 2, data, tmp_path / "two", options, Parallel(2))
    assert begun == ["fold1", "fold2", "fold1"] and "fold 1 of 2: finished earlier" not in lines
    for name in ("metrics.json", "predictions_val.csv", "fold1/PALM.pdparams", "fold2/history.csv"):
        assert sha256(tmp_path / "one" / name) == sha256(tmp_path / "two" / name), name


def test_interrupted_folds_say_how_to_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> Iterator[tuple[Job, str]]:
        raise parallel.interrupted_in(["fold1"])
        yield

    monkeypatch.setattr(folds, "run_jobs", stop)
    with pytest.raises(Stopped, match=f"interrupted in fold1; the state is saved; .*--resume {tmp_path / 'cv'}$"):
        train_folds(recipe(), 2, palm_tree(tmp_path / "data"), tmp_path / "cv", Options("cpu"), Parallel(2))
