import json
import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest

from benchmarks.forked import TRAINING, ForkServer
from tests.train.conftest import TINY

ROOT = Path(__file__).parents[2]
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


def free_ports(count: int) -> list[int]:
    with ExitStack() as opened:
        sockets = [opened.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def torchrun_command(processes: int, *arguments: str) -> list[str]:
    start = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    return [*start, f"--master_port={free_ports(1)[0]}", *arguments]


def run_together(processes: int, *arguments: str) -> subprocess.CompletedProcess:
    """Starts processes together, one thread each, and waits for them."""
    return subprocess.run(
        torchrun_command(processes, *arguments),
        capture_output=True,
        text=True,
        timeout=250,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=ROOT,
    )


class Outcome(NamedTuple):
    """Of a command."""

    statuses: list[int]
    """By rank."""
    out: str
    """What all of them have printed."""
    err: str


@pytest.fixture(scope="package")
def fork_server():
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("OMP_NUM_THREADS", "1")  # a thread each, which is settled when PyTorch is imported
        with ForkServer(*TRAINING, "torch.distributed.launcher.api") as server:
            yield server


def train_in_turn(
    server: ForkServer, processes: int, folder: Path, commands: dict[str, list[str]], at: str = "."
) -> dict[str, Outcome]:
    """``bdh train`` with several lists of arguments, one after the other in the same processes.

    Args:
        commands: by name. Only the last one shows what torchrun does when processes end.
        at: the working directory, in which "{name}" is the command's and "{rank}" the process's.
    """
    folder.mkdir()
    path = folder / "commands"
    listed = [
        {"arguments": ["train", *arguments], "port": port, "folder": str(ROOT / at.replace("{name}", name))}
        for port, (name, arguments) in zip(free_ports(len(commands)), commands.items(), strict=True)
    ]
    path.write_text(json.dumps(listed))
    code = "import sys; sys.path.insert(0, sys.argv[1]); from tests.distributed import in_turn"
    code += f"; in_turn.launch({processes}, sys.argv[2], {free_ports(1)[0]})"
    done = server.start(["-c", code, str(ROOT), str(path)], dict(os.environ))
    done.wait(250)
    found = {}
    for number, name in enumerate(commands):
        files = [f"{path}.{number}.{rank}" for rank in range(processes)]
        assert Path(f"{files[0]}.err").exists(), f"{name} was not run: {done.said()}"
        # A process that torchrun has ended has no status.
        statuses, out, err = (
            [written.read_text() for file in files if (written := Path(f"{file}.{kind}")).exists()]
            for kind in ("status", "out", "err")
        )
        found[name] = Outcome([int(status) for status in statuses], "".join(out), "".join(err))
    assert (done.returncode == 0) == (found[name].statuses == [0] * processes), done.said()
    return found
