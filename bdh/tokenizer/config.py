"""Settings of the section ``tokenizer``."""

from dataclasses import dataclass

from bdh.validation import Faults

BYTE = "byte"


@dataclass
class TokenizerConfig:
    path: str = BYTE
    """byte (a token is a byte), a folder that `bdh tokenizer train` or an export wrote, a tokenizer.json, or a hub id."""
    special_tokens: bool = False
    """byte only: add <pad> <bos> <eos> <unk> behind the 256 bytes. With them, <eos> ends every document."""

    def collect_faults(self, faults: Faults) -> None:
        faults.require(bool(self.path.strip()), "path", self.path, "byte, a folder or a hub id")
        faults.require(
            not self.special_tokens or self.path == BYTE,
            "special_tokens",
            self.special_tokens,
            f"false with the tokenizer {self.path!r}, which has its own: only byte takes it",
        )
