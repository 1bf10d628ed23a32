"""Runs commands of bdh one after the other in each of several processes, as starting takes longest.

What starts and ends them is torchrun's agent; but they are forked from a process that has imported what they need. They end
with the status of the last command. What each prints is in files beside the list of commands.
"""

import json
import os
import signal
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from bdh.cli.main import main
from bdh.distributed import config


def launch(processes: int, path: str, port: int) -> None:
    """Does what ``torchrun --nproc_per_node=PROCESSES --master_port=PORT`` does with a program that calls :func:`run`."""
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        rdzv_backend="static",
        rdzv_endpoint=f"127.0.0.1:{port}",
        rdzv_configs={"rank": 0},
        max_restarts=0,
        monitor_interval=0.1,
        start_method="fork",
    )
    try:
        elastic_launch(settings, run)(path)
    except ChildFailedError as error:
        sys.exit(str(error))


def run(path: str) -> None:
    # A program that torchrun starts has none of the agent's handlers.
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    rank, status = os.environ["RANK"], 0
    del os.environ["TORCHELASTIC_USE_AGENT_STORE"]  # at torchrun's port one command would read what another has left
    commands = json.loads(Path(path).read_text())
    for number, command in enumerate(commands):
        os.environ["MASTER_PORT"] = str(command["port"])
        os.chdir(command["folder"].replace("{rank}", rank))
        # The last one's error ends the processes, which may take a while on a busy machine.
        config.PATIENCE_SECONDS = 60 if number == len(commands) - 1 else 0.1
        prefix = f"{path}.{number}.{rank}"
        with (
            Path(f"{prefix}.out").open("w", buffering=1) as out,
            Path(f"{prefix}.err").open("w", buffering=1) as err,
            redirect_stdout(out),
            redirect_stderr(err),
        ):
            status = main(command["arguments"])
        Path(f"{prefix}.status").write_text(str(status))
    sys.exit(status)
