"""Training of tokenizers, on a stream of texts that is never held in memory.

All kinds share the special tokens ``<pad> <bos> <eos> <unk>`` with ids 0 to 3. ``bpe`` and ``unigram`` work on bytes and give
back every text exactly; their splitter separates letters, digits, signs and white space, so that no piece of text can spell
a special token. What ``wordpiece`` cannot give back is in docs/tokenizers.md.
"""

import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from math import ceil
from typing import Any, Literal, get_args

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from bdh.tokenizer.plain import NUM_BYTES, SPECIAL_TOKENS

Kind = Literal["bpe", "wordpiece", "unigram"]

_SPECIALS = list(SPECIAL_TOKENS.values())
_UNKNOWN = SPECIAL_TOKENS["unk_token"]
# The trainer throws pieces away in large steps, and may end below the size it was asked for though the corpus has
# more: so it is asked for more, and the least likely pieces are left out. Texts shrink as well either way.
_UNIGRAM_SURPLUS = 1.25
# A word takes the square of its length in time, and ``unigram`` one stack frame a character: past some 100,000 the process
# dies. No vocabulary has entries of a thousandth of that.
_MAX_WORD = 1000
_LONG_RUN = re.compile(rf"(?<!\S)\S{{{_MAX_WORD + 1},}}|(?<!\s)\s{{{_MAX_WORD + 1},}}")
_logger = logging.getLogger(__name__)


def train_tokenizer(
    texts: Iterable[str],
    kind: Kind,
    vocab_size: int,
    *,
    min_frequency: int = 2,
    progress: Callable[[str, int, int | None], None] | None = None,
) -> PreTrainedTokenizerFast:
    """Learns a vocabulary from texts.

    Args:
        texts: documents or parts of them, read once. What is held are the different words, not the texts. A word of
            more than 1,000 characters is learned in pieces of so many, which is logged as a warning.
        kind: ``bpe`` or ``unigram``, which are exact, or ``wordpiece``, which is not.
        vocab_size: entries of the vocabulary, the 4 special tokens and, where there are any, the 256 bytes included.
        min_frequency: ``bpe`` and ``wordpiece``: a pair must occur so often to become an entry.
        progress: called with ("reading", bytes of text read so far, None), then with ("training", 0, None).

    Returns:
        The tokenizer. ``len`` of it is ``vocab_size``, or less, which is logged as a warning, if the corpus has
        too few different words for that many.

    Raises:
        ValueError: the kind is unknown, the vocabulary is too small for its smallest entries, or there is no text.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"kind is {kind!r}: must be one of {', '.join(get_args(Kind))}")
    smallest = len(_SPECIALS) + (1 if kind == "wordpiece" else NUM_BYTES)
    if vocab_size <= smallest:
        entries = f"{len(_SPECIALS)} special tokens" + ("" if kind == "wordpiece" else f" and {NUM_BYTES} bytes")
        raise ValueError(f"vocab_size is {vocab_size}: a {kind} tokenizer has {entries}, so at least {smallest + 1}")

    backend, trainer = _untrained(kind, vocab_size, min_frequency)
    num_bytes = num_long_runs = 0

    def counted() -> Iterator[str]:
        nonlocal num_bytes, num_long_runs
        for text in texts:
            num_bytes += len(text.encode())
            if len(text) > _MAX_WORD:
                num_long_runs += sum(1 for _ in _LONG_RUN.finditer(text))
            if progress is not None:
                progress("reading", num_bytes, None)
            yield text
        if progress is not None:
            progress("training", 0, None)

    splitter = backend.pre_tokenizer
    pieces = pre_tokenizers.Split(Regex(rf"[\s\S]{{1,{_MAX_WORD}}}"), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([splitter, pieces])
    backend.train_from_iterator(counted(), trainer)
    backend.pre_tokenizer = splitter
    if num_long_runs:
        _logger.warning(
            "%s runs of more than %s characters without a space, or of nothing but spaces, were learned in pieces of so many",
            f"{num_long_runs:,}",
            f"{_MAX_WORD:,}",
        )
    if num_bytes == 0:
        raise ValueError("there is no text to train a tokenizer on: the corpus is empty")

    if kind == "unigram":
        backend = _of_size(backend, vocab_size)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **SPECIAL_TOKENS)
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"vocab_size is {vocab_size}: the characters of this corpus alone take {len(tokenizer)} entries; "
            f"give at least that many, or the kind bpe or unigram, which need no more than {smallest + 1}"
        )
    if len(tokenizer) < vocab_size:
        _logger.warning(
            "the vocabulary has %d entries, not the %d asked for: the corpus of %d bytes supports no more",
            len(tokenizer),
            vocab_size,
            num_bytes,
        )
    return tokenizer


def _untrained(kind: Kind, vocab_size: int, min_frequency: int) -> tuple[Tokenizer, Any]:
    common: dict[str, Any] = {"vocab_size": vocab_size, "special_tokens": _SPECIALS, "show_progress": False}
    if kind == "wordpiece":
        backend = Tokenizer(models.WordPiece(unk_token=_UNKNOWN))
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece(cleanup=False)
        return backend, trainers.WordPieceTrainer(min_frequency=min_frequency, **common)

    trainer: Any
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if kind == "bpe":
        backend = Tokenizer(models.BPE())
        trainer = trainers.BpeTrainer(min_frequency=min_frequency, initial_alphabet=alphabet, **common)
    else:
        backend = Tokenizer(models.Unigram())
        common["vocab_size"] = ceil(vocab_size * _UNIGRAM_SURPLUS)
        trainer = trainers.UnigramTrainer(initial_alphabet=alphabet, unk_token=_UNKNOWN, **common)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    return backend, trainer


def _of_size(backend: Tokenizer, vocab_size: int) -> Tokenizer:
    """The Unigram tokenizer with its special tokens, its bytes, and the most likely of its other pieces."""
    parts = json.loads(backend.to_str())
    vocabulary = parts["model"]["vocab"]  # pairs of piece and score: special tokens first, then by falling score
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    specials, pieces = vocabulary[: len(_SPECIALS)], vocabulary[len(_SPECIALS) :]
    others = [piece for piece, _ in pieces if piece not in alphabet]
    kept = {*alphabet, *others[: vocab_size - len(specials) - len(alphabet)]}
    parts["model"]["vocab"] = specials + [each for each in pieces if each[0] in kept]
    return Tokenizer.from_str(json.dumps(parts))
