"""bdh runs: lists the runs of a folder."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bdh.cli.settings import parse_settings
from bdh.validation import PathText, Settings

if TYPE_CHECKING:
    from bdh.monitor.history import RunSummary


@dataclass
class RunsSettings(Settings):
    folder: PathText = "runs"
    """Folder that holds runs, at any depth; or a run."""
    json: bool = False
    """Print one JSON object a run instead of a table."""


def run(argv: list[str]) -> int:
    settings = parse_settings(
        RunsSettings,
        argv,
        prog="bdh runs",
        description="List runs: how far each is, its losses and speed, and the settings that differ among them.",
        positionals=("folder",),
    )
    from bdh.monitor.history import summarize_runs

    folder = Path(settings.folder)
    summaries = summarize_runs(folder)
    if settings.json:
        for summary in summaries:
            print(json.dumps({**asdict(summary), "folder": str(summary.folder)}))
        return 0
    print("\n".join(_lines(folder, summaries)))
    return 0


def _lines(folder: Path, summaries: "list[RunSummary]") -> list[str]:
    """A table, with a line under a run for the settings that set it apart."""
    rows = [("run", "state", "step", "loss", "best val", "tokens/s", "logged")]
    for each in summaries:
        rows.append(
            (
                each.folder.relative_to(folder).as_posix() if each.folder != folder else each.folder.name,
                each.state,
                f"{each.step:,}" + (f"/{each.max_steps:,}" if each.max_steps is not None else ""),
                _number(each.train_loss, ".4f"),
                _number(each.best_val_loss, ".4f"),
                _number(each.tokens_per_second, ",.0f"),
                _ago(each.seconds_since_logged),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for number, row in enumerate(rows):
        cells = [text.ljust(width) for text, width in zip(row[:2], widths[:2], strict=True)]
        cells += [text.rjust(width) for text, width in zip(row[2:], widths[2:], strict=True)]
        lines.append("  ".join(cells))
        if number == 0:
            continue
        summary = summaries[number - 1]
        about = summary.fault or ", ".join(f"{name}={value}" for name, value in summary.differences.items())
        if about:
            lines.append(f"    {about}")
    return lines


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _ago(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"
