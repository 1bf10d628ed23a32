"""How many entries the vocabulary of a tokenizer has, as a model counts them."""

from typing import Any
from weakref import WeakKeyDictionary

_sizes: "WeakKeyDictionary[Any, tuple[int, int]]" = WeakKeyDictionary()


def vocabulary_size(tokenizer: Any) -> int:
    """The largest token id of a ``PreTrainedTokenizerFast``, plus one: the rows of the embedding that it needs.

    ``len(tokenizer)`` counts the tokens, which are fewer where the ids have gaps.
    """
    num_tokens, size = _sizes.get(tokenizer, (-1, 0))
    if num_tokens != len(tokenizer):  # else no token was added since
        num_tokens, size = len(tokenizer), max(tokenizer.get_vocab().values(), default=-1) + 1
        _sizes[tokenizer] = (num_tokens, size)
    return size


def document_end_id(tokenizer: Any) -> int | None:
    """The id of the token that ends the documents which a model is trained on; None where there is none.

    It is the tokenizer's ``<eos>``, unless this stands in the place of an unused byte (``with_padding`` of
    :mod:`bdh.tokenizer.plain`): no text had it when the model was trained.
    """
    end = tokenizer.eos_token_id
    is_byte = end == 0xFE and tokenizer.convert_ids_to_tokens(0xFD) == chr(0xFD)
    return None if is_byte else end


def check_vocabulary(tokenizer: Any, vocab_size: int) -> None:
    """
    Raises:
        ValueError: the tokenizer is not that of a model with a vocabulary of this size.
    """
    if vocabulary_size(tokenizer) == vocab_size + 1 and tokenizer.pad_token_id == vocab_size:
        return  # padding that was added to the tokenizer alone: no model sees it
    if vocabulary_size(tokenizer) != vocab_size:
        raise ValueError(
            f"the tokenizer has {vocabulary_size(tokenizer)} entries and the model {vocab_size}: they do not belong together"
        )
