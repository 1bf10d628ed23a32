"""What ends a run, what is exported then, and what may be another when it goes on."""

import json
import os
import shlex
import signal

import pytest
import torch

from bdh.cli.main import main
from bdh.cli.settings import parse_settings
from bdh.monitor import Monitor, MonitorConfig
from bdh.train import loop
from bdh.train.checkpoint import Checkpointer
from bdh.train.config import RunSettings
from bdh.train.loop import deferred_signals, fit
from bdh.train.setup import open_run

from .conftest import TINY, losses, weights


@pytest.fixture
def opened(text_file, tmp_path, monkeypatch):
    """Opens a run on the text with a tiny model."""
    monkeypatch.setenv("BDH_CACHE", str(tmp_path / "cache"))

    def open_it(folder, **overrides):
        settings = {**TINY, "data.source": text_file, "run_dir": folder, **overrides}
        argv = [f"--{name}={value}" for name, value in settings.items()]
        return open_run(parse_settings(RunSettings, argv, prog="p", description="d"))

    return open_it


@pytest.mark.parametrize("during", ["evaluate", "sample"])
def test_a_signal_during_an_evaluation_or_a_sample_is_saved_for(opened, tmp_path, monkeypatch, during):
    """The signal was looked for before them, and the step of one that came later was not saved."""
    run = opened(tmp_path / "run", **{"checkpoint.every_steps": 100, "train.sample_every_steps": 4})
    original = getattr(loop, during)

    def interrupted(run, *rest):
        os.kill(os.getpid(), signal.SIGTERM)
        original(run, *rest)
        return False  # not the best loss, for which there would be a checkpoint anyway

    monkeypatch.setattr(loop, during, interrupted)
    if during == "sample":
        monkeypatch.setattr(loop, "evaluate", lambda *_: False)
    with Monitor(run.folder, MonitorConfig(backends=["console", "jsonl"]), total_steps=12) as monitor:
        assert fit(run, monitor) == "SIGTERM"
    assert run.progress.step == 4
    assert run.checkpointer.load().step == 4


def test_the_best_weights_before_any_evaluation_are_the_last(train, tmp_path, capsys):
    """There was no checkpoint named best, and the training ended with an error."""
    run = tmp_path / "run"
    assert train(run, **{"checkpoint.export": "best", "train.stop_at_step": 3}) == 0
    assert (
        "No validation loss was measured yet: the last weights are exported, not the best." in capsys.readouterr().err
    )
    last = Checkpointer(run).load(3).tensors("weights")
    assert all(torch.equal(last[name], weight) for name, weight in weights(run).items())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_another_weight_decay_counts_from_the_resume_on(train, opened, tmp_path, optimizer):
    """The optimizer's stored groups brought the old one back."""
    same = {"train.optimizer": optimizer}
    assert train(tmp_path / "run", **same, **{"train.stop_at_step": 5}) == 0
    run = opened(tmp_path / "run", **same, **{"resume": "true", "train.weight_decay": 0.7})
    decays = {group["weight_decay"] for each in run.optimizers.all for group in each.param_groups}
    assert decays == {0.0, 0.7}
    assert all(each.state for each in run.optimizers.all)  # the moments came with it


def test_a_float32_run_goes_on_in_float16(train, tmp_path):
    """Its checkpoint has no loss scale, which was taken for one."""
    run = tmp_path / "run"
    assert train(run, **{"train.dtype": "float32", "train.stop_at_step": 5}) == 0
    assert main(["train", "--run_dir", str(run), "--resume", "--train.dtype", "float16"]) == 0
    values = losses(run)
    assert len(values) == 12
    assert None not in values
    training = torch.load(run / "checkpoints" / "step-0000012" / "training.pt", weights_only=True)
    assert training["scaler"]["scale"] > 0


def test_patience_is_tested_right_after_an_evaluation_only(train, tmp_path):
    """A run that it had ended, and that was resumed, ended again after a step, without an evaluation."""
    run = tmp_path / "run"
    quiet = {"train.patience": 2, "train.max_steps": 40, "train.learning_rate": 1e-12, "train.sample_every_steps": 0}
    assert train(run, **quiet) == 0
    assert len(losses(run)) == 12  # evaluations at 4, which is the best, 8 and 12
    assert main(["train", "--run_dir", str(run), "--resume"]) == 0
    assert len(losses(run)) == 16
    state = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert state["step"] == 16
    assert "val/loss" in state


