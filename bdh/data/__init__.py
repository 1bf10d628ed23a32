"""Training data: sources of text, tokenized corpora on disk, streaming, and loaders.

Importing this package is cheap: each name imports its module when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from bdh.data.config import DataConfig

if TYPE_CHECKING:
    from bdh.data.batches import Batch, Loader
    from bdh.data.corpus import Corpus
    from bdh.data.prepare import prepare_corpus, training_texts, validation_texts

__all__ = ["Batch", "Corpus", "DataConfig", "Loader", "prepare_corpus", "training_texts", "validation_texts"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        for module in ("batches", "corpus", "prepare"):
            if found := getattr(import_module(f"{__name__}.{module}"), name, None):
                return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
