"""Training of tokenizers on a stream of texts, which is never held in memory.

All kinds have the special tokens ``<pad> <bos> <eos> <unk>`` with ids 0 to 3. ``bpe`` and ``unigram`` work on bytes and
restore every text exactly. They split text into letters, digits, punctuation and white space, so that no token can
spell a special token. docs/tokenizers.md describes what ``wordpiece`` does not restore.
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
# The trainer prunes pieces in large steps, and can end below the requested size although the corpus has more. More are
# therefore requested, and the least likely ones dropped. The compression of texts is as good.
_UNIGRAM_SURPLUS = 1.25
# The time for a word grows with the square of its length, and ``unigram`` uses a stack frame for each character: above
# about 100,000 the process crashes. No vocabulary has entries of a thousandth of that length.
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
    """Trains a tokenizer on texts.

    Args:
        texts: documents or parts of them, which are read once. Memory holds the distinct words, not the texts. Words of
            more than 1,000 characters are split into pieces of this length, with a logged warning.
        kind: ``bpe`` or ``unigram``, which restore texts exactly, or ``wordpiece``, which does not.
        vocab_size: the number of vocabulary entries, including the 4 special tokens and, for kinds that work on bytes,
            the 256 bytes.
        min_frequency: for ``bpe`` and ``wordpiece``, how often a pair must occur to become an entry.
        progress: called with ("reading", bytes of text read so far, None), then with ("training", 0, None).

    Returns:
        The tokenizer. Its length is ``vocab_size``, or less, with a logged warning, if the texts have too few distinct
        words.

    Raises:
        ValueError: the kind is unknown, the vocabulary is too small for its basic entries, or there is no text.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"kind is {kind!r}: must be one of {', '.join(get_args(Kind))}")
    smallest = len(_SPECIALS) + (1 if kind == "wordpiece" else NUM_BYTES)
    if vocab_size <= smallest:
        entries = f"{len(_SPECIALS)} special tokens" + ("" if kind == "wordpiece" else f" and {NUM_BYTES} bytes")
        raise ValueError(
            f"vocab_size is {vocab_size}: must be at least {smallest + 1}, as a {kind} tokenizer has {entries}"
        )

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
            "%s runs of more than %s characters without a space, or of spaces only, were split into "
            "pieces of that length for training",
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
            "the vocabulary has %d entries, not the %d requested: the corpus of %d bytes is too small for more",
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
    """Returns the Unigram tokenizer reduced to its special tokens, its bytes, and its most likely other pieces."""
    parts = json.loads(backend.to_str())
    vocabulary = parts["model"]["vocab"]  # pairs of piece and score: special tokens first, then by descending score
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    specials, pieces = vocabulary[: len(_SPECIALS)], vocabulary[len(_SPECIALS) :]
    others = [piece for piece, _ in pieces if piece not in alphabet]
    kept = {*alphabet, *others[: vocab_size - len(specials) - len(alphabet)]}
    parts["model"]["vocab"] = specials + [each for each in pieces if each[0] in kept]
    return Tokenizer.from_str(json.dumps(parts))
