"""The connection to a Ray cluster: what is refused, and what a node must have. Those here listen on 127.0.0.1."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from paddle_medcls.core import cluster
from paddle_medcls.core.errors import SetupError

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
            cluster._check_nodes(ray, [])
        assert str(caught.value).count("here 0.1") == str(caught.value).count("here 3.99") == 2  # both nodes
    finally:
        ray.shutdown()
