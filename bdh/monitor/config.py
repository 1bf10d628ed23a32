"""Settings of the monitoring."""

import importlib.util
from dataclasses import dataclass
from typing import Literal

from bdh.validation import Faults


@dataclass
class MonitorConfig:
    log_every_steps: int = 10
    """Steps between lines of metrics.jsonl and points in TensorBoard."""
    progress_bar: bool = True
    """Show a live bar with loss, speed and time left; without a terminal, a line every 10 * log_every_steps."""
    tensorboard: Literal["auto", "on", "off"] = "auto"
    """Write TensorBoard event files. auto does where the package tensorboard is installed, and says where it is not."""

    def collect_faults(self, faults: Faults) -> None:
        faults.require(self.log_every_steps >= 1, "log_every_steps", self.log_every_steps, "at least 1")


def check_packages(config: MonitorConfig) -> None:
    """Raises ``ValueError``, with the line that installs it, if a package that is asked for is missing."""
    if config.tensorboard == "on" and importlib.util.find_spec("tensorboard") is None:
        raise ValueError(
            "monitor.tensorboard is 'on', but the package is missing: pip install \"bdh[monitor]\", or set it to off"
        )
