"""What W&B and Trackio have in common: a run with an id, whose steps can be added but not taken back."""

import json
import os
import uuid
from abc import abstractmethod
from pathlib import Path
from typing import Any

from bdh.monitor.backends.base import Backend, RunFacts


class StepwiseBackend(Backend):
    """Sends each step once, as a whole, in order, over all starts of a run.

    A file in the run's folder keeps the id, so that a later start goes on with the same run, and the last step
    that was sent. Steps up to that one, which a start from an earlier checkpoint takes again, are not sent a
    second time. A step is sent when the next one comes, or at the end.
    """

    def __init__(self, facts: RunFacts, memory_file: str):
        self._memory_file = facts.run_dir / memory_file
        memory = _read(self._memory_file)
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

    def log(self, step: int, values: dict[str, float]) -> None:
        self._add(step, values)

    def log_text(self, step: int, name: str, text: str) -> None:
        self._add(step, {name: self._text(text)})

    def log_histogram(self, step: int, name: str, values: Any) -> None:
        self._add(step, {name: self._histogram(values)})

    def close(self) -> None:
        try:
            self._send_pending()
        finally:
            self._finish()

    @abstractmethod
    def _text(self, text: str) -> Any: ...

    @abstractmethod
    def _histogram(self, values: Any) -> Any: ...

    @abstractmethod
    def _send(self, step: int, values: dict[str, Any]) -> None: ...

    @abstractmethod
    def _finish(self) -> None: ...

    def _add(self, step: int, values: dict[str, Any]) -> None:
        if step <= self._last_step:
            return
        if step != self._pending_step:
            self._send_pending()
            self._pending_step = step
        self._pending |= values

    def _send_pending(self) -> None:
        if self._pending_step is None:
            return
        step, values = self._pending_step, self._pending
        self._pending_step, self._pending = None, {}
        self._send(step, values)
        self._last_step = step
        self._remember()

    def _remember(self) -> None:
        temporary = self._memory_file.with_name(f".{self._memory_file.name}.tmp")
        temporary.write_text(json.dumps({"id": self.run_id, "last_step": self._last_step}), encoding="utf-8")
        os.replace(temporary, self._memory_file)


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(
            f"{path} does not hold the id of the run: {error}; without the file a new one is made"
        ) from error
