"""The command `bdh`: finds a command, runs it, and reports errors for the person who reads them."""

import importlib
import re
import sys
import traceback
from typing import TYPE_CHECKING

import bdh
from bdh.cli.output import kept_back, print_error
from bdh.words import is_out_of_memory, nearest

if TYPE_CHECKING:
    from bdh.cli.settings import Command

COMMANDS = {
    "train": "train a model, or resume a run",
    "generate": "continue prompts",
    "chat": "chat with a model in the terminal",
    "eval": "measure a model on a text, on tasks, or its memory",
    "serve": "serve a model over HTTP, with OpenAI's API",
    "bench": "time a model on this machine",
    "tokenizer": "train a tokenizer",
    "export": "export a run's weights as a model folder",
    "average": "average the weights of models",
    "quantize": "quantize a model's weights to 8 or 4 bits",
    "convert": "convert checkpoints of the published reference code",
    "runs": "list the runs in a folder",
    "plot": "plot the loss curves of runs",
    "demo": "train a small model and generate text with it, in a few minutes",
    "doctor": "show installed and missing packages, and the speed of this machine",
    "completion": "print a completion script for a shell",
}


_MODULES = dict.fromkeys(("tokenizer", "export", "average", "convert", "runs", "plot"), "commands")


def main(argv: list[str] | None = None) -> int:
    """Runs a command line, and returns its exit status.

    It is 2 for invalid input, 1 for a fault of the program, 130 after Ctrl-C, and otherwise that of the command.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        with kept_back(show_on_error=debug):
            return _run(arguments)
    except BrokenPipeError:
        # The reader, such as `head`, is gone. Python would report another error when it flushes at exit.
        sys.stdout = None
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        is_expected = isinstance(error, (ValueError, OSError, ImportError))
        message = re.sub(r"^\[Errno \d+\] ", "", str(error)) or type(error).__name__
        if is_out_of_memory(error):
            first = message.splitlines()[0]
            message = f"out of memory: {first} (bdh train ... --dry_run tells what fits, and what to change)"
        elif not is_expected:
            message = f"unexpected {type(error).__name__}: {error} (the same with --debug shows where)"
        if debug:
            traceback.print_exc()
        else:
            print_error("; ".join([message, *getattr(error, "__notes__", [])]))
        return 2 if is_expected else 1


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0
    command, *rest = arguments
    if command in ("-V", "--version"):
        print(f"bdh {bdh.__version__}")
        return 0
    if command not in COMMANDS:
        near = nearest(command, COMMANDS)
        hint = f"did you mean {near}?" if near else f"there are {', '.join(COMMANDS)}"
        raise ValueError(f"{command!r} is not a command: {hint}")
    return find_command(command)(rest) or 0


def find_command(name: str) -> "Command":
    """Returns a command. Its module is imported here, so that `bdh --help` does not wait for PyTorch."""
    found: Command = getattr(importlib.import_module(f"bdh.cli.{_MODULES.get(name, name)}"), f"run_{name}")
    return found


def _usage() -> str:
    lines = [
        "usage: bdh COMMAND [ARGUMENTS]",
        "",
        "Train, analyse and serve Dragon Hatchling language models.",
        "",
        "commands:",
        *(f"  {name:<12}{summary}" for name, summary in COMMANDS.items()),
        "",
        "options:",
        "  --help      show this text; after a command, its settings",
        "  --version   show the version",
        "  --debug     show the traceback of an error, and the logs of libraries",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
