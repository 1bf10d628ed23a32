"""The settings of the section ``data``."""

import math
import re
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Gt, Lt

from bdh.data.files import check_item, item_names
from bdh.validation import Allowed, Faults, PathText, PositiveInt, Settings, collect_faults

BUILTIN = ("pydoc", "stdlib", "shakespeare")

# Settings that apply to all sources of a mix, so that entries cannot have them.
_NOT_IN_ENTRIES = ("mix", "pack", "shuffle_buffer_documents", "val_tokens", "cache_dir")
# Settings that select texts. With a mix, they belong in its entries.
_ONLY_IN_ENTRIES = ("source", "name", "split", "revision", "val_split", "val_source")


@dataclass
class DataConfig(Settings):
    source: PathText | list[PathText] = "pydoc"
    """Text to read: a built-in one (pydoc, stdlib, shakespeare), a hub id, file, glob or folder; several with commas or
    as a list."""
    mix: list[dict[str, Any]] | None = None
    """Several sources by weight, instead of source: [{source: a.txt, weight: 3}, ...]. Entries may set text_column and
    other settings of their source."""
    name: str | None = None
    """Hub: configuration of the dataset."""
    split: str = "train"
    """Hub: split to train on."""
    revision: str | None = None
    """Hub: branch, tag or commit of the dataset."""
    format: Literal["auto", "text", "chat"] = "auto"
    """text, or chat: conversations, in which only the assistant's tokens count. auto: chat if all files are .jsonl and
    the first line has messages."""
    text_column: str | None = None
    """Tables: column that holds the text. None: the only column of strings, or an error if there are several; for chat,
    messages."""
    csv_delimiter: (
        Annotated[str, Allowed(re.compile(r'tab|[^"\r\n]').fullmatch, "one character, no quote or line end; or tab")]
        | None
    ) = None
    """.csv files: the character between fields, or tab. None: detect it among , ; | and tab; .tsv files use tabs."""
    csv_quoting: bool | None = None
    """.csv files: whether double quotes enclose fields. None: detect it; false: quotes are ordinary characters."""
    csv_header: bool | None = None
    """.csv files: whether the first line is a header. None: yes, but stop if it may be a row; false: call the columns
    1, 2, ..."""
    csv_bad_rows: Literal["error", "skip"] = "error"
    """.csv files: what to do with rows that have more or fewer fields than the header: stop with an error, or skip and
    count them."""
    encoding_errors: Literal["strict", "replace"] = "strict"
    """Bytes that are not UTF-8: strict stops with their position, replace replaces them with U+FFFD."""
    val_split: str | None = None
    """Hub: split to validate on, instead of val_fraction."""
    val_source: PathText | list[PathText] | None = None
    """Files to validate on, instead of val_fraction."""
    val_fraction: Annotated[float, Gt(0), Lt(1)] = 0.1
    """Share of the documents to hold out for validation, from the end; of the bytes if there is only one document."""
    pack: Literal["stream", "documents"] = "stream"
    """stream: a block may contain several documents and attends to all of them. documents: tokens attend to their own
    document only; needs <eos>."""
    streaming: bool = False
    """Read, shuffle and tokenize while training: nothing is written to disk, and memory does not grow with the text."""
    shuffle_buffer_documents: PositiveInt = 1000
    """Streaming: documents in the shuffle buffer, which holds at most 64 MiB of text."""
    val_tokens: PositiveInt = 262_144
    """Streaming: tokens to collect for validation; the last document is taken as a whole."""
    cache_dir: PathText | None = None
    """Folder of the token cache. None: $BDH_CACHE, or else ~/.cache/bdh."""

    def collect_faults(self, faults: Faults) -> None:
        if self.mix is not None:
            collect_mix_faults(self, faults)
        for name in ("source", "val_source"):
            value = getattr(self, name)
            items = value if isinstance(value, list) else [value]
            is_right = bool(items) and all(item is None or item.strip() for item in items)
            faults.require(is_right, name, value, "a name, or a list of names, none of them empty")
        faults.require(
            self.val_split is None or self.val_source is None,
            "val_split",
            self.val_split,
            f"left out when val_source is given ({self.val_source!r})",
        )
        faults.require(
            self.val_split is None or self.val_split != self.split,
            "val_split",
            self.val_split,
            "another split than data.split, which is trained on",
        )

    def check_available(self) -> None:
        if self.mix is not None:
            for each in mix_sources(self):
                each.config.check_available()
            return
        for setting, source in (("data.source", self.source), ("data.val_source", self.val_source or [])):
            for item in item_names(source):
                if item not in BUILTIN:
                    check_item(item, setting)


