"""Settings of the section ``tokenizer``."""

from dataclasses import dataclass

from bdh.path_text import PathText
from bdh.validation import Faults, Settings

BYTE = "byte"
DEFAULT_CHAT_TEMPLATE = "default"


@dataclass
class TokenizerConfig(Settings):
    path: PathText = BYTE
    """byte (a token is a byte), a folder that `bdh tokenizer train` or an export wrote, a tokenizer.json, or a hub id."""
    special_tokens: bool = False
    """byte only: add <pad> <bos> <eos> <unk> behind the 256 bytes. With them, <eos> ends every document."""

    chat_template: PathText | None = None
    """A .jinja file, or default. None keeps the tokenizer's own; chat data without one get the default, with its tokens."""

    def collect_faults(self, faults: Faults) -> None:
        faults.require(bool(self.path.strip()), "path", self.path, "byte, a folder or a hub id")
        template = self.chat_template
        is_right = template is None or bool(template.strip())
        faults.require(is_right, "chat_template", template, "default, the name of a file, or null")
        faults.require(
            not self.special_tokens or self.path == BYTE,
            "special_tokens",
            self.special_tokens,
            f"false with the tokenizer {self.path!r}, which has its own: only byte takes it",
        )
