"""What libraries log while a command fails, and while it does not."""

import logging
import os
import subprocess
import sys
import warnings

import pytest

from bdh.cli.output import kept_back, show_kept


def log_as_a_library(name):
    """As one does that is imported while a command runs: with a handler of its own."""
    logger = logging.getLogger(f"{name}.part")
    root = logging.getLogger(name)
    root.addHandler(logging.StreamHandler(sys.stderr))
    root.propagate = False
    logger.error("cannot read it")
    warnings.warn("a setting is old", stacklevel=1)


def fail(library, *, show_on_error):
    with kept_back(show_on_error=show_on_error):
        logging.getLogger("bdh.some.module").warning("left out 3 files")
        log_as_a_library(library)
        raise ValueError("damaged")


def test_a_failure_drops_them_and_leaves_ours(capsys, caplog):
    """An error of datasets stood beside our own line, and five tries of a download before it."""
    with pytest.raises(ValueError, match="damaged"):
        fail("library_of_a_failure", show_on_error=False)
    assert caplog.messages == ["left out 3 files"]
    assert capsys.readouterr().err == ""
    logging.getLogger("library_of_a_failure.part").error("seen again")
    assert capsys.readouterr().err == "seen again\n"


def test_success_and_debug_show_them(capsys):
    with kept_back(show_on_error=False):
        log_as_a_library("library_of_a_success")
        assert capsys.readouterr().err == ""
    shown = capsys.readouterr().err
    assert shown.startswith("cannot read it\n")
    assert "a setting is old" in shown
    with pytest.raises(ValueError, match="damaged"):
        fail("library_of_a_traceback", show_on_error=True)
    assert "cannot read it" in capsys.readouterr().err


def test_they_are_shown_as_they_come_once_a_command_is_ready(capsys):
    with kept_back(show_on_error=False):
        log_as_a_library("library_of_a_training")
        show_kept()
        assert "cannot read it" in capsys.readouterr().err
        logging.getLogger("library_of_a_training.part").error("once more")
        assert capsys.readouterr().err == "once more\n"


def test_the_logger_class_and_warnings_are_as_before():
    before = logging.getLoggerClass(), warnings.showwarning
    with kept_back(show_on_error=False):
        pass
    assert (logging.getLoggerClass(), warnings.showwarning) == before


@pytest.mark.slow
def test_a_damaged_table_gets_one_line(tmp_path):
    """datasets logs what it raises."""
    (tmp_path / "t.parquet").write_bytes(b"no parquet")
    command = [
        "tokenizer",
        "train",
        "--data.source",
        "t.parquet",
        "--kind",
        "bpe",
        "--vocab_size",
        "300",
        "--out",
        "tok",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "bdh", *command],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("error: t.parquet cannot be read as .parquet: ")


@pytest.mark.slow
def test_processes_of_a_benchmark_do_not_show_what_importing_torchao_logs():
    command = [sys.executable, "-m", "bdh", "bench", "train", "--quick", "--baselines", "[]"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert "memory: bdh" in shown  # in a process of its own
    assert "torchao" not in shown
    assert "register_constant" not in shown


@pytest.mark.slow
def test_what_importing_torchao_logs_is_not_shown_but_with_debug(model_folder, tmp_path):
    """transformers imports it wherever it is installed: two warnings and two "Failed to load" on every command."""
    (tmp_path / "a.txt").write_text("A text. " * 20)
    source = f"--data.source={tmp_path / 'a.txt'}"
    command = [sys.executable, "-m", "bdh", "eval", str(model_folder), source, "--part=all"]
    plain, debug = (
        subprocess.run([*command, *more], capture_output=True, text=True, check=True).stderr
        for more in ([], ["--debug"])
    )
    assert "torchao" not in plain
    assert "register_constant" not in plain
    assert "Failed to load" not in plain
    assert "torchao" in debug  # else this says nothing any more
