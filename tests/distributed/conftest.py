import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train.conftest import TINY

SETTINGS = TINY | {
    "model.dropout": 0,
    "train.dtype": "float64",
    "train.max_steps": 50,
    "train.eval_every_steps": 25,
    "train.eval_windows": 5,  # which two or three processes cannot share evenly
    "train.sample_every_steps": 50,
    "checkpoint.every_steps": 20,
    "monitor.progress_bar": False,
    "monitor.backends": "auto",
}


def flags(settings: dict) -> list[str]:
    return [f"--{name}={value}" for name, value in settings.items()]


def torchrun_command(processes: int, *arguments: str) -> list[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={port}"]
    return [*start, *arguments]


@pytest.fixture
def torchrun():
    """Starts processes together, one thread each, and waits for them."""
    return run_together


def run_together(processes: int, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        torchrun_command(processes, *arguments),
        capture_output=True,
        text=True,
        timeout=200,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
    )
