"""How a training run stops without losing anything."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

from paddle_medcls.errors import Stopped


class Interrupt:
    """Ctrl-C, SIGTERM or the deadline ends the run after the current step; a second one ends it at once.

    Several processes have to agree on the step: each tells the others whether it is `due`.
    """

    def __init__(self, say: Callable[[str], None], deadline: float) -> None:
        self.requested = False
        self.say = say
        self.deadline = deadline
        self.previous: dict = {}

    def __enter__(self) -> Interrupt:
        try:
            self.previous = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:
            pass  # not the main thread: the caller decides about signals
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: object) -> None:
        self.requested = True
        self.say("\nstopping after this step; once more to stop at once")
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def due(self) -> bool:
        return self.requested or time.monotonic() > self.deadline


def stopped(run_dir: Path) -> Stopped:
    return Stopped("stopped; the state is saved", do=f"go on with: python tools/train.py --resume {run_dir}")
