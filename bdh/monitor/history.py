"""Reads what runs have recorded: the rows of ``metrics.jsonl``, plots of them, and a summary of each run in a folder."""

import importlib.util
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from bdh.extras import install_command
from bdh.storage import atomic_file, write_text
from bdh.text_files import read_yaml
from bdh.validation import Faults

LOSS_KEYS = ("train/loss", "val/loss")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of a ``metrics.jsonl`` or ``samples.jsonl``. Values that were not finite are None.

    An incomplete last line is ignored.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: a line before the last is not JSON.
    """
    rows = []
    # Not splitlines(), which also splits at characters that texts may contain unescaped.
    lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise ValueError(f"{path}, line {number}, is not JSON: {error}") from error
    return rows


def cut_back(path: Path, step: int) -> None:
    """Removes the rows after ``step``, and an incomplete last line, from a file of JSON lines, if it exists.

    Raises:
        ValueError: a line before the last is not JSON. The file is not changed.
    """
    if not path.exists():
        return
    kept = [row for row in read_metrics(path) if row["step"] <= step]
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))


def check_matplotlib() -> None:
    """Raises ``ImportError`` if matplotlib is missing. The message says how to install it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError(f"plots need matplotlib: {install_command('report')}")


def plot_metrics(run_dirs: list[Path], output: Path, keys: Sequence[str] = LOSS_KEYS) -> None:
    """Plots metrics of runs over their steps into a PNG file, with one colour for each run.

    Losses share one panel. Every other metric has its own.

    Args:
        keys: names in ``metrics.jsonl``. A run that has logged only some of them is plotted without the others.

    Raises:
        FileNotFoundError: a folder has no ``metrics.jsonl``.
        ValueError: a run has logged none of the metrics, or no run has logged one of those that are not losses.
        ImportError: matplotlib is missing; the message says how to install it.
    """
    check_matplotlib()
    rows = {run_dir: _rows_of_run(run_dir, keys) for run_dir in run_dirs}
    losses = [key for key in keys if key in LOSS_KEYS]
    others = [[key] for key in keys if key not in LOSS_KEYS]
    for (key,) in others:
        if not any(_curve(of_run, key) for of_run in rows.values()):
            raise ValueError(f"no run has logged {key}: logged are {_logged(chain(*rows.values()))}")
    panels = [losses, *others] if losses else others
    names = [run_dir.name for run_dir in run_dirs]
    from matplotlib.figure import Figure  # slow to import, so after all checks

    figure = Figure(figsize=(8, 1 + 4 * len(panels)), layout="constrained")
    for axes, panel in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
        for number, (run_dir, of_run) in enumerate(rows.items()):
            label = run_dir.name if names.count(run_dir.name) == 1 else str(run_dir)
            for key in panel:
                if curve := _curve(of_run, key):
                    words = {"train/loss": ", training", "val/loss": ", validation"}.get(key, "")
                    style = {"alpha": 0.4} if key == "train/loss" else {"marker": "o" if len(curve) < 50 else None}
                    line = {"color": f"C{number % 10}", "label": label + words, "markersize": 4, **style}
                    axes.plot(*zip(*curve, strict=True), **line)
        axes.set(xlabel="step", ylabel="loss, nats per token" if panel == losses else panel[0])
        axes.grid(alpha=0.3)
        axes.legend()
    with atomic_file(output) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def _rows_of_run(run_dir: Path, keys: Sequence[str]) -> list[dict[str, Any]]:
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{run_dir} holds no run: it has no metrics.jsonl")
    rows = read_metrics(path)
    if not any(_curve(rows, key) for key in keys):
        logged = _logged(rows)
        reason = f"it has {logged}" if logged else "the run has not logged a step yet"
        raise ValueError(f"{path} has no {' or '.join(keys)}: {reason}")
    return rows


def _curve(rows: list[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    return [(row["step"], row[key]) for row in rows if row.get(key) is not None]


def _logged(rows: Iterable[dict[str, Any]]) -> str:
    return ", ".join(sorted({name for row in rows for name in row} - {"step", "time"}))


@dataclass
class RunSummary:
    """A summary of a run, read from its folder."""

    folder: Path
    state: str
    """active, if a process holds the run's lock; finished; "finished, not saved", if it has neither a checkpoint of its last
    step nor a model; stopped; or unreadable."""
    step: int
    """The largest logged step."""
    max_steps: int | None
    train_loss: float | None
    """The last training loss, in nats per token."""
    best_val_loss: float | None
    tokens_per_second: float | None
    seconds_since_logged: float | None
    differences: dict[str, Any] = field(default_factory=dict)
    """Settings whose value differs from the most common one. In a tie, the value of the earlier run counts."""
    fault: str | None = None
    """Why the run cannot be read; None if it can."""


def summarize_runs(folder: Path) -> list[RunSummary]:
    """Summarizes the runs in ``folder`` at any depth, in the order of their names. ``folder`` may be a run itself.

    Raises:
        FileNotFoundError: the folder does not exist or contains no run.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    found = sorted(path.parent for path in folder.rglob("config.yaml") if (path.parent / "metrics.jsonl").is_file())
    if not found:
        raise FileNotFoundError(f"{folder} holds no run: no folder in it has a config.yaml and a metrics.jsonl")
    summaries: dict[Path, RunSummary] = {}
    settings: dict[Path, dict[str, Any]] = {}
    for run in found:
        try:
            settings[run] = _settings(run / "config.yaml")
            summaries[run] = _summary(run, settings[run])
        except (OSError, ValueError) as error:
            settings.pop(run, None)
            summaries[run] = RunSummary(run, "unreadable", 0, None, None, None, None, None, fault=str(error))
    readable = [stored for stored in settings.values() if stored]
    names = sorted({name for stored in readable for name in stored})
    usual = {name: _most_common([stored.get(name) for stored in readable]) for name in names}
    for run, stored in settings.items():
        summaries[run].differences = {name: value for name, value in stored.items() if value != usual[name]}
    return list(summaries.values())


def _summary(run: Path, settings: dict[str, Any]) -> RunSummary:
    from bdh.locks import Lock  # which takes a while to import

    is_active = Lock(run / "lock", str(run)).is_held()  # before the rows: a run that ends now is not called stopped
    rows = read_metrics(run / "metrics.jsonl")
    step, max_steps = max((row["step"] for row in rows), default=0), settings.get("train.max_steps")
    age = time.time() - rows[-1]["time"] if rows else None
    is_finished = max_steps is not None and step >= max_steps
    is_saved = any(run.joinpath(name).is_dir() for name in (f"checkpoints/step-{step:07d}", "model"))
    ended = "stopped" if not is_finished else "finished" if is_saved else "finished, not saved"
    return RunSummary(
        folder=run,
        state="active" if is_active else ended,
        step=step,
        max_steps=max_steps,
        train_loss=_last(rows, "train/loss"),
        best_val_loss=min((row["val/loss"] for row in rows if row.get("val/loss") is not None), default=None),
        tokens_per_second=_last(rows, "train/tokens_per_second"),
        seconds_since_logged=age,
    )


def _most_common(values: list[Any]) -> Any:
    return max(values, key=values.count)  # counted without hashing, since values may be lists; the first in a tie


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
