"""Settings of the section ``data``."""

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from bdh.data.builtin import BUILTIN
from bdh.data.files import check_item, item_names
from bdh.data.mix_config import collect_mix_faults, mix_sources
from bdh.validation import Faults, PathText, Settings


@dataclass
class DataConfig(Settings):
    source: PathText | list[PathText] = "pydoc"
    """Built-in (pydoc, stdlib, shakespeare), hub id, file, glob or folder; several with commas or as a list."""
    mix: list[dict[str, Any]] | None = None
    """Several sources instead of one: [{source: a.txt, weight: 3}, ...]; entries may set text_column and the like."""
    name: str | None = None
    """Hub: configuration of the data set."""
    split: str = "train"
    """Hub: split to train on."""
    revision: str | None = None
    """Hub: branch, tag or commit of the data set."""
    format: Literal["auto", "text", "chat"] = "auto"
    """chat: conversations, of which the assistant's part is learned. auto: chat where .jsonl files begin with messages."""
    text_column: str | None = None
    """Column that holds the text, in tables. None takes the only column of strings, if there is only one; chat: messages."""
    csv_delimiter: str | None = None
    """.csv files: the character between fields, or tab. None finds it out among , ; | and tab; a .tsv file has tabs."""
    csv_quoting: bool | None = None
    """.csv files: whether double quotes enclose fields. None finds it out; false: they are characters like any other."""
    csv_header: bool | None = None
    """.csv files: whether the first line names the columns. None stops if it may not; false calls them 1, 2, ..."""
    csv_bad_rows: Literal["error", "skip"] = "error"
    """.csv files: error stops at a row with more or less fields than the header, skip leaves it out and counts it."""
    encoding_errors: Literal["strict", "replace"] = "strict"
    """Bytes that are not UTF-8: strict stops and says where, replace puts U+FFFD in their place."""
    val_split: str | None = None
    """Hub: split to validate on, instead of val_fraction."""
    val_source: PathText | list[PathText] | None = None
    """Files to validate on, instead of val_fraction."""
    val_fraction: float = 0.1
    """Share of the documents that is held out, from the end; of the text's bytes where there is one document."""
    pack: Literal["stream", "documents"] = "stream"
    """stream: a block is read through, whatever it holds. documents: none sees across the end of one, which takes <eos>."""
    streaming: bool = False
    """Read, shuffle and tokenize while training: nothing is written to disk, and memory stays flat."""
    shuffle_buffer_documents: int = 1000
    """Streaming: documents that are shuffled among each other; the buffer also ends at 64 MiB of text."""
    val_tokens: int = 262_144
    """Streaming: tokens to collect for validation; the document that reaches them is taken whole."""
    cache_dir: PathText | None = None
    """Folder of the token cache. None takes $BDH_CACHE, or else ~/.cache/bdh."""

    def beside(self, others: "list[DataConfig]") -> "EntryConfig":
        """The section as that of an entry of a mix."""
        return EntryConfig(**{each.name: getattr(self, each.name) for each in fields(self)}, others=others)

    def collect_faults(self, faults: Faults) -> None:
        if self.mix is not None:
            collect_mix_faults(self, faults)
        for name in ("source", "val_source"):
            value = getattr(self, name)
            items = value if isinstance(value, list) else [value]
            is_right = bool(items) and all(item is None or item.strip() for item in items)
            faults.require(is_right, name, value, "a name, or a list of names, none of them empty")
        faults.require_one_of("format", self.format, ("auto", "text", "chat"))
        is_one = self.csv_delimiter is None or (len(self.csv_delimiter) == 1 and self.csv_delimiter not in '"\r\n')
        allowed = "one character, no quote or line end; or tab"
        faults.require(is_one or self.csv_delimiter == "tab", "csv_delimiter", self.csv_delimiter, allowed)
        faults.require_one_of("csv_bad_rows", self.csv_bad_rows, ("error", "skip"))
        faults.require_one_of("encoding_errors", self.encoding_errors, ("strict", "replace"))
        faults.require_one_of("pack", self.pack, ("stream", "documents"))
        faults.require(0 < self.val_fraction < 1, "val_fraction", self.val_fraction, "above 0 and below 1")
        for name in ("shuffle_buffer_documents", "val_tokens"):
            faults.require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
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
            "another split than the one that is trained on",
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
    """The section as it holds for one entry of ``data.mix``."""

    others: list[DataConfig] = field(default_factory=list)
    """The sections of the other entries: what they validate on is not trained on in this one either."""
