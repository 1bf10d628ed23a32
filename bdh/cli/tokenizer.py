"""bdh tokenizer: trains a tokenizer."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from bdh.cli.settings import parse_settings
from bdh.data.config import DataConfig
from bdh.storage import check_free
from bdh.validation import Faults, PathText, Settings


@dataclass(kw_only=True)
class TokenizerTrainSettings(Settings):
    data: DataConfig = field(default_factory=DataConfig)
    kind: Literal["bpe", "wordpiece", "unigram"] = "bpe"
    """bpe and unigram give every text back exactly; wordpiece loses white space and rare characters."""
    vocab_size: int = 8192
    """Entries of the vocabulary, special tokens included."""
    out: PathText
    """Folder to write."""

    def collect_faults(self, faults: Faults) -> None:
        faults.require(self.vocab_size >= 1, "vocab_size", self.vocab_size, "at least 1")

    def check_available(self) -> None:
        super().check_available()
        check_free(Path(self.out), "choose another --out")


def run(argv: list[str]) -> int:
    if not argv or argv[0] != "train":
        wrong = f"{argv[0]!r} is unknown" if argv and argv[0] not in ("-h", "--help") else ""
        usage = "bdh tokenizer train --data.source SOURCE --kind bpe --vocab_size 8192 --out DIR"
        if wrong or not argv:
            raise ValueError(f"{wrong or 'no command is given'}: use {usage}")
        print(f"usage: {usage}\n\n`bdh tokenizer train --help` lists the settings.")
        return 0
    settings = parse_settings(
        TokenizerTrainSettings,
        argv[1:],
        prog="bdh tokenizer train",
        description="Train a tokenizer on any data source, and measure it on the held-out part.",
    )
    from rich.console import Console

    from bdh.cli.output import stage_progress
    from bdh.data import training_texts, validation_texts
    from bdh.storage import atomic_dir
    from bdh.tokenizer import compression_ratio, train_tokenizer

    out = Path(settings.out)
    console = Console(stderr=True, highlight=False)
    with stage_progress(console, "bytes") as progress:
        tokenizer = train_tokenizer(
            training_texts(settings.data), settings.kind, settings.vocab_size, progress=progress
        )
    held_out = compression_ratio(tokenizer, validation_texts(settings.data))
    with atomic_dir(out) as folder:
        tokenizer.save_pretrained(folder)
    print(f"{out}: {settings.kind}, {len(tokenizer):,} entries, {held_out:.3f} bytes per token on held-out text")
    return 0
