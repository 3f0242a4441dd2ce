"""The package as it is published: what it declares, holds and prints outside the repository."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import zipfile
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


def test_an_installed_package_has_no_commit(tmp_path: Path) -> None:
    """Not the commit of a repository that its environment lies in."""
    inside = tmp_path / "site-packages"
    inside.mkdir()
    for command in (
        ["init", "-q"],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-ma"],
    ):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True, timeout=20)
    assert paddle_setup._state_of_the_code(inside) == "as installed"
    assert re.fullmatch("[0-9a-f]{7,}", paddle_setup._state_of_the_code(tmp_path))


def test_the_dockerfile_runs_what_is_tested() -> None:
    """Its RUN lines, in their order, are lines of `make package`, which .ci/run runs."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    recipe = [line.strip() for line in makefile.partition("\npackage:\n")[2].partition("\n\n")[0].splitlines()]
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    lines = [line[len("RUN ") :] for line in dockerfile.splitlines() if line.startswith("RUN ")]
    assert len(lines) >= 4 and "\\\n" not in dockerfile
    assert lines == [
        line.replace("$(PADDLE)", "$PADDLE") for line in recipe if line.replace("$(PADDLE)", "$PADDLE") in lines
    ]
    assert re.search(r"^make .*\bpackage\b", (ROOT / ".ci/run").read_text(encoding="utf-8"), re.M)
    extras = set(re.search(r"\.\[(.*?)\]", dockerfile)[1].split(","))
    assert extras <= declared()["optional-dependencies"].keys()
    default = re.search(r"^PADDLE \?= (.*)$", makefile, re.M)[1]
    assert f"ARG PADDLE={default}\n" in dockerfile and dockerfile.index("ARG PADDLE") > dockerfile.index("FROM ")


def test_the_docker_context_is_what_pip_installs() -> None:
    wanted = re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text(encoding="utf-8"), re.M)
    assert sorted(wanted) == ["LICENSE", "README.md", "paddle_medcls", "pyproject.toml", "setup.py"]
    assert all((ROOT / name).exists() for name in wanted)


def test_the_citation_is_of_this_version() -> None:
    yaml = pytest.importorskip("yaml")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()  # what the format requires
    assert citation["version"] == __version__ and citation["license"] == declared()["license"]
    assert citation["authors"] == declared()["authors"]
    assert f"\n## {__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_archives_hold_the_package_and_its_tests(tmp_path: Path) -> None:
    """Of a clone with what git tracks: a wheel of the package alone, a source archive with all that the tests read."""
    pytest.importorskip("build")
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True, timeout=60)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(clone)]
    subprocess.run(command, check=True, timeout=300, capture_output=True)
    tracked = subprocess.run(["git", "-C", str(clone), "ls-files"], capture_output=True, text=True).stdout.split()
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        content = [name for name in wheel.namelist() if ".dist-info/" not in name]
        (metadata,) = [wheel.read(name).decode() for name in wheel.namelist() if name.endswith("/METADATA")]
    assert sorted(content) == sorted(name for name in tracked if name.startswith("paddle_medcls/"))
    assert f"\nVersion: {__version__}\n" in metadata and "\nLicense-Expression: Apache-2.0\n" in metadata
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    assert set(tracked) - {".gitignore"} <= packed


@pytest.mark.slow
def test_a_users_script_is_type_checked(tmp_path: Path) -> None:
    """py.typed: mypy knows the types of the public names."""
    pytest.importorskip("mypy")
    (tmp_path / "script.py").write_text(
        "import paddle_medcls as medcls\n"
        "result = medcls.load_predictor('x').predict('y')\n"
        "reveal_type(result.probability)\n"
        "medcls.get_recipe(3)\n"
    )
    environment = {**os.environ, "MYPYPATH": str(ROOT)}
    command = [sys.executable, "-m", "mypy", "--follow-imports", "silent", "--cache-dir", os.devnull, "script.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, env=environment)
    assert 'Revealed type is "' in done.stdout and "float" in done.stdout
    assert 'script.py:4: error: Argument 1 to "get_recipe" has incompatible type "int"' in done.stdout


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
