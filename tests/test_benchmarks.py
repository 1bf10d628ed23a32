"""The benchmarks run, and check what they compare before they print."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_logging_overhead(tmp_path, monkeypatch):
    monkeypatch.setenv("BDH_CACHE", str(tmp_path))
    command = [sys.executable, "benchmarks/logging_overhead.py", "--steps", "12"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert re.search(r"a step +\d+\.\d+ ms\n", done.stdout)
    for name in ("jsonl", "tensorboard", "wandb", "trackio"):
        assert re.search(rf"{name} +\d+\.\d+ ms +\d+\.\d+% +\d+\.\d+% +\d+\.\d+ ms\n", done.stdout)
