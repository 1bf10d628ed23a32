"""What is written is whole or not there, and a full disk is called one."""

import errno
import subprocess
import sys

import pytest

from bdh.storage import DiskFullError, atomic_dir, atomic_file, write_text


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
