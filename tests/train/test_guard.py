"""What happens in a step without waiting for it: as on a GPU, which is played here by a CPU that is not asked."""

import inspect
import os
import sys
import threading

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import bdh
from bdh.cli.settings import parse_settings
from bdh.distributed.world import Parallel, World
from bdh.monitor import Monitor, MonitorConfig
from bdh.train import loop, setup
from bdh.train.config import RunSettings
from bdh.train.loop import TrainingStopped, fit
from bdh.train.setup import open_run

from .conftest import TINY, losses


@pytest.fixture
def opened(text_file, tmp_path):
    """A run whose steps are decided on the device, and read at those that are logged, every fifth."""

    def open_(**overrides):
        flags = {
            **TINY,
            "data.source": text_file,
            "data.cache_dir": tmp_path / "cache",
            "train.eval_every_steps": 100,
            "train.sample_every_steps": 0,
            "checkpoint.every_steps": 100,
            "monitor.log_every_steps": 5,
            **overrides,
        }
        run = open_run(parse_settings(RunSettings, [f"--{k}={v}" for k, v in flags.items()], prog="p", description="d"))
        run.guard.is_on_device = True
        return run

    return open_


def trained(run) -> str:
    with Monitor(
        run.folder, MonitorConfig(backends=["console", "jsonl"], log_every_steps=5), total_steps=12
    ) as monitor:
        try:
            return fit(run, monitor)
        finally:
            run.close()


def breaks(run, *numbers: int, factor: float = float("nan")) -> list[torch.Tensor]:
    """Spoils the gradients of the steps with these numbers; returns what will hold the weights before each step."""
    seen = []

    def spoil(gradient):
        seen.append(run.model.encoder.weight.detach().clone())
        return gradient * factor if len(seen) in numbers else gradient

    run.model.decoder.weight.register_hook(spoil)
    return seen


@pytest.mark.parametrize(
    "overrides",
    [{}, {"train.optimizer": "muon"}, {"train.dtype": "float16", "train.ema_decay": 0.9}, {"train.carry_state": True}],
    ids=["adamw", "muon", "float16-average", "carried"],
)
def test_deciding_on_the_device_trains_to_the_bit_as_deciding_at_once(opened, tmp_path, overrides):
    runs = []
    for name, on_device in (("device", True), ("host", False)):
        run = opened(**overrides, **{"run_dir": tmp_path / name, "train.on_nonfinite": "skip"})
        run.guard.is_on_device = on_device
        breaks(run, 3, 4)
        assert trained(run) == "finished"
        runs.append(run)
    ours, theirs = (run.tensors() for run in runs)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert runs[0].loss_scale.state_dict() == runs[1].loss_scale.state_dict()
    assert losses(tmp_path / "device") == losses(tmp_path / "host")
    assert losses(tmp_path / "device", "train/skipped_steps") == [2, 2, 2]


def test_no_step_is_waited_for_but_those_that_are_logged(opened, tmp_path, monkeypatch):
    """A number that the training reads from a tensor waits for the device. (The CPU's kernels read some of their own.)"""
    run = opened(run_dir=tmp_path / "run", **{"train.spike_threshold": 20})
    read_after = set()
    for name in ("item", "tolist", "__bool__", "__float__", "cpu"):
        original = getattr(torch.Tensor, name)

        def noted(self, *arguments, original=original, **keywords):
            frame = inspect.currentframe()
            if frame is not None and "/bdh/train/" in frame.f_back.f_code.co_filename.replace(os.sep, "/"):
                read_after.add(run.progress.step)
            return original(self, *arguments, **keywords)

        monkeypatch.setattr(torch.Tensor, name, noted)
    assert trained(run) == "finished"
    assert read_after == {5, 10, 12}


# Operations whose result, or its size, the program cannot go on without. Indexing with a mask is another.
WAITING = {"_local_scalar_dense", "nonzero", "_unique2", "equal", "masked_select", "repeat_interleave"}
# What waits where there is nothing to wait for: these ask which device they are on.
OF_THE_CPU = {"_known_ids", "forget", "update"}


