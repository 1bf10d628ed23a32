"""Shows and records the progress of a training run. It does not depend on models or data."""

from bdh.monitor.config import MonitorConfig, chosen_backends
from bdh.monitor.history import cut_back, read_metrics
from bdh.monitor.monitor import Backend, Monitor

__all__ = ["Backend", "Monitor", "MonitorConfig", "chosen_backends", "cut_back", "read_metrics"]
