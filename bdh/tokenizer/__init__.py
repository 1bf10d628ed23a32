"""Tokenizers: byte-level, training of BPE / WordPiece / Unigram, loading, fast exact encoding.

All of them are ``transformers.PreTrainedTokenizerFast``, so ``AutoTokenizer`` loads a saved one without this package.
Importing this package is cheap: each name imports its module when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from bdh.tokenizer.config import TokenizerConfig, load_tokenizer

if TYPE_CHECKING:
    from bdh.tokenizer.chat import ChatEncoder, stop_token_ids, with_chat_template
    from bdh.tokenizer.plain import (
        PlainTokenizer,
        TextEncoder,
        byte_tokenizer,
        compression_ratio,
        encode_texts,
        is_byte_tokenizer,
        with_padding,
    )
    from bdh.tokenizer.training import train_tokenizer

__all__ = [
    "ChatEncoder",
    "PlainTokenizer",
    "TextEncoder",
    "TokenizerConfig",
    "byte_tokenizer",
    "compression_ratio",
    "encode_texts",
    "is_byte_tokenizer",
    "load_tokenizer",
    "stop_token_ids",
    "train_tokenizer",
    "with_chat_template",
    "with_padding",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        for module in ("plain", "chat", "training"):
            if found := getattr(import_module(f"{__name__}.{module}"), name, None):
                return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
