"""Two processes on the CPU (gloo) compute what one does, and count every image once."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import fakes
import numpy as np
import pytest
import toynet

from paddle_medcls.core.paddle_setup import paddle
from paddle_medcls.data.datasets import load_index
from paddle_medcls.models.network import Network
from paddle_medcls.models.weights import read_weights
from paddle_medcls.training import distributed
from paddle_medcls.training.distributed import from_first, pieces, synchronised_batch_norm
from paddle_medcls.training.loop import Options, train

# Without batch norm and dropout, whose results depend on how a batch is shared out. 13 images in
# batches of 4 leave a last batch of one, of which the second process has no share; 7 validation
# images in batches of 4 are an odd number of batches' rows.
RECIPE = fakes.recipe(model="toy_plain", epochs=2, batch_size=4, lr=0.05, class_weights="balanced", flip=0.5)


def launch(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Runs the toy program in two processes; all of them are ended, whatever happens."""
    command = [sys.executable, "-m", "paddle.distributed.launch", "--nproc_per_node=2"]
    command += ["--log_dir", str(tmp_path / "log"), toynet.__file__, *arguments]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=120)
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    logs = "".join(path.read_text() for path in sorted((tmp_path / "log").glob("workerlog.*")))
    return subprocess.CompletedProcess(command, process.returncode, output, logs)


def column(path: Path, name: str) -> list[float]:
    return [float(row[name]) for row in csv.DictReader(path.read_text().splitlines())]


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """Also where each accumulates its share in two pieces, exchanging gradients with the last alone."""
    root = fakes.palm_tree(tmp_path / "palm", pathologic=7, normal=4, myopic=2, val=7)
    (tmp_path / "pieces.json").write_text(json.dumps(RECIPE.replace(accumulate=2).to_json()))
    done = launch(tmp_path, str(tmp_path / "pieces.json"), str(root), str(tmp_path / "two"))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.stderr.count("epoch   2/2") == 1  # one process speaks
    alone = train(RECIPE, root, tmp_path / "one", Options("cpu", 1, say=lambda line: None)).metrics

    for name in ("loss", "accuracy", "lr"):  # of every step: the whole batch's, not a share's
        one, two = (column(tmp_path / run / "steps.csv", name) for run in ("one", "two"))
        assert len(one) == 8
        np.testing.assert_allclose(two, one, rtol=1e-4, atol=1e-6, err_msg=name)
    one, two = (read_weights(tmp_path / run / "PALM.pdparams") for run in ("one", "two"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        np.testing.assert_allclose(two[name], value, rtol=1e-4, atol=1e-6, err_msg=name)

    metrics = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert metrics["n"] == 7 and sum(map(sum, metrics["confusion"])) == 7
    for name in ("loss", "accuracy", "auc", "epoch"):
        assert metrics[name] == pytest.approx(alone[name], rel=1e-4), name
    val = load_index("palm", root, "val")
    rows = list(csv.reader((tmp_path / "two" / "predictions_val.csv").read_text().splitlines()))
    assert [row[0] for row in rows[1:]] == list(val.ids)
    probs = column(tmp_path / "one" / "predictions_val.csv", "pathologic")
    np.testing.assert_allclose(column(tmp_path / "two" / "predictions_val.csv", "pathologic"), probs, atol=1e-5)


def test_process_0_alone_works_for_all(monkeypatch) -> None:
    """What it makes is what the others get; they make nothing, and calls do not mix up."""
    store = fakes.Store()
    monkeypatch.setattr(paddle.base.core, "create_or_get_global_tcp_store", lambda: store)
    calls = list(range(4))
    monkeypatch.setattr(distributed, "_CALLS", iter(calls))
    made = [from_first(lambda: {"file": "ä", "x": 0.1 + 0.2}, 0, 2), from_first(lambda: None, 0, 2)]
    monkeypatch.setattr(distributed, "_CALLS", iter(calls))
    got = [from_first(lambda: 1 / 0, 1, 2), from_first(lambda: 1 / 0, 1, 2)]
    assert made == got == [{"file": "ä", "x": 0.1 + 0.2}, None]
    assert from_first(lambda: (1, 2), 0, 1) == (1, 2)  # alone: as it is


def test_shared_batch_norm_is_the_same_network(monkeypatch) -> None:
    """On GPUs the statistics are shared; names, values and parameters stay. On the CPU Paddle has no such kernel."""
    model = Network("toy_resnet", 3).build()
    assert synchronised_batch_norm(model, 2) is model and not _shared(model)
    before = {name: value.numpy().copy() for name, value in model.state_dict().items()}
    parameters = {name: id(value) for name, value in model.named_parameters()}
    monkeypatch.setattr(paddle, "get_device", lambda: "gpu:1")
    assert not _shared(synchronised_batch_norm(model, 1))
    model = synchronised_batch_norm(model, 2)
    assert _shared(model) == 9
    assert {name: id(value) for name, value in model.named_parameters()} == parameters
    assert list(model.state_dict()) == list(before)
    assert all(np.array_equal(value.numpy(), before[name]) for name, value in model.state_dict().items())


def _shared(model) -> int:
    return sum(isinstance(layer, paddle.nn.SyncBatchNorm) for layer in model.sublayers())


def test_shares_of_a_batch() -> None:
    """Every image once; a process without one gives its gradient the weight 0."""
    rows = np.array([5, 3, 9, 1, 7])
    [(first, part)], [(second, other)] = pieces(rows, 0, 2, 1), pieces(rows, 1, 2, 1)
    assert sorted([*first, *second]) == sorted(rows) and (part, other) == (0.6, 0.4)
    [(_, part)], [(nothing, other)] = pieces(rows[:1], 0, 2, 1), pieces(rows[:1], 1, 2, 1)
    assert (part, other) == (1.0, 0.0) and len(nothing) == 1
    for accumulate in (1, 2, 3, 9):
        cut = [piece for rank in (0, 1) for piece in pieces(rows, rank, 2, accumulate)]
        assert sorted(row for mine, _ in cut for row in mine) == sorted(rows)
        assert all(part == len(mine) / 5 for mine, part in cut)
