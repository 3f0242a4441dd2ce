"""A training as a job: what happens in the process, of this machine or another, that runs it.

What it prints goes to `log.txt` in its directory.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import platform
import signal
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paddle_medcls.core.errors import MedclsError, RunError, SetupError, Stopped, printable
from paddle_medcls.core.files import locked_folder
from paddle_medcls.core.progress import say_line

if TYPE_CHECKING:
    from paddle_medcls.training.session import Options

LOCK = ".lock"  # in the folder of a training, and in that of several: one process at a time works there
LOCK_SECONDS = 120  # NFS gives up a machine that died after 90


@dataclass(frozen=True, eq=False)
class Job:
    """A training: `work(*arguments)`, which resumes what an earlier process has begun in the directory."""

    directory: Path
    data_root: Path
    epochs: int
    work: Callable[..., object]
    arguments: tuple

    @property
    def name(self) -> str:
        """The directory's name, as messages use it."""
        return self.directory.name


def options_of_job(options: Options) -> Options:
    """The options of a training in another process, which has no deadline: who started it ends it."""
    return replace(options, deadline=math.inf, say=say_line)


def run_job(job: Job) -> tuple[str, str]:
    """Runs a training.

    Returns:
        "done", "stopped", "failed" or "machine" (a fault of this machine, such as a full disk); and the message of
        the error.
    """
    try:
        job.work(*job.arguments)
        return "done", ""
    except (Stopped, KeyboardInterrupt):
        return "stopped", ""
    except (SetupError, OSError) as error:
        return "machine", f"{platform.node()}: {error}"
    except MedclsError as error:
        return "failed", f"{type(error).__name__}: {error}"
    except Exception as error:
        traceback.print_exc()
        return "failed", printable(f"unexpected {type(error).__name__}: {error}; log.txt has its traceback")


def run_logged(job: Job, folder: str) -> tuple[str, str]:
    """Runs a training in a folder, the current one of the process that wants it; the output goes to its log.

    It waits for the lock of a machine that died, which NFS holds for some time, or of a process that still saves.
    """
    until = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            os.chdir(folder)
            job.directory.mkdir(parents=True, exist_ok=True)
            with open(job.directory / "log.txt", "ab") as log, locked_folder(job.directory, "trains there", LOCK):
                for number in (1, 2):
                    os.dup2(log.fileno(), number)
                return run_job(job)
        except OSError as error:
            return "machine", f"{platform.node()}: {error}"
        except RunError as error:
            if time.monotonic() > until:
                return "failed", f"{platform.node()}: {error}"
            time.sleep(1)


def run_in_child(sender: Any, job: Job) -> None:
    """`run_logged` in a process of its own, which ends with its parent; sends the result."""
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    sender.send(run_logged(job, os.getcwd()))


def _stop_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)  # the training saves its state
