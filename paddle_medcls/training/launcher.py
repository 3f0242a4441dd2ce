"""`train --processes N`: hands over to `paddle.distributed.launch`, and shows what it does as one command's output.

The launcher starts N times the same command and ends them all when one fails. What process 0 prints goes to
standard error as it comes; of all errors one is told, the cause if it can be known.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from paddle_medcls.core import errors
from paddle_medcls.core.errors import RunError, Stopped
from paddle_medcls.core.files import python_path

_KINDS = "|".join(kind.__name__ for kind in errors.MedclsError.__subclasses__())
_ERROR = re.compile(rf"^(({_KINDS}): |unexpected \w+|interrupted)")
_ABORT = "terminate called after throwing"  # gloo's end of a process that has lost another, and Paddle's trace of it
_FAILED = re.compile(r"Container rank (\d+) status failed .* code (-?\d+) log")


def launched() -> bool:
    """Whether `paddle.distributed.launch` started this process, one of several."""
    return int(os.environ.get("PADDLE_TRAINERS_NUM", "1")) > 1


def launch(arguments: Sequence[str], count: int, environ: dict[str, str], on_cpu: bool) -> None:
    """Runs `train` with these arguments in several processes, and waits for their end.

    Args:
        count: number of processes.
        environ: of each process, before anything was made ready for a process that has all cores.
        on_cpu: they share the cores; else each takes a GPU.

    Raises:
        MedclsError: one of them failed. `Stopped` where they were asked to stop and the state is saved.
        KeyboardInterrupt: they were asked to stop before there was a state to save.
    """
    environ = {**environ, "PYTHONPATH": python_path()}
    if on_cpu:
        environ["CUDA_VISIBLE_DEVICES"] = "all"  # for CUDA no device at all; "" would confuse the launcher
    with tempfile.TemporaryDirectory() as folder:
        logs = Path(folder)
        command = [sys.executable, "-m", "paddle.distributed.launch", "--nproc_per_node", str(count)]
        command += ["--log_dir", folder, sys.executable, "-m", "paddle_medcls.cli.train", *arguments]
        with open(logs / "launcher.log", "wb") as output:
            # A session of its own: Ctrl-C reaches this process alone, which asks the launcher to stop, once.
            process = subprocess.Popen(command, env=environ, stdout=output, stderr=output, start_new_session=True)
        try:
            with _asking_to_stop(process) as signals:
                _show(logs / "workerlog.0", process)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
        if process.returncode:
            raise _error(logs, count, bool(signals))


@contextlib.contextmanager
def _asking_to_stop(process: subprocess.Popen) -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM end the launcher by SIGTERM, which it passes on; the processes then save and leave.

    Gives the signals that came.
    """
    signals: list[int] = []

    def ask(number: int, _: object) -> None:
        signals.append(number)
        process.terminate()

    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _show(log: Path, process: subprocess.Popen) -> None:
    """Copies process 0's lines to standard error until its error, if any, which is told at the end."""
    at, failed = 0, False
    while True:
        ended = process.poll() is not None
        with contextlib.suppress(FileNotFoundError), open(log, "rb") as file:
            file.seek(at)
            text = file.read()
            lines = text if ended else text[: text.rfind(b"\n") + 1]
            at += len(lines)
            for line in lines.decode(errors="replace").splitlines():
                failed = failed or bool(_ERROR.match(line)) or line.startswith(_ABORT)
                if not failed:
                    print(line, file=sys.stderr, flush=True)
        if ended:
            return
        time.sleep(0.2)


def _error(logs: Path, count: int, stopped: bool) -> BaseException:
    """The error that says most: a known one of any process, else how the process that failed first has ended."""
    messages = {rank: _last_error(logs / f"workerlog.{rank}") for rank in range(count)}
    for text in messages.values():
        if text.startswith("interrupted;"):
            return Stopped.retold(text)
    for text in messages.values():
        kind, _, message = text.partition(": ")
        if message and not text.startswith("unexpected"):
            return getattr(errors, kind).retold(message)
    if stopped:
        return KeyboardInterrupt()
    match = _FAILED.search((logs / "launcher.log").read_text(errors="replace"))
    rank, code = (int(match[1]), int(match[2])) if match else (0, 1)
    if messages.get(rank):
        return RunError.retold(f"process {rank} of {count}: {messages[rank]}")
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    lines = _lines(logs / f"workerlog.{rank}" if match else logs / "launcher.log")[-5:]
    if code == -signal.SIGABRT:
        how, lines = "has lost another one, which ended without a message", []
    return RunError(
        f"process {rank} of {count} {how}",
        items=lines,
        fix="see whether memory was short (the system then ends a process); continue from the last save with --resume",
    )


def _lines(log: Path) -> list[str]:
    try:
        return [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    except FileNotFoundError:
        return []


def _last_error(log: Path) -> str:
    """The error that a process has printed, with the lines below that belong to it; "" where there is none."""
    lines = _lines(log)
    start = next((k for k, line in enumerate(lines) if _ERROR.match(line)), None)
    if start is None:
        return ""
    end = next((k for k in range(start + 1, len(lines)) if not lines[k].startswith("  ")), len(lines))
    return "\n".join(lines[start:end])
