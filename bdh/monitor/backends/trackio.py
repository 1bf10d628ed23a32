"""Trackio: a local database with a dashboard (`trackio show`), or a Space or server where its variables name one."""

import contextlib
import io
from typing import Any

from bdh.monitor.backends.base import RunFacts
from bdh.monitor.backends.stepwise import StepwiseBackend


class TrackioBackend(StepwiseBackend):
    title = "Trackio"

    def __init__(self, facts: RunFacts):
        import trackio

        self._trackio = trackio
        super().__init__(facts, "trackio.json")
        # Trackio finds a run that goes on by its name, so the name must be of this run alone.
        name = f"{facts.config.run_name or facts.run_dir.resolve().name}-{self.run_id}"
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what `bdh train` says already
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
        return self._trackio.Markdown("    " + text.replace("\n", "\n    "))  # else it would join the lines

    def _histogram(self, values: Any) -> Any:
        return self._trackio.Histogram(values.numpy())

    def _send(self, step: int, values: dict[str, Any]) -> None:
        self._run.log(values, step=step)
        self._sent_to = step

    def _finish(self) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self._trackio.finish()
        # It writes in a thread, and only prints what went wrong there.
        if self._sent_to is not None and self._run.url is None and (kept := self._kept_to()) != self._sent_to:
            raise OSError(
                f"its database has nothing after step {kept}" if kept else "its database has none of the steps"
            )

    def _kept_to(self) -> int | None:
        storage = self._trackio.SQLiteStorage
        return storage.get_max_step_for_run(self._run.project, self._run.name, run_id=self._run.id)
