"""One training at a time in a run's folder."""

import errno
import os
import signal
import time

import pytest

from bdh.cli.main import main
from bdh.cli.settings import parse_settings
from bdh.locks import InUseError, Lock
from bdh.monitor import Monitor, MonitorConfig
from bdh.train.checkpoint import Checkpointer
from bdh.train.config import RunSettings
from bdh.train.loop import fit
from bdh.train.setup import open_run

from .conftest import TINY, losses


@pytest.fixture
def flags(text_file, tmp_path, monkeypatch):
    monkeypatch.setenv("BDH_CACHE", str(tmp_path / "cache"))

    def of(**overrides) -> list[str]:
        settings = TINY | {"data.source": text_file, "run_dir": tmp_path / "runs" / "run"} | overrides
        return [f"--{name}={value}" for name, value in settings.items()]

    return of


@pytest.fixture
def start(fork_server, flags, tmp_path):
    """Starts a training in a process of its own."""
    return lambda **overrides: fork_server.start(
        ["train", *flags(**overrides)], {"BDH_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    )


def contents(folder) -> dict:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.name != "lock"}


@pytest.mark.slow
def test_a_second_start_is_refused_and_a_killed_one_can_be_resumed_at_once(start, flags, tmp_path, capsys):
    """Both trained, both exported; two resumes removed each other's checkpoints."""
    run = tmp_path / "runs" / "run"
    long = {"train.max_steps": 1_000_000, "checkpoint.keep_last": 2}
    first = start(**long)
    while not Checkpointer(run).steps():
        assert first.poll() is None, first.said()
        time.sleep(0.01)
    os.kill(first.pid, signal.SIGSTOP)  # so that what changes was not changed by it
    before = contents(run)
    for more in ([], ["--resume"], ["--resume", "--resume_step=3"]):
        assert main(["train", *flags(**long), *more]) == 2
        error = capsys.readouterr().err
        assert f"error: {run} is in use by process {first.pid} on " in error
        assert "continue the run with --resume, or give another --run_dir; nothing was changed" in error
    assert main(["export", str(run), str(run / "again")]) == 2
    assert f"error: {run} is in use by process {first.pid} on " in capsys.readouterr().err
    assert contents(run) == before
    first.kill()
    first.wait()
    step = Checkpointer(run).load().step
    assert main(["train", *flags(**long, **{"train.stop_at_step": step + 2}), "--resume"]) == 0
    assert len(losses(run)) == step + 2
    assert not (run / "lock").exists()
    assert main(["export", str(run), str(run / "again")]) == 0


@pytest.mark.slow
def test_of_two_starts_at_once_one_trains(start, tmp_path):
    processes = [start() for _ in range(2)]
    statuses = [process.wait() for process in processes]
    said = [process.said() for process in processes]
    assert sorted(statuses) == [0, 2], said
    assert any(reason in said[statuses.index(2)] for reason in ("is in use by process", "already holds a run"))
    assert len(losses(tmp_path / "runs" / "run")) == 12


def test_a_start_that_fails_leaves_no_folder_and_no_lock(flags, tmp_path):
    assert main(["train", *flags(**{"data.source": tmp_path / "none.txt"})]) == 2
    assert not (tmp_path / "runs").exists()
    (tmp_path / "runs" / "run").mkdir(parents=True)
    assert main(["train", *flags(**{"data.source": tmp_path / "none.txt"})]) == 2
    assert list((tmp_path / "runs" / "run").iterdir()) == []


@pytest.mark.parametrize("refused", ["write", "mkdir"])
def test_a_start_on_a_full_disk_names_the_folder_and_leaves_none(flags, tmp_path, monkeypatch, capsys, refused):
    """It said "No space left on device" of nothing, and left an empty folder."""
    call = getattr(os, refused)

    def refuse(*args, **kwargs):
        if refused == "mkdir" and not str(args[0]).endswith(os.path.join("runs", "run")):
            return call(*args, **kwargs)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(os, refused, refuse)
        assert main(["train", *flags()]) == 2
    assert f"error: the disk is full, {tmp_path / 'runs' / 'run'} could not be written" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_takes_no_lock(flags, tmp_path):
    assert main(["train", *flags(), "--dry_run"]) == 0
    assert not (tmp_path / "runs").exists()


def test_a_run_whose_folder_was_taken_meanwhile_writes_nothing_more(flags, tmp_path):
    """As after it was stopped for so long that another machine took it for dead."""
    run = open_run(parse_settings(RunSettings, flags(), prog="p", description="d"))
    lock = run.folder / "lock"
    lock.unlink()
    with (
        Lock(lock, "the run"),
        Monitor(run.folder, MonitorConfig(backends=["jsonl"]), total_steps=12) as monitor,
        pytest.raises(InUseError, match=f"lost its lock on {run.folder}"),
    ):
        fit(run, monitor)
    run.close()
    assert losses(run.folder) == []
    assert run.checkpointer.steps() == []


def test_closing_a_run_gives_its_folder_back(flags):
    open_run(parse_settings(RunSettings, flags(), prog="p", description="d")).close()
    assert main(["train", *flags()]) == 2  # it holds a run, which is never overwritten
