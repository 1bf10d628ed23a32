"""Text that cannot be read in the middle of a training: saved, named, mended, gone on with."""

import json

import pytest

from bdh.cli.main import main
from bdh.train.checkpoint import Checkpointer

from .conftest import losses
from .test_run import assert_same_run

STREAMED = {
    "data.streaming": True,
    "data.shuffle_buffer_documents": 4,
    "data.text_column": "text",
    "data.val_tokens": 1,
}
ROWS = [{"id": i, "text": f"{i} and {i + 1} are neighbours, " * 2} for i in range(60)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("bad", [{"text": 5}, {"text": ["a"]}])
def test_a_fault_is_saved_for_and_the_mended_file_gone_on_with(train, tmp_path, capsys, caplog, bad):
    """It ended the run without a checkpoint, and the resumed run refused the mended file."""
    path, straight, run = tmp_path / "t.jsonl", tmp_path / "straight", tmp_path / "run"
    settings = STREAMED | {"data.source": path, "checkpoint.every_steps": 1000, "train.eval_every_steps": 1000}
    write(path, ROWS)
    assert train(straight, **settings) == 0
    write(path, [*ROWS[:20], bad, *ROWS[21:]])
    capsys.readouterr()
    assert train(run, **settings) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    step = Checkpointer(run).load().step
    assert 0 < step < 12
    assert len(told) == 1
    assert told[0].startswith(f"error: step {step + 1}: {path}, line 21: column 'text' holds {bad['text']!r}")
    assert told[0].endswith(
        f"everything up to step {step} is saved: once the text is corrected, `bdh train --run_dir {run} --resume` "
        "continues from there"
    )

    assert main(["train", "--run_dir", str(run), "--resume"]) == 2  # nothing has been mended
    assert Checkpointer(run).load().step == step
    write(path, [ROWS[0] | {"text": "another"}, *ROWS[1:]])
    capsys.readouterr()
    assert main(["train", "--run_dir", str(run), "--resume"]) == 2
    assert "has changed since the run was started" in capsys.readouterr().err
    write(path, ROWS)
    assert main(["train", "--run_dir", str(run), "--resume"]) == 0
    assert "has changed after the place where it could not be read" in caplog.text
    assert_same_run(straight, run)


def test_a_fault_before_the_first_step_is_saved_for_too(train, tmp_path, capsys):
    path, run = tmp_path / "t.jsonl", tmp_path / "run"
    settings = STREAMED | {"data.source": path, "data.shuffle_buffer_documents": 1000}
    write(path, [*ROWS[:20], {"text": 5}, *ROWS[21:]])
    assert train(run, **settings) == 2
    assert "line 21" in capsys.readouterr().err
    assert Checkpointer(run).load().step == 0
    write(path, ROWS)
    assert main(["train", "--run_dir", str(run), "--resume"]) == 0
    assert len(losses(run)) == 12
