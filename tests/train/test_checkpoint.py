import errno
import os
import pickle
import resource
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from bdh.train import checkpoint, places
from bdh.train.checkpoint import MANIFEST, TRAINING, Checkpoint, Checkpointer, CheckpointError

TENSORS = "__0_0.distcp"  # what torch.distributed.checkpoint calls the first file of rank 0
WEIGHT = {"weights.w": torch.arange(12, dtype=torch.float32).view(3, 4)}


def saved(folder: Path, *steps: int, keep_last: int = 2) -> Checkpointer:
    checkpointer = Checkpointer(folder, keep_last=keep_last)
    for step in steps:
        checkpointer.save(
            step, {"weights.w": WEIGHT["weights.w"] + step}, {"step": step, "nested": [torch.ones(2), {"a": 1.5}]}
        )
    return checkpointer


def save_and_wait(checkpointer, step):
    checkpointer.save(step, WEIGHT, {})
    checkpointer.wait()


def test_what_is_saved_comes_back(tmp_path):
    checkpoint = saved(tmp_path, 10).load()
    assert checkpoint.step == 10
    assert torch.equal(checkpoint.tensors("weights")["w"], WEIGHT["weights.w"] + 10)
    assert checkpoint.training["step"] == 10
    assert torch.equal(checkpoint.training["nested"][0], torch.ones(2))


KINDS = {
    "weights.a": torch.arange(6, dtype=torch.float32).view(2, 3),
    "weights.b": torch.ones(4, dtype=torch.float64),
    "optimizer.a.step": torch.tensor(3.0),
    "optimizer.a.momentum": torch.randn(2, 3, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "counts": torch.arange(3),
}


def test_tensors_come_back_by_group_or_into_others(tmp_path):
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, KINDS, {})
    checkpoint = checkpointer.load()
    assert checkpoint.shapes() == {name: (t.shape, t.dtype) for name, t in KINDS.items()}
    weights = checkpoint.tensors("weights")
    assert list(weights) == ["a", "b"]
    assert torch.equal(weights["a"], KINDS["weights.a"])
    assert torch.equal(checkpoint.tensors("optimizer")["a.momentum"], KINDS["optimizer.a.momentum"])
    wide = torch.zeros(2, 3, dtype=torch.float64)
    checkpoint.read_into({"weights.a": wide})
    assert torch.equal(wide, KINDS["weights.a"].double())
    with pytest.raises(ValueError, match=r"weights.c is not stored; counts is stored as \(3,\)"):
        checkpoint.read_into({"weights.c": torch.zeros(1), "counts": torch.zeros(4)})


class _Bomb:
    def __reduce__(self):
        return print, ("boom",)


def test_metadata_that_would_run_code_are_refused_and_run_none(tmp_path, capsys):
    path = saved(tmp_path, 10).path_of(10)
    (path / ".metadata").write_bytes(pickle.dumps(_Bomb()))
    with pytest.raises(ValueError, match=r"builtins\.print, which is not allowed"):
        Checkpoint(path, 10, {}).tensors("weights")
    assert capsys.readouterr().out == ""


def test_latest_names_the_newest_and_an_earlier_one_can_be_asked_for(tmp_path):
    checkpointer = saved(tmp_path, 10, 20)
    assert checkpointer.load().step == 20
    assert checkpointer.load(10).step == 10
    assert (tmp_path / "checkpoints" / "latest").read_text().strip() == "step-0000020"


def test_the_last_k_and_the_best_are_kept(tmp_path):
    checkpointer = Checkpointer(tmp_path, keep_last=2)
    for step in (1, 2, 3, 4, 5):
        checkpointer.save(step, WEIGHT, {}, is_best=step == 2)
    assert checkpointer.steps() == [2, 4, 5]
    assert checkpointer.step_of("best") == 2


def test_those_of_every_so_many_steps_are_kept_for_good(tmp_path):
    checkpointer = Checkpointer(tmp_path, keep_last=1, keep_every_steps=4)
    for step in range(2, 14, 2):
        checkpointer.save(step, WEIGHT, {})
    assert checkpointer.steps() == [4, 8, 12]