def contents(folder):
    """Of all files but the lock, which each start takes."""
    return {
        path.relative_to(folder): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "lock" not in path.name
    }


@pytest.mark.parametrize("name", ["max_steps", "stop_at_step"])
def test_a_run_that_is_further_than_its_new_end_is_left_as_it_is(train, tmp_path, capsys, name):
    """It was exported again, and said to be finished, with another number of steps in its settings."""
    run = tmp_path / "run"
    assert train(run, **{"train.stop_at_step": 7}) == 0
    before = contents(run)
    assert main(["train", "--run_dir", str(run), "--resume", f"--train.{name}", "6"]) == 2
    assert f"train.{name} is 6, but the run has reached step 7" in capsys.readouterr().err
    assert contents(run) == before
    assert main(["train", "--run_dir", str(run), "--resume", "--train.stop_at_step", "7"]) == 0


@pytest.mark.parametrize("streaming", [False, True])
def test_a_run_goes_on_with_the_same_text_at_another_place(train, tmp_path, text_file, streaming, capsys):
    more = {"data.streaming": streaming, "data.val_tokens": 400}
    run, straight = tmp_path / "run", tmp_path / "straight"
    assert train(straight, **more) == 0
    assert train(run, **more, **{"train.stop_at_step": 5}) == 0
    (tmp_path / "moved").mkdir()
    moved = text_file.rename(tmp_path / "moved" / text_file.name)
    assert main(["train", "--run_dir", str(run), "--resume", "--data.source", str(moved)]) == 0
    assert losses(run) == losses(straight)
    other = tmp_path / "other.txt"
    other.write_text(moved.read_text().replace("cat", "cow"))
    before = contents(run)
    capsys.readouterr()
    flags = ["--data.source", str(other), "--train.max_steps", "20"]
    assert main(["train", "--run_dir", str(run), "--resume", *flags]) == 2
    assert f"the text of {other} is not that of {moved}, which the run was started with" in capsys.readouterr().err
    assert contents(run) == before


def test_commands_that_are_printed_can_be_pasted_into_a_shell(train, tmp_path, capsys):
    run = tmp_path / "it's a run; here"
    assert train(run, **{"train.stop_at_step": 5}) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "Stopped at step 5" in line]
    program, *arguments = shlex.split(line.partition("Continue with: ")[2])
    assert program == "bdh"
    assert main(arguments) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Exported to")]
    assert shlex.split(line.partition(": bdh ")[2])[:2] == ["generate", str(run / "model")]
    assert main(arguments) == 0
    said = capsys.readouterr().err
    assert f"{run}: all 12 steps are done, nothing to train; a higher --train.max_steps continues" in said


@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1"])
def test_signals_that_come_twice_for_one_reason_are_collected_both_times(name):
    number = signal.Signals[name]
    with deferred_signals() as received:
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        assert received


def test_a_signal_is_answered_at_once_as_a_step_may_take_minutes(capfd):
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with deferred_signals(says=True) as received:
            for name in ("SIGUSR1", "SIGUSR1", "SIGTERM"):
                os.kill(os.getpid(), signal.Signals[name])
                assert received
            said = capfd.readouterr().err.split("\n\n")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert [line.strip() for line in said] == [
        "SIGUSR1: finishing the step, then saving",
        "SIGTERM: finishing the step, then saving; a second SIGTERM ends the run at once, without saving",
    ]


def test_a_run_of_days_says_so_after_its_second_step(train, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("bdh.train.loop.LONG_RUN_HOURS", 0.0)
    few = {
        "train.max_steps": 4,
        "train.eval_every_steps": 9,
        "train.sample_every_steps": 0,
        "checkpoint.export": "none",
    }
    assert train(tmp_path / "run", **few) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("a step takes")]
    assert len(said) == 1
    assert "s here, and the remaining 2 will take about 0.0 days: --config tiny is a small model" in said[0]


def test_a_hangup_that_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with deferred_signals() as received:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not received
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
