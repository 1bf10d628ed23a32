"""What is written is whole or not there, and a full disk is called one."""

import errno
import os
import pathlib
import shutil
import signal
import subprocess
import sys
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from bdh import storage
from bdh.locks import InUseError
from bdh.storage import DiskFullError, atomic_dir, atomic_file, is_taken, recover_dir, write_text


def fail_in_folder(target, error):
    with atomic_dir(target) as folder:
        (folder / "a").write_text("after")
        raise error


def fail_in_file(target, error):
    with atomic_file(target) as path:
        path.write_text("after")
        raise error


def test_a_folder_appears_with_all_its_files_when_the_block_ends(tmp_path):
    target = tmp_path / "new" / "folder"
    with atomic_dir(target) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "a").write_text("a")
        assert not target.exists()
    assert (target / "inner" / "a").read_text() == "a"
    assert [path.name for path in target.parent.iterdir()] == ["folder"]


def test_a_folder_takes_the_place_of_the_one_before(tmp_path):
    target = tmp_path / "folder"
    for name in ("a", "b"):
        with atomic_dir(target) as folder:
            (folder / name).write_text(name)
    assert [path.name for path in target.iterdir()] == ["b"]
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("error", [ValueError("wrong"), KeyboardInterrupt(), OSError(errno.EACCES, "not allowed")])
def test_an_error_leaves_what_was_there_and_comes_through(tmp_path, error):
    write_text(tmp_path / "file", "before")
    with atomic_dir(tmp_path / "folder") as folder:
        (folder / "a").write_text("before")
    with pytest.raises(type(error)) as raised:
        fail_in_folder(tmp_path / "folder", error)
    assert raised.value is error
    with pytest.raises(type(error)) as raised:
        fail_in_file(tmp_path / "file", error)
    assert raised.value is error
    assert (tmp_path / "folder" / "a").read_text() == (tmp_path / "file").read_text() == "before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        Exception("No space left on device (os error 28)"),  # of the library tokenizers
        RuntimeError("Error while serializing: I/O error: Disk quota exceeded (os error 122)"),
    ],
)
def test_a_full_disk_is_called_one_with_the_target(tmp_path, error):
    for name, fail in (("folder", fail_in_folder), ("file", fail_in_file)):
        with pytest.raises(DiskFullError, match=f"the disk is full, .*{name} could not be written"):
            fail(tmp_path / name, error)
    assert list(tmp_path.iterdir()) == []


