"""What libraries log while a command fails, and while it does not."""

import logging
import os
import subprocess
import sys
import warnings
from enum import Enum

import pytest

from bdh.cli.output import kept_back, show_kept
from bdh.unneeded_lines import hide_unneeded_lines


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


def test_lines_about_nothing_that_is_used_are_hidden_and_others_are_not(caplog):
    class OfTorchao(Enum):
        A = 1

    class Own(Enum):
        A = 1

    OfTorchao.__module__ = "torchao.quantization.common"
    hide_unneeded_lines()
    hide_unneeded_lines()
    for name, *line in (
        ("torchao", "Failed to load _C.so: no GPU"),
        ("torchao", "it is another one"),
        ("torch.utils._pytree", "%s is an Enum subclass", OfTorchao),
        ("torch.utils._pytree", "%s is an Enum subclass", Own),
        (
            "bitsandbytes.backends.cpu.ops",
            "Failed to load CPU gemm_4bit_forward from kernels-community: %s",
            "no kernels",
        ),
        ("bitsandbytes.autograd._functions", "MatMul8bitLt: inputs will be cast from %s to float16", "float32"),
        ("bitsandbytes.cextension", "Failed to load another library"),
    ):
        logging.getLogger(name).warning(*line)
    assert caplog.messages == ["it is another one", f"{Own} is an Enum subclass", "Failed to load another library"]
    names = [getattr(each, "__name__", "") for each in logging.getLogger("torchao").filters]
    assert names.count("_is_shown") == 1  # a logger that a command made has one of its own


_IN_ONE_PROCESS = """
import sys
from bdh.cli.main import main
model, text, folder = sys.argv[1:]
small = ["--model.n_embd=32", "--model.n_head=2", "--model.n_layer=1", "--train.batch_size=2", "--train.block_size=16"]
run = [f"--data.source={text}", "--train.max_steps=1", "--train.warmup_steps=0", "--data.val_fraction=0.2"]
lora = [f"--train.init_from={model}", "--train.lora.r=2", f"--run_dir={folder}/adapted"]
assert main(["eval", model, f"--data.source={text}", "--part=all"]) == 0
assert main(["train", *run, *small, f"--run_dir={folder}/run"]) == 0
assert main(["train", *run, *small[3:], *lora]) == 0
assert main(["generate", f"{folder}/adapted", "--prompt=x", "--max_new_tokens=2"]) == 0
assert main(["average", model, model, "--out", f"{folder}/average"]) == 0
print("IMPORTED", *(name for name in sys.modules if name.partition(".")[0] == "torchao"))
"""


@pytest.mark.slow
def test_no_command_imports_torchao_for_a_model_without_its_weights(model_folder, tmp_path):
    """transformers imports it wherever it is installed, and so does peft: half a second, two warnings, two "Failed to load"."""
    pytest.importorskip("torchao")
    pytest.importorskip("peft")
    (tmp_path / "a.txt").write_text("A text. " * 200)
    command = [sys.executable, "-c", _IN_ONE_PROCESS, str(model_folder), str(tmp_path / "a.txt"), str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == "IMPORTED"
    assert "Failed to load" not in run.stderr  # of bitsandbytes either, which peft imports
