"""The settings of the monitor, and which backends they select."""

import importlib.util
from dataclasses import dataclass, field
from typing import Annotated, Literal

from bdh.extras import install_command
from bdh.validation import Allowed, Faults, PositiveInt, PositiveSeconds, Settings, collect_faults

AUTO = "auto"
BACKENDS = ("console", "jsonl", "tensorboard", "wandb", "trackio")
# The packages of backends that are not dependencies of the core.
_PACKAGES = ("tensorboard", "wandb", "trackio")


@dataclass
class MonitorConfig(Settings):
    log_every_steps: PositiveInt = 10
    """Number of steps between log entries."""
    backends: list[str] = field(default_factory=lambda: [AUTO])
    """Where to show and record the run: console, jsonl (metrics.jsonl), tensorboard, wandb, trackio, as a list or with
    commas. auto means console, jsonl, and tensorboard if it is installed; `auto,wandb` adds to these."""
    progress_bar: bool = True
    """Console: show a live bar with loss, speed and time left; without a terminal, print lines."""
    project: Annotated[str, Allowed(str.strip, "a name")] = "bdh"
    """W&B, Trackio: project of the run."""
    run_name: str | None = None
    """W&B, Trackio: name of the run. None: the name of its folder."""
    wandb_mode: Literal["online", "offline"] = "online"
    """W&B: offline writes files that `wandb sync` sends later; online does the same if the server cannot be reached."""
    wandb_timeout_seconds: PositiveSeconds = 30.0
    """W&B: how long to wait for the server at the start, and for the last metrics to arrive at the end."""

    def collect_faults(self, faults: Faults) -> None:
        for name in split_names(self.backends):
            faults.require_one_of("backends", name, (AUTO, *BACKENDS))


def chosen_backends(config: MonitorConfig) -> list[str]:
    """Returns the names of the selected backends, each once, in the order of ``BACKENDS``.

    Raises:
        ValueError: a name is unknown, or the package of a backend that is selected by name is missing.
    """
    faults = Faults("monitor.")
    collect_faults(config, faults)
    given = split_names(config.backends)
    for name in filter(is_missing, given):
        about = f"monitor.backends names {name}, but the package {name} is missing"
        faults.add(f"{about}: {install_command('monitor')}, or leave it out")
    faults.raise_if_any()
    by_default = {"console", "jsonl", "tensorboard"} if AUTO in given else set()
    return [name for name in BACKENDS if name in given or (name in by_default and not is_missing(name))]


def is_missing(backend: str) -> bool:
    return backend in _PACKAGES and importlib.util.find_spec(backend) is None


def split_names(backends: list[str]) -> list[str]:
    """Returns the names in a list whose items may contain several, separated by commas."""
    return [name.strip() for item in backends for name in item.split(",") if name.strip()]
