"""`train --processes N`: hands over to `paddle.distributed.launch`, and shows what process 0 prints."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from paddle_medcls.core.errors import PROGRAM, RunError
from paddle_medcls.core.files import python_path

_FAILED = re.compile(r"Container rank (\d+) status failed .* code (-?\d+) log")


def launched() -> bool:
    """Whether `paddle.distributed.launch` started this process, one of several."""
    return int(os.environ.get("PADDLE_TRAINERS_NUM", "1")) > 1


def launch(arguments: Sequence[str], count: int, environ: dict[str, str], on_cpu: bool) -> int:
    """Runs `train` with these arguments in several processes, waits for their end, and returns the exit code.

    Args:
        count: number of processes.
        environ: of each process, before anything was made ready for a process that has all cores.
        on_cpu: they share the cores; else each takes a GPU.

    Raises:
        RunError: a process has ended without a message; else process 0 prints it.
        KeyboardInterrupt: they were asked to stop before there was a state to save.
    """
    environ = {**environ, "PYTHONPATH": python_path(), PROGRAM: sys.argv[0]}
    if on_cpu:
        environ["CUDA_VISIBLE_DEVICES"] = "all"  # for CUDA no device at all; "" would confuse the launcher
    signals: list[int] = []

    def stop(number: int, _: object) -> None:
        signals.append(number)
        process.terminate()  # the launcher passes it on; the processes then save and leave

    with tempfile.TemporaryDirectory() as folder:
        log, shown = Path(folder, "launcher.log"), Path(folder, "workerlog.0")
        shown.touch()
        command = [sys.executable, "-m", "paddle.distributed.launch", "--nproc_per_node", str(count)]
        command += ["--log_dir", folder, sys.executable, "-m", "paddle_medcls.cli.train", *arguments]
        with open(log, "wb") as file:
            # A session of its own: Ctrl-C reaches this process alone, which asks the launcher to stop, once.
            process = subprocess.Popen(command, env=environ, stdout=file, stderr=file, start_new_session=True)
        previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            last = _show(shown, process)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            process.terminate()
            process.wait()
        if process.returncode and signals and not last.startswith("interrupted"):
            raise KeyboardInterrupt
        if not signals and (process.returncode not in (0, 1) or process.returncode and not last):
            raise _silent_end(log, count)
    return int(process.returncode != 0)


def _show(log: Path, process: subprocess.Popen) -> str:
    """Copies process 0's lines to standard error as they come; returns the last one."""
    last = ""
    with open(log, errors="replace") as file:
        while True:
            ended = process.poll() is not None
            while line := file.readline():
                print(line, end="", file=sys.stderr, flush=True)
                last = line
            if ended:
                return last
            time.sleep(0.2)


def _silent_end(log: Path, count: int) -> RunError:
    """How the process that failed first has ended; the last lines that it, or else the launcher, has printed."""
    match = _FAILED.search(log.read_text(errors="replace"))
    rank, code = (int(match[1]), int(match[2])) if match else (0, 1)
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    lines = (log.with_name(f"workerlog.{rank}") if match else log).read_text(errors="replace").splitlines()
    return RunError(
        f"process {rank} of {count} {how}",
        items=[line for line in lines if line.strip()][-5:],
        fix="see whether memory was short (the system then ends a process); continue from the last save with --resume",
    )
