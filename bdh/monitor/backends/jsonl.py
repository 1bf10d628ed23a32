"""``metrics.jsonl``: one JSON object for each logged step."""

import json
import math
import os
import time
from pathlib import Path
from typing import Any

from bdh.monitor.backends.base import Backend


class MetricsFile(Backend):
    """Appends to ``metrics.jsonl``.

    A file that is there already, of the run that goes on, is cut back to ``start_step`` first: later steps will
    be taken again, and a last line that a kill has torn is dropped.
    """

    title = "metrics.jsonl"

    def __init__(self, path: Path, start_step: int = 0):
        cut_back(path, start_step)
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def log(self, step: int, values: dict[str, float]) -> None:
        row: dict[str, Any] = {"step": step, "time": round(time.time(), 3)}
        row |= {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps(row) + "\n")

    def close(self) -> None:
        self._file.close()


def cut_back(path: Path, step: int) -> None:
    """Drops the rows of later steps, and a last line that is torn, from a file of JSON lines, if there is one.

    Raises:
        ValueError: a line before the last is not JSON; the file is left as it is.
    """
    if not path.exists():
        return
    kept = [row for row in read_metrics(path) if row["step"] <= step]
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept), encoding="utf-8")
    os.replace(temporary, path)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a ``metrics.jsonl`` or ``samples.jsonl``. What is not finite is None. A torn last line is left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line before the last is not JSON.
    """
    rows = []
    # Not splitlines, which also splits at characters that texts may hold as they are.
    lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise ValueError(f"{path}, line {number}, is not JSON: {error}") from error
    return rows