def test_a_checkpoint_is_written_in_the_background_as_it_was(tmp_path):
    checkpointer = Checkpointer(tmp_path, in_background=True)
    weight = torch.ones(500, 500)
    for step in (1, 2):
        checkpointer.save(step, {"weights.w": weight}, {"step": step})
        checkpointer.wait_until_copied()
        weight += 1
    checkpointer.close()
    assert checkpointer.steps() == [1, 2]
    for step in (1, 2):
        assert torch.equal(checkpointer.load(step).tensors("weights")["w"], torch.full((500, 500), float(step)))


def test_a_checkpoint_without_its_marker_does_not_count(tmp_path):
    checkpointer = saved(tmp_path, 10, 20)
    (tmp_path / "checkpoints" / "step-0000020" / MANIFEST).unlink()
    assert checkpointer.steps() == [10]
    with pytest.raises(ValueError, match=r"manifest.json is missing.*step-0000010.*--resume_step 10"):
        checkpointer.load()


@pytest.mark.parametrize("name", [TENSORS, ".metadata", TRAINING])
def test_a_cut_off_file_is_refused_and_the_newest_whole_one_named(tmp_path, name):
    checkpointer = saved(tmp_path, 10, 20)
    path = tmp_path / "checkpoints" / "step-0000020" / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(
        ValueError, match=rf"{name} has [\d,]+ bytes instead of [\d,]+.*newest complete one is step-0000010"
    ):
        checkpointer.load()


def test_a_flipped_bit_is_refused(tmp_path):
    checkpointer = saved(tmp_path, 10)
    path = tmp_path / "checkpoints" / "step-0000010" / TENSORS
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"SHA-256.*there is no complete one besides it"):
        checkpointer.load()


@pytest.mark.parametrize("moment", [checkpoint.checkpoint_fault, places.file_facts, torch.load])
def test_a_newest_checkpoint_that_a_training_removes_while_it_is_read_gives_way_to_the_one_after(
    tmp_path, monkeypatch, moment
):
    """The one that was being read was called damaged, or one of its files was not found."""
    reader = saved(tmp_path, 10)
    owner = {torch.load: torch, places.file_facts: places}.get(moment, checkpoint)

    def train_on_first(*args, **kwargs):
        monkeypatch.undo()
        saved(tmp_path, 20, 30, keep_last=1)
        return moment(*args, **kwargs)

    monkeypatch.setattr(owner, moment.__name__, train_on_first)
    assert reader.load().step == 30
    monkeypatch.setattr(
        owner, moment.__name__, lambda *_, **__: shutil.rmtree(tmp_path / "checkpoints") or moment(*_, **__)
    )
    with pytest.raises((FileNotFoundError, ValueError), match=r"step-0000030"):
        reader.load()


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no complete checkpoint"):
        Checkpointer(tmp_path).load()
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 15.*there are 10"):
        saved(tmp_path, 10).load(15)


def test_going_back_forgets_the_later_checkpoints(tmp_path):
    checkpointer = saved(tmp_path, 10, 20)
    checkpointer.forget_after(10)
    assert checkpointer.steps() == [10]
    assert checkpointer.load().step == 10


def test_a_leftover_of_a_killed_save_is_ignored_and_replaced(tmp_path):
    checkpointer = saved(tmp_path, 10)
    shutil.copytree(tmp_path / "checkpoints" / "step-0000010", tmp_path / "checkpoints" / ".step-0000020.tmp")
    assert checkpointer.load().step == 10
    saved(tmp_path, 20)
    assert checkpointer.steps() == [10, 20]
    assert not list((tmp_path / "checkpoints").glob(".step*"))


