"""Shows and records how a training goes. Knows nothing of models or data."""

from bdh.monitor.backends.jsonl import read_metrics
from bdh.monitor.config import MonitorConfig, chosen_backends
from bdh.monitor.monitor import Monitor

__all__ = ["Monitor", "MonitorConfig", "chosen_backends", "read_metrics"]
