"""A process of a training that fails ends all of them, on every node, with one message.

Each process counts in the store of the process group, once a second, and watches the count of the next one. A process
that fails leaves its message there for the others; one that was killed, or whose machine is off, counts no longer.
The exchange of gradients alone would not do: with NCCL it waits for ever, and gloo ends the process from C++.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from paddle_medcls.core.errors import RunError, Stopped, describe
from paddle_medcls.core.paddle_setup import paddle
from paddle_medcls.training.interruption import restart_calls

INTERVAL = 1.0  # seconds between two counts
LIMIT = 30.0  # seconds without a count after which a process is lost
_CONNECTION = re.compile(r"gloo|TCP|NCCL", re.IGNORECASE)  # in Paddle's errors about a lost one

_watch: Watch | None = None  # of this process, like the process group that it belongs to


@contextlib.contextmanager
def shared_failure() -> Iterator[None]:
    """An error in this block ends the other processes too, with its message; alone, nothing is done."""
    if _watch is None and paddle.distributed.get_world_size() > 1:
        _start()
    try:
        yield
    except Stopped:  # all processes stop at the same step
        if _watch is not None:
            _on_sigterm(signal.SIG_IGN)  # the launcher repeats it until the process has ended
        raise
    except BaseException as error:
        if _watch is not None:
            if isinstance(error, (RuntimeError, ValueError)) and _CONNECTION.search(str(error)):
                _wait_for_the_cause()
            _watch.tell(describe(error))
        raise


def process_name(rank: int) -> str:
    """ "process 2 of 4, on 10.0.0.7"."""
    addresses = os.environ.get("PADDLE_TRAINER_ENDPOINTS", "").split(",")
    host = f", on {addresses[rank].partition(':')[0]}" if rank < len(addresses) else ""
    return f"process {rank} of {paddle.distributed.get_world_size()}{host}"


def _start() -> None:
    """Begins to watch the processes of this run."""
    global _watch
    paddle.base.core.create_or_get_global_tcp_store()  # process 0 serves it
    address = os.environ.get("PADDLE_MASTER") or os.environ["PADDLE_TRAINER_ENDPOINTS"].split(",")[0]
    host, port = address.split(":")
    # A connection of its own: Paddle's takes one request at a time, and the main thread may wait in it.
    store = paddle.base.core.TCPStore(host, int(port), False, 0, int(LIMIT))
    _watch = Watch(store, paddle.distributed.get_rank(), paddle.distributed.get_world_size())
    _watch.start()
    atexit.register(_watch.leave)
    with contextlib.suppress(OSError, AttributeError):  # without this library Paddle ends with a trace
        ctypes.CDLL("libstdc++.so.6")._ZSt13set_terminatePFvvE(_terminate)
    _on_sigterm(lambda *_: sys.exit(128 + signal.SIGTERM))


def _on_sigterm(handler: Any) -> None:
    with contextlib.suppress(ValueError):  # not the main thread: the caller decides about signals
        signal.signal(signal.SIGTERM, handler)
        restart_calls()


@ctypes.CFUNCTYPE(None)
def _terminate() -> None:
    """As `std::terminate`: Paddle lets gloo's error of a lost connection escape from the backward pass."""
    if _watch is not None and not _watch.stopping.is_set():
        _wait_for_the_cause()
    os.abort()


def _wait_for_the_cause() -> None:
    """Gives the watch, which learns which process is lost, the time to end this one."""
    _on_sigterm(signal.SIG_DFL)  # the launcher may end it earlier
    time.sleep(LIMIT + 15)


class Watch(threading.Thread):
    """Counts for this process and watches the next one.

    Args:
        store: of the process group; `set`, `get` (waits for the key) and `add`, which returns the sum.
    """

    def __init__(self, store: Any, rank: int, world: int) -> None:
        super().__init__(daemon=True)
        self.store, self.rank, self.world = store, rank, world
        self.count, self.counted_at = 0, time.monotonic()  # of the next process
        self.stopping = threading.Event()

    def run(self) -> None:
        while not self.stopping.wait(INTERVAL):
            # A machine that is off does not answer, and a request has no time limit.
            alarm = threading.Timer(LIMIT, self.end, [_lost(0)])
            alarm.start()
            try:
                text = self.beat()
            except Exception:
                text = _lost(0)  # the store has ended with it
            alarm.cancel()
            if text and not self.stopping.is_set():
                self.end(text)

    def beat(self) -> str:
        """Counts once; returns the message of the process that has failed or is lost, or ""."""
        self.store.add(f"medcls/count/{self.rank}", 1)
        following = (self.rank + 1) % self.world
        count, now = self.store.add(f"medcls/count/{following}", 0), time.monotonic()
        if count != self.count or not count:  # one that has not begun may still import Paddle
            self.count, self.counted_at = count, now
        elif now - self.counted_at > LIMIT:
            self.publish(_lost(following))
        return self.store.get("medcls/failure").decode() if self.store.add("medcls/failed", 0) else ""

    def publish(self, text: str) -> None:
        """Leaves a message for all; the first one counts."""
        if self.store.add("medcls/failed", 1) == 1:
            self.store.set("medcls/failure", text)

    def tell(self, text: str) -> None:
        """Leaves the message of this process, which prints it itself, and waits until the others have taken it."""
        if not self.stopping.is_set():
            self.stopping.set()
            _on_sigterm(signal.SIG_IGN)  # the launcher may have noticed the end of another one
            self.join(LIMIT)  # it uses the same connection
            with contextlib.suppress(Exception):  # process 0 has ended
                self.publish(f"{text}\n  {process_name(self.rank)}")
                time.sleep(3 * INTERVAL)

    def end(self, text: str) -> None:
        """Prints a message and ends this process, wherever it waits."""
        sys.stdout.flush()
        print(text, file=sys.stderr, flush=True)
        sys.stdout = sys.stderr = open(os.devnull, "w")  # the main thread may still be at work  # noqa: SIM115
        time.sleep(3 * INTERVAL)  # all must take the message before the first one leaves, or the launcher ends them
        os._exit(1)

    def leave(self) -> None:
        """The end of this process, once all have come to theirs; a thread inside Paddle would abort it."""
        _on_sigterm(signal.SIG_IGN)
        with contextlib.suppress(Exception):  # process 0, which serves the store, has left
            if not self.stopping.is_set():
                self._wait_for_all("done")
                self.stopping.set()  # only when nobody watches any more the store may end
                self._wait_for_all("left")
        self.stopping.set()
        self.join(LIMIT)

    def _wait_for_all(self, stage: str) -> None:
        store = paddle.base.core.create_or_get_global_tcp_store()  # the main thread's connection
        store.add(f"medcls/{stage}", 1)
        while store.add(f"medcls/{stage}", 0) < self.world:
            time.sleep(INTERVAL / 10)


def _lost(rank: int) -> str:
    return describe(
        RunError(
            f"{process_name(rank)}, was killed, or its machine or network has failed",
            fix="see its log, and whether memory was short; continue from the last save with --resume",
        )
    )
