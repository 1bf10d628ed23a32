"""One place to tell what happens: the console, ``metrics.jsonl`` and TensorBoard."""

import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bdh.monitor.config import MonitorConfig, check_packages
from bdh.monitor.metrics import MetricsFile

_HISTOGRAM_VALUES = 1 << 16  # counting all of millions takes seconds


class Monitor:
    """Passes metrics, texts and messages on to whoever shows or writes them. A context manager.

    A writer that the disk refuses does not end the training: it is announced, left out from then on, and
    named again at the end.
    """

    def __init__(
        self,
        run_dir: Path,
        config: MonitorConfig,
        *,
        total_steps: int,
        start_step: int = 0,
        console: Console | None = None,
    ):
        self._console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self._start_step, self._start_time = start_step, time.monotonic()
        self._total_steps = total_steps
        self._lost: list[str] = []
        self._writers: dict[str, Any] = {}
        self._open("metrics.jsonl", lambda: MetricsFile(run_dir / "metrics.jsonl", start_step))
        if self._wants_tensorboard(config):
            self._open("TensorBoard", lambda: _tensorboard(run_dir / "tensorboard", start_step))
        self._log_every_steps = config.log_every_steps
        self._bar: Progress | None = None
        if config.progress_bar and self._console.is_terminal:
            self._bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=None),
                TextColumn("loss {task.fields[loss]:.4f}"),
                TextColumn("{task.fields[tokens_per_second]:,.0f} tokens/s"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self._console,
                refresh_per_second=4,
                expand=True,
            )
            self._task = self._bar.add_task(
                "training", total=total_steps, completed=start_step, loss=float("nan"), tokens_per_second=0.0
            )
        self._prints_lines = config.progress_bar and self._bar is None

    def __enter__(self) -> "Monitor":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def log(self, step: int, values: dict[str, float]) -> None:
        """Records the metrics of a step. What is not a finite number is null in ``metrics.jsonl``."""
        if "metrics.jsonl" in self._writers:
            self._try("metrics.jsonl", lambda: self._writers["metrics.jsonl"].log(step, values))
        if "TensorBoard" in self._writers:
            self._try("TensorBoard", lambda: self._log_to_tensorboard(step, values))

    def log_text(self, step: int, name: str, text: str) -> None:
        """Records a text, in TensorBoard."""
        if "TensorBoard" in self._writers:
            # Markdown would join the lines of the text.
            shown = "    " + text.replace("\n", "\n    ")
            self._try("TensorBoard", lambda: self._writers["TensorBoard"].add_text(name, shown, step))

    def log_histogram(self, step: int, name: str, values: Any) -> None:
        """Records the distribution of a tensor's values, in TensorBoard; of a large one, of evenly spaced ones."""
        if "TensorBoard" in self._writers and values.numel() > 0:
            some = values.detach().flatten()[:: 1 + values.numel() // _HISTOGRAM_VALUES].float().cpu()
            self._try("TensorBoard", lambda: self._writers["TensorBoard"].add_histogram(name, some, step))

    def progress(self, step: int, *, loss: float, tokens_per_second: float) -> None:
        """Moves the bar."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, loss=loss, tokens_per_second=tokens_per_second)
        elif self._prints_lines and (step % (10 * self._log_every_steps) == 0 or step == self._total_steps):
            left = (self._total_steps - step) * self._seconds_per_step(step)
            self.message(
                f"step {step}/{self._total_steps}: loss {loss:.4f}, {tokens_per_second:,.0f} tokens/s, "
                f"{_clock(left)} left"
            )

    def message(self, text: str) -> None:
        """Prints a line, above the bar."""
        self._console.print(text, markup=False, highlight=False)

    def warn(self, text: str) -> None:
        """Prints a line that should be seen."""
        self._console.print(f"warning: {text}", style="yellow", markup=False, highlight=False)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        for name in list(self._writers):
            self._try(name, self._writers[name].close)
        for name in self._lost:
            self.warn(f"{name} is incomplete: it could not be written to the end")
        self._writers, self._lost = {}, []

    def _open(self, name: str, make: Callable[[], Any]) -> None:
        def add() -> None:
            self._writers[name] = make()

        self._try(name, add)

    def _try(self, name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except OSError as error:
            self._writers.pop(name, None)
            self._lost.append(name)
            self.warn(f"{name} cannot be written ({error}); the training goes on without it")

    def _wants_tensorboard(self, config: MonitorConfig) -> bool:
        if config.tensorboard == "off":
            return False
        if importlib.util.find_spec("tensorboard") is not None:
            return True
        check_packages(config)
        self.message('No TensorBoard files: the package is missing (pip install "bdh[monitor]" brings it).')
        return False

    def _log_to_tensorboard(self, step: int, values: dict[str, float]) -> None:
        writer = self._writers["TensorBoard"]
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    def _seconds_per_step(self, step: int) -> float:
        return (time.monotonic() - self._start_time) / max(1, step - self._start_step)


def _tensorboard(folder: Path, start_step: int) -> Any:
    # Imported here: it takes a second, and is there only where tensorboard is.
    from torch.utils.tensorboard import SummaryWriter

    # purge_step hides what a run that goes on from start_step had logged behind it.
    return SummaryWriter(str(folder), purge_step=start_step + 1 if start_step else None)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02d}:{minutes:02d}:{seconds:02d}"
