"""The monitor, to which a run reports its progress, and the backends that show or record it."""

import contextlib
import html
import io
import json
import math
import os
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from bdh.extras import install_command
from bdh.monitor.config import AUTO, BACKENDS, MonitorConfig, chosen_backends, is_missing, split_names
from bdh.monitor.history import cut_back
from bdh.words import first_line

if TYPE_CHECKING:
    from rich.console import Console

_SILENT_SECONDS = 60.0  # without a terminal, a step that is reported is printed if the last line is this old
_HISTOGRAM_VALUES = 1 << 16  # the maximum, because counting millions takes seconds


@dataclass(frozen=True)
class RunFacts:
    """What a backend is opened with. Steps after ``start_step`` that an earlier start logged are logged again."""

    run_dir: Path
    config: MonitorConfig
    total_steps: int
    start_step: int
    settings: Mapping[str, Any]
    console: "Console"
    warn: Callable[[str], None]


class Backend:
    """The base class of backends, which show or record a run. Its methods do nothing: override those that apply.

    Steps are logged in order, and a step may have several calls. A method may raise any exception. The backend is then not
    called again, except for ``close``.
    """

    title: str
    """The name in messages."""

    def start(self) -> None:
        """Called when training is about to start."""

    def message(self, text: str) -> None:
        """Shows a line of text."""

    def progress(self, step: int, *, loss: float, tokens_per_second: float) -> None:
        """Called after steps whose results are read: those that are logged and, on a CPU, others too."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Records numbers by name. Some may be infinite or NaN."""

    def log_text(self, step: int, name: str, text: str) -> None:
        """Records a text, which may have several lines."""

    def log_histogram(self, step: int, name: str, values: Any) -> None:
        """Records the distribution of values: a float32 tensor of one dimension, on the CPU, not empty."""

    def close(self) -> None:
        """Writes the remaining data."""


