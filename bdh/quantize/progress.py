"""How far some work is."""

from collections.abc import Callable, Mapping

Progress = Callable[[str, int, int], None]
"""Called with what is done, how much of it is done, and how much there is."""


class Stages:
    """Reports the stages of some work as one, in percent of their time, so that what remains is known from the first on.

    Args:
        work: its name.
        seconds: how long each stage should take, in their order; only the shares matter.
    """

    def __init__(self, progress: Progress, work: str, seconds: Mapping[str, float]):
        self._progress, self._work, self._seconds = progress, f"{work}, percent", seconds

    def of(self, name: str) -> Callable[[int, int], None]:
        """A function of how much of the stage of this name is done, and how much there is."""
        seconds, names = self._seconds, list(self._seconds)
        before, whole = sum(seconds[other] for other in names[: names.index(name)]), sum(seconds.values())

        def report(done: int, total: int) -> None:
            self._progress(self._work, int(99 * (before + seconds[name] * done / total) / whole), 100)

        return report

    def end(self) -> None:
        self._progress(self._work, 100, 100)
