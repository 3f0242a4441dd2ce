"""Progress: a bar on a terminal, lines in a log, and no remains after an error."""

from __future__ import annotations

import io
import sys

import pytest

from paddle_medcls.core import progress as module
from paddle_medcls.core.progress import progress, say_line


def standard_error(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> io.StringIO:
    stream = io.StringIO()
    stream.isatty = lambda: terminal  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


def test_a_log_has_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    log = standard_error(monkeypatch, terminal=False)
    monkeypatch.setattr(module, "LINE_SECONDS", 0.0)
    with progress(range(3), "reading palm", 3, "image") as bar:
        assert list(bar) == [0, 1, 2]
    shares = [line.split(", ")[0] for line in log.getvalue().splitlines()]
    assert shares[-3:] == [f"reading palm: {percent}%" for percent in (33, 67, 100)]
    assert "3 of 3" in log.getvalue() and log.getvalue().isascii() and "\r" not in log.getvalue()


def test_a_log_has_no_lines_of_short_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    log = standard_error(monkeypatch, terminal=False)
    assert list(progress(range(3), "reading palm", 3, "image")) == [0, 1, 2]
    assert log.getvalue() == ""


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_removes_the_bar(error: type, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = standard_error(monkeypatch, terminal=True)
    with pytest.raises(error), progress(range(3), "reading palm", 3, "image") as bar:
        for _ in bar:
            raise error
    shown = terminal.getvalue()
    assert (
        "reading palm" in shown and shown.endswith("\r") and not shown.rpartition("\r")[0].rpartition("\r")[2].strip()
    )


def test_only_one_of_several_processes_shows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = standard_error(monkeypatch, terminal=True)
    with progress(range(3), "reading palm", 3, "image", show=False) as bar:
        assert list(bar) == [0, 1, 2]
    assert terminal.getvalue() == ""


def test_a_notebook_shows_lines_as_output(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Standard error is red there."""
    say_line("in a terminal")
    stream = type("OutStream", (io.StringIO,), {"__module__": "ipykernel.iostream"})
    monkeypatch.setattr("sys.stderr", stream())
    say_line("in a notebook")
    monkeypatch.undo()
    assert capsys.readouterr() == ("in a notebook\n", "in a terminal\n")
