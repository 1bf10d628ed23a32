"""Settings of the monitoring."""

from dataclasses import dataclass
from typing import Literal

from bdh.validation import Faults


@dataclass
class MonitorConfig:
    log_every_steps: int = 10
    """Steps between lines of metrics.jsonl and points in TensorBoard."""
    progress_bar: bool = True
    """Show a live bar with loss, speed and time left; without a terminal, a line for each logged step."""
    tensorboard: Literal["auto", "on", "off"] = "auto"
    """Write TensorBoard event files. auto does where the package tensorboard is installed, and says where it is not."""

    def collect_faults(self, faults: Faults) -> None:
        faults.require(self.log_every_steps >= 1, "log_every_steps", self.log_every_steps, "at least 1")
