"""Pictures of what was recorded."""

from pathlib import Path

from bdh.monitor.backends.jsonl import read_metrics


def plot_loss(run_dirs: list[Path], output: Path) -> None:
    """Draws the training and validation loss of runs over their steps into a PNG file.

    Raises:
        FileNotFoundError: a folder has no ``metrics.jsonl``.
        ValueError: a run has logged no loss yet.
        ImportError: matplotlib is missing; the message says how to install it.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('plots need matplotlib: pip install "bdh[report]"') from error

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for number, run_dir in enumerate(run_dirs):
        path = run_dir / "metrics.jsonl"
        if not path.is_file():
            raise FileNotFoundError(f"{run_dir} holds no run: it has no metrics.jsonl")
        rows = read_metrics(path)
        curves = {
            key: [(r["step"], r[key]) for r in rows if r.get(key) is not None] for key in ("train/loss", "val/loss")
        }
        if not curves["train/loss"]:
            raise ValueError(f"{path} has no train/loss: the run has not logged a step yet")
        color = f"C{number % 10}"
        axes.plot(*zip(*curves["train/loss"], strict=True), color=color, alpha=0.4, label=f"{run_dir.name}, training")
        if curves["val/loss"]:
            axes.plot(
                *zip(*curves["val/loss"], strict=True), color=color, marker="o", label=f"{run_dir.name}, validation"
            )
    axes.set(xlabel="step", ylabel="loss, nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=120)
