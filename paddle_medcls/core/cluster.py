"""The only import of Ray, which carries work to several machines; its package is optional (extra `cluster`)."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import socket
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import paddle_medcls
from paddle_medcls.core.errors import SetupError
from paddle_medcls.core.files import folder_error, python_path
from paddle_medcls.core.hardware import environment_variables, installed_version

SECONDS_TO_ANSWER = 10  # for an address
SECONDS_TO_CHECK = 40  # for all nodes; each starts a Python process
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is reported to Ray's makers
    "RAY_gcs_server_port_wait_time_s": "1",  # one attempt to connect, and not 20 of up to a minute each
    "RAY_py_gcs_connect_timeout_s": str(SECONDS_TO_ANSWER),
}
"""What Ray's own code reads when it is imported."""


def connect(address: str, shared: Sequence[str | Path] = (), needed: Sequence[str | Path] = ()) -> Any:
    """Connects this process to a Ray cluster, and checks each node that can work.

    A node must have this version of the package, Paddle and Python, the current folder, and the shared folders. Tasks
    import this package from where this process does, if that folder exists there.

    Args:
        address: "HOST:PORT" of the cluster's head node; "auto": RAY_ADDRESS, or the cluster that runs on this machine.
        shared: folders that all nodes write to; they are created here.
        needed: other folders that each node must have, as that of the images.

    Returns:
        The module `ray`, connected; `ray.shutdown()` disconnects.

    Raises:
        SetupError: Ray is not installed; no answer; a node that differs, or that does not see a shared folder.
    """
    if address != "auto":
        _knock(address)
    with environment_variables(ENVIRONMENT):
        ray = _connected(address)
    try:
        _check_nodes(ray, shared, [Path.cwd(), *(Path(folder).absolute() for folder in needed)])
    except BaseException:
        ray.shutdown()
        raise
    return ray


def _connected(address: str) -> Any:
    try:
        import ray
    except ImportError:
        fix = "pip install ray, on every machine, in the version that the cluster has"
        raise SetupError("--cluster needs the package ray, which is not installed", fix=fix) from None
    environment = {"env_vars": {"PYTHONPATH": python_path()}}
    # Ray prints what it notices, such as the death of a worker, to standard output, where results go. Who waits for the
    # worker's task is told.
    ray._private.worker.listen_error_messages = lambda *_: None
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR, runtime_env=environment)
    except Exception as error:  # of many kinds
        lines = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        if "Traceback" in lines[0]:
            lines = lines[-1:]
        raise SetupError(
            f"no connection to the Ray cluster {address}: {' '.join(' '.join(lines).split())}",
            expected="a running cluster with this version of Ray and Python, of which this machine is a node",
            fix="on this machine: ray start --address HOST:PORT --disable-usage-stats (--num-cpus 0: without work)",
        ) from None
    return ray


def working_nodes(ray: Any) -> list[dict]:
    """The nodes that are alive and have a CPU or GPU for tasks, as `ray.nodes` describes them."""
    return [node for node in ray.nodes() if node["Alive"] and {"CPU", "GPU"} & node["Resources"].keys()]


def gpus_of(nodes: Sequence[dict], device: str) -> list[int]:
    """GPUs of each node that tasks may use: none for the device "cpu", or with the CPU build of Paddle."""
    if device == "cpu" or not installed_version("paddlepaddle-gpu"):
        return [0] * len(nodes)
    return [int(node["Resources"].get("GPU", 0)) for node in nodes]


def software() -> dict[str, str]:
    """What must be the same on every node: the code of this package, Paddle, Python."""
    digest = hashlib.sha256()
    folder = Path(paddle_medcls.__file__).parent
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    builds = {name: installed_version(name) for name in ("paddlepaddle", "paddlepaddle-gpu")}
    return {
        "paddle_medcls": f"{paddle_medcls.__version__} (code {digest.hexdigest()[:8]})",
        "Paddle": ", ".join(f"{name} {version}" for name, version in builds.items() if version) or "not installed",
        "Python": platform.python_version(),
    }


