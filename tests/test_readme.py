"""The lines that README.md shows, run as they stand: each prints what the line below it says, but for the digits."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from fakes import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def lines_of(language: str) -> list[str]:
    return README.partition(f"```{language}\n")[2].partition("```")[0].splitlines()


def pattern(shown: str) -> str:
    """What a line must match: any digits for digits, any width of blanks."""
    words = [re.sub(r"\d[\d.e-]*", r"[\\d.e-]+", re.escape(word).replace(r"\.", ".")) for word in shown.split()]
    return r"\s*".join(words)


def test_the_pattern() -> None:
    assert re.search(pattern("accuracy  0.97 (95% 0.9 to 1.0)"), "x\n accuracy 1.00   (95% 0.9398 to 1.0000)")
    assert not re.search(pattern("accuracy 0.97"), "accuracy nan")


@pytest.mark.slow
def test_the_lines_print_what_is_shown(tmp_path: Path) -> None:
    commands, shown = lines_of("sh")[::2], lines_of("sh")[1::2]
    assert len(commands) == len(shown) == 5
    for command, expected in zip(commands, shown):
        words = shlex.split(command.replace("runs/", f"{tmp_path}/"))
        assert words[0] == "python"
        run = subprocess.run([sys.executable, *words[1:]], cwd=ROOT, capture_output=True, text=True, timeout=300)
        output = (run.stdout + run.stderr).replace(f"{tmp_path}/", "runs/")
        assert run.returncode == 0 and re.search(pattern(expected.lstrip("# ")), output), output
    script = "\n".join(lines_of("python")).replace("runs/", f"{tmp_path}/")
    (tmp_path / "script.py").write_text(script, encoding="utf-8")
    run = subprocess.run(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert run.returncode == 0, run.stderr
    for expected in re.findall(r"\)  # (\d.*|\w+ \d.*)", "\n".join(lines_of("python"))):
        assert re.search(pattern(expected), run.stdout.replace(f"{tmp_path}/", "runs/")), run.stdout
    assert (tmp_path / "python/heat-map.png").is_file()
