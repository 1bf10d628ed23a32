"""Runs commands of bdh one after the other in each of the processes that torchrun has started, as starting takes longest.

The processes end with the status of the last one. What each prints is in files beside the list of commands.
"""

import json
import os
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from bdh.cli.main import main
from bdh.distributed import config


def run(path: Path) -> int:
    rank, status = os.environ["RANK"], 0
    del os.environ["TORCHELASTIC_USE_AGENT_STORE"]  # at torchrun's port one command would read what another has left
    commands = json.loads(path.read_text())
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
    return status


if __name__ == "__main__":
    sys.exit(run(Path(sys.argv[1])))