def _knock(address: str) -> None:
    """Raises SetupError unless something listens at HOST:PORT; Ray itself would wait for minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "/" in host:
        raise SetupError(
            f"--cluster {address} is no address", expected="auto, or HOST:PORT of the head node, as 10.0.0.1:6379"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), SECONDS_TO_ANSWER).close()
    except (OSError, OverflowError) as error:
        raise SetupError(
            f"--cluster {address} does not answer: {error}",
            fix="start the cluster: ray start --head --disable-usage-stats, on its head node; or correct the address",
        ) from None


def _check_nodes(ray: Any, shared: Sequence[str | Path], needed: Sequence[Path]) -> None:
    """Raises SetupError for the nodes that cannot do this process's work."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def look(needed: list[str], probes: list[str]) -> tuple[dict[str, str], list[str]]:
        # Defined here, so that Ray sends its code: the node may not have this package.
        import os

        try:
            from paddle_medcls.core import cluster
        except ImportError as error:
            return {}, [f"paddle_medcls cannot be imported: {error}"]
        faults = [f"there is no {folder}" for folder in needed if not os.path.exists(folder)]
        return cluster.software(), faults + [fault for probe in probes if (fault := cluster.probe_fault(probe))]

    nodes = working_nodes(ray)
    if not nodes:
        raise SetupError("no node of the Ray cluster has a CPU or GPU", fix="ray start --address … --num-cpus N")
    with ExitStack() as stack:
        probes = [stack.enter_context(_probe(Path(folder).absolute())).name for folder in shared]
        task = ray.remote(num_cpus=0, max_retries=0)(look)
        answers = {}
        for node in nodes:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            answers[task.options(scheduling_strategy=there).remote([*map(str, needed)], probes)] = node
        ray.wait(list(answers), num_returns=len(answers), timeout=SECONDS_TO_CHECK)
        faults = []
        for answer, node in answers.items():
            name = f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
            faults += [f"{name}: {fault}" for fault in _faults_of(ray, answer)]
    if faults:
        raise SetupError(
            "nodes of the Ray cluster that differ from this machine",
            items=faults,
            expected="the same paddle_medcls, Paddle and Python, and the folders under the same paths, on each",
            fix="install the same versions there; put --output and the images on storage that all nodes mount",
        )


def _faults_of(ray: Any, answer: Any) -> list[str]:
    try:
        there, faults = ray.get(answer, timeout=0)
    except ray.exceptions.GetTimeoutError:
        return [f"no answer within {SECONDS_TO_CHECK} s"]
    except ray.exceptions.RayError as error:
        return [f"a task fails: {str(error).strip().splitlines()[-1]}"]
    here = software()
    return faults + [f"{name} {there[name]}, here {here[name]}" for name in there if there[name] != here[name]]


def _probe(folder: Path) -> Any:
    """A file in a folder, which each node looks for; it is removed when it is closed."""
    error = folder_error(folder)
    if error:
        raise SetupError(f"cannot write in {folder}: {error}")
    file = tempfile.NamedTemporaryFile(dir=folder, prefix=".medcls-probe-")  # noqa: SIM115  the caller closes it
    file.write(os.path.basename(file.name).encode())
    file.flush()
    os.fsync(file.fileno())
    return file


def probe_fault(probe: str) -> str:
    """On a node: why the folder of a file that another machine has written cannot be worked in; "" if it can."""
    path = Path(probe)
    try:
        if path.read_bytes() != path.name.encode():
            return f"{path.parent} is not shared: a file has another content there"
    except OSError as error:
        return f"{path.parent} is not shared: a file from here cannot be read there: {error.strerror}"
    full = folder_error(path.parent)
    return f"cannot write in {path.parent}: {full}" if full else ""
