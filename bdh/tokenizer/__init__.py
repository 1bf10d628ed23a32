"""Tokenizers: byte-level, training of BPE / WordPiece / Unigram, loading, fast exact encoding.

All of them are ``transformers.PreTrainedTokenizerFast``: a folder that one is saved to opens with
``AutoTokenizer`` and none of our code. Importing this package is cheap: its names load what they need when
they are first used.
"""

from typing import TYPE_CHECKING, Any

from bdh.tokenizer.config import TokenizerConfig

if TYPE_CHECKING:
    from bdh.tokenizer.byte_level import byte_tokenizer, is_byte_tokenizer, with_padding
    from bdh.tokenizer.chat import ChatEncoder, stop_token_ids, with_chat_template
    from bdh.tokenizer.encoding import TextEncoder, compression_ratio, encode_texts
    from bdh.tokenizer.loading import load_tokenizer
    from bdh.tokenizer.plain import PlainTokenizer
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

_MODULES = {
    "ChatEncoder": "chat",
    "PlainTokenizer": "plain",
    "TextEncoder": "encoding",
    "byte_tokenizer": "byte_level",
    "compression_ratio": "encoding",
    "encode_texts": "encoding",
    "is_byte_tokenizer": "byte_level",
    "load_tokenizer": "loading",
    "stop_token_ids": "chat",
    "train_tokenizer": "training",
    "with_chat_template": "chat",
    "with_padding": "byte_level",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        from importlib import import_module

        return getattr(import_module(f"bdh.tokenizer.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'bdh.tokenizer' has no attribute {name!r}")
