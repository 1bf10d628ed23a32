"""From settings and a tokenizer to a corpus that is ready to train on."""

from transformers import PreTrainedTokenizerFast

from bdh.data.chat import ChatCorpus
from bdh.data.config import DataConfig
from bdh.data.conversations import holds_chat
from bdh.data.corpus import Corpus
from bdh.data.mapped import MapCorpus
from bdh.data.mixed import MixCorpus
from bdh.data.progress import ProgressCallback, no_progress
from bdh.data.streaming import StreamingCorpus
from bdh.tokenizer.encoding import TextEncoder


def prepare_corpus(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerFast,
    block_size: int,
    *,
    progress: ProgressCallback | None = None,
) -> Corpus:
    """Reads, tokenizes, splits and caches a text; or, with ``streaming``, gets ready to do so while training.

    Args:
        block_size: tokens that a row predicts; 0 where no rows will be taken: then either part may be of any length.
        progress: see :data:`bdh.data.progress.ProgressCallback`.

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
    kind = StreamingCorpus if config.streaming else MapCorpus
    return kind(config, encoder, block_size, progress or no_progress)
