"""Standard streams that lose their reader."""

import os
import shlex
import subprocess
import sys

import pytest

from bdh.cli.output import lasting_streams


def in_a_process(code: str, **streams) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", code], **streams)


WRITES_MUCH = """
import sys
from bdh.cli.output import lasting_streams
with lasting_streams():
    for number in range(2000):
        print("a line of text that somebody reads", number)
        print("a line of trouble", number, file=sys.stderr)
"""


def test_a_reader_that_leaves_ends_nothing_and_the_other_stream_says_so_once():
    process = in_a_process(WRITES_MUCH, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.stdout.close()
    _, trouble = process.communicate(timeout=60)
    assert process.returncode == 0
    assert trouble.count("warning: stdout cannot be written to (Broken pipe)") == 1
    assert "a line of trouble 1999" in trouble


def test_both_readers_may_leave():
    read, write = os.pipe()
    process = in_a_process(WRITES_MUCH, stdout=write, stderr=write)
    os.close(write)
    os.read(read, 10)
    os.close(read)
    assert process.wait(timeout=60) == 0


def test_a_full_disk_below_a_log_ends_nothing():
    with open("/dev/full", "w") as full:
        assert in_a_process(WRITES_MUCH, stdout=full, stderr=full).wait(timeout=60) == 0


def test_streams_that_were_closed_before_the_start_end_nothing():
    command = f"exec {shlex.quote(sys.executable)} -c {shlex.quote(WRITES_MUCH)} >&- 2>&-"
    assert subprocess.run(["sh", "-c", command], timeout=60).returncode == 0


def test_the_streams_are_as_before_afterwards():
    before = sys.stdout, sys.stderr
    with lasting_streams():
        assert sys.stdout is not before[0]
        assert sys.stdout.encoding == before[0].encoding
    assert (sys.stdout, sys.stderr) == before


@pytest.mark.slow
def test_a_training_whose_log_has_lost_its_reader_goes_on_to_its_end(tmp_path):
    """`bdh train 2>&1 | head -3` ended with the third line; what had been trained was lost."""
    run = tmp_path / "run"
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and ate some fish. " * 100)
    flags = ["--model.n_layer", "1", "--model.n_embd", "16", "--model.n_head", "2"]
    flags += [
        "--train.max_steps",
        "30",
        "--train.warmup_steps",
        "1",
        "--train.block_size",
        "16",
        "--train.batch_size",
        "2",
    ]
    flags += ["--monitor.log_every_steps", "1", "--monitor.backends", "console,jsonl", "--data.cache_dir", tmp_path]
    flags += ["--data.source", text, "--run_dir", run]
    read, write = os.pipe()
    process = subprocess.Popen([sys.executable, "-m", "bdh", "train", *map(str, flags)], stdout=write, stderr=write)
    os.close(write)
    assert os.read(read, 10)
    os.close(read)
    assert process.wait(timeout=120) == 0
    assert (run / "model" / "model.safetensors").is_file()
