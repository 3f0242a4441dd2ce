"""One of several processes on a run; started by `processes`, which see for what goes in and out."""

from __future__ import annotations

import _thread
import contextlib
import json
import os
import signal
import sys
import threading
import traceback
from pathlib import Path


def main() -> None:
    report = os.dup(1)
    os.dup2(2, 1)  # whatever else is printed here is no report
    job = json.loads(_line(0))
    for screen in job["screen"]:
        sys.stderr = os.fdopen(screen, "w", buffering=1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    input_open = threading.Thread(target=_watch, daemon=True)
    input_open.start()
    end = _end_of(job)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(BrokenPipeError):  # the command has gone
        os.write(report, json.dumps(end).encode() + b"\n")
    input_open.join()  # to leave before the others have done would look like a failure to them


def _line(file: int) -> bytes:
    """A line, and nothing after it: what follows is for `_watch`."""
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(file, 1)
        if not byte:
            sys.exit(1)  # the command has gone
        line += byte
    return line


def _watch() -> None:
    """Stops this process as Ctrl-C does when the command says so, or has gone."""
    told = True
    while told:
        told = bool(os.read(0, 1 << 16))
        _thread.interrupt_main()  # not a signal: see `processes`


def _end_of(job: dict) -> dict:
    """Does the job; what to report of it."""
    from paddle_medcls.errors import MedclsError, Stopped

    try:
        return {"ended": "done", "result": _train(job)}
    except Stopped as error:
        return {"ended": "stopped", "text": str(error)}
    except MedclsError as error:
        return {"ended": "failed", "kind": type(error).__name__, "text": _text(job, error)}
    except KeyboardInterrupt:
        return {"ended": "interrupted"}
    except Exception as error:
        return {"ended": "unexpected", "text": _text(job, error)}


def _text(job: dict, error: Exception) -> str:
    if job["debug"]:
        return f"{error}\n{traceback.format_exc()}"
    if hasattr(error, "what"):
        return str(error)
    return f"unexpected {type(error).__name__}: {error}\n  fix        run again with --debug"


def _train(job: dict) -> dict:
    from paddle_medcls.cpu import NOTES
    from paddle_medcls.recipe import Recipe
    from paddle_medcls.train import Options, train

    recipe = Recipe.from_json(job["recipe"])
    if os.environ["PADDLE_TRAINER_ID"] == "0":
        for note in NOTES:
            print(f"set {note}", file=sys.stderr)
    return train(recipe, Path(job["data_root"]), Path(job["run_dir"]), Options(**job["options"]), job["resume"])
