"""Two nodes of two processes each, on this machine: training, stopping, resuming, and what a failure of one prints."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import fakes
import numpy as np
import pytest
import toynet

from paddle_medcls.data.datasets import load_index
from paddle_medcls.models.weights import read_weights
from paddle_medcls.training.loop import Options, train

pytestmark = pytest.mark.slow

MINUTE = 60


class Nodes:
    """Two calls of Paddle's launcher, each in a folder of its own, as on two machines without shared storage."""

    def __init__(self, folder: Path, program: Path, *arguments: list[object], environ: dict | None = None) -> None:
        self.folders = [folder / "node0", folder / "node1"]
        self.launchers, self.workers = [], []
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            master = f"127.0.0.1:{free.getsockname()[1]}"
        for rank, own in enumerate(self.folders):
            own.mkdir(parents=True, exist_ok=True)
            command = [sys.executable, "-m", "paddle.distributed.launch", "--master", master, "--nnodes", 2]
            command += ["--rank", rank, "--nproc_per_node", 2, "--log_dir", "log", program]
            command += arguments[rank if len(arguments) > 1 else 0]
            with open(own / "console", "wb") as console:
                process = subprocess.Popen(
                    list(map(str, command)),
                    cwd=own,
                    env={**os.environ, "OMP_NUM_THREADS": "1", **(environ or {})},
                    stdout=console,
                    stderr=console,
                    start_new_session=True,
                )
            self.launchers.append(process)

    def __enter__(self) -> Nodes:
        return self

    def __exit__(self, *_: object) -> None:
        for rank in (0, 1):
            self.signal(rank, signal.SIGKILL)
            self.launchers[rank].wait()

    def processes(self, rank: int) -> list[int]:
        """The launcher of a node and those that it has started."""
        pid = self.launchers[rank].pid
        if self.launchers[rank].poll() is not None:
            return []
        return [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]

    def signal(self, rank: int, number: int) -> None:
        """Sends a signal to a whole node, as when its machine fails."""
        for pid in self.processes(rank):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def until(self, epoch: int) -> None:
        """Waits for an epoch of training."""
        deadline = time.monotonic() + 150
        while f"epoch   {epoch}/" not in self.console(0):
            assert time.monotonic() < deadline and self.launchers[0].poll() is None, self.console(0)
            time.sleep(0.1)

    def console(self, rank: int) -> str:
        return (self.folders[rank] / "console").read_text(errors="replace")

    def said(self, rank: int) -> str:
        """What the first process of a node has printed; the launcher repeats the end of it."""
        return (self.folders[rank] / "log" / f"workerlog.{0}").read_text(errors="replace")

    def wait(self, seconds: float, *ranks: int) -> list[int]:
        """The exit codes of the nodes."""
        deadline = time.monotonic() + seconds
        return [self.launchers[rank].wait(max(0.1, deadline - time.monotonic())) for rank in ranks or (0, 1)]


