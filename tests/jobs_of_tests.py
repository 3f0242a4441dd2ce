"""What the processes of `test_parallel` run; it is imported there, so it imports little."""

from __future__ import annotations

import math
import os
import signal
import time
from pathlib import Path

from paddle_medcls.core.errors import RunError, Stopped


def note(path: Path, text: str = "x") -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(text)


def tell_environment(path: Path) -> None:
    note(path, f"{os.environ.get('OMP_NUM_THREADS')} {os.environ.get('CUDA_VISIBLE_DEVICES')} {os.getcwd()}")


def die_until(path: Path, times: int) -> None:
    """Is killed in the first attempts."""
    note(path)
    if path.stat().st_size <= times:
        os.kill(os.getpid(), signal.SIGKILL)


def fail(kind: str) -> None:
    if kind == "bug":
        raise ValueError("a bug")
    raise RunError("the loss is nan", fix="lower --lr")


def fill_the_disk() -> None:
    with open("/dev/full", "w", encoding="utf-8") as file:
        file.write("x")


def work_until_stopped(path: Path) -> None:
    """Saves its state when it is stopped, as a training does."""
    from paddle_medcls.training.interruption import Interrupt

    with Interrupt(lambda line: None, math.inf) as interrupt:
        note(path, f"{os.getpid()} ")
        while not interrupt.due():
            time.sleep(0.02)
        note(path, "saved")
        raise Stopped("interrupted")


def cell(cell: object, options: object) -> None:
    """A cell of a grid whose network is one of `toynet`; of seed 1 it is killed once, at its third step."""
    import toynet

    from paddle_medcls.training.reproduce import _run_cell

    begun = cell.folder / "begun"
    if cell.recipe.seed == 1 and not begun.exists():
        note(begun)
        toynet.kill_at("step", 3)
    _run_cell(cell, options)
