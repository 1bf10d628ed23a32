"""One place to tell what happens, for all backends."""

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console

from bdh.monitor.backends import Backend, RunFacts, open_backend
from bdh.monitor.config import AUTO, MonitorConfig, chosen_backends, is_installed, split_names

_HISTOGRAM_VALUES = 1 << 16  # counting all of millions takes seconds
_TITLES = {"wandb": "W&B", "trackio": "Trackio", "tensorboard": "TensorBoard", "jsonl": "metrics.jsonl"}


class Monitor:
    """Passes metrics, texts and messages on to the backends. A context manager.

    A backend that raises, because the disk is full or its server is gone, does not end the training: it is
    announced, left out from then on, and named again at the end.

    Args:
        settings: the run's configuration, nested plain data, for the backends that show it.

    Raises:
        ValueError: a backend is unknown, or its package is missing.
    """

    def __init__(
        self,
        run_dir: Path,
        config: MonitorConfig,
        *,
        total_steps: int,
        start_step: int = 0,
        settings: Mapping[str, Any] | None = None,
        console: Console | None = None,
    ):
        self._console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self._lost: list[str] = []
        self._step = start_step
        self._backends: list[Backend] = []
        facts = RunFacts(
            run_dir=run_dir,
            config=config,
            total_steps=total_steps,
            start_step=start_step,
            settings=settings or {},
            console=self._console,
            warn=self.warn,
        )
        for name in chosen_backends(config):
            try:
                self._backends.append(open_backend(name, facts))
            except Exception as error:
                self._lose(_TITLES.get(name, name), "cannot be opened", error)
        if AUTO in split_names(config.backends) and not is_installed("tensorboard"):
            self.message('No TensorBoard files: the package is missing (pip install "bdh[monitor]" brings it).')

    def __enter__(self) -> "Monitor":
        self._each("start")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def log(self, step: int, values: dict[str, float]) -> None:
        """Records the metrics of a step. What is not a finite number is null in ``metrics.jsonl``."""
        self._step = step
        self._each("log", step, values)

    def log_text(self, step: int, name: str, text: str) -> None:
        """Records a text, where texts can be shown."""
        self._each("log_text", step, name, text)

    def log_histogram(self, step: int, name: str, values: Any) -> None:
        """Records the distribution of a tensor's values; of a large one, of evenly spaced ones."""
        shows_them = any(type(each).log_histogram is not Backend.log_histogram for each in self._backends)
        if shows_them and values.numel() > 0:
            some = values.detach().flatten()[:: 1 + values.numel() // _HISTOGRAM_VALUES].float().cpu()
            # A copy: a backend may keep it while the training changes the values, or FSDP frees them.
            some = some.clone()
            self._each("log_histogram", step, name, some)

    def progress(self, step: int, *, loss: float, tokens_per_second: float) -> None:
        """Moves the bar."""
        self._each("progress", step, loss=loss, tokens_per_second=tokens_per_second)

    def message(self, text: str) -> None:
        """Prints a line, above the bar."""
        self._each("message", text)

    def warn(self, text: str) -> None:
        """Prints a line that should be seen, whatever the backends."""
        self._console.print(f"warning: {text}", style="yellow", markup=False, highlight=False)

    def close(self) -> None:
        for backend in list(self._backends):
            self._call(backend, "close")
        for what in self._lost:
            self.warn(what)
        self._backends, self._lost = [], []

    def _each(self, method: str, *arguments: Any, **keywords: Any) -> None:
        for backend in list(self._backends):
            self._call(backend, method, *arguments, **keywords)

    def _call(self, backend: Backend, method: str, *arguments: Any, **keywords: Any) -> None:
        try:
            getattr(backend, method)(*arguments, **keywords)
        except Exception as error:
            self._backends.remove(backend)
            self._lose(backend.title, "cannot be written", error)
            if method != "close":
                self._close_lost(backend)

    def _close_lost(self, backend: Backend) -> None:
        try:
            backend.close()
        except Exception:
            # It has been announced already, with the error that came first.
            return

    def _lose(self, title: str, what: str, error: Exception) -> None:
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        self._lost.append(f"{title} is incomplete: it lacks what came at step {self._step} or later ({reason})")
        self.warn(f"{title} {what} ({reason}); the training goes on without it")
