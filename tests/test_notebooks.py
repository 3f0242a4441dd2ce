"""The notebooks: their code runs, their outputs are stored, both languages are there, and nothing of a machine is.

`python -m pytest tests/test_notebooks.py --slow --update-docs` runs them and stores their outputs again.
"""

from __future__ import annotations

import ast
import copy
import getpass
import json
import re
from pathlib import Path

import pytest
from fakes import ROOT
from test_documents import OPTION, known_options

import paddle_medcls as medcls

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SHORTEST = "medmnist_baseline"
CHINESE, LATIN = re.compile("[\u4e00-\u9fff]"), re.compile("[A-Za-z]")
MACHINE_PATH = re.compile(r"(?<![\w.:/])(?:/(?:root|home|Users|work|tmp|opt|usr|var|mnt|data)/|[A-Z]:\\)")
SECONDS = re.compile(r"\b\d+(?:\.\d+)? (?:s|ms|seconds|minutes)\b")


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def source(cell: dict) -> str:
    return "".join(cell["source"])


def code_cells(notebook: dict) -> list[dict]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def printed(notebook: dict) -> str:
    """The text of all outputs."""
    texts = []
    for cell in code_cells(notebook):
        for output in cell["outputs"]:
            parts = [output.get("text", ""), *output.get("data", {}).get("text/plain", [])]
            texts += ["".join(part) for part in parts]
    return "\n".join(texts)


def kinds(cell: dict) -> list[tuple]:
    """What a cell shows: streams, texts, pictures; not their content, which differs between machines."""
    return [(one["output_type"], one.get("name"), tuple(sorted(one.get("data", {})))) for one in cell["outputs"]]


def test_each_tutorial_and_own_images_have_one() -> None:
    names = {path.stem for path in NOTEBOOKS}
    assert names == {"covid", "medmnist_baseline", "medmnist_study", "oct", "own_images", "palm"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_a_reader_finds(path: Path) -> None:
    notebook = read(path)
    cells = [(cell["cell_type"], source(cell)) for cell in notebook["cells"]]
    assert 8 <= len(cells) <= 14 and path.stat().st_size < 300_000
    kind, first = cells[0]
    assert kind == "markdown" and "pip install" in first and "不可用于诊断" in first and "not for diagnosis" in first
    kind, last = cells[-1]
    assert kind == "markdown" and ("datasets/" in last or path.stem == "own_images")  # where the real images go
    for kind, text in cells:
        head, *paragraphs = text.split("\n\n") if kind == "markdown" else ["#"]
        assert kind == "code" or re.match(r"##? ", head), "each explanation has a heading"
        assert kind == "code" or (CHINESE.search(text) and LATIN.search(text) and len(paragraphs) >= 2), text
        # "Grad-CAM" is the same in both languages
        assert kind == "code" or (CHINESE.search(head) and " / " in head) or "Grad-CAM" in head, head


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_stored_and_tell_nothing_of_a_machine(path: Path) -> None:
    notebook = read(path)
    cells = code_cells(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream", "execute_result", "display_data"}
    assert all(output.get("name") != "stderr" for output in outputs), "red boxes look like faults"
    assert sum(bool(cell["outputs"]) for cell in cells) >= len(cells) - 1
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2
    text = printed(notebook) + "".join(source(cell) for cell in notebook["cells"])
    assert "SYNTHETIC SAMPLE" in printed(notebook) and not MACHINE_PATH.search(text)
    assert not SECONDS.search(printed(notebook)), "it would change with each run"
    assert notebook["metadata"]["language_info"] == {"name": "python"}
    if len(getpass.getuser()) > 4:
        assert getpass.getuser() not in text


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_code_uses_the_public_api_and_known_options(path: Path) -> None:
    notebook = read(path)
    for cell in code_cells(notebook):
        for node in ast.walk(ast.parse(source(cell))):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                assert set(names) <= {"paddle_medcls", "pathlib", "shutil"}
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "medcls":
                assert node.attr in medcls.__all__
    text = "\n".join(source(cell) for cell in notebook["cells"])
    for name, words in re.findall(r"!medcls (\w+)(.*)", text):
        assert set(OPTION.findall(words.partition("#")[0])) <= known_options(name)


def test_the_tests_above_can_fail() -> None:
    assert MACHINE_PATH.search("written to /opt/x") and MACHINE_PATH.search("/data/x")
    assert not MACHINE_PATH.search("runs/tmp/x https://example.org/home/x")
    assert SECONDS.search("epoch 1/3  12 s  *") and not SECONDS.search("60 images")


# --- execution ---------------------------------------------------------------------------------------


def merge_streams(outputs: list) -> list:
    """Outputs in which a stream that came in pieces, as the kernel happened to send it, is one."""
    merged: list = []
    for output in outputs:
        if merged and output.output_type == "stream" and merged[-1].get("name") == output.name:
            merged[-1].text += output.text
        else:
            merged.append(output)
    return merged


def executed(path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    """The notebook, run from its first cell to its last in a new kernel and an empty folder."""
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    import nbformat

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(folder / "jupyter"))
    monkeypatch.setenv("IPYTHONDIR", str(folder / "ipython"))
    (folder / "work").mkdir()
    notebook = nbformat.read(path, as_version=4)
    metadata = copy.deepcopy(notebook.metadata)  # not with the versions of this Python
    resources = {"metadata": {"path": str(folder / "work")}}
    nbclient.NotebookClient(notebook, timeout=300, resources=resources, record_timing=False).execute()
    notebook.metadata = metadata
    for cell in notebook.cells:
        cell.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = merge_streams(cell.outputs)
    return json.loads(nbformat.writes(notebook))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=() if path.stem == SHORTEST else pytest.mark.slow, id=path.stem) for path in NOTEBOOKS],
)
def test_the_code_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request) -> None:
    """It shows the same kinds of outputs as the file."""
    made = executed(path, tmp_path, monkeypatch)
    if request.config.getoption("--update-docs"):
        path.write_text(json.dumps(made, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    stored = read(path)
    assert [source(cell) for cell in made["cells"]] == [source(cell) for cell in stored["cells"]]
    assert [kinds(cell) for cell in code_cells(made)] == [kinds(cell) for cell in code_cells(stored)]
