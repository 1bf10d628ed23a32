"""What every backend can be asked, and what it is told of the run."""

from abc import ABC
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from bdh.monitor.config import MonitorConfig


@dataclass(frozen=True)
class RunFacts:
    """What a backend is told of the run when it is opened."""

    run_dir: Path
    config: MonitorConfig
    total_steps: int
    start_step: int
    """Steps done by earlier starts of the run; what had been logged behind it will be logged again."""
    settings: Mapping[str, Any]
    """The run's configuration: nested, plain data."""
    console: Console
    warn: Callable[[str], None]


class Backend(ABC):
    """One place where a run is shown or recorded. What it cannot show, it leaves out: these do nothing.

    Steps come in order; several calls may be for one step. A method may raise anything: the backend is then
    not called again, except for ``close``.
    """

    title: str
    """What people call it."""

    def start(self) -> None:  # noqa: B027 (a backend overrides what it can show)
        """Called when the training is about to start."""

    def message(self, text: str) -> None:  # noqa: B027
        """A line for people who watch."""

    def progress(self, step: int, *, loss: float, tokens_per_second: float) -> None:  # noqa: B027
        """Called after every step, logged or not."""

    def log(self, step: int, values: dict[str, float]) -> None:  # noqa: B027
        """Numbers by name; some may be infinite or NaN."""

    def log_text(self, step: int, name: str, text: str) -> None:  # noqa: B027
        """A text of several lines."""

    def log_histogram(self, step: int, name: str, values: Any) -> None:  # noqa: B027
        """The distribution of a tensor's values: float32, one dimension, on the CPU, not empty."""

    def close(self) -> None:  # noqa: B027
        """Writes what is left."""