def column(path: Path, name: str) -> list[float]:
    return [float(row[name]) for row in csv.DictReader(path.read_text().splitlines())]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Data of two nodes, the same, and recipes."""
    folder = tmp_path_factory.mktemp("nodes")
    for rank in (0, 1):
        fakes.palm_tree(folder / f"palm{rank}", pathologic=7, normal=4, myopic=2)
    recipe = fakes.recipe(model="resnet18", epochs=3, batch_size=4, lr=0.01, flip=0.5)
    (folder / "recipe.json").write_text(json.dumps(recipe.to_json()))
    return folder


def resnet(folder: Path, rank: int, *more: object) -> list[object]:
    return ["--recipe", folder / "recipe.json", "--data-root", folder / f"palm{rank}", *more]


TRAIN = fakes.TOOLS / "train.py"


@pytest.fixture(scope="module")
def complete(folder: Path) -> Path:
    """The run directory of a training of both nodes that nothing interrupted, and no --output named."""
    with Nodes(folder / "complete", TRAIN, resnet(folder, 0), resnet(folder, 1)) as nodes:
        assert nodes.wait(240) == [0, 0], nodes.console(0) + nodes.console(1)
        assert "4 processes share each batch of 4" in nodes.said(0) and nodes.said(0).count("epoch   3/3") == 1
        assert nodes.said(0).count("val: 7 images") == 1 and "best epoch" in nodes.said(0)
        assert nodes.said(1) == ""
    (run,) = [path for path in (nodes.folders[0] / "runs").iterdir() if path.name != "images"]
    assert [path.name for path in (nodes.folders[1] / "runs").iterdir()] == ["images"]  # each its own cache
    return run


def test_two_nodes_one_run(complete: Path) -> None:
    """Every image of the validation split is counted once; the run knows how many processes it had."""
    metrics = json.loads((complete / "metrics.json").read_text())
    assert metrics["n"] == 7 and sum(map(sum, metrics["confusion"])) == 7
    assert json.loads((complete / "environment.json").read_text())["processes"] == 4
    ids = [row["id"] for row in csv.DictReader((complete / "predictions_val.csv").read_text().splitlines())]
    assert len(ids) == len(set(ids)) == 7


def test_gradients_equal_those_of_one_process(tmp_path: Path) -> None:
    """To 1e-6: one step with a learning rate of 1, so that weights differ by what gradients do; no batch norm.

    13 images for 4 processes are unequal shares.
    """
    root = fakes.palm_tree(tmp_path / "palm", pathologic=7, normal=4, myopic=2)
    recipe = fakes.recipe(model="toy_plain", epochs=1, batch_size=13, lr=1.0, weight_decay=0.0, flip=0.5)
    (tmp_path / "recipe.json").write_text(json.dumps(recipe.to_json()))
    arguments = [tmp_path / "recipe.json", root, tmp_path / "two"]
    with Nodes(tmp_path, Path(toynet.__file__), arguments) as nodes:
        assert nodes.wait(200) == [0, 0], nodes.console(0) + nodes.console(1)
    train(recipe, root, tmp_path / "one", Options("cpu", 1, say=lambda line: None))
    one, two = (read_weights(tmp_path / run / "PALM.pdparams") for run in ("one", "two"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        np.testing.assert_allclose(two[name], value, rtol=0, atol=1e-6, err_msg=name)
    assert column(tmp_path / "one" / "steps.csv", "lr") == [1.0]
    val = load_index("palm", root, "val")
    assert json.loads((tmp_path / "two" / "metrics.json").read_text())["n"] == len(val) == 7


def test_stopped_on_one_node_and_resumed(folder: Path, complete: Path) -> None:
    """SIGTERM to the launcher of the second node; the same number of processes goes on to the same bits."""
    here, run = folder / "stopped", folder / "stopped" / "run"
    output = ["--output", run]
    with Nodes(here, TRAIN, resnet(folder, 0, *output), resnet(folder, 1, *output)) as nodes:
        nodes.until(1)
        nodes.launchers[1].send_signal(signal.SIGTERM)
        assert nodes.wait(MINUTE)[0] == 1
        line = f"interrupted; state saved in {run}; resume with: python -m paddle.distributed.launch … python tools/"
        for rank in (0, 1):
            assert nodes.said(rank).splitlines()[-1].startswith(line), nodes.said(rank)
            assert "Error" not in nodes.said(rank)
    one_node = [sys.executable, TRAIN, "--resume", run, "--processes", 2]
    done = subprocess.run(list(map(str, one_node)), capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "processes: 4 then, 2 now" in done.stderr, done.stderr
    with Nodes(here / "again", TRAIN, ["--resume", run]) as nodes:
        assert nodes.wait(240) == [0, 0], nodes.console(0) + nodes.console(1)
        assert "resumed after" in nodes.said(0)
    for name in ("steps.csv", "history.csv", "PALM.pdparams", "predictions_val.csv"):
        assert (run / name).read_bytes() == (complete / name).read_bytes(), name


@pytest.mark.parametrize(("victim", "number"), [(1, signal.SIGKILL), (0, signal.SIGKILL), (0, signal.SIGSTOP)])
def test_a_lost_node_ends_the_other(folder: Path, tmp_path: Path, victim: int, number: int) -> None:
    """SIGSTOP is a machine that is off: nothing closes its connections."""
    with Nodes(tmp_path, TRAIN, resnet(folder, 0, "--epochs", 99), resnet(folder, 1, "--epochs", 99)) as nodes:
        nodes.until(1)
        nodes.signal(victim, number)
        assert nodes.wait(MINUTE, 1 - victim) != [0]
        said = nodes.said(1 - victim)
    first = 2 * victim
    assert re.search(rf"RunError: process ({first}|{first + 1}) of 4, on [^ ]+, was killed, or its machine", said), said
    assert said.count("RunError") == 1 and "gloo" not in said and "Traceback" not in said


def test_other_images_on_one_node(folder: Path, tmp_path: Path) -> None:
    """Before the first step; both nodes print the same error."""
    root = fakes.palm_tree(tmp_path / "palm", pathologic=7, normal=4, myopic=2)
    fakes.write_image(root / "PALM-Validation400" / "V0003.jpg", fakes.pixels(99))
    (root / "PALM-Training400" / "P0007.jpg").unlink()
    with Nodes(tmp_path, TRAIN, resnet(folder, 0), ["--recipe", folder / "recipe.json", "--data-root", root]) as nodes:
        assert nodes.wait(120) == [1, 1], nodes.console(0) + nodes.console(1)
        for rank in (0, 1):
            said = nodes.said(rank)
            assert said.count("RunError: the processes of this run do not begin with the same") == 1, said
            assert re.search(r"process 2 of 4, on \S+: train split: 12 images, fingerprint \w+, not 13 images", said)
            assert re.search(r"process 3 of 4, on \S+: val pixels: ", said)
    assert not list(tmp_path.rglob("steps.csv"))


def test_a_damaged_image_on_one_node(folder: Path, tmp_path: Path) -> None:
    """The first process of the second node finds it; all print it, and which process found it."""
    root = fakes.palm_tree(tmp_path / "palm", pathologic=7, normal=4, myopic=2)
    (root / "PALM-Training400" / "P0001.jpg").write_bytes(b"")
    with Nodes(tmp_path, TRAIN, resnet(folder, 0), ["--recipe", folder / "recipe.json", "--data-root", root]) as nodes:
        assert nodes.wait(120) == [1, 1], nodes.console(0) + nodes.console(1)
        assert re.search(r"P0001.jpg: the file is empty\n(.*\n)*  process 2 of 4, on \S+\n$", nodes.said(0)), (
            nodes.said(0)
        )
        assert nodes.said(1).count("P0001.jpg: the file is empty") == 1
        assert "Traceback" not in nodes.said(0) + nodes.said(1)
