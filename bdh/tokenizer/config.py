"""Settings of the section ``tokenizer``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from bdh.storage import recover_dir
from bdh.text_files import read_text
from bdh.validation import Allowed, Faults, PathText, Settings

BYTE = "byte"
TOKENIZER_FILE = "tokenizer.json"
DEFAULT_CHAT_TEMPLATE = "default"


@dataclass
class TokenizerConfig(Settings):
    path: Annotated[PathText, Allowed(str.strip, "byte, a folder or a hub id")] = BYTE
    """byte (a token is a byte), a folder that `bdh tokenizer train` or an export wrote, a tokenizer.json, or a hub id."""
    special_tokens: bool = False
    """byte only: add <pad> <bos> <eos> <unk> after the 256 bytes. With them, <eos> ends every document."""

    chat_template: Annotated[PathText, Allowed(str.strip, "default, the name of a file")] | None = None
    """A .jinja file, or default. None keeps the tokenizer's own; chat data without one get the default, with its tokens."""

    def collect_faults(self, faults: Faults) -> None:
        faults.require(
            not self.special_tokens or self.path == BYTE,
            "special_tokens",
            self.special_tokens,
            f"false with the tokenizer {self.path!r}, which has its own: only byte takes it",
        )

    def check_available(self) -> None:
        if self.path != BYTE:
            check_tokenizer_there(self.path)
        if self.chat_template not in (None, DEFAULT_CHAT_TEMPLATE):
            read_template(Path(str(self.chat_template)))


def check_tokenizer_there(name: str) -> None:
    """Whether a name may be that of a tokenizer: of a file, of a folder that holds one, or of one on the hub.

    Raises:
        FileNotFoundError: it is none of these.
    """
    folder = Path(name)
    recover_dir(folder)
    if folder.is_dir() and not (folder / TOKENIZER_FILE).is_file():
        raise FileNotFoundError(
            f"tokenizer.path is {name!r}: this folder holds no {TOKENIZER_FILE}, so it is neither a tokenizer nor an "
            "exported model"
        )
    if not folder.exists() and _is_no_hub_id(name):
        raise FileNotFoundError(f"tokenizer.path is {name!r}: there is no such folder")


def read_template(path: Path) -> str:
    """The text of ``tokenizer.chat_template``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no UTF-8.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"tokenizer.chat_template is {str(path)!r}: there is no such file; {DEFAULT_CHAT_TEMPLATE!r} takes the one "
            "that comes with bdh"
        )
    return read_text(path)


def _is_no_hub_id(name: str) -> bool:
    """A hub id is NAME or ORGANISATION/NAME: anything else can only have been meant as a path."""
    return name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1 or name.endswith("/")