class Monitor:
    """Passes metrics, texts and messages to the backends, which have the same methods. A context manager.

    If a backend raises, because the disk is full or its server cannot be reached, training continues without it. A warning
    says so at once, and again at the end.

    Args:
        settings: the run's configuration as nested plain data, for the backends that show it.

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
        console: "Console | None" = None,
    ):
        from rich.console import Console

        self._console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self._lost: list[str] = []
        self._step = start_step
        self._backends: list[Backend] = []
        facts = RunFacts(run_dir, config, total_steps, start_step, settings or {}, self._console, self.warn)
        for name in chosen_backends(config):
            kind = _KINDS[name]
            try:
                self._backends.append(kind(facts))
            except Exception as error:
                self._lose(kind.title, "cannot be opened", error)
        if AUTO in split_names(config.backends) and is_missing("tensorboard"):
            self.message(f"No TensorBoard files: the package is missing ({install_command('monitor')} brings it).")

    def __enter__(self) -> "Monitor":
        self._each("start")
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def add(self, backend: Backend) -> None:
        """Adds a backend to those of the settings."""
        self._backends.append(backend)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Records the metrics of a step. Values that are not finite are null in ``metrics.jsonl``."""
        self._step = step
        self._each("log", step, values)

    def log_text(self, step: int, name: str, text: str) -> None:
        self._each("log_text", step, name, text)

    def log_histogram(self, step: int, name: str, values: Any) -> None:
        """Records the distribution of a tensor's values, or of evenly spaced ones if it is large."""
        shows_them = any(type(each).log_histogram is not Backend.log_histogram for each in self._backends)
        if shows_them and values.numel() > 0:
            some = values.detach().flatten()[:: 1 + values.numel() // _HISTOGRAM_VALUES].float().cpu()
            # A copy: a backend may keep it while training changes the values or FSDP frees them.
            self._each("log_histogram", step, name, some.clone())

    def progress(self, step: int, *, loss: float, tokens_per_second: float) -> None:
        self._each("progress", step, loss=loss, tokens_per_second=tokens_per_second)

    def message(self, text: str) -> None:
        self._each("message", text)

    def warn(self, text: str) -> None:
        """Prints a warning, whatever the backends are."""
        self._console.print(f"warning: {text}", style="yellow", markup=False, highlight=False)

    def close(self) -> None:
        self._each("close")
        for what in self._lost:
            self.warn(what)
        self._backends, self._lost = [], []

    def _each(self, method: str, *arguments: Any, **keywords: Any) -> None:
        for backend in list(self._backends):
            try:
                getattr(backend, method)(*arguments, **keywords)
            except Exception as error:
                self._backends.remove(backend)
                self._lose(backend.title, "cannot be written", error)
                if method != "close":
                    with contextlib.suppress(Exception):  # the first error has been reported
                        backend.close()

    def _lose(self, title: str, what: str, error: Exception) -> None:
        reason = first_line(error)
        self._lost.append(f"{title} is incomplete: it lacks what came at step {self._step} or later ({reason})")
        self.warn(f"{title} {what} ({reason}); the training continues without it")


def _indented(text: str) -> str:
    """Returns the text as a code block of Markdown, which would otherwise join its lines."""
    return "    " + text.replace("\n", "\n    ")


class ConsoleBackend(Backend):
    """Shows a live bar in the terminal, or prints lines if there is no terminal."""

    title = "the console"

    def __init__(self, facts: RunFacts):
        self._facts = facts
        self._start_time = self._said_at = time.monotonic()
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

        self._bar: Progress | None = None
        if facts.config.progress_bar and facts.console.is_terminal:
            speed = ("loss {task.fields[loss]}", "{task.fields[tokens_per_second]} tokens/s")
            columns = ("step", MofNCompleteColumn(), BarColumn(bar_width=None), *speed, TimeElapsedColumn())
            left = ("left", TimeRemainingColumn())
            self._bar = Progress(*columns, *left, console=facts.console, refresh_per_second=4, expand=True)
            self._task = self._bar.add_task(
                "training", total=facts.total_steps, completed=facts.start_step, loss="-", tokens_per_second="-"
            )

    def start(self) -> None:
        if self._bar is not None:
            self._bar.start()

    def progress(self, step: int, *, loss: float, tokens_per_second: float) -> None:
        config, total = self._facts.config, self._facts.total_steps
        if self._bar is not None:
            speed = f"{tokens_per_second:,.0f}"
            self._bar.update(self._task, completed=step, loss=f"{loss:.4f}", tokens_per_second=speed)
            return
        now = time.monotonic()
        is_due = step % (10 * config.log_every_steps) == 0 or step == total or now - self._said_at >= _SILENT_SECONDS
        if config.progress_bar and is_due:
            self._said_at = now
            each = (now - self._start_time) / max(1, step - self._facts.start_step)
            minutes, seconds = divmod(int((total - step) * each), 60)
            left = f"{minutes // 60:02d}:{minutes % 60:02d}:{seconds:02d}"
            self.message(f"step {step}/{total}: loss {loss:.4f}, {tokens_per_second:,.0f} tokens/s, {left} left")

    def message(self, text: str) -> None:
        self._facts.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


class MetricsFile(Backend):
    """Appends a JSON object to ``metrics.jsonl`` for each logged step.

    If a run is resumed, its file is cut back to ``start_step`` first, because later steps are repeated. An incomplete last
    line from a killed process is dropped.
    """

    title = "metrics.jsonl"

    def __init__(self, facts: RunFacts):
        path = facts.run_dir / "metrics.jsonl"
        cut_back(path, facts.start_step)
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def log(self, step: int, values: dict[str, float]) -> None:
        row: dict[str, Any] = {"step": step, "time": round(time.time(), 3)}
        row |= {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps(row) + "\n")

    def close(self) -> None:
        self._file.close()


class TensorBoardBackend(Backend):
    """Writes TensorBoard's event files."""

    title = "TensorBoard"

    def __init__(self, facts: RunFacts):
        # Imported here, because it takes a second and needs tensorboard.
        from torch.utils.tensorboard import SummaryWriter

        # purge_step hides what the run had logged after start_step, before it was resumed.
        purge_step = facts.start_step + 1 if facts.start_step else None
        self._writer = SummaryWriter(str(facts.run_dir / "tensorboard"), purge_step=purge_step)
        if facts.settings:
            self.log_text(facts.start_step, "settings", yaml.safe_dump(dict(facts.settings), sort_keys=False))

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def log_text(self, step: int, name: str, text: str) -> None:
        self._writer.add_text(name, _indented(text), step)

    def log_histogram(self, step: int, name: str, values: Any) -> None:
        self._writer.add_histogram(name, values, step)

    def close(self) -> None:
        self._writer.close()


class StepwiseBackend(Backend, ABC):
    """The base class of W&B and Trackio: a run has an id, and its steps can be added but not removed.

    Each step is sent once, as a whole and in order, over all starts of a run. A file in the run's folder stores the id, so
    that a later start continues the same run, and the last step that was sent. If a start from an earlier checkpoint repeats
    steps up to that one, they are not sent again. A step is sent when the next one is logged, or at the end.
    """

    memory_file: str
    _package: Any
    """wandb, or trackio, which has the same interface."""
    _run: Any

    def __init__(self, facts: RunFacts):
        self._facts, self._memory_path = facts, facts.run_dir / self.memory_file
        try:
            memory = json.loads(self._memory_path.read_text("utf-8")) if self._memory_path.exists() else {}
            is_object = isinstance(memory, dict) and isinstance(memory.get("last_step", -1), int)
            if not is_object or not isinstance(memory.get("id", ""), str):
                raise ValueError(f"it holds {json.dumps(memory)[:80]}")
        except ValueError as error:
            raise ValueError(
                f"{self._memory_path} does not hold the id of the run: {error}; without the file a new one is made"
            ) from error
        self.run_id: str = memory.get("id") or uuid.uuid4().hex[:8]
        self._last_step: int = memory.get("last_step", -1)
        self._pending: dict[str, Any] = {}
        self._pending_step: int | None = None
        self._remember()
        if self._last_step > facts.start_step:
            facts.warn(
                f"{self.title} has the steps up to {self._last_step} already, and cannot take them back: those from "
                f"{facts.start_step + 1} on are not sent again"
            )

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        if step <= self._last_step:
            return
        if step != self._pending_step:
            self._send_pending()
            self._pending_step = step
        self._pending |= values

    def log_text(self, step: int, name: str, text: str) -> None:
        self.log(step, {name: self._text(text)})

    def log_histogram(self, step: int, name: str, values: Any) -> None:
        self.log(step, {name: self._histogram(values)})

    def close(self) -> None:
        try:
            self._send_pending()
        finally:
            self._finish()

    @abstractmethod
    def _text(self, text: str) -> Any: ...

    def _histogram(self, values: Any) -> Any:
        return self._package.Histogram(values.numpy())

    def _send(self, step: int, values: dict[str, Any]) -> None:
        self._run.log(values, step=step)

    @abstractmethod
    def _finish(self) -> None: ...

    def _send_pending(self) -> None:
        step, values = self._pending_step, self._pending
        self._pending_step, self._pending = None, {}
        if step is not None:
            self._send(step, values)
            self._last_step = step
            self._remember()

    def _remember(self) -> None:
        temporary = self._memory_path.with_name(f".{self._memory_path.name}.tmp")
        temporary.write_text(json.dumps({"id": self.run_id, "last_step": self._last_step}), encoding="utf-8")
        os.replace(temporary, self._memory_path)


class WandbBackend(StepwiseBackend):
    """Weights & Biases: sends the run to its server, or writes files to send later."""

    title, memory_file = "W&B", "wandb.json"

    def __init__(self, facts: RunFacts):
        import wandb

        self._package = wandb
        super().__init__(facts)
        config, seconds = facts.config, facts.config.wandb_timeout_seconds
        timeouts: dict[str, Any] = dict.fromkeys(("init_timeout", "login_timeout", "finish_timeout"), seconds)
        arguments: dict[str, Any] = {
            "project": config.project,
            "name": config.run_name or facts.run_dir.resolve().name,
            "id": self.run_id,
            "resume": "allow",
            "dir": str(facts.run_dir),
            "config": dict(facts.settings),
            # The console backend uses the terminal.
            "settings": wandb.Settings(**timeouts, finish_timeout_raises=True, console="off", silent=True),
        }
        self._only_in_files = False
        try:
            self._run = wandb.init(mode=config.wandb_mode, **arguments)
        except wandb.errors.Error as error:
            if config.wandb_mode == "offline":
                raise
            facts.warn(f"W&B cannot be used online ({first_line(error)}): the run goes into files, to be sent later")
            self._only_in_files = True
            wandb.teardown()  # otherwise its service keeps the id in use
            self._run = wandb.init(mode="offline", **arguments)

    def _text(self, text: str) -> Any:
        return self._package.Html(f"<pre>{html.escape(text)}</pre>", inject=False)

    def _finish(self) -> None:
        self._run.finish()
        if self._only_in_files:
            folder = self._facts.run_dir
            self._facts.warn(f"W&B has nothing of this start yet: `wandb sync {folder}/wandb/offline-run-*` sends it")


class TrackioBackend(StepwiseBackend):
    """Trackio: a local database with a dashboard (`trackio show`), or a Space or server that its variables name."""

    title, memory_file = "Trackio", "trackio.json"

    def __init__(self, facts: RunFacts):
        import trackio

        self._package = trackio
        super().__init__(facts)
        # Trackio finds a resumed run by its name, so the name must be unique.
        name = f"{facts.config.run_name or facts.run_dir.resolve().name}-{self.run_id}"
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what `bdh train` already prints
            self._run = trackio.init(
                project=facts.config.project,
                name=name,
                resume="allow",
                config=dict(facts.settings),
                embed=False,
                auto_log_cpu=False,
                auto_log_gpu=False,
            )
        self._sent_to: int | None = None

    def _text(self, text: str) -> Any:
        return self._package.Markdown(_indented(text))

    def _send(self, step: int, values: dict[str, Any]) -> None:
        super()._send(step, values)
        self._sent_to = step

    def _finish(self) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self._package.finish()
        # It writes in a thread, and only prints the errors there.
        if self._sent_to is not None and self._run.url is None:
            run = self._run
            kept = self._package.SQLiteStorage.get_max_step_for_run(run.project, run.name, run_id=run.id)
            if kept != self._sent_to:
                missing = f"nothing after step {kept}" if kept else "none of the steps"
                raise OSError(f"its database has {missing}")


_KINDS: dict[str, type[Any]] = dict(
    zip(BACKENDS, (ConsoleBackend, MetricsFile, TensorBoardBackend, WandbBackend, TrackioBackend), strict=True)
)
