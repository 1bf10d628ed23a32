"""Collects every fault of a set of settings, so that a person reads them all at once."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, Self


class Faults:
    """Faults found so far. Each one names its field, its value and what is allowed.

    ``with_prefix`` gives a view on the same list whose fields are named under a section:

        faults = Faults()
        faults.with_prefix("train").require(lr > 0, "learning_rate", lr, "a number above 0")
        faults.raise_if_any()
    """

    def __init__(self, prefix: str = "", found: list[str] | None = None, not_finite: set[str] | None = None):
        self._prefix = prefix
        self.found: list[str] = [] if found is None else found
        self._not_finite: set[str] = set() if not_finite is None else not_finite

    def with_prefix(self, section: str) -> "Faults":
        return Faults(f"{self._prefix}{section}.", self.found, self._not_finite)

    def require(self, is_right: bool, field: str, value: Any, allowed: str) -> None:
        """Records a fault unless ``is_right``: ``allowed`` says what would have been right."""
        if not is_right and self._prefix + field not in self._not_finite:
            self.found.append(f"{self._prefix}{field} is {value!r}: must be {allowed}")

    def require_finite(self, field: str, value: Any) -> None:
        """Records a fault where a number, or one inside of a list or mapping, is infinite or NaN; no other follows then."""
        if not _is_finite(value):
            self.require(
                False, field, value, "a finite number" if isinstance(value, float) else "of finite numbers only"
            )
            self._not_finite.add(self._prefix + field)

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


class Settings:
    """A dataclass of settings, whose numbers are finite. A subclass says in ``collect_faults`` what else must hold."""

    def collect_faults(self, faults: Faults) -> None:
        """Records what is out of range, but for the sections inside, which do so themselves."""

    def check_available(self) -> None:
        """Whether what the settings name is there: files, folders, packages, a port. Asked of all sections inside.

        To be told at once, it needs neither PyTorch nor another large package. What uses them later checks again, by the
        same functions.

        Raises:
            OSError, ValueError, ImportError: as the functions that would use what is missing.
        """
        for field in dataclasses.fields(self):  # type: ignore[arg-type]  # subclasses are dataclasses
            if isinstance(section := getattr(self, field.name), Settings):
                section.check_available()

    def validated(self) -> Self:
        """This object, or a ``ValueError`` that lists all faults, those of its sections among them."""
        faults = Faults()
        collect_faults(self, faults)
        faults.raise_if_any()
        return self


def collect_faults(settings: Any, faults: Faults, *, with_top: bool = True) -> None:
    """Records every fault of a dataclass of settings and of its sections.

    Args:
        with_top: whether ``settings`` is asked itself, besides that its numbers must be finite.
    """
    fields = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    for name, value in fields.items():
        faults.require_finite(name, value)
    if with_top and hasattr(settings, "collect_faults"):
        settings.collect_faults(faults)
    for name, value in fields.items():
        if dataclasses.is_dataclass(value):
            collect_faults(value, faults.with_prefix(name))


def _is_finite(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_is_finite, value)) and all(map(_is_finite, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)
