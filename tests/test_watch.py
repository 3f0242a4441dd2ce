"""A process of several that fails, is killed or no longer answers: what the others learn."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time

import fakes
import pytest

from paddle_medcls.core.errors import DataError, RunError, Stopped
from paddle_medcls.training import run, watch
from paddle_medcls.training.interruption import Interrupt
from paddle_medcls.training.run_directory import State
from paddle_medcls.training.session import Options, Session
from paddle_medcls.training.watch import Watch, shared_failure


@pytest.fixture(autouse=True)
def three(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PADDLE_TRAINER_ENDPOINTS", "10.0.0.7:80,10.0.0.7:81,10.0.0.8:80")
    monkeypatch.setattr(watch.paddle.distributed, "get_world_size", lambda: 3)
    monkeypatch.setattr(watch, "INTERVAL", 0.01)


def watches() -> list[Watch]:
    """Those of three processes; their threads are not started."""
    store = fakes.Store()
    return [Watch(store, rank, 3) for rank in range(3)]


def test_a_process_that_no_longer_counts_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "LIMIT", 0.0)
    first, second, third = watches()
    assert [second.beat() for _ in range(3)] == ["", "", ""]  # the third has not begun: it may import Paddle
    assert third.beat() == "" and second.beat() == "" and third.beat() == "" and second.beat() == ""
    lost = second.beat()  # the third has not counted since
    assert lost.startswith("RunError: process 2 of 3, on 10.0.0.8, was killed, or its machine") and "--resume" in lost
    assert first.beat() == lost == third.beat()


def test_the_first_message_counts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(Watch, "join", lambda self, timeout: None)  # the threads are not started
    first, second, third = watches()
    third.tell("DataError: P0001.jpg: the file is empty")
    second.tell("RunError: another")
    text = "DataError: P0001.jpg: the file is empty\n  process 2 of 3, on 10.0.0.8"
    assert first.beat() == text
    third.tell("again")
    assert first.beat() == text and capsys.readouterr().err == ""  # each prints its own


def started(monkeypatch: pytest.MonkeyPatch, store: object) -> tuple[Watch, list[str]]:
    """The watch of process 1, and what it prints before it ends the process."""
    printed: list[str] = []
    monkeypatch.setattr(Watch, "end", lambda self, text: (printed.append(text), self.stopping.set()))
    result = Watch(store, 1, 3)
    result.start()
    return result, printed


def test_the_thread_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    store = fakes.Store()
    thread, printed = started(monkeypatch, store)
    store.add("medcls/failed", 1)
    store.set("medcls/failure", "DataError: empty")
    thread.join(10)
    assert printed == ["DataError: empty"]


def test_without_the_store_process_0_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """It serves the store: a closed connection raises, and a machine that is off does not answer at all."""
    broken = fakes.Store()
    monkeypatch.setattr(broken, "add", lambda key, number: 1 / 0)
    thread, printed = started(monkeypatch, broken)
    thread.join(10)
    assert printed[0].startswith("RunError: process 0 of 3, on 10.0.0.7, was killed")

    monkeypatch.setattr(watch, "LIMIT", 0.05)
    silent, answer = fakes.Store(), threading.Event()
    monkeypatch.setattr(silent, "add", lambda key, number: answer.wait(10) and 0)
    thread, printed = started(monkeypatch, silent)
    assert thread.stopping.wait(10)
    answer.set()
    thread.join(10)
    assert len(printed) == 1 and printed[0].startswith("RunError: process 0 of 3")


def test_what_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    waited: list[bool] = []
    fake = type("Fake", (), {"tell": lambda self, text: told.append(text)})()
    monkeypatch.setattr(watch, "_watch", fake)
    monkeypatch.setattr(watch, "_on_sigterm", lambda handler: None)
    monkeypatch.setattr(watch, "_wait_for_the_cause", lambda: waited.append(True))
    errors = [DataError("empty", path="a.jpg"), KeyboardInterrupt(), SystemExit(143), Stopped("interrupted; saved")]
    errors += [RuntimeError("[/paddle/third_party/gloo/pair.cc:784] Connection refused"), RuntimeError("other")]
    for error in errors:
        with pytest.raises(type(error)), shared_failure():
            raise error
    assert told[:3] == ["DataError: empty\n  path       a.jpg", "interrupted", "interrupted"]
    assert [text.partition("\n")[0] for text in told[3:]] == [
        "unexpected RuntimeError: [/paddle/third_party/gloo/pair.cc:784] Connection refused",
        "unexpected RuntimeError: other",
    ]
    assert waited == [True]  # a lost connection is not the cause: the watch tells which process is lost


def facts(count: int = 13, fingerprint: str = "a" * 64, mean: float = 0.5) -> dict:
    split = {"images": count, "fingerprint": fingerprint, "per_image": {"mean": [mean], "std": [0.2]}}
    return {"train": split, "val": {**split, "images": 7}}


@pytest.mark.parametrize(
    ("other", "item"),
    [
        (facts(), ""),
        (facts(12, "b" * 64), "process 2 of 3, on 10.0.0.8: train split: 12 images, fingerprint bbbbbbbbbbbb, not 13 "),
        (
            facts(mean=0.25),
            "process 2 of 3, on 10.0.0.8: val pixels: fingerprint ",
        ),
        ({**facts(), "frozen_weights": "c"}, "process 2 of 3, on 10.0.0.8: frozen weights: c, not None"),
    ],
)
def test_data_of_a_node_that_are_not_the_same(monkeypatch: pytest.MonkeyPatch, other: dict, item: str) -> None:
    """Also the recipe, versions and the state that is resumed; the message names process, machine and split."""
    session, own = Session("cpu", 0, 3, Options(), print), []
    check = run._refuse_differences
    monkeypatch.setattr(run, "from_all", lambda value, rank, world: own.append(value) or [value] * 3)
    for data in (facts(), other):
        check(fakes.recipe(), data, "paddle", State(), session)
    monkeypatch.setattr(run, "from_all", lambda value, rank, world: [own[0], own[0], own[1]])
    if not item:
        check(fakes.recipe(), other, "paddle", State(), session)
        return
    with pytest.raises(RunError) as caught:
        check(fakes.recipe(), other, "paddle", State(), session)
    assert item in str(caught.value) and "process 1 of 3" not in str(caught.value)


def test_nobody_leaves_before_all_are_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """And nobody watches any more when process 0 ends, and the store with it."""
    store = fakes.Store()
    monkeypatch.setattr(watch.paddle.base.core, "create_or_get_global_tcp_store", lambda: store)
    processes = [Watch(store, rank, 3) for rank in range(3)]
    ends = [threading.Thread(target=process.leave) for process in processes]
    for process in processes:
        process.start()
    for end in ends[:2]:
        end.start()
    ends[0].join(0.2)
    assert ends[0].is_alive() and processes[0].is_alive() and not processes[0].stopping.is_set()
    ends[2].start()
    for thread in [*ends, *processes]:
        thread.join(10)
        assert not thread.is_alive()


def test_a_signal_does_not_break_a_request() -> None:
    """Paddle's store takes a system call that a signal has interrupted for a lost connection."""
    reader, writer = os.pipe()

    def later() -> None:
        time.sleep(0.1)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)
        time.sleep(0.1)
        os.write(writer, b"x")

    with Interrupt(lambda line: None, float("inf")) as interrupt:
        thread = threading.Thread(target=later)
        thread.start()
        assert ctypes.CDLL(None).read(reader, ctypes.create_string_buffer(1), 1) == 1  # -1: interrupted
        thread.join()
        assert interrupt.due()
    os.close(reader)
    os.close(writer)
