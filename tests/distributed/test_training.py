"""Runs of several processes, against the same run of one."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bdh.cli.main import main
from bdh.locks import Lock
from bdh.train.checkpoint import Checkpointer
from tests.distributed.conftest import SETTINGS, flags, torchrun_command, train_in_turn
from tests.train.conftest import TINY, losses, samples

pytestmark = pytest.mark.slow
STRATEGIES = ["ddp", "fsdp"]
KERNELS = {
    "train.dtype": "float32",
    "train.layer_path": "kernels",
    "train.max_steps": 10,
    "train.carry_state": True,
    "train.sample_every_steps": 5,
}


# The processes' sequences hold different numbers of documents, whose first tokens are not predicted.
DOCUMENTS = {
    "data.pack": "documents",
    "data.streaming": True,
    "tokenizer.special_tokens": True,
    "train.max_steps": 10,
    "train.eval_every_steps": 10,
    "train.sample_every_steps": 0,
}


QUANTIZE = {
    "train.quantize": "mixed",
    "train.quantize_from_step": 3,
    "train.max_steps": 10,
    "train.eval_every_steps": 5,
    "train.sample_every_steps": 5,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of all runs, with the text."""
    folder = tmp_path_factory.mktemp("training")
    (folder / "text.txt").write_text(" ".join(f"{number * 7919 % 1009} is a number" for number in range(2000)))
    documents = [{"text": f"{number} " * (1 + number % 7 * (number % 3))} for number in range(900)]
    (folder / "documents.jsonl").write_text("".join(json.dumps(each) + "\n" for each in documents))
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("BDH_CACHE", str(folder / "cache"))
        yield folder


@pytest.fixture(scope="module")
def settings(folder) -> dict:
    return {**SETTINGS, "data.source": folder / "text.txt"}


def train_alone(run: Path, settings: dict) -> Path:
    """A run of one process, with 12 sequences a step."""
    assert main(["train", *flags(settings | {"run_dir": run, "train.batch_size": 12})]) == 0
    return run


@pytest.fixture(scope="module")
def alone(settings, folder) -> Path:
    return train_alone(folder / "alone", settings)


def of_two_processes(settings: dict, strategy: str, accumulation: int) -> dict:
    return settings | {
        "train.batch_size": 6 // accumulation,
        "train.gradient_accumulation_steps": accumulation,
        "distributed.strategy": strategy,
        "train.layer_path": "torch",  # an error, were the weights not there as plain tensors
    }


@pytest.fixture(scope="module")
def together(settings, folder, fork_server):
    """What two processes do in turn; in the last command, the folder of the run is in use."""
    commands: dict[str, dict] = {}
    for strategy in STRATEGIES:
        of_strategy = {"distributed.strategy": strategy}
        for accumulation in (1, 3):
            commands[f"two-{strategy}-{accumulation}"] = of_two_processes(settings, strategy, accumulation)
        commands[f"quantize-{strategy}"] = of_two_processes(settings | QUANTIZE, strategy, 3)
        commands[f"kernels-{strategy}"] = settings | KERNELS | of_strategy | {"train.batch_size": 6}
        commands[f"dry-{strategy}"] = {
            **TINY, "data.source": settings["data.source"], "train.layer_path": "plain", "dry_run": "true", **of_strategy,
        }  # fmt: skip
    for carry_state in (False, True):
        commands[f"continued-{carry_state}"] = settings | {
            "train.carry_state": carry_state,
            "distributed.strategy": "fsdp",
            "checkpoint.in_background": True,
            "train.ema_decay": 0.9,
            "train.batch_size": 6,
            "train.stop_at_step": 13,
        }
    documents = settings | DOCUMENTS | {"data.source": folder / "documents.jsonl"}
    commands["documents"] = documents | {"train.batch_size": 6, "train.layer_path": "torch"}
    commands["used"] = settings
    (folder / "used").mkdir()
    with Lock(folder / "used" / "lock", "the run"):
        lists = {name: flags(given | {"run_dir": folder / name}) for name, given in commands.items()}
        return train_in_turn(fork_server, 2, folder / "together", lists)


@pytest.fixture(scope="module")
def continued(settings, folder, alone, together, fork_server):
    """What was stopped after 13 steps is continued by three processes, by one, and by two; and what three refused."""
    runs = {f"continued-{carry_state}": folder / f"continued-{carry_state}" for carry_state in (False, True)}
    for name in runs:
        assert together[name].statuses == [0, 0], together[name].err
    eight = {"run_dir": folder / "eight", "train.batch_size": 8, "train.max_steps": 5}
    assert main(["train", *flags(settings | eight)]) == 0
    commands = {name: [*flags({"run_dir": run, "train.stop_at_step": 30}), "--resume"] for name, run in runs.items()}
    commands["uneven"] = [f"--run_dir={folder / 'eight'}", "--train.max_steps=6", "--resume"]
    by_three = train_in_turn(fork_server, 3, folder / "by-three", commands)
    for name, run in runs.items():
        assert by_three[name].statuses == [0, 0, 0], by_three[name].err
        by_one = {"run_dir": run, "distributed.strategy": "none", "train.stop_at_step": 40}
        assert main(["train", *flags(by_one), "--resume"]) == 0
    commands = {name: [f"--run_dir={run}", "--distributed.strategy=ddp", "--resume"] for name, run in runs.items()}
    return by_three["uneven"], train_in_turn(fork_server, 2, folder / "by-two", commands)


