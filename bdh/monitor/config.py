"""Settings of the monitoring."""

import importlib.util
from dataclasses import dataclass, field
from typing import Annotated, Literal

from bdh.validation import Allowed, Faults, PositiveInt, PositiveSeconds, Settings, collect_faults

AUTO = "auto"
BACKENDS = ("console", "jsonl", "tensorboard", "wandb", "trackio")
# Imported by those that are not part of the core's dependencies.
_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}


@dataclass
class MonitorConfig(Settings):
    log_every_steps: PositiveInt = 10
    """Steps between two that are logged."""
    backends: list[str] = field(default_factory=lambda: [AUTO])
    """Where to show and record the run: console, jsonl (metrics.jsonl), tensorboard, wandb, trackio, as a list or with
    commas. auto stands for console, jsonl, and tensorboard where it is installed: `auto,wandb` adds to them."""
    progress_bar: bool = True
    """Console: a live bar with loss, speed and time left; without a terminal, lines."""
    project: Annotated[str, Allowed(str.strip, "a name")] = "bdh"
    """W&B, Trackio: project of the run."""
    run_name: str | None = None
    """W&B, Trackio: name of the run. None takes the name of its folder."""
    wandb_mode: Literal["online", "offline"] = "online"
    """W&B: offline writes files that `wandb sync` sends later; so does online where the server cannot be reached."""
    wandb_timeout_seconds: PositiveSeconds = 30.0
    """W&B: how long to wait for the server at the start, and for the last figures to arrive at the end."""

    def collect_faults(self, faults: Faults) -> None:
        for name in split_names(self.backends):
            faults.require_one_of("backends", name, (AUTO, *BACKENDS))


def chosen_backends(config: MonitorConfig) -> list[str]:
    """The names that ``backends`` stands for, each once, in the order of ``BACKENDS``.

    Raises:
        ValueError: an unknown name, or one that was asked for by name and whose package is missing.
    """
    faults = Faults("monitor.")
    collect_faults(config, faults)
    given = split_names(config.backends)
    for name in given:
        if name in BACKENDS and not is_installed(name):
            faults.add(
                f"monitor.backends names {name}, but the package {_PACKAGES[name]} is missing: "
                'pip install "bdh[monitor]", or leave it out'
            )
    faults.raise_if_any()
    chosen = set(given)
    if AUTO in chosen:
        chosen |= {"console", "jsonl"} | ({"tensorboard"} if is_installed("tensorboard") else set())
    return [name for name in BACKENDS if name in chosen]


def is_installed(name: str) -> bool:
    return name not in _PACKAGES or importlib.util.find_spec(_PACKAGES[name]) is not None


def split_names(backends: list[str]) -> list[str]:
    """The names in a list whose items may hold several with commas between them."""
    return [name.strip() for item in backends for name in item.split(",") if name.strip()]
