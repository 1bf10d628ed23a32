"""Pictures of what was recorded."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bdh.monitor.backends.jsonl import read_metrics

LOSS_KEYS = ("train/loss", "val/loss")


def plot_metrics(run_dirs: list[Path], output: Path, keys: Sequence[str] = LOSS_KEYS) -> None:
    """Draws metrics of runs over their steps into a PNG file: all runs over each other, a colour each.

    Losses share one panel; every other metric has its own.

    Args:
        keys: names in ``metrics.jsonl``. A run that has not logged one of several is drawn without it.

    Raises:
        FileNotFoundError: a folder has no ``metrics.jsonl``.
        ValueError: a run has logged none of the metrics, or no run has logged one of them.
        ImportError: matplotlib is missing; the message says how to install it.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError('plots need matplotlib: pip install "bdh[report]"')
    curves = {run_dir: _curves(run_dir, keys) for run_dir in run_dirs}
    for key in keys:
        if key not in LOSS_KEYS and not any(of_run[key] for of_run in curves.values()):
            raise ValueError(f"no run has logged {key}{_known(run_dirs)}")
    losses = [key for key in keys if key in LOSS_KEYS]
    panels = ([losses] if losses else []) + [[key] for key in keys if key not in LOSS_KEYS]
    labels = _labels(run_dirs)
    # After all that can be wrong: it is slow to import.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1 + 4 * len(panels)), layout="constrained")
    for axes, panel in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
        for number, (run_dir, of_run) in enumerate(curves.items()):
            for key in panel:
                _draw(axes, of_run[key], key, f"C{number % 10}", labels[run_dir])
        axes.set(xlabel="step", ylabel="loss, nats per token" if panel == losses else panel[0])
        axes.grid(alpha=0.3)
        axes.legend()
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=120, format="png")


def _curves(run_dir: Path, keys: Sequence[str]) -> dict[str, list[tuple[int, float]]]:
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{run_dir} holds no run: it has no metrics.jsonl")
    rows = read_metrics(path)
    curves = {key: [(row["step"], row[key]) for row in rows if row.get(key) is not None] for key in keys}
    if not any(curves.values()):
        raise ValueError(f"{path} has no {' or '.join(keys)}: {_reason(rows)}")
    return curves


def _reason(rows: list[dict[str, Any]]) -> str:
    names = {name for row in rows for name in row} - {"step", "time"}
    return f"it has {', '.join(sorted(names))}" if names else "the run has not logged a step yet"


def _known(run_dirs: list[Path]) -> str:
    names = {name for run_dir in run_dirs for row in read_metrics(run_dir / "metrics.jsonl") for name in row}
    return ": logged are " + ", ".join(sorted(names - {"step", "time"}))


def _draw(axes: Any, curve: list[tuple[int, float]], key: str, color: str, label: str) -> None:
    if not curve:
        return
    if key == "train/loss":
        axes.plot(*zip(*curve, strict=True), color=color, alpha=0.4, label=f"{label}, training")
    else:
        what = ", validation" if key == "val/loss" else ""
        marker = "o" if len(curve) < 50 else None
        axes.plot(*zip(*curve, strict=True), color=color, marker=marker, markersize=4, label=label + what)


def _labels(run_dirs: list[Path]) -> dict[Path, str]:
    """The folders' names; their whole paths where two have the same name."""
    names = [run_dir.name for run_dir in run_dirs]
    return {run_dir: run_dir.name if names.count(run_dir.name) == 1 else str(run_dir) for run_dir in run_dirs}
