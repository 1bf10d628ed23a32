"""Processes of bdh from one that has imported what they need: each starts in a moment instead of seconds."""

import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Self

TRAINING = ("bdh.train.dry_run", "bdh.train.loop", "bdh.train.setup")


class Forked:
    """As a :class:`subprocess.Popen` of ``python``."""

    def __init__(self, pid: int, files: Path):
        self.pid, self.returncode = pid, None
        self._files = files

    def poll(self) -> int | None:
        status = self._files.with_suffix(".status")
        if self.returncode is None and status.exists():
            self.returncode = int(status.read_text())
        return self.returncode

    def wait(self, timeout: float = float("inf")) -> int:
        ends = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > ends:
                raise TimeoutError(f"process {self.pid} runs after {timeout} s")
            time.sleep(0.005)
        return status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wrote(self) -> str:
        """What it has written to stdout."""
        return self._files.with_suffix(".out").read_text()

    def said(self) -> str:
        """What it has written to stderr."""
        return self._files.with_suffix(".err").read_text()


class ForkServer:
    """Starts such processes; those that still run when it is closed are killed.

    Args:
        modules: what they need.
    """

    def __init__(self, *modules: str):
        self._modules = modules or TRAINING

    def __enter__(self) -> Self:
        self._folder = tempfile.TemporaryDirectory()
        self._started: list[Forked] = []
        command = [sys.executable, __file__, *self._modules]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for each in self._started:
            if each.poll() is None:
                each.kill()
                each.wait()
        self._process.communicate()
        self._folder.cleanup()

    def start(
        self, arguments: Sequence[str], environment: dict[str, str] | None = None, *, stderr: Path | None = None
    ) -> Forked:
        """Starts ``bdh ARGUMENTS``; or what follows ``-c``, or a file that ends with .py, as Python does.

        Args:
            environment: variables besides those that the server has.
            stderr: a pipe with a name; where there is none, :meth:`Forked.said` has what is written.
        """
        files = Path(self._folder.name, str(len(self._started)))
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        given = [list(arguments), environment or {}, str(files), str(stderr or f"{files}.err")]
        print(json.dumps(given), file=self._process.stdin, flush=True)
        self._started.append(Forked(int(self._process.stdout.readline()), files))
        return self._started[-1]


def serve(modules: Sequence[str]) -> None:
    for name in modules:
        importlib.import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks for the status of those below
    for line in sys.stdin:
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            wait_for_one(*json.loads(line))
            os._exit(0)


def wait_for_one(arguments: list[str], environment: dict[str, str], files: str, stderr: str) -> None:
    """Forks once more, prints the number of that process, and writes its status when it has ended."""
    pid = os.fork()
    if pid == 0:
        run(arguments, environment, f"{files}.out", stderr)
    print(pid, flush=True)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    Path(f"{files}.writing").write_text(str(status))
    Path(f"{files}.writing").rename(f"{files}.status")


def run(arguments: list[str], environment: dict[str, str], stdout: str, stderr: str) -> NoReturn:
    """Ends as any Python does, which waits for threads."""
    os.environ.update(environment)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in ((1, stdout), (2, stderr)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), number)
    if arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        exec(arguments[1], {"__name__": "__main__"})
        sys.exit()
    if arguments[0].endswith(".py"):
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")
        sys.exit()
    from bdh.cli.main import main

    sys.exit(main(arguments))


if __name__ == "__main__":
    serve(sys.argv[1:])
