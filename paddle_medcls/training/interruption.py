"""Stops a training after the current step, with its state saved."""

from __future__ import annotations

import os
import shlex
import signal
import time
from collections.abc import Callable
from pathlib import Path

from paddle_medcls.core.errors import PROGRAM, Stopped, command
from paddle_medcls.training.launcher import launched


class Interrupt:
    """Ctrl-C, SIGTERM or the deadline ends the run after the current step; a second Ctrl-C ends it at once.

    SIGTERM may come several times: Paddle's launcher repeats it until the process has ended.

    Several processes stop at the same step: each tells the others whether a stop is `due`.
    """

    def __init__(self, say: Callable[[str], None], deadline: float) -> None:
        self.requested = False
        self.say = say
        self.deadline = deadline
        self.previous: dict = {}

    def __enter__(self) -> Interrupt:
        try:
            self.previous = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
            restart_calls()
        except ValueError:
            pass  # not the main thread: the caller decides about signals
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        restart_calls()

    def _handle(self, number: int, _: object) -> None:
        if not self.requested:
            self.say("\nstopping after this step (press Ctrl-C again to quit now)")
        self.requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def due(self) -> bool:
        return self.requested or time.monotonic() > self.deadline


def restart_calls() -> None:
    """Lets system calls go on after a SIGTERM: Paddle takes an interrupted one for a lost connection."""
    if hasattr(signal, "siginterrupt"):  # Windows has no such signals
        signal.siginterrupt(signal.SIGTERM, False)


def interrupted(run_dir: Path) -> Stopped:
    return Stopped(f"interrupted; state saved in {run_dir}; resume with: {resume_command(run_dir)}")


def resume_command(run_dir: Path) -> str:
    """The command line that resumes a run; one that Paddle's launcher was called for needs its options again."""
    launcher = "python -m paddle.distributed.launch … " if launched() and PROGRAM not in os.environ else ""
    return f"{launcher}{command('train')} --resume {shlex.quote(str(run_dir))}"
