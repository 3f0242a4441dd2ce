"""`medcls completion bash`: the script by which a shell completes commands, options, names and files."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

from paddle_medcls.cli import COMMANDS
from paddle_medcls.cli.common import parser, run

SHELLS = ("bash", "zsh", "fish")
TEXT = """Prints the script by which a shell completes commands, options, names and files. To turn it on:

  bash  eval "$(medcls completion bash)"    in ~/.bashrc
  zsh   eval "$(medcls completion zsh)"     in ~/.zshrc, after compinit
  fish  medcls completion fish | source     in ~/.config/fish/config.fish"""


def main(argv: Sequence[str] | None = None) -> int:
    p = parser("completion", TEXT)
    p.add_argument("shell", choices=SHELLS)
    return run(_work, p.parse_args(argv))


def _work(args: argparse.Namespace) -> int:
    from paddle_medcls.core.errors import SetupError

    try:
        import shtab
    except ImportError:
        raise SetupError("shtab is not installed, which writes the script", fix="pip install shtab") from None
    script = shtab.complete(_all_commands(args.shell), args.shell)
    print(
        script.replace("complete -o bashdefault ", "complete -o bashdefault -o default ")
    )  # files, where no name fits
    return 0


def _all_commands(shell: str) -> argparse.ArgumentParser:
    """One parser with all commands, whose options know what completes them."""
    import shtab

    from paddle_medcls.data.datasets import dataset_names
    from paddle_medcls.models.network import model_names
    from paddle_medcls.recipes import all_recipes

    top = argparse.ArgumentParser(prog="medcls")
    top.add_argument("--version", action="store_true", help="print versions")
    commands = top.add_subparsers()
    names = {
        "dataset": [*dataset_names(), "list"],
        "model": [*model_names(), "list"],
        "recipe": [*all_recipes(), "list"],
    }
    for name, text in COMMANDS.items():
        if name == "benchmark":  # for clones
            continue
        one = commands.add_parser(name, parents=[parser_of(name)], add_help=False, help=text)
        for action in one._actions:
            if action.dest in names:
                action.choices = names[action.dest]
            # After an option with several values bash would complete files alone; without a mark it completes both.
            elif action.dest == "images" or (action.type is Path and (shell != "bash" or action.nargs is None)):
                action.complete = shtab.DIRECTORY if action.metavar == "DIR" else shtab.FILE  # type: ignore[attr-defined]
    commands.add_parser("completion", help="print the script of a shell").add_argument("shell", choices=SHELLS)
    return top


def parser_of(name: str) -> argparse.ArgumentParser:
    """The parser that a command's `main` makes."""
    with mock.patch.object(argparse.ArgumentParser, "parse_args", lambda parser, argv: _stop(parser)):
        try:
            importlib.import_module(f"paddle_medcls.cli.{name}").main([])
        except _Made as made:
            return made.parser
    raise AssertionError(f"{name} parses no arguments")


class _Made(Exception):
    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.parser = parser


def _stop(parser: argparse.ArgumentParser) -> None:
    raise _Made(parser)
