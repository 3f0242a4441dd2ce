"""The documents against the code: links, files and options of commands that they name exist."""

from __future__ import annotations

import functools
import importlib
import re
from pathlib import Path

import pytest
from fakes import ROOT

READMES = ("README.md", "README.zh-CN.md")
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("datasets/*/README.md")],
    key=lambda path: path.relative_to(ROOT),
)
LINK = re.compile(r"\]\((?!https?:|mailto:)([^)#\s]+)(?:#[^)]*)?\)")
FILE = re.compile(r"\b((?:paddle_medcls|tools|tests|benchmarks|docs|datasets)/[\w./-]*\w\.(?:py|md|json|txt))\b")
OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*")
MADE_BY_COMMANDS = ("datasets/",)  # but for their pages, files in it are the user's


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def faulty_links(text: str, folder: Path) -> list[str]:
    return [link for link in LINK.findall(text) if not (folder / link).exists()]


def faulty_files(text: str) -> list[str]:
    found = [path for path in FILE.findall(text) if not path.startswith(MADE_BY_COMMANDS) or path.endswith(".md")]
    return [path for path in found if not (ROOT / path).is_file() and path != "tools/NAME.py"]


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_links_and_files_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not faulty_links(text, path.parent)
    if path.name != "CHANGELOG.md":  # it also names what is gone
        assert not faulty_files(text)


def options_named(text: str) -> set[tuple[str, str]]:
    """(command, option) of all commands with options in a text; a table row that begins with a command is all its."""
    found = set()
    for line in text.splitlines():
        row = re.match(r"\| `python tools/(\w+)\.py", line)
        for name, words in [(row[1], line)] if row else re.findall(r"tools/(\w+)\.py([^`|]*)", line):
            found |= {(name, option) for option in OPTION.findall(words.partition("#")[0])}
    return found


@functools.cache
def known_options(name: str) -> set[str]:
    """The options that a command's --help names."""
    with pytest.MonkeyPatch.context() as patch:
        shown: list[str] = []
        patch.setattr("argparse.ArgumentParser._print_message", lambda self, text, file=None: shown.append(text))
        with pytest.raises(SystemExit) as end:
            importlib.import_module(f"paddle_medcls.cli.{name}").main(["--help"])
    assert end.value.code == 0
    return set(OPTION.findall("".join(shown)))


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if path.name != "CHANGELOG.md"], ids=named)
def test_options_exist(path: Path) -> None:
    named_here = options_named(path.read_text(encoding="utf-8"))
    assert not [pair for pair in sorted(named_here) if pair[1] not in known_options(pair[0])]
    assert named_here or path.name not in READMES


def test_both_languages_name_the_same_options() -> None:
    english, chinese = (options_named((ROOT / name).read_text(encoding="utf-8")) for name in READMES)
    assert english == chinese


def test_the_tests_above_can_fail() -> None:
    assert faulty_links("[a](no/such.md) [b](README.md) [c](https://example.org/x)", ROOT) == ["no/such.md"]
    assert faulty_files("`paddle_medcls/images.py`, `tools/train.py`, `paddle_medcls/models/<name>.py`") == [
        "paddle_medcls/images.py"
    ]
    assert options_named("| `python tools/eval.py` | `--nothing` |\nsee `tools/train.py --lr 1` or `--other`") == {
        ("eval", "--nothing"),
        ("train", "--lr"),
    }
    assert "--nothing" not in known_options("eval")