def test_another_fault_on_a_full_disk_is_still_told(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    with pytest.raises(DiskFullError, match=r"could not be written \(CUDA error: an illegal access\)$"):
        fail_in_folder(tmp_path / "folder", RuntimeError("CUDA error: an illegal access\nmore"))


def test_the_line_that_says_why_is_the_one_that_is_told(tmp_path):
    error = RuntimeError("something failed\nbecause: No space left on device\nmore")
    with pytest.raises(DiskFullError, match=r"could not be written \(because: No space left on device\)$"):
        fail_in_folder(tmp_path / "folder", error)


def test_a_disk_that_is_full_until_the_rest_is_removed_is_called_full(tmp_path, monkeypatch):
    """PyTorch's writer does not say why it failed, and free space was looked at when its file was gone."""

    def disk_usage(path):
        return SimpleNamespace(free=0 if any(path.glob(".*.tmp")) else 1 << 30)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    error = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")
    with pytest.raises(DiskFullError, match=r"^the disk is full, [^(]*folder could not be written$"):
        fail_in_folder(tmp_path / "folder", error)


def test_a_killed_process_leaves_the_target_and_the_next_one_cleans_up(tmp_path):
    write_text(tmp_path / "file", "before")
    code = f"""
import os, pathlib
from bdh.storage import atomic_file, atomic_dir
with atomic_dir(pathlib.Path({str(tmp_path)!r}, "folder")) as folder, atomic_file(
    pathlib.Path({str(tmp_path)!r}, "file")
) as path:
    (folder / "a").write_text("half")
    path.write_text("half")
    os._exit(9)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    assert (tmp_path / "file").read_text() == "before"
    assert not (tmp_path / "folder").exists()
    with atomic_dir(tmp_path / "folder") as folder:
        (folder / "b").write_text("whole")
    write_text(tmp_path / "file", "after")
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["b"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


REPLACE = """
import os, pathlib, signal, sys
from bdh import storage
if sys.argv[2] == "renames":
    storage.exchange = lambda *_: False  # as on a disk that cannot
folder, rename = pathlib.Path(sys.argv[1]), pathlib.Path.rename
def rename_and_die_where_the_folder_is_missing(path, target):
    rename(path, target)
    if not folder.exists():
        os.kill(os.getpid(), signal.SIGKILL)
pathlib.Path.rename = rename_and_die_where_the_folder_is_missing
with storage.atomic_dir(folder) as temporary:
    (temporary / "a").write_text("after")
"""


def written(folder, text="before"):
    with atomic_dir(folder) as temporary:
        (temporary / "a").write_text(text)
    return folder


def replace_until_killed(folder, how):
    return subprocess.run([sys.executable, "-c", REPLACE, folder, how], check=False).returncode


def abandoned(folder):
    """A folder as a kill between the two renames leaves it."""
    folder.rename(folder.with_name(f".{folder.name}.old"))


@pytest.mark.skipif(os.name == "nt", reason="Windows cannot exchange two folders")
def test_at_no_moment_of_its_replacement_is_a_folder_missing(tmp_path):
    """It was renamed away before the new one took its name: a kill in between left no folder."""
    folder = written(tmp_path / "folder")
    assert replace_until_killed(folder, "exchange") == 0
    assert (folder / "a").read_text() == "after"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_where_two_folders_cannot_be_exchanged_a_kill_between_the_renames_is_mended_on_opening(tmp_path, caplog):
    folder = written(tmp_path / "folder")
    assert replace_until_killed(folder, "renames") == -signal.SIGKILL
    assert not folder.exists()
    recover_dir(folder)
    assert (folder / "a").read_text() == "before"
    assert "folder was being replaced when a process died: the one before is back in its place" in caplog.text
    written(folder, "after")
    assert (folder / "a").read_text() == "after"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


KILL_IN_REMOVAL = """
import os, pathlib, signal, sys
from bdh import storage
storage.exchange = lambda *_: False
unlink = os.unlink
def unlink_and_die(path, **where):
    unlink(path, **where)
    if pathlib.Path(path).name in ("weights", "config"):
        os.kill(os.getpid(), signal.SIGKILL)
os.unlink = unlink_and_die
with storage.atomic_dir(pathlib.Path(sys.argv[1])) as temporary:
    (temporary / "a").write_text("after")
"""


@pytest.mark.parametrize("left", [False, True])
def test_what_is_left_of_a_replaced_folder_that_was_being_deleted_is_never_put_back(tmp_path, monkeypatch, left):
    """It lay under the name from which a replacement is recovered: half of it came back when the new one was moved."""
    with atomic_dir(tmp_path / "folder") as temporary:
        for name in ("weights", "config"):
            (temporary / name).write_text("before")
    if left:  # of a process that was killed before it came to the deletion
        shutil.copytree(tmp_path / "folder", tmp_path / ".folder.old")
    killed = subprocess.run([sys.executable, "-c", KILL_IN_REMOVAL, tmp_path / "folder"], check=False)
    assert killed.returncode == -signal.SIGKILL
    (tmp_path / "folder").rename(tmp_path / "kept")
    assert not is_taken(tmp_path / "folder")
    monkeypatch.setattr(storage, "exchange", lambda *_: False)
    written(tmp_path / "folder")
    written(tmp_path / "folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "kept"]


def test_a_folder_between_two_renames_is_recovered_before_it_is_replaced_or_found_free(tmp_path):
    folder = written(tmp_path / "folder")
    abandoned(folder)
    assert is_taken(folder)
    abandoned(folder)
    with pytest.raises(KeyError):
        fail_in_folder(folder, KeyError("no"))
    assert (folder / "a").read_text() == "before"


def test_a_second_rename_that_fails_puts_the_folder_back(tmp_path, monkeypatch):
    folder, rename = written(tmp_path / "folder"), pathlib.Path.rename

    def refuse_the_second(path, target):
        if path.name == ".folder.tmp":
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(storage, "exchange", lambda *_: False)
    monkeypatch.setattr(pathlib.Path, "rename", refuse_the_second)
    with pytest.raises(OSError, match="Input/output error"):
        written(folder, "after")
    assert (folder / "a").read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_system_that_cannot_exchange_is_told_from_other_errors(tmp_path, monkeypatch):
    one, other = written(tmp_path / "one"), written(tmp_path / "other")
    for number in (errno.ENOSYS, errno.EINVAL, errno.EPERM, errno.EXDEV):
        monkeypatch.setattr(storage.ctypes, "get_errno", lambda number=number: number)
        with monkeypatch.context() as patched:
            patched.setattr(storage.ctypes, "CDLL", lambda *_, **__: Refusing())
            assert not storage.exchange(one, other)
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError):
        storage.exchange(one, tmp_path / "none")


class Refusing:
    """A C library whose calls fail."""

    def renameat2(self, *_):
        return -1

    def renamex_np(self, *_):
        return -1


def test_a_link_to_a_folder_is_replaced_and_what_it_pointed_to_stays(tmp_path):
    (tmp_path / "link").symlink_to(written(tmp_path / "real"))
    written(tmp_path / "link", "after")
    assert (tmp_path / "link" / "a").read_text() == "after"
    assert (tmp_path / "real" / "a").read_text() == "before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


@pytest.mark.parametrize("write", [atomic_dir, atomic_file])
def test_a_second_writer_is_refused_and_leaves_the_first_ones_work(tmp_path, write):
    """It removed what the first had written so far, and a mixture of both was published."""
    with ExitStack() as stack:
        path = stack.enter_context(write(tmp_path / "target"))
        (path / "a" if write is atomic_dir else path).write_text("first")
        code = f"""
import pathlib
from bdh.storage import {write.__name__}
with {write.__name__}(pathlib.Path({str(tmp_path)!r}, "target")):
    pass
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert f"InUseError: {tmp_path}/target is in use by process {os.getpid()} on " in done.stderr
        with pytest.raises(InUseError), write(tmp_path / "target"):  # in the same process
            pass
    assert (tmp_path / "target" / "a" if write is atomic_dir else tmp_path / "target").read_text() == "first"
    assert [each.name for each in tmp_path.iterdir()] == ["target"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o027, 0o640)])
def test_files_may_be_read_by_whom_the_umask_allows(tmp_path, umask, mode):
    """safetensors writes with 0600, so that a model in a shared folder was its owner's alone."""
    before = os.umask(umask)
    try:
        with atomic_dir(tmp_path / "model") as folder:
            save_file({"w": torch.zeros(1)}, folder / "model.safetensors")
            (folder / "config.json").write_text("{}")
        with atomic_file(tmp_path / "state") as path:
            save_file({"w": torch.zeros(1)}, path)
        with atomic_file(tmp_path / "conversation", private=True) as path:
            save_file({"w": torch.zeros(1)}, path)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()}
    assert modes == {"model.safetensors": mode, "config.json": mode, "state": mode, "conversation": 0o600}


def test_the_folder_that_one_is_in_needs_no_recovery(tmp_path, monkeypatch):
    """`bdh eval .` ended with "PosixPath('.') has an empty name"."""
    monkeypatch.chdir(tmp_path)
    recover_dir(pathlib.Path("."))
    assert not is_taken(pathlib.Path("."))
