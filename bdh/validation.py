"""Collects every fault of a set of settings, so that a person reads them all at once."""

from collections.abc import Iterable
from typing import Any


class Faults:
    """Faults found so far. Each one names its field, its value and what is allowed.

    ``with_prefix`` gives a view on the same list whose fields are named under a section:

        faults = Faults()
        faults.with_prefix("train").require(lr > 0, "learning_rate", lr, "a number above 0")
        faults.raise_if_any()
    """

    def __init__(self, prefix: str = "", found: list[str] | None = None):
        self._prefix = prefix
        self.found: list[str] = [] if found is None else found

    def with_prefix(self, section: str) -> "Faults":
        return Faults(f"{self._prefix}{section}.", self.found)

    def require(self, is_right: bool, field: str, value: Any, allowed: str) -> None:
        """Records a fault unless ``is_right``: ``allowed`` says what would have been right."""
        if not is_right:
            self.found.append(f"{self._prefix}{field} is {value!r}: must be {allowed}")

    def require_one_of(self, field: str, value: Any, allowed: Iterable[Any]) -> None:
        options = list(allowed)
        self.require(value in options, field, value, "one of " + ", ".join(map(str, options)))

    def add(self, message: str) -> None:
        self.found.append(message)

    def raise_if_any(self) -> None:
        """Raises one ``ValueError`` that lists all faults, one a line."""
        if not self.found:
            return
        if len(self.found) == 1:
            raise ValueError(self.found[0])
        raise ValueError(f"{len(self.found)} settings are wrong:\n" + "\n".join(f"  {f}" for f in self.found))
