"""The terminal: a live bar, or lines where there is none."""

import time

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bdh.monitor.backends.base import Backend, RunFacts


class ConsoleBackend(Backend):
    title = "the console"

    def __init__(self, facts: RunFacts):
        self._console = facts.console
        self._start_step, self._start_time = facts.start_step, time.monotonic()
        self._total_steps = facts.total_steps
        self._log_every_steps = facts.config.log_every_steps
        self._bar: Progress | None = None
        if facts.config.progress_bar and self._console.is_terminal:
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
                "training",
                total=self._total_steps,
                completed=self._start_step,
                loss=float("nan"),
                tokens_per_second=0.0,
            )
        self._prints_lines = facts.config.progress_bar and self._bar is None

    def start(self) -> None:
        if self._bar is not None:
            self._bar.start()

    def progress(self, step: int, *, loss: float, tokens_per_second: float) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=step, loss=loss, tokens_per_second=tokens_per_second)
        elif self._prints_lines and (step % (10 * self._log_every_steps) == 0 or step == self._total_steps):
            left = (self._total_steps - step) * self._seconds_per_step(step)
            self.message(
                f"step {step}/{self._total_steps}: loss {loss:.4f}, {tokens_per_second:,.0f} tokens/s, "
                f"{_clock(left)} left"
            )

    def message(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _seconds_per_step(self, step: int) -> float:
        return (time.monotonic() - self._start_time) / max(1, step - self._start_step)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02d}:{minutes:02d}:{seconds:02d}"
