"""A corpus of conversations, of which the assistant's tokens count."""

import logging
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from bdh.data.batch import Batch, ValidationPart
from bdh.data.config import DataConfig
from bdh.data.conversations import (
    Conversation,
    has_answer,
    read_conversations,
    training_conversations,
    validation_conversations,
)
from bdh.data.corpus import Corpus, announce, left_out
from bdh.data.packing import ID_BITS, IS_ANSWER, packed, pieces_of, with_marks
from bdh.data.parts import Skipped, describe
from bdh.data.progress import ProgressCallback
from bdh.data.split import num_kept
from bdh.data.token_cache import TokenCache, TokenMeta, TokenWriter
from bdh.data.windows import check_rows, check_state
from bdh.tokenizer.chat import ChatEncoder

NO_ANSWER = "conversations without a message of the assistant"
_BATCH = 256  # conversations that are encoded together
_logger = logging.getLogger(__name__)


class ChatCorpus(Corpus):
    """Conversations, tokenized once; see :mod:`bdh.data.token_cache`.

    The loss counts what the assistant writes, the end of its turn included. Training rows hold several conversations,
    each of which starts from nothing; a validation row holds one.
    """

    is_chat = True

    def __init__(
        self, config: DataConfig, tokenizer: PreTrainedTokenizerFast, block_size: int, progress: ProgressCallback
    ):
        """
        Raises:
            ValueError: a line is no conversation, the tokenizer has no usable chat template, or nothing is left for
                one of the two parts.
        """
        if config.streaming:
            raise ValueError(
                "data.streaming is true, but conversations are tokenized before the training: set data.streaming=false"
            )
        self.block_size = block_size
        self._pad_id = tokenizer.pad_token_id or 0  # neither seen nor counted
        encoder = ChatEncoder(tokenizer)
        training, validation = training_conversations(config), validation_conversations(config)
        key = [
            "chat",
            training.identity,
            validation.identity if validation else config.val_fraction,
            config.text_column,
            config.encoding_errors,
            encoder.hash,
        ]
        cache = TokenCache(config.cache_dir, key)
        meta = cache.load()
        is_cached = meta is not None
        if meta is None:

            def conversations(part: Any) -> Iterator[Conversation]:
                return read_conversations(part.files, config.text_column, config.encoding_errors)

            held_out = None if validation is None else conversations(validation)
            meta = cache.build(
                lambda writer: _tokenize(config, conversations(training), held_out, encoder, writer, progress)
            )
        skipped = left_out(meta.skipped, training, validation)
        announce(config, skipped)
        stream = cache.tokens(meta)
        self._train, self._validation = stream[: meta.num_train_tokens], stream[meta.num_train_tokens :]
        pieces, num_cut = pieces_of(self._train, block_size)
        self._val_pieces, _ = pieces_of(self._validation, block_size)
        if not len(pieces) or not len(self._val_pieces):
            part = "validate on" if len(pieces) else "train on"
            raise ValueError(
                f"data.source {config.source!r} leaves nothing to {part}: the chat template marks no answer"
            )
        self._rows = _Rows(self._train, pieces, block_size, self._pad_id)
        if num_cut:
            _logger.warning(
                "%s of %s conversations are longer than train.block_size, %s tokens: they go on in another row, from "
                "nothing",
                f"{num_cut:,}",
                f"{meta.num_documents - meta.num_val_documents:,}",
                f"{block_size:,}",
            )
        num_val_answers = int(np.count_nonzero(self._validation & IS_ANSWER))
        self.val_bytes_per_token = (meta.num_bytes - meta.num_train_bytes) / num_val_answers
        self.fingerprint = meta.content_hash
        self.facts = {
            "source": config.source,
            "format": "chat",
            "streaming": False,
            "documents": meta.num_documents,
            "val_documents": meta.num_val_documents,
            "train_tokens": len(self._train),
            "val_tokens": len(self._validation),
            "train_answer_tokens": int(np.count_nonzero(self._train & IS_ANSWER)),
            "val_answer_tokens": num_val_answers,
            "train_bytes": meta.num_train_bytes,
            "val_bytes": meta.num_bytes - meta.num_train_bytes,
            "rows": len(self._rows),
            "cut_documents": num_cut,
            "dtype": meta.dtype,
            "skipped": skipped.counts,
            "fingerprint": self.fingerprint,
            "cache": str(cache.folder),
            "was_cached": is_cached,
        }

    def train_loader(
        self, batch_size: int, seed: int, rank: int = 0, world_size: int = 1, *, carry_state: bool = False
    ) -> "ChatLoader":
        if carry_state:
            raise ValueError("train.carry_state is true, but conversations are read from nothing: set it to false")
        return ChatLoader(self._rows, batch_size, check_rows(batch_size, rank, world_size), seed)

    def train_tokens(self) -> np.ndarray:
        raise ValueError("conversations are no single text: only what the assistant writes counts")

    def validation_tokens(self) -> np.ndarray:
        raise ValueError("conversations are no single text: only what the assistant writes counts")

    def validation_windows(self, num_windows: int) -> torch.Tensor:
        """As of a text, (n, block_size + 1): the conversations one behind the other, again from the first if need be."""
        length = self.block_size + 1
        number = min(num_windows, max(1, len(self._validation) // length))
        return torch.from_numpy(np.resize(self._validation & ID_BITS, (number, length)).astype(np.int64))

    def validation_parts(self, num_windows: int, document_end: int | None = None) -> list[ValidationPart]:
        """So many conversations of the validation part, or all, evenly spaced, each in a row of its own.

        Of one that is longer than a row, each piece counts as one.
        """
        number = min(num_windows, len(self._val_pieces))
        chosen = np.linspace(0, len(self._val_pieces) - 1, number).astype(np.int64)
        pieces = self._val_pieces[chosen]
        longest = int((pieces[:, 1] - pieces[:, 0]).max())
        rows = [_row(self._validation, [piece], longest, self._pad_id) for piece in pieces]
        return [ValidationPart("", _batch(rows), self.val_bytes_per_token)]


class ChatLoader:
    """Rows of packed conversations, each once a pass, every pass in another order.

    Row i of step s depends on (seed, s, i) and the size of the batch alone.
    """

    def __init__(self, packed_rows: "_Rows", batch_size: int, rows: slice, seed: int):
        self._packed = packed_rows
        self._batch_size = batch_size
        self._rows = rows
        self._seed = seed
        self._step = 0
        self._orders: dict[int, np.ndarray] = {}  # of the passes that the last batch was of

    def prepare(self) -> None:
        pass

    def next(self) -> Batch:
        """The rows of the next step; ``starts`` marks the conversations, ``is_target`` what the assistant writes."""
        numbers = self._step * self._batch_size + np.arange(self._batch_size)[self._rows]
        self._step += 1
        passes, places = np.divmod(numbers, len(self._packed))
        self._orders = {each: self._order(each) for each in np.unique(passes).tolist()}
        return _batch([self._packed[self._orders[p][i]] for p, i in zip(passes.tolist(), places, strict=True)])

    def _order(self, number: int) -> np.ndarray:
        if number in self._orders:
            return self._orders[number]
        generator = np.random.Generator(np.random.Philox(key=self._seed, counter=[0, 0, 0, number]))
        return generator.permutation(len(self._packed))

    def state_dict(self) -> dict[str, Any]:
        return {"kind": "chat", "step": self._step, "seed": self._seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Raises:
            ValueError: the state is of another kind of loader, or of another seed.
        """
        check_state(state, "chat", seed=self._seed)
        self._step = state["step"]


class _Rows:
    """The packed rows of a stream of conversations, made when they are asked for."""

    def __init__(self, stream: np.ndarray, pieces: np.ndarray, block_size: int, pad_id: int):
        self._stream = stream
        self._pieces = pieces
        self._length = block_size + 1
        self._pad_id = pad_id
        self._packed = packed((pieces[:, 1] - pieces[:, 0]).tolist(), self._length)

    def __len__(self) -> int:
        return len(self._packed)

    def __getitem__(self, number: int) -> np.ndarray:
        return _row(self._stream, [self._pieces[i] for i in self._packed[number]], self._length, self._pad_id)


def _row(stream: np.ndarray, pieces: Iterable[np.ndarray], length: int, pad_id: int) -> np.ndarray:
    """Tokens, whether each counts, and whether a conversation starts at it: int64 (3, length)."""
    row = np.zeros((3, length), dtype=np.int64)
    row[0] = pad_id
    end = 0
    for start, stop in pieces:
        begin, end = end, end + stop - start
        marked = stream[start:stop]
        row[0, begin:end] = marked & ID_BITS
        row[1, begin:end] = (marked & IS_ANSWER) != 0
        row[1, begin] = 0  # nothing of its conversation is before it
        row[2, begin] = 1
    return row


def _batch(rows: list[np.ndarray]) -> Batch:
    tokens, counts, starts = torch.from_numpy(np.stack(rows, axis=1))
    return Batch(tokens, is_target=counts[:, 1:].bool(), starts=starts[:, :-1].bool())


def _tokenize(
    config: DataConfig,
    training: Iterator[Conversation],
    validation: Iterator[Conversation] | None,
    encoder: ChatEncoder,
    writer: TokenWriter,
    progress: ProgressCallback,
) -> TokenMeta:
    skipped = Skipped()
    ends = [(0, 0), *_write(training, encoder, writer, skipped, progress)]  # tokens and bytes behind each conversation
    if validation is None:
        kept = num_kept(len(ends) - 1, config.val_fraction)
    else:
        kept = len(ends) - 1
        ends += _write(validation, encoder, writer, skipped, progress)
    num_val = len(ends) - 1 - kept
    if kept == 0 or num_val == 0:
        raise ValueError(
            f"data.source {config.source!r} has {len(ends) - 1} conversations with an answer: at least one to train on "
            f"and one to validate on are needed{describe(skipped)}"
        )
    train_tokens, train_bytes = ends[kept]
    return writer.finish(np.dtype(np.uint32), train_tokens, train_bytes, num_val, skipped.counts)


def _write(
    conversations: Iterator[Conversation],
    encoder: ChatEncoder,
    writer: TokenWriter,
    skipped: Skipped,
    progress: ProgressCallback,
) -> list[tuple[int, int]]:
    """Writes conversations, and returns the tokens and the bytes of answers up to the end of each."""
    ends = []
    while read := list(islice(conversations, _BATCH)):
        batch = [conversation for conversation in read if has_answer(conversation)]
        if len(batch) < len(read):
            skipped.add(NO_ANSWER, len(read) - len(batch))
        for conversation, (ids, is_answer) in zip(batch, _encoded(batch, encoder), strict=True):
            answers = (m["content"] for m in conversation.messages if m["role"] == "assistant")
            num_bytes = sum(len(answer.encode()) for answer in answers)
            ends.append(writer.append_encoded(with_marks(ids, is_answer), num_bytes))
        progress("tokenizing", writer.num_bytes, None)
    return ends


def _encoded(batch: list[Conversation], encoder: ChatEncoder) -> list[tuple[np.ndarray, np.ndarray]]:
    try:
        return encoder.encode([conversation.messages for conversation in batch])
    except ValueError:
        for conversation in batch:  # one by one, to name the one that the template refuses
            try:
                encoder.encode([conversation.messages])
            except ValueError as error:
                raise ValueError(f"{conversation.where}: {error}") from error
        raise
