"""One command, several processes: starts them, watches them, ends them.

The command itself computes nothing. Each process is `worker.main`; through its
standard input it gets its job, one line of JSON, and through its standard output it sends back one
line on how it ended. The input stays open: another line, or its end because the command has died,
stops the process as Ctrl-C does. The processes are out of the terminal's reach, so Ctrl-C and SIGTERM
come to the command alone; no signal is passed on, since one breaks off what Paddle waits for.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from paddle_medcls import errors
from paddle_medcls.errors import MedclsError, RunError, SetupError, Stopped

ROOT = str(Path(__file__).resolve().parent.parent)
CODE = f"import sys; sys.path[0] = {ROOT!r}; from paddle_medcls.worker import main; main()"
WORKER = [sys.executable, "-c", CODE]  # the package that runs here, and nothing from the current folder
PATIENCE = 0.5  # seconds after the first failure, in which its cause may report, too
GRACE = 10.0  # seconds that a process may take to leave when all is done
GOOD_ENDS = ("done", "stopped")
SMALLEST_SHARE = 8  # images of a batch; with fewer a process has too little to do, and poor batch-norm statistics


def choose(wanted: int | str, gpus: int, cores: int, batch_size: int, onednn: bool = False) -> int:
    """Number of processes.

    "auto" is one a GPU; on the CPU two where there are two cores, which is what was measured: 1.3
    times the speed of one process with two threads. Each must get 8 images of every batch or more.
    With oneDNN's operators one process is faster than two (13.2 to 12.3 images a second).

    Args:
        wanted: a number, or "auto".
        onednn: whether these operators would compute, on the CPU.

    Raises:
        SetupError: more than there are GPUs, or than a batch has images.
    """
    if wanted == "auto":
        return max(1, min(gpus or (1 if onednn else min(cores, 2)), batch_size // SMALLEST_SHARE))
    assert isinstance(wanted, int)
    if gpus and wanted > gpus:
        raise SetupError(
            f"--processes {wanted}: one GPU each, and there are {gpus}", do=f"--processes {gpus}, or --device cpu"
        )
    if wanted > batch_size:
        raise SetupError(f"--processes {wanted}: a batch of {batch_size} has too few images to share")
    return wanted


def run_processes(job: dict, count: int, gpus: bool, environ: dict[str, str]) -> dict:
    """Runs a job in several processes and returns what process 0 returns.

    Args:
        job: JSON values, for `worker`.
        count: number of processes, 2 or more.
        gpus: one GPU each; else they share the cores.
        environ: environment of each, before what tells them apart.

    Raises:
        MedclsError: that of the process that failed; the others are ended first. `Stopped` where
            all have stopped as they were asked to.
        KeyboardInterrupt: they were asked to end before there was a state to save, or asked twice.
    """
    addresses = _free_addresses(count)
    workers: list[subprocess.Popen] = []
    said = [tempfile.TemporaryFile() for _ in addresses]  # what each writes to standard error
    asked = 0

    def pass_on(*_: object) -> None:
        nonlocal asked
        asked += 1
        for worker in workers:
            _tell(worker, b"stop\n") if asked == 1 else worker.kill()

    previous = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for rank in range(count):
            own = {**environ, **_place(rank, addresses, gpus)}
            workers.append(_start(job, own, said[rank], speaks=rank == 0))
        if asked:  # while they were being started
            raise KeyboardInterrupt
        reports = _reports(workers)
        if all(report.get("ended") in GOOD_ENDS for report in reports.values()):
            _dismiss(workers)
        elif sys.stderr.isatty():
            print(file=sys.stderr)  # leave the line of the bar, which process 0 will not remove
        return _outcome(reports, workers, asked > 0, said)
    finally:
        for worker in workers:
            with worker:  # closes its pipes and waits for its end
                worker.kill()
        for number, handler in previous.items():
            signal.signal(number, handler)
        for file in said:
            file.close()


def _free_addresses(count: int) -> list[str]:
    """Addresses on this machine that nothing listens on."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]
    finally:
        for each in sockets:
            each.close()


