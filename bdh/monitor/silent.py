"""The monitor of the processes that leave the telling to rank 0."""

from types import TracebackType
from typing import Any

from bdh.monitor.monitor import Monitor


class SilentMonitor(Monitor):
    """Takes everything, and tells nothing."""

    def __init__(self) -> None:
        pass

    def __enter__(self) -> "SilentMonitor":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def log(self, step: int, values: dict[str, float]) -> None:
        pass

    def log_text(self, step: int, name: str, text: str) -> None:
        pass

    def log_histogram(self, step: int, name: str, values: Any) -> None:
        pass

    def progress(self, step: int, *, loss: float, tokens_per_second: float) -> None:
        pass

    def message(self, text: str) -> None:
        pass

    def warn(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass
