"""The documents against the code: links, files, commands and options that they name exist.

docs/commands.md is generated: `python -m pytest tests/test_documents.py --update-docs` writes it again.
page.zh-CN.md is page.md in Chinese. A change belongs in both; the code, links and numbers of both are compared.
"""

from __future__ import annotations

import argparse
import re
import textwrap
from pathlib import Path

import pytest
from fakes import ROOT

import paddle_medcls
from paddle_medcls.cli import COMMANDS
from paddle_medcls.cli.completion import parser_of

READMES = ("README.md", "README.zh-CN.md")
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("datasets/*/README*.md")],
    key=lambda path: path.relative_to(ROOT),
)
SITE = [*DOCUMENTS, ROOT / "results/README.md"]
LINK = re.compile(r"\]\((?!https?:|mailto:)([^)#\s]+)(?:#[^)]*)?\)")
FILE = re.compile(r"\b((?:paddle_medcls|tools|tests|benchmarks|docs|datasets)/[\w./-]*\w\.(?:py|md|json|txt))\b")
OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*")
FENCED = re.compile(r"^```\w*\n(.*?)^```$", re.M | re.S)
NUMBER = re.compile(r"(?<![A-Za-z\d])\.?\d[\d,.]*")  # but for those that end a word: bf16, uint8
ENGLISH_ONLY = ["docs/commands.md", "docs/hostile-inputs.md", "docs/reference.md", "results/README.md"]  # generated
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
    for line in re.sub(r"`[^`]+`", lambda span: " ".join(span[0].split()), text).splitlines():
        row = re.match(r"\| `python tools/(\w+)\.py", line)
        for name, words in [(row[1], line)] if row else re.findall(r"tools/(\w+)\.py([^`|]*)", line):
            found |= {(name, option) for option in OPTION.findall(words.partition("#")[0])}
    return found


def known_options(name: str) -> set[str]:
    return {option for action in parser_of(name)._actions for option in action.option_strings if option != "-h"}


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if path.name != "CHANGELOG.md"], ids=named)
def test_options_exist(path: Path) -> None:
    named_here = options_named(path.read_text(encoding="utf-8"))
    assert not [pair for pair in sorted(named_here) if pair[1] not in known_options(pair[0])]
    assert named_here or path.name not in READMES


def chinese(path: Path) -> Path:
    return path.with_suffix(".zh-CN.md")


def facts(text: str) -> list[dict]:
    """For each heading and the text below it, what is the same in both languages."""
    text = FENCED.sub(lambda block: textwrap.indent(block[1], "    "), text)
    return [section_facts(section) for section in re.split(r"^(?=#+ )", text, flags=re.M)]


