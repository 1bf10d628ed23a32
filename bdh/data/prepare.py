"""From settings to a corpus that is ready to train on, or to the texts behind it."""

from collections.abc import Iterator

from transformers import PreTrainedTokenizerFast

from bdh.data.chat import ChatCorpus, chat_texts, holds_chat
from bdh.data.config import DataConfig, mix_sources
from bdh.data.corpus import Corpus, ProgressCallback, no_progress
from bdh.data.mix import MixCorpus, check_overlap
from bdh.data.reading import Chunk, split_document, stream_split, whole_split
from bdh.data.sources import show_columns, training_source, validation_source
from bdh.data.streaming import StreamingCorpus
from bdh.data.tokenized import TextCorpus
from bdh.tokenizer.plain import TextEncoder


def prepare_corpus(
    config: DataConfig, tokenizer: PreTrainedTokenizerFast, block_size: int, *, progress: ProgressCallback | None = None
) -> Corpus:
    """Reads, tokenizes, splits and caches a text; or, with ``streaming``, gets ready to do so while training.

    Args:
        block_size: tokens that a row predicts; 0 where no rows will be taken: then either part may be of any length.
        progress: see :data:`bdh.data.corpus.ProgressCallback`.

    Raises:
        FileNotFoundError: a file is missing, or the hub does not give the data set.
        ValueError: settings out of range, or that do not go together, text that cannot be read, or too little of it. Nothing has
            been written then.
        OSError: the cache cannot be written.
    """
    config.validated()
    if config.mix is not None:
        return MixCorpus(
            config, lambda each: prepare_corpus(each, tokenizer, block_size, progress=progress), block_size
        )
    if holds_chat(config):
        return ChatCorpus(config, tokenizer, block_size, progress or no_progress)
    encoder = TextEncoder(tokenizer)
    if config.pack == "documents" and encoder.eos_token_id is None:
        raise ValueError(
            "data.pack is 'documents', but the tokenizer has no <eos> that would stand between documents: "
            "tokenizer.special_tokens=true gives the byte tokenizer one, data.pack=stream needs none"
        )
    kind = StreamingCorpus if config.streaming else TextCorpus
    return kind(config, encoder, block_size, progress or no_progress)


def training_texts(config: DataConfig) -> Iterator[str]:
    """The documents that are trained on, long ones in chunks of at most 256 KiB. Raises as :func:`prepare_corpus`.

    They are split exactly as a corpus is, so that a tokenizer never learns from what a model is validated on.
    """
    return (chunk.utf8.decode() for chunk in _chunks(config, held_out=False))


def validation_texts(config: DataConfig) -> Iterator[str]:
    """The documents that are held out, as :func:`training_texts`."""
    return (chunk.utf8.decode() for chunk in _chunks(config, held_out=True))


def _chunks(config: DataConfig, held_out: bool) -> Iterator[Chunk]:
    if config.mix is not None:  # each source once and as a whole, whatever its weight
        sources = mix_sources(config)
        check_overlap(sources)
        for mixed in sources:
            yield from _chunks(mixed.config, held_out)
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
    split = (stream_split if config.streaming else whole_split)(source.open, config.val_fraction)
    for chunk, is_held_out, _ in split.marked(source.open()):
        if is_held_out == held_out:
            yield chunk