def _place(rank: int, addresses: list[str], gpus: bool) -> dict[str, str]:
    """What tells a process its place, as paddle.distributed.launch sets it."""
    count = str(len(addresses))
    place = {
        "PADDLE_TRAINER_ID": str(rank),
        "PADDLE_TRAINERS_NUM": count,
        "PADDLE_LOCAL_SIZE": count,  # by which `cpu` divides the cores
        "PADDLE_CURRENT_ENDPOINT": addresses[rank],
        "PADDLE_TRAINER_ENDPOINTS": ",".join(addresses),
        "PADDLE_MASTER": addresses[0],
    }
    return {**place, "FLAGS_selected_gpus": str(rank)} if gpus else {**place, "PADDLE_DISTRI_BACKEND": "gloo"}


def _start(job: dict, environ: dict[str, str], said, speaks: bool) -> subprocess.Popen:
    """A process; one that speaks has the command's standard error for Python's, other code's is kept apart."""
    screen = [os.dup(2)] if speaks else []
    worker = subprocess.Popen(
        WORKER,
        bufsize=0,
        env=environ,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=said,
        pass_fds=screen,
        start_new_session=True,
    )
    for file in screen:
        os.close(file)
    _tell(worker, json.dumps({**job, "screen": screen}).encode() + b"\n")
    return worker


def _tell(worker: subprocess.Popen, line: bytes) -> None:
    with contextlib.suppress(BrokenPipeError, ValueError):  # it has ended, which its silence tells, or is dismissed
        worker.stdin.write(line)  # type: ignore[union-attr]


def _reports(workers: list[subprocess.Popen]) -> dict[int, dict]:
    """Each process's last line, until all have sent one, or shortly after the first failure.

    {} stands for a process that ended without a word.
    """
    reports: dict[int, dict] = {}
    timeout = None
    with selectors.DefaultSelector() as selector:
        for rank, worker in enumerate(workers):
            selector.register(worker.stdout, selectors.EVENT_READ, rank)  # type: ignore[arg-type]
        while selector.get_map():
            ready = selector.select(timeout)
            if not ready and timeout is not None:
                break
            for key, _ in ready:
                line = key.fileobj.readline()  # type: ignore[union-attr]
                reports[key.data] = json.loads(line) if line else {}
                selector.unregister(key.fileobj)
                if reports[key.data].get("ended") not in GOOD_ENDS:
                    timeout = PATIENCE
    return reports


def _dismiss(workers: list[subprocess.Popen]) -> None:
    """Closes the inputs and lets the processes leave by themselves, together."""
    for worker in workers:
        worker.stdin.close()  # type: ignore[union-attr]
    for worker in workers:
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.wait(GRACE)


def _outcome(reports: dict[int, dict], workers: list[subprocess.Popen], asked: bool, said: list) -> dict:
    """The result of process 0, or the error that says most: a known one, else a silent end, else any other."""
    ends = {rank: report.get("ended", "silent") for rank, report in reports.items()}  # as they came
    for wanted in ("failed", "interrupted", "silent", "unexpected"):
        rank = next((rank for rank, end in ends.items() if end == wanted), None)
        if rank is None:
            continue
        if wanted == "interrupted" or (wanted == "silent" and asked):
            raise KeyboardInterrupt
        if wanted == "failed":
            kind = getattr(errors, reports[rank]["kind"])
            raise kind.retold(reports[rank]["text"])
        if wanted == "unexpected":
            raise RunError.retold(f"process {rank} of {len(workers)}: {reports[rank]['text']}")
        raise _silent_end([rank for rank, end in ends.items() if end == "silent"], workers, said)
    if "stopped" in ends.values():
        raise Stopped.retold(next(report["text"] for report in reports.values() if report["ended"] == "stopped"))
    return reports[0]["result"]


def _silent_end(ranks: list[int], workers: list[subprocess.Popen], said: list) -> MedclsError:
    """About the process that ended first; gloo aborts those that have lost another."""
    rank = min(ranks, key=lambda rank: workers[rank].wait() == -signal.SIGABRT)
    code = workers[rank].wait()
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    said[rank].seek(0)
    lines = [line for line in said[rank].read().decode(errors="replace").splitlines() if line.strip()][-5:]
    return RunError(
        f"process {rank} of {len(workers)} {how}",
        items=lines,
        do="see whether memory was short (the system then ends a process); go on from the last save with --resume",
    )
