"""Progress reports of long computations."""

from collections.abc import Callable, Mapping

Progress = Callable[[str, int, int], None]
"""Called with the name of the work, the amount done, and the total amount."""


class Stages:
    """Combines the progress of several stages into one, in percent of the expected total time.

    Args:
        work: the name of the work.
        seconds: the expected time of each stage, in order; only the ratios matter.
    """

    def __init__(self, progress: Progress, work: str, seconds: Mapping[str, float]):
        self._progress, self._work, self._seconds = progress, f"{work}, percent", seconds

    def of(self, name: str) -> Callable[[int, int], None]:
        """Returns a progress function for the stage of this name, to call with the amount done and the total amount."""
        seconds, names = self._seconds, list(self._seconds)
        before, whole = sum(seconds[other] for other in names[: names.index(name)]), sum(seconds.values())

        def report(done: int, total: int) -> None:
            self._progress(self._work, int(99 * (before + seconds[name] * done / total) / whole), 100)

        return report

    def end(self) -> None:
        self._progress(self._work, 100, 100)
