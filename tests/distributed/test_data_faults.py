"""Text that one of the processes, or all, cannot read: all end, with everything saved."""

import json

import pytest

from bdh.train.checkpoint import Checkpointer
from tests.distributed.conftest import SETTINGS, flags, train_in_turn
from tests.train.conftest import losses

pytestmark = pytest.mark.slow
ROWS = [{"text": f"{i} and {i + 1} are neighbours, " * 2} for i in range(120)]
BAD = [*ROWS[:40], {"text": 5}, *ROWS[41:]]
AT_FAULT = {"both": (0, 1), "first": (0,), "second": (1,)}
"""The ranks. When those of the last one end, torchrun sees it."""


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory, fork_server):
    """The folder of the runs, how they ended, at which step, and how those ended that were continued with the fault mended."""
    folder = tmp_path_factory.mktemp("faults")
    settings = SETTINGS | {
        "data.source": "t.jsonl",
        "data.streaming": True,
        "data.shuffle_buffer_documents": 4,
        "data.val_tokens": 1,
        "data.text_column": "text",
        "train.batch_size": 2,
        "train.block_size": 16,
        "train.eval_every_steps": 1000,
        "checkpoint.every_steps": 1000,
    }
    for name, at_fault in {"straight": (), **AT_FAULT}.items():
        for rank in (0, 1):  # each process has a disk of its own
            write(folder / name / f"{rank}" / "t.jsonl", BAD if rank in at_fault else ROWS)
    commands = {name: flags(settings | {"run_dir": folder / f"run-{name}"}) for name in ("straight", *AT_FAULT)}
    places = str(folder / "{name}" / "{rank}")
    ended = train_in_turn(fork_server, 2, folder / "ended", commands, places)
    steps = {name: Checkpointer(folder / f"run-{name}").load().step for name in commands}
    for name in AT_FAULT:
        for rank in (0, 1):
            write(folder / name / f"{rank}" / "t.jsonl", ROWS)
    commands = {name: [f"--run_dir={folder / f'run-{name}'}", "--resume"] for name in AT_FAULT}
    return folder, ended, steps, train_in_turn(fork_server, 2, folder / "continued", commands, places)


@pytest.mark.parametrize("at_fault", AT_FAULT)
def test_a_fault_of_any_process_ends_all_of_them_saved(outcomes, at_fault):
    """The others waited for the one that had ended until their time was over, or torchrun killed them unsaved."""
    folder, ended, steps, continued = outcomes
    assert ended["straight"].statuses == [0, 0], ended["straight"].err
    assert 0 not in ended[at_fault].statuses
    told = [line for line in ended[at_fault].err.splitlines() if line.startswith("error: ")]
    assert len(told) == 1
    step = steps[at_fault]
    assert 0 < step < 50
    assert f"step {step + 1}: t.jsonl, line 41: column 'text' holds 5" in told[0]
    assert continued[at_fault].statuses == [0, 0], continued[at_fault].err
    assert losses(folder / f"run-{at_fault}") == losses(folder / "run-straight")
