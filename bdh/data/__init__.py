"""Data: sources of text, token streams on disk, streaming, the loader.

Importing this package is cheap: its names load what they need when they are first used.
"""

from typing import TYPE_CHECKING, Any

from bdh.data.config import DataConfig

if TYPE_CHECKING:
    from bdh.data.corpus import Batch, Corpus, Loader
    from bdh.data.prepare import prepare_corpus, training_texts, validation_texts

__all__ = ["Batch", "Corpus", "DataConfig", "Loader", "prepare_corpus", "training_texts", "validation_texts"]

_MODULES = {
    "Batch": "corpus",
    "Corpus": "corpus",
    "Loader": "corpus",
    "prepare_corpus": "prepare",
    "training_texts": "prepare",
    "validation_texts": "prepare",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        from importlib import import_module

        return getattr(import_module(f"bdh.data.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'bdh.data' has no attribute {name!r}")
