import subprocess
import sys

import pytest

from bdh.cli.main import COMMANDS, main


def test_help_lists_every_command(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(command in shown for command in COMMANDS)


def test_help_loads_neither_pytorch_nor_transformers():
    """So that it answers at once."""
    code = (
        "import sys; from bdh.cli.main import main; main(['--help']); "
        "print([m for m in ('torch', 'transformers', 'datasets', 'numpy') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


def test_the_package_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "bdh", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("bdh ")


def test_a_misspelt_command_gets_one_line_and_status_2(capsys):
    assert main(["trian"]) == 2
    assert capsys.readouterr().err == "error: 'trian' is not a command: did you mean train?\n"


@pytest.mark.parametrize("command", [c for c in COMMANDS if c != "tokenizer"])
def test_every_command_explains_its_settings(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    assert f"usage: bdh {command}" in capsys.readouterr().out


def test_tokenizer_train_explains_its_settings(capsys):
    with pytest.raises(SystemExit):
        main(["tokenizer", "train", "--help"])
    assert "--vocab_size" in capsys.readouterr().out
    assert main(["tokenizer", "tarin"]) == 2


@pytest.mark.parametrize(
    ("error", "status", "shown"),
    [
        (ValueError("the value is 3: must be 4"), 2, "error: the value is 3: must be 4\n"),
        (FileNotFoundError("there is no [bold]file[/bold]"), 2, "error: there is no [bold]file[/bold]\n"),
        (ValueError("2 settings are wrong:\n  a\n  b"), 2, "error: 2 settings are wrong:\n  a\n  b\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (
            ZeroDivisionError("oops"),
            1,
            "error: unexpected ZeroDivisionError: oops (the same with --debug shows where)\n",
        ),
    ],
)
def test_errors_become_a_line_and_a_status(monkeypatch, capsys, error, status, shown):
    def fail(argv):
        raise error

    monkeypatch.setattr("bdh.cli.commands.run_plot", fail)
    assert main(["plot"]) == status
    assert capsys.readouterr().err == shown


def test_debug_shows_the_traceback(capsys):
    assert main(["plot", "no-such-run", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_memory_that_is_refused_is_an_error_that_helps(monkeypatch, capsys):
    import torch

    import bdh.cli.main as main_module

    monkeypatch.setattr(main_module, "find_command", lambda name: lambda arguments: torch.empty(1 << 60))
    assert main(["train"]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error: out of memory: ")
    assert "--dry_run" in shown
    assert "unexpected" not in shown
