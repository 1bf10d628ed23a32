"""Where a run is shown and recorded: one class a place, all with the interface of :class:`Backend`."""

from bdh.monitor.backends.base import Backend, RunFacts

__all__ = ["Backend", "RunFacts", "open_backend"]


def open_backend(name: str, facts: RunFacts) -> Backend:
    """The backend of that name, ready to take values. Raises whatever its package or the disk raises."""
    # Each is imported only when it is used: their packages are optional, and slow to import.
    if name == "console":
        from bdh.monitor.backends.console import ConsoleBackend

        return ConsoleBackend(facts)
    if name == "jsonl":
        from bdh.monitor.backends.jsonl import MetricsFile

        return MetricsFile(facts.run_dir / "metrics.jsonl", facts.start_step)
    if name == "tensorboard":
        from bdh.monitor.backends.tensorboard import TensorBoardBackend

        return TensorBoardBackend(facts)
    if name == "wandb":
        from bdh.monitor.backends.wandb import WandbBackend

        return WandbBackend(facts)
    from bdh.monitor.backends.trackio import TrackioBackend

    return TrackioBackend(facts)
