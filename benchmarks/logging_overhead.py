"""What logging costs: the time that a run spends in its monitor, as a share of its steps.

    python benchmarks/logging_overhead.py [--config configs/tiny.yaml] [--steps 100]

Every step is logged, and one evaluation is: to metrics.jsonl, TensorBoard, W&B (offline) and Trackio (its local
database), to each alone. Timed are the calls themselves, since two runs with and without them differ by less than two
equal runs do. All runs, one with nothing logged among them, must end with the same loss.
"""

import argparse
import os
import statistics
import tempfile
import time
from itertools import pairwise
from typing import Any

from rich.console import Console

from bdh.cli.settings import parse_settings
from bdh.monitor import Monitor
from bdh.train.config import RunSettings
from bdh.train.loop import fit
from bdh.train.setup import open_run

_WARM_UP = 5  # steps
_BACKENDS = ("jsonl", "tensorboard", "wandb", "trackio")


class TimedMonitor(Monitor):
    """Notes how long its own methods take, and what is between two of them."""

    def __init__(self, *arguments: Any, **keywords: Any):
        super().__init__(*arguments, **keywords)
        self.calls: list[tuple[float, float]] = []  # of log: when each began and ended
        self.histogram_seconds = 0.0
        self.last_loss = float("nan")

    def log(self, step: int, values: dict[str, float]) -> None:
        start = time.perf_counter()
        super().log(step, values)
        self.calls.append((start, time.perf_counter()))

    def log_histogram(self, step: int, name: str, values: Any) -> None:
        start = time.perf_counter()
        super().log_histogram(step, name, values)
        self.histogram_seconds += time.perf_counter() - start

    def progress(self, step: int, *, loss: float, tokens_per_second: float) -> None:
        super().progress(step, loss=loss, tokens_per_second=tokens_per_second)
        self.last_loss = loss


def trained(config: str, steps: int, log_every: int, backend: str) -> TimedMonitor:
    flags = {
        "config": config,
        "train.max_steps": steps,
        "train.warmup_steps": 1,
        "train.eval_every_steps": steps,
        "train.sample_every_steps": 0,
        "checkpoint.every_steps": steps,
        "monitor.log_every_steps": log_every,
        "monitor.backends": backend,
        "monitor.wandb_mode": "offline",
    }
    argv = [f"--{name}={value}" for name, value in flags.items()]
    with tempfile.TemporaryDirectory() as folder:
        settings = parse_settings(
            RunSettings, [*argv, f"--run_dir={folder}/run"], prog="logging_overhead", description=""
        )
        run = open_run(settings)
        with TimedMonitor(run.folder, settings.monitor, total_steps=steps, console=Console(quiet=True)) as monitor:
            fit(run, monitor)
    return monitor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/tiny.yaml")
    parser.add_argument("--steps", type=int, default=100)
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRACKIO_DIR"] = folder  # read when Trackio is imported
        silent = trained(arguments.config, arguments.steps, 10**9, "jsonl")
        logged = {name: trained(arguments.config, arguments.steps, 1, name) for name in _BACKENDS}
    for name, monitor in logged.items():
        if silent.last_loss != monitor.last_loss:
            raise SystemExit(
                f"the runs do not agree: with {name} the loss is {monitor.last_loss}, not {silent.last_loss}"
            )
    # The silent run says nothing of most steps.
    step = statistics.median(began - ended for (_, ended), (began, _) in pairwise(logged["jsonl"].calls[_WARM_UP:]))
    print(f"a step {step * 1e3:.3f} ms\n")
    print("              logging one   of a step   one in ten   histograms of an evaluation")
    for name, monitor in logged.items():
        log = statistics.mean(ended - began for began, ended in monitor.calls[_WARM_UP:])
        print(
            f"{name:<12}{log * 1e3:10.3f} ms{log / step:12.2%}{log / step / 10:13.2%}"
            f"{monitor.histogram_seconds * 1e3:27.3f} ms"
        )


if __name__ == "__main__":
    main()
