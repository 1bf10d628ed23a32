"""What ``data.mix`` says: several sources, each with its weight and with settings of its own."""

import math
import types
import typing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bdh.validation import Faults

if TYPE_CHECKING:
    from bdh.data.config import DataConfig, EntryConfig

# What an entry may set for its source. The rest of the section holds for all of them.
ENTRY_FIELDS = (
    "name",
    "split",
    "revision",
    "format",
    "text_column",
    "csv_delimiter",
    "csv_quoting",
    "csv_header",
    "csv_bad_rows",
    "encoding_errors",
    "val_split",
    "val_source",
    "val_fraction",
    "streaming",
)
# What says which texts are read: with a mix it has its place in the entries.
_ONLY_IN_ENTRIES = ("source", "name", "split", "revision", "val_split", "val_source")


@dataclass(frozen=True)
class MixSource:
    """One source of a mix."""

    label: str
    """A short name, another for each source of the mix."""
    share: float
    """Of the rows, above 0; those of all sources sum to 1."""
    config: "EntryConfig"
    """The section as it holds for this source alone."""


def mix_sources(config: "DataConfig") -> list[MixSource]:
    """The sources of a mix without faults. Those of weight 0 are left out."""
    entries = [entry for entry in config.mix or [] if entry.get("weight", 1) > 0]
    total = sum(entry.get("weight", 1) for entry in entries)
    labels = [_label(entry["source"]) for entry in entries]
    sections = [_alone(config, entry) for entry in entries]
    return [
        MixSource(
            label if labels.count(label) == 1 else f"{number}:{label}",
            entry.get("weight", 1) / total,
            sections[number - 1].beside([*sections[: number - 1], *sections[number:]]),
        )
        for number, (label, entry) in enumerate(zip(labels, entries, strict=True), start=1)
    ]


def collect_mix_faults(config: "DataConfig", faults: Faults) -> None:
    """Records what is wrong with ``config.mix``, which is not None, and with each of its entries."""
    mix = config.mix
    if not mix:
        faults.require(False, "mix", mix, "a list of at least one source, as [{source: a.txt, weight: 2}]")
        return
    defaults = type(config)()
    for name in _ONLY_IN_ENTRIES:
        value = getattr(config, name)
        faults.require(value == getattr(defaults, name), name, value, "left out with data.mix: its entries have it")
    weights = []
    for number, entry in enumerate(mix):
        inner = faults.with_prefix(f"mix[{number}]")
        weights.append(entry.get("weight", 1))
        unknown = [key for key in entry if key not in ("source", "weight", *ENTRY_FIELDS)]
        if unknown:
            allowed = ", ".join(("source", "weight", *ENTRY_FIELDS))
            inner.require(False, str(unknown[0]), entry[unknown[0]], f"left out: an entry has {allowed}")
            continue
        if "source" not in entry:
            faults.require(False, f"mix[{number}]", entry, "a source, as {source: a.txt, weight: 2}")
            continue
        hints = typing.get_type_hints(type(config))
        wrong = [key for key in entry if key != "weight" and not _is_a(entry[key], hints[key])]
        for key in wrong:
            inner.require(False, key, entry[key], f"a value that data.{key} takes")
        if not wrong:
            _alone(config, entry).collect_faults(inner)
    are_numbers = all(
        isinstance(weight, int | float) and not isinstance(weight, bool) and math.isfinite(weight) and weight >= 0
        for weight in weights
    )
    faults.require(
        are_numbers and sum(weights) > 0, "mix", weights, "weights that are finite, not negative, and sum to above 0"
    )


def _alone(config: "DataConfig", entry: dict[str, Any]) -> "DataConfig":
    return replace(config, mix=None, **{name: value for name, value in entry.items() if name != "weight"})


def _label(source: str | list[str]) -> str:
    """The last part of a path; of several, all of theirs."""
    items = source.split(",") if isinstance(source, str) else source
    return ",".join(Path(item.strip()).name or item.strip() for item in items)


def _is_a(value: Any, hint: Any) -> bool:
    """Whether a value, as YAML gives it, is of an annotated type of the section."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_is_a(value, argument) for argument in arguments)
    if origin is Literal:
        return value in arguments
    if origin is list:
        return isinstance(value, list) and all(_is_a(item, arguments[0]) for item in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, hint)
