"""Several trainings at a time: in processes of this machine, or as tasks of a Ray cluster.

Each has its own run directory, so a process that dies costs only what a resume cannot bring back.
"""

from __future__ import annotations

import contextlib
import signal
import statistics
import sys
from collections.abc import Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paddle_medcls.core.cluster import connect
from paddle_medcls.core.errors import Stopped
from paddle_medcls.core.progress import progress, say_line
from paddle_medcls.training.interruption import Interrupt
from paddle_medcls.training.jobs import Job
from paddle_medcls.training.places import Processes, Tasks

if TYPE_CHECKING:
    from paddle_medcls.training.session import Options

ATTEMPTS = 3  # of a training whose process dies, as when memory is short


@dataclass(frozen=True)
class Parallel:
    """Where several trainings run at a time.

    Attributes:
        count: how many at a time. None: in a cluster one a GPU, else one a node; on this machine one.
        cluster: "auto" or HOST:PORT of a Ray cluster, see `core.cluster`; None: processes of this machine.
    """

    count: int | None = None
    cluster: str | None = None


def chosen(count: int | None, cluster: str | None) -> Parallel | None:
    """What the options --parallel and --cluster ask for; None: one training after the other, in this process."""
    return Parallel(count, cluster) if cluster or (count or 1) > 1 else None


def interrupted_in(names: Sequence[str]) -> Stopped:
    """The error of a command that has stopped these runs."""
    where = f" in {', '.join(names)}" if names else ""
    return Stopped(f"interrupted{where}; the state is saved", fix="run the same command again")


def run_jobs(
    jobs: Sequence[Job], parallel: Parallel, options: Options, shared: Path
) -> Generator[tuple[Job, str], None, None]:
    """Runs trainings, several at a time, and shows how many are waiting, running and done.

    Ctrl-C, SIGTERM or the deadline of the options stop those that run, with their state saved. After a fault of a
    machine, such as a full disk, no more are begun.

    Args:
        shared: the folder that all of them write to.

    Yields:
        A training that has ended, and the message of its error, "" where there is none.

    Raises:
        SetupError: a cluster or GPU that cannot be used.
        Stopped: by Ctrl-C or SIGTERM.
        KeyboardInterrupt: Ctrl-C was pressed again.
    """
    where: Processes | Tasks
    if parallel.cluster:
        ray = connect(parallel.cluster, [shared], sorted({job.data_root for job in jobs}))
        where = Tasks(ray, parallel.count, options.device)
    else:
        where = Processes(parallel.count or 1, options.device)
    count = min(where.count, len(jobs))
    options.say(f"{count} of {len(jobs)} runs at a time, {where.threads} thread(s) each; their lines: log.txt in each")
    pool = ThreadPoolExecutor(count, initializer=_leave_ctrl_c_to_the_main_thread)
    timing: dict[Job, list[list[float]]] = {}
    ended, stopping, stopped = 0, False, []
    with contextlib.closing(where), pool, Interrupt(options.say, options.deadline) as interrupt:
        futures = {pool.submit(_attempt, where, job): job for job in jobs}
        try:
            with progress(None, "runs", sum(job.epochs for job in jobs), "epoch") as bar:
                bar.bar_format = "{desc}"
                while futures:
                    for future in wait(futures, 1, FIRST_COMPLETED).done:
                        job = futures.pop(future)
                        kind, message = future.result()
                        if kind in ("done", "failed", "machine"):
                            ended += 1
                            yield job, message
                        elif kind == "stopped":
                            stopped.append(job.name)
                    _show(bar, futures, ended, timing)
                    if interrupt.due() and not stopping:
                        stopping = True
                        where.stop()
        except BaseException as error:
            where.stop(kill=isinstance(error, KeyboardInterrupt))
            raise
    if interrupt.requested and ended < len(jobs):
        raise interrupted_in(sorted(stopped))


def _leave_ctrl_c_to_the_main_thread() -> None:
    """The processes that this thread starts inherit it: Ctrl-C in a terminal would reach them all."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


def _attempt(where: Processes | Tasks, job: Job) -> tuple[str, str]:
    """Runs a training; again, where its process died without a message."""
    message = ""
    for _ in range(ATTEMPTS):
        kind, message = where.run(job)
        if kind == "machine":
            where.stopping = True  # the next one would meet it too; one such node of a cluster would fail all
        if kind != "lost":
            return kind, message
        if where.stopping:
            return "stopped", ""
        say_line(f"{job.name}: {message}; it is resumed")
    return "failed", f"{message}, {ATTEMPTS} times; see whether memory is short"


# --- the display ---------------------------------------------------------------------------------


def _show(bar: Any, futures: dict[Future, Job], ended: int, timing: dict[Job, list[list[float]]]) -> None:
    """One line: trainings waiting, running and done, images a second, and time left, from their `timing.csv`.

    Args:
        futures: of the trainings that have not ended.
        timing: what was read earlier; those that run are read again.
    """
    from paddle_medcls.training.run_directory import read_timing

    running = [job for future, job in futures.items() if future.running()]
    for job in running:
        with contextlib.suppress(ValueError):  # half a file, which another machine writes
            timing[job] = read_timing(job.directory)
    text = f"runs: {len(futures) - len(running)} waiting, {len(running)} running, {ended} done"
    seconds = {job: statistics.median(row[-1] for row in rows) for job, rows in timing.items() if rows}  # of an epoch
    if seconds and futures:
        usual = statistics.fmean(seconds.values())
        left = sum((job.epochs - len(timing.get(job, ()))) * seconds.get(job, usual) for job in futures.values())
        speed = sum(timing[job][-1][2] for job in running if timing.get(job))
        text += f"; {speed:,.0f} images/s, {timedelta(seconds=round(left / max(1, len(running))))} left"
    bar.set_description_str(text, refresh=sys.stderr is not None and sys.stderr.isatty())
    bar.update(sum(map(len, timing.values())) - bar.n)  # epochs: where standard error is no terminal, prints a line
