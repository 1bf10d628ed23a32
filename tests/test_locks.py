"""At most one process holds a lock, and one that has ended holds none."""

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import filelock._api
import filelock._lease
import filelock._soft
import pytest

from bdh import locks
from bdh.locks import InUseError, Lock
from tests.clock import time_with

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
SHORT_LEASE = 1.0


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


def test_who_only_asks_whether_it_is_held_does_not_wait_or_change_it(path, hold):
    assert not Lock(path, "the thing").is_held()
    holder = hold()
    before = path.read_bytes()
    assert Lock(path, "the thing").is_held()
    assert path.read_bytes() == before
    os.utime(path, (time.time() + 3600,) * 2)  # a clock that is wrong
    assert Lock(path, "the thing").is_held()
    kill(holder)
    assert not Lock(path, "the thing").is_held()
    assert path.read_bytes() == before


def test_one_of_another_machine_seems_held_until_nobody_has_touched_it_for_a_while(path, hold):
    hold(host="elsewhere")
    assert Lock(path, "the thing").is_held()
    os.utime(path, (time.time() - locks.LEASE_SECONDS - 1,) * 2)
    assert not Lock(path, "the thing").is_held()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_one_whose_process_number_is_in_use_again_seems_held_only_while_it_is_fresh(path, hold):
    kill(hold())
    path.write_text(re.sub(r"pid=\d+", f"pid={os.getppid()}", path.read_text()))
    os.utime(path, (time.time() - locks.LEASE_SECONDS - 1,) * 2)
    assert not Lock(path, "the thing").is_held()


def test_without_space_for_a_temporary_file_one_can_still_be_asked_about(path, monkeypatch):
    with Lock(path, "the thing"):
        monkeypatch.setattr(locks, "_machine", Path("/nowhere/at/all").read_text)
        assert Lock(path, "the thing").is_held()


def test_its_own_process_is_another_holder_too(path):
    with Lock(path, "the thing"), pytest.raises(InUseError, match=f"process {os.getpid()} on"):
        Lock(path, "the thing").acquire()


@pytest.mark.parametrize("can_exchange", [True, False])
def test_the_lock_of_a_killed_process_can_be_taken_at_once(path, hold, monkeypatch, can_exchange):
    """Also on disks that cannot exchange two names, where filelock leaves it."""
    if not can_exchange:
        monkeypatch.setattr(filelock._soft, "exchange_names", lambda *_: False)
    for module in (locks, filelock._api, filelock._lease, filelock._soft):
        monkeypatch.setattr(module, "time", time_with(sleep=lambda _: pytest.fail("it waited")))
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
    lease_seconds = 3 * SHORT_LEASE  # its process has to touch it in a sixth of that, on a busy machine too
    monkeypatch.setattr(locks, "LEASE_SECONDS", lease_seconds)
    process = hold("elsewhere", lease_seconds)
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


def look_refused(monkeypatch, path):
    """A disk on which the lock cannot be opened, by filelock or by a path's method."""

    def refusing(open_file):
        def refuse(opened, *more, **kwargs):
            if Path(opened) == path:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
            return open_file(opened, *more, **kwargs)

        return refuse

    monkeypatch.setattr(os, "open", refusing(os.open))
    monkeypatch.setattr(Path, "open", refusing(Path.open))


def test_a_disk_that_refuses_one_look_at_the_lock_loses_no_lock(path, monkeypatch, caplog):
    """It was taken for a lock that nobody holds, which ended a training."""
    with Lock(path, "the thing") as lock:
        with monkeypatch.context() as broken:
            look_refused(broken, path)
            lock.check()
            lock.check()
        assert caplog.text.count("the lock on the thing cannot be read") == 1
        lock.check()


def test_a_lock_that_cannot_be_read_for_too_long_is_lost(path, monkeypatch):
    with Lock(path, "the thing") as lock, monkeypatch.context() as broken:
        look_refused(broken, path)
        lock.check()
        moment = time.monotonic()
        broken.setattr(locks, "time", time_with(monotonic=lambda: moment + locks.LEASE_SECONDS + 1))
        with pytest.raises(InUseError, match=r"cannot read any more \(.*Stale file handle.*; it writes nothing more"):
            lock.check()


def test_a_lock_that_another_process_has_aside_for_a_moment_is_not_lost(path, monkeypatch):
    with Lock(path, "the thing") as lock:
        aside = path.rename(path.with_name("aside"))
        monkeypatch.setattr(locks, "time", time_with(sleep=lambda _: aside.rename(path)))
        lock.check()


