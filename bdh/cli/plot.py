"""bdh plot: draws the loss of one or more runs."""

from dataclasses import dataclass, field
from pathlib import Path

from bdh.cli.settings import parse_settings


@dataclass
class PlotSettings:
    runs: list[str] = field(default_factory=list)
    """Folders of the runs, drawn over each other."""
    output: str | None = None
    """PNG file to write; by default loss.png in the folder of the first run."""


def run(argv: list[str]) -> int:
    settings = parse_settings(
        PlotSettings,
        argv,
        prog="bdh plot",
        description="Draw the training and validation loss of runs over their steps.",
        positionals=("runs",),
    )
    from bdh.monitor.plots import plot_loss

    if not settings.runs:
        raise ValueError("no run is given: name the folder of at least one run")
    output = Path(settings.output or Path(settings.runs[0]) / "loss.png")
    plot_loss([Path(run) for run in settings.runs], output)
    print(f"The loss curve is in {output}")
    return 0
