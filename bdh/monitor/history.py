"""What a folder of runs holds: how far each is, how good, and what sets it apart."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bdh.monitor.backends.jsonl import read_metrics
from bdh.validation import Faults
from bdh.yaml_files import read_yaml

_ACTIVE_SECONDS = 120


@dataclass
class RunSummary:
    folder: Path
    state: str
    """finished; active (it has logged within two minutes); or stopped."""
    step: int
    """Of the last logged row."""
    max_steps: int | None
    train_loss: float | None
    """Last one, nats per token."""
    best_val_loss: float | None
    tokens_per_second: float | None
    seconds_since_logged: float | None
    differences: dict[str, Any] = field(default_factory=dict)
    """Settings whose value is another than in most of the runs; the first run's counts where none is the most."""
    fault: str | None = None
    """Why the run could not be read, if so."""


def summarize_runs(folder: Path) -> list[RunSummary]:
    """The runs in ``folder``, at any depth, in the order of their names; or ``folder`` itself, if it is one.

    Raises:
        FileNotFoundError: there is no such folder, or it holds no run.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    found = sorted(path.parent for path in folder.rglob("config.yaml") if (path.parent / "metrics.jsonl").is_file())
    if not found:
        raise FileNotFoundError(f"{folder} holds no run: no folder in it has a config.yaml and a metrics.jsonl")
    settings: list[dict[str, Any]] = []
    summaries = []
    for run in found:
        try:
            stored = _settings(run / "config.yaml")
            summaries.append(_summary(run, stored))
        except ValueError as error:
            stored = {}
            summaries.append(RunSummary(run, "unreadable", 0, None, None, None, None, None, fault=str(error)))
        settings.append(stored)
    readable = [stored for stored in settings if stored]
    names = sorted({name for stored in readable for name in stored})
    usual = {name: _most_common([stored.get(name) for stored in readable]) for name in names}
    for summary, stored in zip(summaries, settings, strict=True):
        summary.differences = {name: value for name, value in stored.items() if value != usual[name]}
    return summaries


def _summary(run: Path, settings: dict[str, Any]) -> RunSummary:
    rows = read_metrics(run / "metrics.jsonl")
    step = max((row["step"] for row in rows), default=0)
    max_steps = settings.get("train.max_steps")
    age = time.time() - rows[-1]["time"] if rows else None
    if max_steps is not None and step >= max_steps:
        state = "finished"
    else:
        state = "active" if age is not None and age < _ACTIVE_SECONDS else "stopped"
    return RunSummary(
        folder=run,
        state=state,
        step=step,
        max_steps=max_steps,
        train_loss=_last(rows, "train/loss"),
        best_val_loss=min((row["val/loss"] for row in rows if row.get("val/loss") is not None), default=None),
        tokens_per_second=_last(rows, "train/tokens_per_second"),
        seconds_since_logged=age,
    )


def _most_common(values: list[Any]) -> Any:
    return max(values, key=values.count)  # lists among them cannot be hashed; the first of equals


def _last(rows: list[dict[str, Any]], name: str) -> float | None:
    return next((row[name] for row in reversed(rows) if row.get(name) is not None), None)


def _settings(path: Path) -> dict[str, Any]:
    faults = Faults()
    tree = read_yaml(path, faults).tree
    if faults.found:
        raise ValueError("; ".join(faults.found))
    if not isinstance(tree, dict):
        raise ValueError(f"{path.name} holds no settings")
    return _flat(tree)


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
