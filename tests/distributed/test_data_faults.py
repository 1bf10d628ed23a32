"""Text that one of the processes, or all, cannot read: all end, with everything saved."""

import json
import textwrap

import pytest

from bdh.train.checkpoint import Checkpointer
from tests.distributed.conftest import SETTINGS, flags
from tests.train.conftest import losses

pytestmark = pytest.mark.slow
ROWS = [{"text": f"{i} and {i + 1} are neighbours, " * 2} for i in range(120)]
BAD = [*ROWS[:40], {"text": 5}, *ROWS[41:]]


def write(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("at_fault", [(0, 1), (1,), (0,)])
def test_a_fault_of_any_process_ends_all_of_them_saved(torchrun, tmp_path, at_fault):
    """The others waited for the one that had ended until their time was over, or torchrun killed them unsaved."""
    run, script = tmp_path / "run", tmp_path / "train.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import os, sys
            from bdh.cli.main import main
            os.chdir({str(tmp_path)!r} + "/" + os.environ["RANK"])  # each process has a disk of its own
            sys.exit(main(sys.argv[1:]))
            """
        )
    )
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
    for rank in (0, 1):
        write(tmp_path / f"{rank}" / "t.jsonl", ROWS)
    assert torchrun(2, str(script), "train", *flags(settings | {"run_dir": tmp_path / "straight"})).returncode == 0

    for rank in at_fault:
        write(tmp_path / f"{rank}" / "t.jsonl", BAD)
    done = torchrun(2, str(script), "train", *flags(settings | {"run_dir": run}))
    assert done.returncode != 0
    told = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(told) == 1
    step = Checkpointer(run).load().step
    assert 0 < step < 50
    assert f"step {step + 1}: t.jsonl, line 41: column 'text' holds 5" in told[0]

    for rank in at_fault:
        write(tmp_path / f"{rank}" / "t.jsonl", ROWS)
    done = torchrun(2, str(script), "train", f"--run_dir={run}", "--resume")
    assert done.returncode == 0, done.stderr
    assert losses(run) == losses(tmp_path / "straight")
