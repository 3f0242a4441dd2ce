"""A Ray cluster, which listens on 127.0.0.1: what is refused, what a node must have, and trainings in it."""

from __future__ import annotations

import functools
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jobs_of_tests as work
import pytest
from fakes import ROOT, pixels, write_image
from test_parallel import interrupt_when, job, without_minutes
from test_parallel import root as root  # a fixture
from test_predict import saved

from paddle_medcls.core import cluster
from paddle_medcls.core.errors import SetupError, Stopped
from paddle_medcls.data.image_files import ImageFiles
from paddle_medcls.deployment.predictor import Predictor
from paddle_medcls.deployment.sharded_prediction import Cluster, ShardOptions, predict_shards
from paddle_medcls.models.network import Network
from paddle_medcls.training import reproduce
from paddle_medcls.training.grid import Grid, plan
from paddle_medcls.training.loop import Options
from paddle_medcls.training.parallel import Parallel, run_jobs
from paddle_medcls.training.reproduce import run_grid

LOOPBACK = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A cluster of two nodes with one CPU each."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        for name, value in {**LOOPBACK, "RAY_TMPDIR": folder}.items():
            patch.setenv(name, value)
        pytest.importorskip("ray", reason="Ray is not installed")
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 80_000_000}
        nodes = Cluster(initialize_head=True, head_node_args=head)
        try:
            nodes.add_node(num_cpus=1, object_store_memory=80_000_000)
            yield nodes.address
        finally:
            nodes.shutdown()


def test_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SetupError, match="package ray, which is not installed"):
        cluster.connect("auto")


@pytest.mark.parametrize(
    "address", ["10.0.0.1", ":6379", "head:", "head:six", "ray://10.0.0.1:10001", "127.0.0.1:99999"]
)
def test_an_address_that_is_none(address: str) -> None:
    with pytest.raises(SetupError) as caught:
        cluster._knock(address)
    assert address in str(caught.value)


def test_an_address_that_does_not_answer() -> None:
    began = time.monotonic()
    with pytest.raises(SetupError, match="127.0.0.1:1 does not answer"):
        cluster._knock("127.0.0.1:1")
    assert time.monotonic() - began < 5


def test_a_folder_that_is_not_shared(tmp_path: Path) -> None:
    """Another machine has no such file, or another one under this path, or cannot write."""
    with cluster._probe(tmp_path / "out") as probe:
        assert cluster.probe_fault(probe.name) == ""
        other = tmp_path / "other" / Path(probe.name).name
        assert "cannot be read there: No such file" in cluster.probe_fault(str(other))
        other.parent.mkdir()
        other.write_text("another")
        assert "another content" in cluster.probe_fault(str(other))
    assert list((tmp_path / "out").iterdir()) == []


def test_a_disk_that_is_full_on_a_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**_: object) -> None:
        raise OSError(28, os.strerror(28))

    with cluster._probe(tmp_path) as probe:
        monkeypatch.setattr(tempfile, "TemporaryFile", full)
        assert cluster.probe_fault(probe.name) == f"cannot write in {tmp_path}: No space left on device"
        with pytest.raises(SetupError, match="No space left"):
            cluster._probe(tmp_path)


def test_nodes_are_checked(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = cluster.connect(address, [tmp_path / "out"])
    try:
        assert len(cluster.working_nodes(ray)) == 2 and list((tmp_path / "out").iterdir()) == []
        monkeypatch.setattr(cluster, "software", lambda: {"paddle_medcls": "0.1", "Paddle": "9", "Python": "3.99"})
        with pytest.raises(SetupError, match="differ from this machine") as caught:
            cluster._check_nodes(ray, [], [tmp_path / "images"])
        assert str(caught.value).count("here 0.1") == str(caught.value).count("here 3.99") == 2  # both nodes
        assert str(caught.value).count(f"there is no {tmp_path / 'images'}") == 2
    finally:
        ray.shutdown()


# --- trainings -------------------------------------------------------------------------------------


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The workers of a cluster import what the jobs of these tests need."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))


def test_jobs_in_a_cluster(address: str, importable: None, tmp_path: Path) -> None:
    several = [
        job(tmp_path, "dies", work.die_until, tmp_path / "once", 1),
        job(tmp_path, "nan", work.fail, "nan"),
        job(tmp_path, "tell", work.tell_environment, tmp_path / "told"),
    ]
    options = Options("cpu", say=lambda line: None)
    found = {one.name: error for one, error in run_jobs(several, Parallel(None, address), options, tmp_path)}
    assert found == {"dies": "", "tell": "", "nan": "RunError: the loss is nan\n  fix        lower --lr"}
    assert (tmp_path / "once").read_text() == "xx"
    assert (tmp_path / "told").read_text().split()[::2] == ["1", os.getcwd()]


@pytest.mark.slow
def test_ctrl_c_saves_all_states_in_a_cluster(address: str, importable: None, tmp_path: Path) -> None:
    several = [job(tmp_path, f"{k}", work.work_until_stopped, tmp_path / f"{k}.txt") for k in range(3)]
    thread = threading.Thread(target=interrupt_when, args=([tmp_path / f"{k}.txt" for k in (0, 1)],))
    thread.start()
    with pytest.raises(Stopped, match="interrupted in 0, 1; the state is saved"):
        list(run_jobs(several, Parallel(None, address), Options("cpu", say=lambda line: None), tmp_path))
    thread.join()
    assert all((tmp_path / f"{k}.txt").read_text().endswith("saved") for k in (0, 1))
    assert not (tmp_path / "2.txt").exists()


@pytest.mark.slow
def test_a_grid_in_a_cluster_gives_the_same_table(
    address: str, importable: None, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = Options("cpu", 0, say=lambda line: None)
    grid = Grid("medmnist", 4, ("medmnist", "medmnist_best"), ("breast",), ("toy",), epochs=4)
    assert run_grid(plan(grid, tmp_path / "one", root), tmp_path / "one", options) == ([], {})
    monkeypatch.setattr(reproduce, "_run_cell", work.cell)
    cells = plan(grid, tmp_path / "two", root)
    assert len(cells) == 8
    assert run_grid(cells, tmp_path / "two", options, Parallel(None, address)) == ([], {})
    assert without_minutes(tmp_path / "one") == without_minutes(tmp_path / "two")
    assert [cell.recipe.seed for cell in cells if (cell.folder / "begun").exists()] == [1, 1]  # killed once


# --- predictions -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_shards_in_a_cluster(address: str, importable: None, tmp_path: Path) -> None:
    for number in range(7):
        write_image(tmp_path / "images" / f"{number}.png", pixels(number))
    write_image(tmp_path / "images" / "4.png", pixels(0)).write_bytes(b"")
    opened = functools.partial(Predictor.from_weights, saved(tmp_path / "m", network=Network("resnet18", 3)))
    images, options = ImageFiles([str(tmp_path / "images")]), ShardOptions(2, "csv", workers=1)
    expected = predict_shards(opened(), images, tmp_path / "here", options)
    assert predict_shards(opened(), images, tmp_path / "out", options, Cluster(address, opened)) == expected == (6, 1)
    for path in (tmp_path / "here").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
