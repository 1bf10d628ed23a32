"""Runs of several processes, against the same run of one."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from bdh.cli.main import main
from bdh.locks import Lock
from bdh.train.checkpoint import Checkpointer
from tests.distributed.conftest import SETTINGS, flags, torchrun_command
from tests.train.conftest import losses, samples

pytestmark = pytest.mark.slow


@pytest.fixture
def text_file(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"{number * 7919 % 1009} is a number" for number in range(2000)))
    return path


@pytest.fixture
def settings(text_file, tmp_path, monkeypatch) -> dict:
    monkeypatch.setenv("BDH_CACHE", str(tmp_path / "cache"))
    return {**SETTINGS, "data.source": text_file}


@pytest.fixture
def alone(settings, tmp_path) -> Path:
    """A run of one process, with 12 sequences a step."""
    assert main(["train", *flags(settings | {"run_dir": tmp_path / "alone", "train.batch_size": 12})]) == 0
    return tmp_path / "alone"


def train_together(torchrun, processes: int, settings: dict, *more: str) -> None:
    done = torchrun(processes, "-m", "bdh", "train", *flags(settings), *more)
    assert done.returncode == 0, done.stderr


def assert_same_curve(run: Path, reference: Path, relative: float) -> None:
    for key in ("train/loss", "train/grad_norm", "val/loss", "val/accuracy"):
        assert losses(run, key) == pytest.approx(losses(reference, key), rel=relative)
    assert len(losses(run)) == 50


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_two_processes_train_as_one(settings, alone, torchrun, tmp_path, strategy, accumulation):
    more = {
        "run_dir": tmp_path / "two",
        "train.batch_size": 6 // accumulation,
        "train.gradient_accumulation_steps": accumulation,
        "distributed.strategy": strategy,
        "train.layer_path": "torch",  # an error, were the weights not there as plain tensors
    }
    train_together(torchrun, 2, settings | more)
    # float64 has 1e-16; sums of another order, through 50 steps, may lose a few digits of it.
    assert_same_curve(tmp_path / "two", alone, 1e-9)
    assert samples(tmp_path / "two") == samples(alone)
    # The model card gave the sequences of one process.
    assert "| sequences a step | 12 |" in (tmp_path / "two" / "model" / "README.md").read_text()
    found = Checkpointer(tmp_path / "two").load().tensors("weights")  # the export is rounded to float32
    for name, weight in Checkpointer(alone).load().tensors("weights").items():
        assert (found[name] - weight).abs().max() < 1e-9


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_the_kernels_serve_several_processes(settings, torchrun, tmp_path, strategy):
    kernels = {
        "train.dtype": "float32",
        "train.layer_path": "kernels",
        "train.max_steps": 10,
        "train.carry_state": True,
        "train.sample_every_steps": 5,
    }
    assert main(["train", *flags(settings | kernels | {"run_dir": tmp_path / "alone", "train.batch_size": 12})]) == 0
    more = {"run_dir": tmp_path / "two", "train.batch_size": 6, "distributed.strategy": strategy}
    train_together(torchrun, 2, settings | kernels | more)
    # float32 sums in another order, through 10 steps.
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "alone"), rel=1e-4)
    assert samples(tmp_path / "two") == samples(tmp_path / "alone")
    assert len(samples(tmp_path / "two")) == 2


@pytest.mark.parametrize("carry_state", [False, True])
def test_what_two_processes_saved_others_go_on_with(settings, torchrun, tmp_path, carry_state):
    settings["train.carry_state"] = carry_state
    alone, run = tmp_path / "alone", tmp_path / "run"
    assert main(["train", *flags(settings | {"run_dir": alone, "train.batch_size": 12})]) == 0
    fsdp = {"run_dir": run, "distributed.strategy": "fsdp", "checkpoint.in_background": True, "train.ema_decay": 0.9}
    train_together(torchrun, 2, settings | fsdp | {"train.batch_size": 6, "train.stop_at_step": 13})
    train_together(torchrun, 3, {"run_dir": run, "train.stop_at_step": 30}, "--resume")
    assert (
        main(["train", *flags({"run_dir": run, "distributed.strategy": "none", "train.stop_at_step": 40}), "--resume"])
        == 0
    )
    train_together(torchrun, 2, {"run_dir": run, "distributed.strategy": "ddp"}, "--resume")
    assert_same_curve(run, alone, 1e-6)
    assert Checkpointer(run).load().training["rows_per_step"] == 12


def test_processes_that_cannot_share_a_step_evenly_are_refused(settings, alone, torchrun):
    done = torchrun(5, "-m", "bdh", "train", f"--run_dir={alone}", "--train.max_steps=60", "--resume")
    assert done.returncode != 0
    assert "12 sequences, which 5 processes cannot share evenly: start 1, 2, 3, 4, 6 or 12" in done.stderr
    assert done.stderr.count("error: a step of this run") == 1
    assert len(losses(alone)) == 50


def test_a_signal_to_the_starter_saves_on_all_processes(settings, tmp_path):
    run = tmp_path / "run"
    more = {"run_dir": run, "train.max_steps": 100_000, "checkpoint.every_steps": 100_000, "train.warmup_steps": 10}
    started = subprocess.Popen(
        torchrun_command(2, "-m", "bdh", "train", *flags(settings | more)),
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    metrics = run / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.is_file() and metrics.read_text().count("\n") > 5) and time.monotonic() < deadline:
        time.sleep(0.1)
    started.send_signal(signal.SIGTERM)
    _, told = started.communicate(timeout=60)
    assert "Stopped by SIGTERM after step" in told
    step = Checkpointer(run).load().step
    assert step == json.loads(metrics.read_text().splitlines()[-1])["step"]


def test_a_folder_in_use_ends_all_processes_with_one_error(settings, torchrun, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    with Lock(run / "lock", "the run"):
        done = torchrun(2, "-m", "bdh", "train", *flags(settings | {"run_dir": run}))
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if f"{run} is in use by process {os.getpid()} on " in line]
    assert len([line for line in said if line.startswith("error: ")]) == 1, done.stderr
    assert list(run.iterdir()) == []
