"""The texts behind a corpus, for those who need text instead of tokens, such as the training of a tokenizer.

They are split exactly as :func:`bdh.data.prepare_corpus` splits them, so that a tokenizer never learns from what
a model is validated on.
"""

from collections.abc import Iterator

from bdh.data.columns import show_columns
from bdh.data.config import DataConfig, mix_sources
from bdh.data.conversations import chat_texts, holds_chat
from bdh.data.mix_overlap import check_overlap
from bdh.data.parts import Part, split_document
from bdh.data.source import training_source, validation_source
from bdh.data.split import count_documents, count_if_single, cut, num_kept, stream_split


def training_texts(config: DataConfig) -> Iterator[str]:
    """The documents that are trained on, long ones in parts of at most 256 KiB. Raises as ``prepare_corpus``."""
    return (part.utf8.decode() for part in _parts(config, held_out=False))


def validation_texts(config: DataConfig) -> Iterator[str]:
    """The documents that are held out, as :func:`training_texts`."""
    return (part.utf8.decode() for part in _parts(config, held_out=True))


def _parts(config: DataConfig, held_out: bool) -> Iterator[Part]:
    if config.mix is not None:  # each source once and as a whole, whatever its weight
        sources = mix_sources(config)
        check_overlap(sources)
        for mixed in sources:
            yield from _parts(mixed.config, held_out)
        return
    if holds_chat(config):
        for text in chat_texts(config, held_out):
            yield from split_document(text.encode())
        return
    validation = validation_source(config)
    if not held_out:
        show_columns(config, training_source(config))
    if validation is not None:
        yield from (validation if held_out else training_source(config)).open()
        return
    source = training_source(config)
    if config.streaming:
        for part, is_behind, _ in stream_split(source, config.val_fraction).marked(source.open()):
            if is_behind == held_out:
                yield part
        return
    single_bytes = count_if_single(source)
    if single_bytes is not None:
        position = num_kept(single_bytes, config.val_fraction)
        for part, is_behind in cut(iter(source.open()), position):
            if is_behind == held_out:
                yield part
        return
    kept = num_kept(count_documents(source), config.val_fraction)
    document = 0
    for part in source.open():
        if (document >= kept) == held_out:
            yield part
        document += part.ends_document