def section_facts(section: str) -> dict:
    lines = section.splitlines()
    prose = "\n".join(line for line in lines if not line.startswith("    "))
    plain = re.sub(r"`[^`]+`|\]\([^)]*\)", "", prose)
    return {
        "heading": re.match("#*", section)[0],
        "code, of its comments the numbers": [
            re.sub(" +#.*", lambda comment: f"  # {sorted(numbers(comment[0]))}", line)
            for line in lines
            if line.startswith("    ")
        ],
        "options": options_named(section),
        "`code`": {" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)},
        "links": set(re.findall(r"\]\(([^)#\s]+)", prose)) - set(READMES),
        "numbers of each cell": [
            [numbers(cell) for cell in row.split("|")] for row in plain.splitlines() if row.startswith("|")
        ],
        "numbers": numbers(plain),
    }


def with_chinese_links(text: str, folder: Path) -> str:
    """An English text with the links that its Chinese page has to have: to the Chinese page where there is one."""

    def link(found: re.Match) -> str:
        return found[0].replace(".md", ".zh-CN.md") if chinese(folder / found[1]).exists() else found[0]

    return re.sub(r"\]\(([\w./-]+\.md)", link, text)


def numbers(text: str) -> set[str]:
    return {number.rstrip(",.") for number in NUMBER.findall(text)}


def joined_lines(text: str) -> list[str]:
    """Lines that continue a paragraph: browsers show a blank there, which Chinese text does not have."""
    return re.findall(r"(?<=[^\n])\n((?! {4}|- |[|#]|\d+\. )[^\n]+)", FENCED.sub("", text))


@pytest.mark.parametrize("path", [path for path in SITE if chinese(path).exists()], ids=named)
def test_both_languages_have_the_same_code_links_and_numbers(path: Path) -> None:
    english = facts(with_chinese_links(path.read_text(encoding="utf-8"), path.parent))
    translation = facts(chinese(path).read_text(encoding="utf-8"))
    for number, (left, right) in enumerate(zip(english, translation), 1):
        differences = {name: (left[name], right[name]) for name in left if left[name] != right[name]}
        assert not differences, f"section {number} of {named(path)} and of {named(chinese(path))}"
    assert len(english) == len(translation)
    assert not joined_lines(chinese(path).read_text(encoding="utf-8"))


def test_every_page_has_a_chinese_one() -> None:
    pages = [path for path in SITE if path.parent != ROOT and not path.name.endswith(".zh-CN.md")]
    assert [named(path) for path in pages if not chinese(path).exists()] == ENGLISH_ONLY


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
    english = "# Title\n\nsee [a](docs/trust.md)\n\n    cd a  # go\n\n| `--x` | 5 of 1,200 |\n"
    translation = "# 标题\n\n见[甲](docs/trust.zh-CN.md)\n\n    cd a  # 进入\n\n| `--x` | 1,200 中的 5 |\n"
    english = facts(with_chinese_links(english, ROOT))
    assert english == facts(translation)
    for part, other in [("cd a", "cd b"), ("--x", "--y"), ("5", "6"), (".zh-CN", ""), ("# ", "## ")]:
        assert english != facts(translation.replace(part, other, 1))
    assert joined_lines("一行\n又一行\n- 一项\n  续行\n\n    code\n    code\n\n| a |\n|---|\n") == ["又一行", "  续行"]


COMMANDS_PAGE = ROOT / "docs/commands.md"
COMMANDS_HEAD = """# Commands

Written from the commands' own `--help` by

    python -m pytest tests/test_documents.py --update-docs

Every `python tools/NAME.py` is also `medcls NAME` after the installation (`benchmark` in a clone only). Exit codes:
0 done, 1 failed (one message, no traceback without `--debug`), 2 wrong usage. `--recipe list`, `--model list`,
`--dataset list` and `--set list` of `train` print the known names.
"""


def commands_page() -> str:
    """docs/commands.md: each command's description and a table of its options."""
    sections = [COMMANDS_HEAD]
    for name, title in COMMANDS.items():
        parser = parser_of(name)
        description = parser.description.replace("<", "&lt;").replace("%%", "%")
        rows = [option_row(action) for action in parser._actions if action.dest not in ("help", "debug")]
        sections.append(
            f"## {name}: {title}\n\n{description}\n\n| option | meaning |\n|---|---|\n" + "\n".join(rows) + "\n"
        )
    return "\n".join(sections)


def option_row(action: argparse.Action) -> str:
    """One row of the table; argparse's own layout differs between versions of Python."""
    value = action.metavar or (action.dest.upper() if action.choices is None else "|".join(map(str, action.choices)))
    value = " ".join(value) if isinstance(value, tuple) else value + " …" * (action.nargs in ("+", "*"))
    names = ", ".join(action.option_strings)
    usage = names if action.nargs == 0 else f"{names} {value}".lstrip()
    meaning = action.help.replace("%%", "%").replace("<", "&lt;")
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in (f"`{usage}`", meaning)) + " |"


def test_the_page_of_commands(request: pytest.FixtureRequest) -> None:
    page = commands_page()
    if request.config.getoption("--update-docs"):
        COMMANDS_PAGE.write_text(page, encoding="utf-8")
    assert COMMANDS_PAGE.read_text(encoding="utf-8") == page, "write it again with --update-docs"
    assert all(option in page for name in COMMANDS for option in known_options(name) - {"--help", "--debug"})


def test_the_reference_has_every_public_name() -> None:
    page = (ROOT / "docs/reference.md").read_text(encoding="utf-8")
    assert re.findall(r"^::: paddle_medcls\.(\w+)$", page, re.M) == paddle_medcls.__all__


def test_the_site_leads_to_every_document() -> None:
    pages = re.findall(r"[\w./-]+\.md\b", (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("nav:\n")[2])
    assert sorted(pages) == sorted(named(path) for path in SITE if not path.name.endswith(".zh-CN.md"))


def test_the_badges_are_true() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8") + (ROOT / "setup.py").read_text(encoding="utf-8")
    versions = re.findall(r"Python :: (3\.\d+)", project)
    shown = (ROOT / "docs/images/badges.svg").read_text(encoding="utf-8")
    texts = re.findall(r">([^<>]+)</text>", shown)
    assert (
        texts[:2] == ["Python", f"{versions[0]} to {versions[-1]}"]
        and "Apache-2.0" in texts
        and "Apache-2.0" in project
    )
    assert f"Paddle {texts[3].split()[0]}" in (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert "http" not in shown.replace("http://www.w3.org/2000/svg", "")