def test_a_lock_that_is_checked_in_each_step_is_looked_at_every_few_seconds(path, monkeypatch):
    moment = 1000.0
    with Lock(path, "the thing") as lock, monkeypatch.context() as patched:
        patched.setattr(locks, "time", time_with(monotonic=lambda: moment))
        lock.check(seldom=True)
        path.unlink()
        lock.check(seldom=True)
        with pytest.raises(InUseError, match="lost its lock"):
            lock.check()
        moment += 60
        with pytest.raises(InUseError, match="lost its lock"):
            lock.check(seldom=True)


def test_the_lock_in_a_copied_folder_is_no_lock(path, tmp_path, caplog):
    """It named a process that lives, and uses the original: the copy was refused for as long as that went on."""
    with Lock(path, "the thing") as lock:
        (tmp_path / "copies").mkdir()
        copy = tmp_path / "copies" / "lock"
        shutil.copy2(path, copy)
        assert_can_be_taken(copy)
        lock.check()
        copy.parent.rmdir()
        moved = path.rename(path.with_name("moved"))
        with pytest.raises(InUseError):
            Lock(moved, "the thing").acquire()
        moved.rename(path)
    assert f"{copy} is a copy, as of a folder that was copied while process {os.getpid()} used it" in caplog.text


def test_a_lock_of_another_boot_is_not_called_a_copy(path, hold, monkeypatch, caplog):
    """The number of its file can differ, for the disk was mounted anew."""
    monkeypatch.setattr(locks, "LEASE_SECONDS", 1.0)
    kill(hold(lease_seconds=1.0))
    of_another_boot(path)
    path.write_text(re.sub(r"file=.*", "file=77:5", path.read_text()))
    assert_can_be_taken(path)
    assert "is a copy" not in caplog.text


def test_a_damaged_lock_without_a_process_is_taken(path, monkeypatch):
    monkeypatch.setattr(locks, "LEASE_SECONDS", 1.0)
    path.write_text("file=77:5\n")
    assert_can_be_taken(path)


def of_another_boot(path):
    """Makes a lock one of another machine that has this one's name, and on which its holder's number is not given."""
    own = re.search(r"start=(\d+)\n", path.read_text())
    start = ((int(own[1]) >> 64) ^ 12345) << 64
    path.write_text(path.read_text().replace(own[0], f"start={start}\n"))


@pytest.mark.skipif(not Path("/proc/sys/kernel/random/boot_id").exists(), reason="needs a boot id")
@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_live_lock_of_another_machine_of_the_same_name_is_kept_until_nobody_touches_it(
    path, hold, monkeypatch, caplog, can_exchange
):
    """It was taken at once, as there is no such process here."""
    monkeypatch.setattr(locks, "LEASE_SECONDS", 6.0)
    if not can_exchange:
        monkeypatch.setattr(filelock._soft, "exchange_names", lambda *_: False)
    kill(hold(lease_seconds=6.0))
    of_another_boot(path)
    ended = threading.Event()

    def touch():
        while not ended.wait(0.2):
            os.utime(path)

    toucher = threading.Thread(target=touch)
    toucher.start()
    try:
        with pytest.raises(InUseError, match="the thing is in use by process"):
            Lock(path, "the thing").acquire()
    finally:
        ended.set()
        toucher.join()
    assert_can_be_taken(path)
    assert "waiting until it shows that it is alive, at most 1 s" in caplog.text


def test_a_lock_that_is_no_text_is_taken_once_nobody_touches_it(path, monkeypatch, caplog):
    """It ended with an error of the decoder, which named no file."""
    monkeypatch.setattr(locks, "LEASE_SECONDS", SHORT_LEASE)
    path.write_bytes(b"\xff\xfe\x00pid=\x80")
    assert_can_be_taken(path)
    assert "the thing is in use by another process: waiting" in caplog.text


def test_a_folder_in_the_place_of_a_lock_is_named(path):
    path.mkdir()
    with pytest.raises(IsADirectoryError, match=rf"^{path} is a folder, but must be free for the lock on the thing"):
        Lock(path, "the thing").acquire()


def test_an_error_of_the_disk_names_the_lock(path, monkeypatch):
    """A full disk was reported without any path."""

    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(os, "write", refuse)
        with pytest.raises(OSError, match=rf"No space left on device: '{path}'"):
            Lock(path, "the thing").acquire()
    assert_can_be_taken(path)
