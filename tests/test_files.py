"""Atomic file writing: a file is complete or absent, whatever fails."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fakes import ROOT

from paddle_medcls.core.errors import SetupError
from paddle_medcls.core.files import atomic_write, remove_abandoned, sha256, write_csv, write_json, write_text


def test_a_failed_write_leaves_the_old_file_and_no_temporary_one(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    atomic_write(path, b"before")

    def fails(temporary: str) -> None:
        Path(temporary).write_bytes(b"half")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        atomic_write(path, fails)
    assert path.read_bytes() == b"before" and os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.skipif(sys.platform != "linux", reason="/proc names the file of a handle on Linux")
def test_a_file_is_on_the_disk_before_it_has_its_name_and_its_name_is_on_the_disk_after(tmp_path, monkeypatch) -> None:
    calls, replace = [], os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: calls.append(os.readlink(f"/proc/self/fd/{handle}")))
    monkeypatch.setattr(os, "replace", lambda *names: calls.append("replace") or replace(*names))
    atomic_write(tmp_path / "a.bin", b"data")
    temporary, *rest = calls
    assert Path(temporary).name.startswith(".medcls-") and rest == ["replace", str(tmp_path)]


def test_a_full_disk_is_one_clear_error(tmp_path: Path) -> None:
    """A real limit: this process may write files of 10 kB at most; a longer one leaves the old."""
    path = tmp_path / "a.bin"
    code = (
        "import resource, signal, sys\n"
        "from paddle_medcls.core.files import atomic_write\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))\n"
        "atomic_write(sys.argv[1], b'a' * 5_000)\n"
        "try: atomic_write(sys.argv[1], b'b' * 50_000)\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith(f"SetupError cannot write {path}: File too large"), done.stdout + done.stderr
    assert path.read_bytes() == b"a" * 5000 and os.listdir(tmp_path) == ["a.bin"]


def test_an_impossible_target(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SetupError, match="cannot write"):
        write_text(tmp_path / "file" / "below.txt", "text")


def test_folders_are_made_and_the_umask_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "c.txt"
    before = os.umask(0o027)
    try:
        write_text(path, "ß眼")
    finally:
        os.umask(before)
    assert path.read_bytes() == "ß眼".encode() and path.stat().st_mode & 0o777 == 0o640


def test_json_is_strict(tmp_path: Path) -> None:
    values = {
        "nan": float("nan"),
        "inf": [np.inf, -np.inf],
        "np": np.float32(0.5),
        "array": np.arange(2),
        "t": (1, "ß"),
    }
    write_json(tmp_path / "a.json", values)
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"nan": None, "inf": [None, None], "np": 0.5, "array": [0, 1], "t": [1, "ß"]}
    assert "ß" in text and text.endswith("}\n")


def test_csv_quotes_what_needs_it(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv", ["a", "b"], [["x, y", 1], ['"', 2]])
    assert (tmp_path / "a.csv").read_text() == 'a,b\n"x, y",1\n"""",2\n'


def test_sha256(tmp_path: Path) -> None:
    data = os.urandom(3_000_000)  # more than one block
    (tmp_path / "a").write_bytes(data)
    assert sha256(tmp_path / "a") == hashlib.sha256(data).hexdigest()


def test_temporary_files_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    """The next start removes the temporary file of a killed process, but not that of a running one."""
    code = (
        "import os, sys\n"
        "from paddle_medcls.core.files import atomic_write\n"
        "def write(name):\n"
        "    open(name, 'w').write('half')\n"
        "    os.kill(os.getpid(), 9)\n"
        "atomic_write(sys.argv[1], write)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.bin")], cwd=ROOT, timeout=60)
    (left,) = os.listdir(tmp_path)
    assert left.startswith(".medcls-") and left.endswith(".bin")
    others = [".a.bin.abc123.bin", "a.bin", ".medcls-notes", ".medcls-ffffffff-1-x.bin", f"{left.rpartition('-')[0]}.d"]
    for name in others:
        (tmp_path / name).write_text("")
    seen: list[set[str]] = []

    def slow(temporary: str) -> None:
        remove_abandoned(tmp_path)
        seen.append(set(os.listdir(tmp_path)))

    atomic_write(tmp_path / "b.bin", slow)  # while it writes
    assert seen[0] - {*others} and left not in seen[0]
    assert set(os.listdir(tmp_path)) == {*others, "b.bin"}
    remove_abandoned(tmp_path / "none")
