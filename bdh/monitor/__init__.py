"""Shows and records how a training goes. Knows nothing of models or data."""

from bdh.monitor.config import MonitorConfig
from bdh.monitor.metrics import read_metrics
from bdh.monitor.monitor import Monitor

__all__ = ["Monitor", "MonitorConfig", "read_metrics"]