def assert_same_curve(run: Path, reference: Path, relative: float) -> None:
    for key in ("train/loss", "train/grad_norm", "val/loss", "val/accuracy"):
        assert losses(run, key) == pytest.approx(losses(reference, key), rel=relative)
    assert len(losses(run)) == 50


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("accumulation", [1, 3])
def test_two_processes_train_as_one(folder, alone, together, strategy, accumulation):
    name = f"two-{strategy}-{accumulation}"
    assert together[name].statuses == [0, 0], together[name].err
    # float64 has 1e-16; sums of another order, through 50 steps, may lose a few digits of it.
    assert_same_curve(folder / name, alone, 1e-9)
    assert samples(folder / name) == samples(alone)
    # The model card gave the sequences of one process.
    assert "| sequences a step | 12 |" in (folder / name / "model" / "README.md").read_text()
    found = Checkpointer(folder / name).load().tensors("weights")  # the export is rounded to float32
    for weight_name, weight in Checkpointer(alone).load().tensors("weights").items():
        assert (found[weight_name] - weight).abs().max() < 1e-9


def test_two_processes_count_the_targets_of_both(settings, folder, together):
    run, alone = folder / "documents", folder / "documents-alone"
    assert together["documents"].statuses == [0, 0], together["documents"].err
    train_alone(alone, settings | DOCUMENTS | {"data.source": folder / "documents.jsonl"})
    for key in ("train/loss", "train/grad_norm", "val/loss"):
        assert losses(run, key) == pytest.approx(losses(alone, key), rel=1e-9)  # as above
    assert len(losses(run)) == 10


@pytest.fixture(scope="module")
def alone_by_kernels(settings, folder) -> Path:
    return train_alone(folder / "alone-by-kernels", settings | KERNELS)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_kernels_serve_several_processes(folder, alone_by_kernels, together, strategy):
    name = f"kernels-{strategy}"
    assert together[name].statuses == [0, 0], together[name].err
    # float32 sums in another order, through 10 steps.
    assert losses(folder / name) == pytest.approx(losses(alone_by_kernels), rel=1e-4)
    assert samples(folder / name) == samples(alone_by_kernels)
    assert len(samples(folder / name)) == 2


@pytest.fixture(scope="module")
def alone_for_quantization(settings, folder) -> Path:
    return train_alone(folder / "alone-for-quantization", settings | QUANTIZE)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_train_for_a_format_as_one(folder, alone_for_quantization, together, strategy):
    name, alone = f"quantize-{strategy}", alone_for_quantization
    assert together[name].statuses == [0, 0], together[name].err
    for key in ("train/loss", "train/grad_norm", "val/loss"):
        assert losses(folder / name, key) == pytest.approx(losses(alone, key), rel=1e-9)  # float64, as above
    assert samples(folder / name) == samples(alone)
    ours, theirs = (load_file(run / "model" / "model.safetensors") for run in (folder / name, alone))
    assert ours["decoder.packed"].dtype == torch.uint8
    assert all(torch.equal(theirs[name], weight) for name, weight in ours.items() if name.endswith(".packed"))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_processes_measure_together(together, strategy):
    dry = together[f"dry-{strategy}"]
    assert dry.statuses == [0, 0], dry.err
    assert dry.out.count("available per process") == 1
    assert "steps of 1, 2 and 4 sequences" in dry.out


@pytest.mark.parametrize("carry_state", [False, True])
def test_what_two_processes_saved_others_go_on_with(folder, settings, alone, continued, carry_state):
    name = f"continued-{carry_state}"
    assert continued[1][name].statuses == [0, 0], continued[1][name].err
    if carry_state:
        alone = train_alone(folder / "alone-carrying", settings | {"train.carry_state": True})
    assert_same_curve(folder / name, alone, 1e-6)
    assert Checkpointer(folder / name).load().training["rows_per_step"] == 12


def test_processes_that_cannot_share_a_step_evenly_are_refused(folder, continued):
    uneven = continued[0]
    assert 0 not in uneven.statuses
    assert "8 sequences, which 3 processes cannot share evenly: start 1, 2, 4 or 8" in uneven.err
    assert uneven.err.count("error: a step of this run") == 1
    assert len(losses(folder / "eight")) == 5


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


def test_a_folder_in_use_ends_all_processes_with_one_error(folder, together):
    run, used = folder / "used", together["used"]
    assert 0 not in used.statuses
    said = [line for line in used.err.splitlines() if f"{run} is in use by process {os.getpid()} on " in line]
    assert len([line for line in said if line.startswith("error: ")]) == 1, used.err
    assert list(run.iterdir()) == []
