"""Where trainings run at a time: processes of this machine, or tasks of a Ray cluster."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import queue
import threading
from typing import Any

from paddle_medcls.core.cluster import gpus_of, working_nodes
from paddle_medcls.core.errors import SetupError, printable
from paddle_medcls.core.hardware import NOTES, environment_variables, usable_cores
from paddle_medcls.training.jobs import Job, run_in_child, run_logged

SPAWN = multiprocessing.get_context("spawn")  # a copy of a process that uses Paddle would not work


class Processes:
    """Processes of this machine, which share its cores, or take a GPU each.

    Attributes:
        count: how many run at a time.
        threads: of each.
        stopping: no more are started.
    """

    def __init__(self, count: int, device: str) -> None:
        gpus = [] if device == "cpu" else _gpus()
        if gpus and count > len(gpus):
            raise SetupError(f"--parallel {count}: each needs a GPU, and there are {len(gpus)}")
        self.count, self.threads, self.stopping = count, _chosen_threads() or max(1, usable_cores() // count), False
        self._running: set[Any] = set()
        self._lock = threading.Lock()
        self._gpus: queue.Queue[str] = queue.Queue()
        for gpu in gpus or [""] * count:
            self._gpus.put(gpu)

    def run(self, job: Job) -> tuple[str, str]:
        """How a training ended, see `run_job`; "lost" if its process died, "not begun" while stopping."""
        receiver, sender = SPAWN.Pipe(duplex=False)
        process = SPAWN.Process(target=run_in_child, args=(sender, job))
        gpu = self._gpus.get()
        variables = {"OMP_NUM_THREADS": str(self.threads), **({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {})}
        try:
            with self._lock:
                if self.stopping:
                    return "not begun", ""
                with environment_variables(variables):
                    process.start()
                self._running.add(process)
            sender.close()
            with contextlib.suppress(EOFError):  # it died
                return receiver.recv()
            process.join()
            return "lost", f"its process ended with exit code {process.exitcode}"  # -9: killed
        finally:
            if process.pid:
                process.join()
            self._running.discard(process)
            self._gpus.put(gpu)

    def stop(self, kill: bool = False) -> None:
        """Lets the trainings save their state and end; with `kill`, or when called again, they end at once."""
        with self._lock:
            self.stopping = True
            for process in list(self._running):
                process.kill() if kill else process.terminate()

    def close(self) -> None:
        """Nothing is left of them."""


class Tasks:
    """Tasks of a Ray cluster, with a GPU each where it has some; attributes and methods as of `Processes`.

    Args:
        ray: connected, see `core.cluster.connect`; `close` disconnects it.
    """

    def __init__(self, ray: Any, count: int | None, device: str) -> None:
        self.ray, self.stopping = ray, False
        self._running: list[Any] = []
        self._lock = threading.Lock()
        nodes = working_nodes(self.ray)
        each = gpus_of(nodes, device)
        nodes, gpus = [node for node, number in zip(nodes, each) if number] or nodes, sum(each)
        self.count = count or gpus or len(nodes)
        cores = min(int(node["Resources"].get("CPU", 0)) for node in nodes)
        self.threads = _chosen_threads() or max(1, cores // math.ceil(self.count / len(nodes)))
        if self.threads > cores:
            self.close()
            raise SetupError(f"{self.threads} thread(s) for each run, but a node of the cluster has {cores} CPU(s)")
        environment = {"env_vars": {"OMP_NUM_THREADS": str(self.threads)}}
        self._task = self.ray.remote(
            num_cpus=self.threads, num_gpus=min(gpus, 1), max_retries=0, max_calls=1, runtime_env=environment
        )(run_logged)

    def run(self, job: Job) -> tuple[str, str]:
        errors = self.ray.exceptions
        with self._lock:
            if self.stopping:
                return "not begun", ""
            task = self._task.remote(job, os.getcwd())
            self._running.append(task)
        try:
            while not self.ray.wait([task], timeout=20)[0]:
                if not working_nodes(self.ray):
                    return "machine", "no node of the Ray cluster is left"
            return self.ray.get(task)
        except errors.TaskCancelledError:
            return "stopped", ""
        except errors.RayTaskError as error:
            return "failed", printable(str(error).strip().splitlines()[-1])
        except errors.RayError as error:
            return "lost", f"its worker died: {printable(str(error).strip().splitlines()[0])}"
        finally:
            self._running.remove(task)

    def stop(self, kill: bool = False) -> None:
        with self._lock:
            self.stopping = True
            for task in list(self._running):
                self.ray.cancel(task, force=kill)

    def close(self) -> None:
        self.ray.shutdown()


def _chosen_threads() -> int:
    """OMP_NUM_THREADS as the user has set it; 0 where it is not set, or by `prepare_environment`."""
    text = os.environ.get("OMP_NUM_THREADS", "")
    return 0 if not text or f"OMP_NUM_THREADS={text}" in NOTES else int(text.split(",")[0])


def _gpus() -> list[str]:
    """The GPUs of this process, as CUDA_VISIBLE_DEVICES names them."""
    from paddle_medcls.core.paddle_setup import count_gpus

    names = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return (names or [str(number) for number in range(count_gpus())])[: count_gpus()]