class Waits(TorchDispatchMode):
    """Which functions of the package wait for the device within it, in the backward pass and the update too."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        name = operation._schema.name.removeprefix("aten::")
        indices = arguments[1] if name in ("index", "index_put_") else ()
        if name in WAITING or any(each is not None and each.dtype == torch.bool for each in indices):
            frame, package = sys._getframe(), os.path.dirname(bdh.__file__)
            while not frame.f_code.co_filename.startswith(package):
                frame = frame.f_back
            self.found.add(frame.f_code.co_name)
        return operation(*arguments, **(keywords or {}))


DOCUMENTS = {"data.pack": "documents", "tokenizer.special_tokens": "true"}


@pytest.mark.parametrize("path", ["torch", "plain"])
@pytest.mark.parametrize(
    "overrides",
    [
        {"train.gradient_accumulation_steps": 2, "train.spike_threshold": 20},
        {"train.optimizer": "muon", "train.ema_decay": 0.9},
        {"train.dtype": "float16"},
        {**DOCUMENTS, "model.decay": 8},
        {"train.carry_state": True, "tokenizer.special_tokens": "true"},
    ],
    ids=["accumulated", "muon-average", "float16", "documents-decay", "carried"],
)
def test_nothing_in_a_step_waits_for_the_device(opened, tmp_path, path, overrides):
    """The model's operations, those of its backward pass and those of the update among them."""
    run = opened(run_dir=tmp_path / "run", **{"train.layer_path": path}, **overrides)
    for _ in range(2):
        batch, num_targets = run.batches.next()
        with Waits() as waits:
            loop.training_step(run, run.parallel.step_model, batch, num_targets)
    run.close()
    # In blocks the positions at which carried states stand are made a table of: how many differ is not known before.
    known = OF_THE_CPU | ({"make_rotation"} if path == "torch" and run.carried else set())
    assert "_known_ids" in waits.found
    assert waits.found <= known


class TwoProcesses(World):
    """As if another process did just the same. ``note`` is called when they exchange something."""

    def __init__(self):
        super().__init__(size=2)
        self.note = lambda: None

    def sum(self, values):
        self.note()
        return values.mul_(2)

    def any(self, flags):
        self.note()
        return flags

    def gather(self, value, *, beside_training=False):
        self.note()
        return [value, value]

    def wait_for_all(self):
        self.note()


@pytest.mark.parametrize(
    "overrides",
    [{}, DOCUMENTS, {**DOCUMENTS, "data.streaming": "true"}, {"train.carry_state": True, "train.spike_threshold": 20}],
    ids=["plain", "documents", "streaming", "carried"],
)
def test_a_step_that_is_not_logged_exchanges_gradients_alone(opened, tmp_path, monkeypatch, overrides):
    """How many targets the others have, and whether their loss is finite, was asked in each step. Signals are agreed on after
    every tenth. The thread that prepares batches may talk beside the steps."""
    world, exchanged = TwoProcesses(), set()
    monkeypatch.setattr(World, "join", lambda *arguments, **keywords: world)
    monkeypatch.setattr(setup, "parallelize", lambda model, *arguments: Parallel(model, "none", model))
    monkeypatch.setattr(loop, "save", lambda *arguments, **keywords: None)
    run = opened(run_dir=tmp_path / "run", **overrides, **{"monitor.log_every_steps": 4, "train.max_steps": 22})

    def note():
        if threading.current_thread() is threading.main_thread():
            exchanged.add(run.progress.step)  # while a step runs, those before it

    world.note = note
    assert trained(run) == "finished"
    assert exchanged == {4, 8, 10, 12, 16, 20, 22}
    assert len(losses(run.folder)) == 6


def test_a_fault_stops_all_updates_at_once_and_is_told_when_it_is_read(opened, tmp_path):
    run = opened(run_dir=tmp_path / "run")
    seen = breaks(run, 2)
    with pytest.raises(TrainingStopped, match="step 2: the gradient's norm is nan; the weights are those after step 1"):
        trained(run)
    assert len(seen) == 5  # it was read after the fifth, and no step from the second on had changed the weights
    assert not torch.equal(seen[0], seen[1])
    assert all(torch.equal(seen[1], weight) for weight in [*seen[2:], run.model.encoder.weight])
    assert losses(run.folder) == []


def test_a_spike_is_left_out_on_the_device(opened, tmp_path, capsys):
    overrides = {"train.spike_threshold": 20, "train.on_nonfinite": "skip", "train.max_steps": 35}
    run = opened(run_dir=tmp_path / "run", **overrides)
    seen = breaks(run, 32, factor=1000.0)
    assert trained(run) == "finished"
    assert torch.equal(seen[31], seen[32])
    assert not torch.equal(seen[32], seen[33])
    assert "step 32: the gradient's norm is " in capsys.readouterr().err
    assert losses(run.folder, "train/skipped_steps")[-1] == 1


def test_a_loss_that_is_not_finite_makes_its_gradient_so(opened, tmp_path):
    """An infinite loss may have a finite gradient, and other processes see the gradient alone."""
    run = opened(run_dir=tmp_path / "run")
    forward = run.parallel.step_model

    def infinite(**arguments):
        output = forward(**arguments)
        output.loss = output.loss + float("inf")
        return output

    run.parallel.step_model = infinite
    with pytest.raises(TrainingStopped, match="step 1: the loss is inf"):
        trained(run)
