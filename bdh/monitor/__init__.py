"""Shows and records how a training goes. Knows nothing of models or data."""

from bdh.monitor.config import MonitorConfig
from bdh.monitor.metrics import read_metrics
from bdh.monitor.monitor import Monitor
from bdh.monitor.silent import SilentMonitor

__all__ = ["Monitor", "MonitorConfig", "SilentMonitor", "read_metrics"]
