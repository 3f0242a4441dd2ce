"""The structure of the code: imports point down, no file names a folder of one machine, no text is run as code."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fakes import ROOT

PACKAGE = ROOT / "paddle_medcls"

FOLDERS = "core data preprocessing models recipes evaluation explanation training deployment web cli".split()
"""A module may import from its own folder and those before it, without circles."""
NEEDS_PADDLE = (
    *("core.paddle_setup", "preprocessing.loader", "models.architectures.", "models.onednn."),
    *(
        "evaluation.evaluate",
        "explanation.",
        "training.",
        "deployment.export",
        "deployment.heatmaps",
        "deployment.parity",
        "web.page",
    ),
)
"""Modules, and folders of them, that import Paddle when they are imported; no other does."""


def modules() -> dict[str, Path]:
    """Name below the package ("data.palm") -> file."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def folder(name: str) -> int:
    """The number of a module's folder in FOLDERS; -1 for a module that lies in none."""
    first = name.partition(".")[0]
    return FOLDERS.index(first) if first in FOLDERS else -1


def imports(path: Path) -> set[str]:
    """Modules of the project that a file imports anywhere, except those for annotations only."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "paddle_medcls":
                below = name.partition(".")[2]
                found.add(below if below in MODULES else below.rpartition(".")[0])
    return found


@pytest.mark.parametrize("name", [name for name in MODULES if folder(name) >= 0])
def test_imports_point_one_way(name: str) -> None:
    down = {other for other in imports(MODULES[name]) if folder(other) > folder(name)}
    assert not down, f"{name} imports {down}"


def test_no_circles() -> None:
    graph = {name: imports(path) & MODULES.keys() - {name} for name, path in MODULES.items()}
    done: set[str] = set()
    while len(done) < len(graph):
        ready = {name for name, needs in graph.items() if name not in done and needs <= done}
        assert ready, f"a circle among {sorted(set(graph) - done)}"
        done |= ready


def test_the_rule_can_fail(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(
        "def f():\n    from paddle_medcls.training.loop import train\n    import paddle_medcls.training.run_directory\n"
    )
    assert imports(tmp_path / "a.py") == {"training.loop", "training.run_directory"}
    assert folder("training.loop") > folder("models") > folder("data.index") > folder("core.errors") == 0


def test_tools_only_call_a_command() -> None:
    for path in (ROOT / "tools").glob("*.py"):
        assert len(path.read_text().splitlines()) < 20, path.name
        assert all(name == "cli" for name in imports(path)), path.name


def test_no_other_module_imports_paddle() -> None:
    names = [f"paddle_medcls.{name}" for name in MODULES if name and not f"{name}.".startswith(NEEDS_PADDLE)]
    if not all(map(importlib.util.find_spec, ("fastapi", "prometheus_client", "python_multipart", "uvicorn"))):
        names.remove("paddle_medcls.web.service")
    assert len(names) > 50
    code = (
        f"import importlib, sys\nfor n in {names}:\n importlib.import_module(n)\n assert 'paddle' not in sys.modules, n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("library", ["paddle", "openvino"])
def test_a_library_is_imported_in_one_place(library: str) -> None:
    """`core.paddle_setup` and `core.openvino_setup` configure their import; other modules import from there."""
    pattern = rf"\s*(import {library}\b(?!\.)|from {library} )"
    for name, path in MODULES.items():
        if name == f"core.{library}_setup":
            assert re.search(pattern, path.read_text())
            continue
        lines = [line for line in path.read_text().splitlines() if re.match(pattern, line)]
        assert not lines, f"{name}: {lines}"


def project_files() -> list[Path]:
    kinds = {".py", ".md", ".toml", ".txt", ".cfg", ".yml", ".yaml", ".json", ".sh", ""}
    left_out = {"runs", "log", "build", "dist", "__pycache__", ".git", "node_modules"}
    found = []
    for path in ROOT.rglob("*"):
        parts = path.relative_to(ROOT).parts
        hidden = any(part.startswith(".") and part != ".ci" for part in parts[:-1])
        images = parts[0] == "datasets" and path.name != "README.md"
        if (
            path.is_file()
            and path.suffix in kinds
            and path.name != ".coverage"
            and not hidden
            and not images
            and not left_out & set(parts)
        ):
            found.append(path)
    return found


def test_no_file_names_a_folder_of_one_machine() -> None:
    pattern = re.compile(
        r"(?<![\w.:/~-])(?:/(?:" + "|".join(("home", "root", "work", "tmp", "Users")) + r")/|[A-Z]:\\)"
    )
    named = []
    for path in project_files():
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
            if pattern.search(line):
                named.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}")
    assert len(project_files()) > 40 and named == []


def test_no_text_calls_a_tutorial_by_a_number() -> None:
    """Help texts, errors and the texts of the page use the titles of docs/tutorials.md."""
    for name, path in MODULES.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                assert not re.search(r"documents? 00\d", node.value, re.IGNORECASE), f"{name}: {node.value}"


def test_no_eval_and_no_foreign_loading() -> None:
    """Users' files are not read by pickle, NumPy's pickles or paddle.load, and no text is run as code."""
    forbidden = {"eval", "exec", "compile", "pickle.load", "pickle.loads", "paddle.load", "numpy.load", "np.load"}
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in forbidden or (called == "np.load" and "allow_pickle=False" in ast.unparse(node)), (
                    f"{name}: {called}"
                )