@dataclass
class EntryConfig(DataConfig):
    """The settings of one entry of ``data.mix``."""

    others: list[DataConfig] = field(default_factory=list)
    """The settings of the other entries. This entry is not trained on what they validate on."""


@dataclass(frozen=True)
class MixSource:
    """One source of a mix."""

    label: str
    """A short name, unique within the mix."""
    share: float
    """The fraction of sequences from this source, above 0. The fractions of all sources sum to 1."""
    config: EntryConfig
    """The settings of this source alone."""


def mix_sources(config: DataConfig) -> list[MixSource]:
    """Returns the sources of a valid mix, without those of weight 0."""
    entries = [entry for entry in config.mix or [] if entry.get("weight", 1) > 0]
    total = sum(entry.get("weight", 1) for entry in entries)
    labels = [_label(entry["source"]) for entry in entries]
    sections = [_alone(config, entry) for entry in entries]
    return [
        MixSource(
            label if labels.count(label) == 1 else f"{number}:{label}",
            entry.get("weight", 1) / total,
            EntryConfig(**vars(section), others=[each for each in sections if each is not section]),
        )
        for number, (label, entry, section) in enumerate(zip(labels, entries, sections, strict=True), start=1)
    ]


def collect_mix_faults(config: DataConfig, faults: Faults) -> None:
    """Collects the faults of ``config.mix``, which must not be None, and of its entries."""
    mix = config.mix
    if not mix:
        faults.require(False, "mix", mix, "a list of at least one source, as [{source: a.txt, weight: 2}]")
        return
    defaults = type(config)()
    for name in _ONLY_IN_ENTRIES:
        value = getattr(config, name)
        faults.require(value == getattr(defaults, name), name, value, "left out with data.mix: its entries have it")
    names = [each.name for each in fields(DataConfig) if each.name not in _NOT_IN_ENTRIES]
    allowed = ["source", "weight", *names[1:]]
    for number, entry in enumerate(mix):
        inner = faults.with_prefix(f"mix[{number}]")
        for name in (key for key in entry if key not in allowed):
            inner.require(False, str(name), entry[name], f"left out: an entry has {', '.join(allowed)}")
        if "source" not in entry:
            faults.require(False, f"mix[{number}]", entry, "a source, as {source: a.txt, weight: 2}")
        else:
            collect_faults(_alone(config, {name: entry[name] for name in allowed if name in entry}), inner)
    weights = [entry.get("weight", 1) for entry in mix]
    are_numbers = all(
        isinstance(weight, int | float) and not isinstance(weight, bool) and math.isfinite(weight) and weight >= 0
        for weight in weights
    )
    faults.require(are_numbers and sum(weights) > 0, "mix", weights, "finite, non-negative weights with a sum above 0")


def _alone(config: DataConfig, entry: dict[str, Any]) -> DataConfig:
    return replace(config, mix=None, **{name: value for name, value in entry.items() if name != "weight"})


def _label(source: str | list[str]) -> str:
    """Returns the last component of a path, or of each of several paths."""
    items = source.split(",") if isinstance(source, str) else source
    return ",".join(Path(item.strip()).name or item.strip() for item in items)
