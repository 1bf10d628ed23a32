"""How long commands take to say what is wrong, and to their first token; with --before, by turns with another checkout.

python benchmarks/startup.py --before ../main --model runs/x/model --rounds 3
python benchmarks/startup.py --busy 1      # beside a process that keeps a core busy
"""

import argparse
import contextlib
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent


def seconds(checkout: Path, arguments: list[str]) -> float:
    """Until the process has ended."""
    start = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    quiet = subprocess.DEVNULL
    command = [sys.executable, "-m", "bdh", *arguments]
    subprocess.run(command, cwd=checkout, env=environment, stdin=quiet, stdout=quiet, stderr=quiet, check=False)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, help="another checkout, that is timed by turns with this one")
    parser.add_argument("--model", type=Path, help="an exported model, for the commands that need one")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--busy", type=int, default=0, help="processes that keep a core busy meanwhile")
    settings = parser.parse_args()
    checkouts = {"now": HERE} | ({"before": settings.before.resolve()} if settings.before else {})
    with contextlib.ExitStack() as stack:
        taken = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        for _ in range(settings.busy):
            neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"])
            stack.callback(neighbour.kill)
        lines = ["--help", "train --help", "eval /nonexistent", "eval --modle x", "train --data.source /nonexistent"]
        if settings.model is not None:
            model = settings.model.resolve()
            lines += [
                f"serve {model} --port {taken.getsockname()[1]}",
                f"generate {model} --prompt x --max_new_tokens 1",
            ]
        for line in lines:
            times: dict[str, list[float]] = {name: [] for name in checkouts}
            for _ in range(settings.rounds):
                for name, checkout in checkouts.items():
                    times[name].append(seconds(checkout, line.split()))
            shown = ", ".join(f"{name} {statistics.median(each):.2f} s" for name, each in times.items())
            print(f"bdh {line:<60} {shown}", flush=True)


if __name__ == "__main__":
    main()
