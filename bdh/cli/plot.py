"""bdh plot: draws what one or more runs have logged."""

from dataclasses import dataclass, field
from pathlib import Path

from bdh.cli.settings import parse_settings
from bdh.validation import PathText, Settings


@dataclass
class PlotSettings(Settings):
    runs: list[PathText] = field(default_factory=list)
    """Folders of the runs, drawn over each other."""
    keys: list[str] = field(default_factory=lambda: ["train/loss", "val/loss"])
    """What to draw: names of metrics.jsonl, with commas or as a list. What is not a loss has a panel of its own."""
    output: PathText | None = None
    """PNG file to write; by default loss.png, or metrics.png with keys, in the folder of the first run."""


def run(argv: list[str]) -> int:
    settings = parse_settings(
        PlotSettings,
        argv,
        prog="bdh plot",
        description="Draw the training and validation loss of runs over their steps, or other metrics.",
        positionals=("runs",),
    )
    from bdh.monitor.history import LOSS_KEYS, plot_metrics

    if not settings.runs:
        raise ValueError("no run is given: name the folder of at least one run")
    keys = list(dict.fromkeys(key.strip() for item in settings.keys for key in item.split(",") if key.strip()))
    if not keys:
        raise ValueError("keys is empty: name at least one metric")
    name = "loss.png" if set(keys) <= set(LOSS_KEYS) else "metrics.png"
    output = Path(settings.output or Path(settings.runs[0]) / name)
    plot_metrics([Path(run) for run in settings.runs], output, keys)
    print(f"The picture is in {output}")
    return 0