@pytest.mark.slow
@pytest.mark.parametrize("in_background", [False, True])
def test_a_save_that_the_disk_refuses_leaves_the_one_before(tmp_path, in_background):
    """A file-size limit makes the kernel refuse the write, as a full disk does."""
    saved(tmp_path, 10)
    script = textwrap.dedent(
        f"""
        import resource, signal, torch
        from pathlib import Path
        from bdh.train.checkpoint import Checkpointer, CheckpointError
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, {resource.RLIM_INFINITY}))
        checkpointer = Checkpointer(Path({str(tmp_path)!r}), in_background={in_background})
        big = torch.zeros(1_000_000)
        for weights, training in (({{"w": big}}, {{}}), ({{"w": big[:10]}}, {{"optimizer": big}})):
            try:
                checkpointer.save(20, weights, training)
                checkpointer.wait()
            except CheckpointError as error:
                print("refused:", error)
        """
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.count("refused: the checkpoint of step 20 is not saved") == 2
    checkpointer = Checkpointer(tmp_path)
    assert checkpointer.steps() == [10]
    assert checkpointer.load().step == 10
    assert not list((tmp_path / "checkpoints").glob(".step*"))


def test_a_folder_that_cannot_be_made_is_a_checkpoint_error(tmp_path):
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(CheckpointError, match="step 1 is not saved"):
        Checkpointer(tmp_path).save(1, WEIGHT, {})


@pytest.mark.parametrize(
    "content",
    [b"", b"\0" * 14, b"step-", b"no step\n", b"step-0000099\n"],
    ids=["empty", "nul", "cut", "other", "gone"],
)
def test_a_latest_that_names_no_checkpoint_gives_the_newest_complete_one_and_says_so(tmp_path, content, caplog):
    """It was an error about int(), and neither resuming nor reading the run was possible."""
    checkpointer = saved(tmp_path, 10, 20)
    (tmp_path / "checkpoints" / "latest").write_bytes(content)
    assert checkpointer.load().step == 20
    assert "latest does not name an existing checkpoint" in caplog.text
    assert "using the newest complete one, that of step 20" in caplog.text
    checkpointer.forget_after(20)
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-0000020\n"


def test_a_damaged_best_is_named_and_a_resume_restores_it(tmp_path):
    checkpointer = saved(tmp_path, 10, 20)
    (tmp_path / "checkpoints" / "best").write_text("")
    with pytest.raises(
        ValueError, match=r"best must hold the name of a checkpoint.* it is empty: choose a step \(10, 20\)"
    ):
        checkpointer.step_of("best")
    checkpointer.forget_after(20, best_step=10)
    assert checkpointer.step_of("best") == 10


def test_a_checkpoint_between_two_renames_is_recovered_and_a_removed_one_is_not(tmp_path):
    checkpointer = saved(tmp_path, 10, 20)
    folder = tmp_path / "checkpoints"
    (folder / "step-0000020").rename(folder / ".step-0000020.old")
    (folder / "step-0000010").rename(folder / ".step-0000010.removed")
    assert checkpointer.load().step == 20
    assert checkpointer.steps() == [20]


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_run_on_a_read_only_disk_is_read_though_a_checkpoint_cannot_be_put_back(
    tmp_path, monkeypatch, caplog, number
):
    """The lock for putting it back could not be written, which kept the whole checkpoints from being read too."""
    checkpointer = saved(tmp_path, 10, 20)
    folder = tmp_path / "checkpoints"
    (folder / "step-0000010").rename(folder / ".step-0000010.old")
    open_file = os.open

    def refuse_to_write(path, flags, *more, **kwargs):
        if flags & os.O_CREAT:
            raise OSError(number, os.strerror(number), path)
        return open_file(path, flags, *more, **kwargs)

    monkeypatch.setattr(os, "open", refuse_to_write)
    assert checkpointer.load().step == 20
    assert f"{folder}/.step-0000010.old, cannot be put back ({os.strerror(number)})" in caplog.text
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 10 .*there are 20"):
        checkpointer.load(10)


@pytest.mark.parametrize("in_background", [False, True])
def test_a_checkpoint_that_may_not_be_written_any_more_changes_nothing(tmp_path, in_background):
    """As when another process has taken the run meanwhile: its checkpoints were pruned."""
    saved(tmp_path, 10, 20)

    def refuse():
        raise OSError("the run is another's")

    checkpointer = Checkpointer(tmp_path, keep_last=1, in_background=in_background, may_write=refuse)
    with pytest.raises(CheckpointError, match="step 30 is not saved: the run is another's"):
        save_and_wait(checkpointer, 30)
    checkpointer.close()
    assert checkpointer.steps() == [10, 20]
    assert checkpointer.load().step == 20
