"""bdh completion: prints a completion script for a shell, generated from the commands' settings."""

import argparse
import typing
from dataclasses import dataclass
from typing import Literal

import shtab

from bdh.cli.leaves import Leaf, help_parser, leaves_of
from bdh.cli.main import COMMANDS, find_command
from bdh.cli.settings import Command, command
from bdh.validation import Settings, holds_paths


@dataclass(kw_only=True)
class CompletionSettings(Settings):
    shell: Literal["bash", "zsh", "fish", "tcsh", "powershell"]
    """The shell to write the script for."""


@command("shell")
def run_completion(settings: CompletionSettings) -> int:
    """Print a script with which a shell completes commands, settings and files. For bash, write it to
    ~/.local/share/bash-completion/completions/bdh; for zsh, to a file _bdh in a folder of $fpath; for fish, to
    ~/.config/fish/completions/bdh.fish.
    """
    print(shtab.complete(all_commands(), settings.shell))
    return 0


def all_commands() -> argparse.ArgumentParser:
    """Returns a parser with every command and its settings."""
    parser = argparse.ArgumentParser("bdh")
    commands = parser.add_subparsers()
    for name, summary in COMMANDS.items():
        found = find_command(name)
        if name == "tokenizer":
            inner = commands.add_parser(name, help=summary).add_subparsers()
            inner.add_parser("train", help=summary, parents=[_parser(found)], add_help=False)
        else:
            commands.add_parser(name, help=summary, parents=[_parser(found)], add_help=False)
    return parser


def _parser(of: Command) -> argparse.ArgumentParser:
    leaves = {leaf.name: leaf for leaf in leaves_of(of.settings_class)}

    def complete(name: str, action: argparse.Action) -> None:
        if name == "config" or holds_paths(leaves[name].type):
            action.complete = shtab.FILE  # type: ignore[attr-defined]  # an attribute that shtab reads
        else:
            action.choices = _choices(leaves[name])

    return help_parser(of.settings_class, leaves, of.prog, of.description, of.positionals, complete)


def _choices(leaf: Leaf) -> list[str] | None:
    """Returns the values that a setting allows if they can be listed, otherwise None."""
    if leaf.types == (bool,):
        return ["true", "false"]
    words = [word for kind in leaf.types if typing.get_origin(kind) is Literal for word in typing.get_args(kind)]
    return [str(word) for word in words] or None
