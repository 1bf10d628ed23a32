"""At most one process holds a lock, and one that has ended holds none."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import filelock._lease
import filelock._soft
import pytest

from bdh import locks
from bdh.locks import InUseError, Lock

# Holds a lock until a line comes, as a process of this machine or, by another name of it, of another.
HOLD = """
import pathlib, socket, sys
if sys.argv[2]:
    socket.gethostname = lambda: sys.argv[2]
from bdh import locks
locks.LEASE_SECONDS = float(sys.argv[3])
with locks.Lock(pathlib.Path(sys.argv[1]), "the thing"):
    print("held", flush=True)
    sys.stdin.readline()
"""
SHORT_LEASE = 3.0


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "lock"


@pytest.fixture
def hold(path):
    """Starts a process that takes the lock."""
    started = []

    def start(host: str = "", lease_seconds: float = locks.LEASE_SECONDS) -> subprocess.Popen:
        line = [sys.executable, "-c", HOLD, str(path), host, str(lease_seconds)]
        process = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def kill(process):
    process.kill()
    process.wait()


def assert_can_be_taken(path):
    with Lock(path, "the thing"):
        assert f"pid={os.getpid()}\n" in path.read_text()
    assert list(path.parent.iterdir()) == []


def test_a_lock_is_given_back(path):
    for _ in range(2):
        assert_can_be_taken(path)


def test_whoever_holds_it_is_named(path, hold):
    process = hold()
    began = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d{4}"
    message = (
        rf"^the thing is in use by process {process.pid} on \S+ since {began}: try again when it has ended; nothing"
    )
    with pytest.raises(InUseError, match=message):
        Lock(path, "the thing").acquire()
    process.communicate("\n")
    assert_can_be_taken(path)


def test_its_own_process_is_another_holder_too(path):
    with Lock(path, "the thing"), pytest.raises(InUseError, match=f"process {os.getpid()} on"):
        Lock(path, "the thing").acquire()


@pytest.mark.parametrize("can_exchange", [True, False])
def test_the_lock_of_a_killed_process_can_be_taken_at_once(path, hold, monkeypatch, can_exchange):
    """Also on disks that cannot exchange two names, where filelock leaves it."""
    if not can_exchange:
        monkeypatch.setattr(filelock._soft, "exchange_names", lambda *_: False)
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("it waited"))
    kill(hold())
    assert_can_be_taken(path)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_the_lock_of_a_killed_process_can_be_taken_before_its_parent_has_waited_for_it(path, hold):
    process = hold()
    os.kill(process.pid, signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert_can_be_taken(path)


def test_a_process_that_has_been_given_the_number_of_a_killed_one_holds_nothing(path, hold):
    process = hold()
    kill(process)
    path.write_text(path.read_text().replace(f"pid={process.pid}\n", f"pid={os.getpid()}\n"))
    assert_can_be_taken(path)


def test_a_stopped_process_keeps_its_lock(path, hold, monkeypatch):
    monkeypatch.setattr(locks, "LEASE_SECONDS", SHORT_LEASE)
    process = hold(lease_seconds=SHORT_LEASE)
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(2 * SHORT_LEASE)
    with pytest.raises(InUseError, match=f"process {process.pid} on"):
        Lock(path, "the thing").acquire()


def test_a_live_process_of_another_machine_keeps_its_lock(path, hold, monkeypatch, caplog):
    monkeypatch.setattr(locks, "LEASE_SECONDS", SHORT_LEASE)
    process = hold("elsewhere", SHORT_LEASE)
    for _ in range(3):
        with pytest.raises(InUseError, match=f"in use by process {process.pid} on elsewhere since "):
            Lock(path, "the thing").acquire()
    assert "the thing is in use by process" in caplog.text
    process.communicate("\n")
    assert_can_be_taken(path)


@pytest.mark.parametrize("can_exchange", [True, False])
@pytest.mark.parametrize("hours", [-5, 0, 5])
def test_a_lock_that_another_machine_does_not_touch_any_more_is_taken(path, hold, monkeypatch, can_exchange, hours):
    """Whatever the clock of that machine, or of the disk's, may say."""
    monkeypatch.setattr(locks, "LEASE_SECONDS", SHORT_LEASE)
    if not can_exchange:
        monkeypatch.setattr(filelock._soft, "exchange_names", lambda *_: False)
    kill(hold("elsewhere", SHORT_LEASE))
    moment = time.time() + 3600 * hours
    os.utime(path, (moment, moment))
    assert_can_be_taken(path)


def test_a_lock_that_was_torn_by_a_full_disk_is_taken(path, monkeypatch):
    monkeypatch.setattr(locks, "LEASE_SECONDS", SHORT_LEASE)
    for text in ("", "filelock/2\npid=12"):
        path.write_text(text)
        assert_can_be_taken(path)


def test_waiting_lasts_until_the_holder_has_ended(path, hold):
    process = hold()
    code = "import pathlib, sys; from bdh.locks import Lock\nwith Lock(pathlib.Path(sys.argv[1]), 'it', wait=True): print(1)"
    waiting = subprocess.Popen([sys.executable, "-c", code, path], stderr=subprocess.PIPE, text=True)
    assert "waiting until it has ended" in waiting.stderr.readline()
    assert waiting.poll() is None
    process.communicate("\n")
    assert waiting.wait() == 0
    waiting.stderr.close()


def test_a_lock_that_was_removed_or_taken_is_noticed_and_the_new_one_left_alone(path):
    lock = Lock(path, "the thing")
    lock.acquire()
    lock.check()
    path.unlink()
    with pytest.raises(InUseError, match=r"lost its lock on the thing, now nobody holds it: .*removed .*lock"):
        lock.check()
    with Lock(path, "the thing"):
        with pytest.raises(InUseError, match=f"now process {os.getpid()} on .* holds it"):
            lock.check()
        lock.release()
        assert path.exists()


def test_a_disk_that_does_not_answer_for_a_while_loses_no_lock(path, monkeypatch):
    monkeypatch.setattr(locks, "LEASE_SECONDS", SHORT_LEASE)

    def refuse(*_, **__):
        raise OSError(errno.EIO, "Input/output error")

    with Lock(path, "the thing") as lock, monkeypatch.context() as broken:
        broken.setattr(filelock._lease, "touch", refuse)
        while lock._lease.compromise is None:
            time.sleep(0.05)
        broken.undo()
        lock.check()
        assert lock._lease.compromise is None
        lock.check()
    assert list(path.parent.iterdir()) == []
