"""The package as it is published: what it declares, holds and prints outside the repository."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from fakes import ROOT

from paddle_medcls import __version__
from paddle_medcls.cli import COMMANDS, completion, medcls
from paddle_medcls.core import paddle_setup


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[<>=;\[ ]", line.strip())[0].lower() for line in requirements}


def declared() -> dict:
    tomllib = pytest.importorskip("tomllib", reason="tomllib came with Python 3.11")
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_requirements_file_installs_what_the_package_needs() -> None:
    project = declared()
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    listed = names([line for line in lines if line and not line.startswith("#")])
    assert listed == names(project["dependencies"]) | names(project["optional-dependencies"]["cpu"]) | {"openpyxl"}


def test_the_code_of_an_installed_package_is_its_version(tmp_path: Path) -> None:
    """Not the commit of a repository that its environment lies in."""
    inside = tmp_path / "site-packages"
    inside.mkdir()
    for command in (
        ["init", "-q"],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-ma"],
    ):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True, timeout=20)
    assert paddle_setup._state_of_the_code(inside) == f"{__version__}, installed"
    assert re.fullmatch("[0-9a-f]{7,}", paddle_setup._state_of_the_code(tmp_path))


# --- completion --------------------------------------------------------------------------------------


def printed(shell: str, capsys: pytest.CaptureFixture) -> str:
    assert medcls(["completion", shell]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_the_script_of_a_shell_knows_all_commands(shell: str, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("shtab")
    script = printed(shell, capsys)
    assert all(re.search(rf"\b{name}\b", script) for name in COMMANDS.keys() - {"benchmark"})
    assert {"palm_tutorial", "mobilenet_v3_small", "breastmnist_224"} <= set(re.findall(r"\w+", script))


def test_what_bash_completes(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("shtab")
    (tmp_path / "completion.bash").write_text(printed("bash", capsys))
    (tmp_path / "image.png").touch()
    lines = {
        "medcls tra": ["train"],
        "medcls train --mod": ["--model"],
        "medcls train --model resnet1": ["resnet101", "resnet152", "resnet18"],
        "medcls predict im": ["image.png"],
        "medcls predict image.png --grad": ["--gradcam"],
        "medcls eval --weights image.png --outp": ["--output"],
        "medcls completion z": ["zsh"],
    }
    code = "source completion.bash\n"
    for line in lines:
        code += f"COMP_WORDS=({line}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))\n"
        code += '_shtab_medcls 2> /dev/null; echo "${COMPREPLY[@]}"\n'
    done = subprocess.run(["bash", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=20)
    assert [sorted(line.split()) for line in done.stdout.splitlines()] == list(lines.values())


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert medcls(["completion", "bash"]) == 1
    assert "pip install shtab" in capsys.readouterr().err


def test_the_help_says_how_to_turn_completion_on(capsys: pytest.CaptureFixture) -> None:
    medcls(["--help"])
    assert 'eval "$(medcls completion bash)"' in capsys.readouterr().out
