"""Evaluates a model on tokens: loss, perplexity, bits per byte and accuracy."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import reduce
from itertools import groupby, pairwise
from operator import add

import numpy as np
import torch
import torch.nn.functional as F

from bdh.data.batches import Batch, starts_after
from bdh.data.corpus import ValidationPart
from bdh.generate.advance import Advancer, StepInput
from bdh.model import BDHForCausalLM
from bdh.model.network import inference
from bdh.model.state import SynapticState
from bdh.words import counted

# The most logits in one forward pass: 256 MiB in float32.
_MAX_LOGITS = 2**26


def perplexity(loss: float) -> float:
    """Returns e^loss for a loss in nats per token; infinite if it exceeds the range of a float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


@dataclass(frozen=True)
class Metrics:
    """The metrics of a model on a text."""

    loss: float
    """The mean cross-entropy in nats per token."""
    bits_per_byte: float
    """The mean cross-entropy in bits per byte of UTF-8 text, which is comparable between tokenizers."""
    accuracy: float
    """The fraction of tokens that were the likeliest prediction."""
    num_tokens: int
    """The number of predicted tokens."""
    loss_by_position: tuple[float, ...] = ()
    """The nats per token at each position of windows of equal length, or of stretches, read with an empty state."""

    @property
    def perplexity(self) -> float:
        return perplexity(self.loss)

    @property
    def nats_per_byte(self) -> float:
        return self.bits_per_byte * math.log(2)

    def as_dict(self, prefix: str = "") -> dict[str, float]:
        return {f"{prefix}{name}": getattr(self, name) for name in ("loss", "perplexity", "bits_per_byte", "accuracy")}

    def loss_at(self, prefix: str = "") -> dict[str, float]:
        """Returns the loss by position in octaves: ``loss_at/8`` is the mean over positions 8 to 15, counted from 1.

        At these positions the model has seen 8 to 15 tokens. The result is empty without a loss by position.
        """
        starts = [2**i for i in range(len(self.loss_by_position).bit_length())]
        octaves = {start: self.loss_by_position[start - 1 : 2 * start - 1] for start in starts}
        return {f"{prefix}loss_at/{start}": sum(part) / len(part) for start, part in octaves.items()}

    def loss_by_block(self, block_size: int) -> tuple[float, ...]:
        """Returns the mean loss of each ``block_size`` positions; empty without a loss by position."""
        losses = self.loss_by_position
        blocks = (losses[start : start + block_size] for start in range(0, len(losses), block_size))
        return tuple(sum(block) / len(block) for block in blocks)


@dataclass
class _Count:
    nats: float = 0.0
    correct: int = 0
    tokens: int = 0
    at: torch.Tensor | None = None  # nats and tokens by position, float64 (2, T), if requested

    @classmethod
    def by_position(cls, length: int) -> "_Count":
        return cls(at=torch.zeros(2, length, dtype=torch.float64))

    def add(self, logits: torch.Tensor, targets: torch.Tensor, *, position: int = 0) -> None:
        """Adds predictions for targets (B, T), with logits (B, T, V); ``position`` is that of the first ones."""
        logits = logits if logits.dtype == torch.float64 else logits.float()
        targets = targets.to(logits.device)
        nats = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
        each = torch.stack([nats.cpu().double(), (targets >= 0).cpu().double()])  # (2, B, T)
        self.nats += each[0].sum().item()
        self.correct += int((logits.argmax(-1) == targets).sum().item())
        self.tokens += int(each[1].sum().item())
        if self.at is not None:
            self.at[:, position : position + targets.shape[1]] += each.sum(1)

    def summed(self, total: Callable[[torch.Tensor], torch.Tensor], device: torch.device) -> "_Count":
        """Returns the sum of the counts of all processes, for windows of equal length."""
        assert self.at is not None
        numbers = torch.tensor([self.nats, self.correct, self.tokens], dtype=torch.float64)
        sums = total(torch.cat([numbers, self.at.flatten()]).to(device)).cpu()
        nats, correct, tokens = sums[:3].tolist()
        return _Count(nats, int(correct), int(tokens), sums[3:].view_as(self.at))

    def __add__(self, other: "_Count") -> "_Count":
        """Returns the sum of two counts; by position only if both have the same positions."""
        at = None
        if self.at is not None and other.at is not None and self.at.shape == other.at.shape:
            at = self.at + other.at
        return _Count(self.nats + other.nats, self.correct + other.correct, self.tokens + other.tokens, at)

    def metrics(self, num_bytes: float) -> Metrics:
        """Returns the metrics; ``num_bytes`` is the size of the text of all tokens that count."""
        by_position: tuple[float, ...] = ()
        if self.at is not None and bool((self.at[1] > 0).all()):
            by_position = tuple((self.at[0] / self.at[1]).tolist())
        bits_per_byte = self.nats / math.log(2) / num_bytes
        return Metrics(self.nats / self.tokens, bits_per_byte, self.correct / self.tokens, self.tokens, by_position)


def evaluate_parts(
    model: BDHForCausalLM,
    parts: Sequence[ValidationPart],
    *,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    max_batch_size: int = 16,
    sequences: slice = slice(None),
    sum_over_processes: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> tuple[Metrics, dict[str, Metrics]]:
    """Evaluates a model on the sequences of each part, each read with an empty state.

    It draws no random numbers, and restores the training or evaluation mode of the model.

    Args:
        model: the model.
        parts: the sequences, with the tokens that count.
        autocast: returns the context of the forward passes.
        max_batch_size: the largest number of sequences in a forward pass.
        sequences: the sequences of each part that this process evaluates, possibly none.
        sum_over_processes: sums a float64 tensor over the processes, if several of them evaluate a part each.

    Returns:
        The metrics over all tokens that count, and those of each part by name if there are several.
    """
    counts: list[_Count] = []
    with inference(model), autocast():
        for part in parts:
            length = part.batch.tokens.shape[1] - 1
            count = _Count.by_position(length)
            for batch in part.batch[sequences].split(_batch_size(model, length, max_batch_size)):
                _score(model, batch, count)
            counts.append(count if sum_over_processes is None else count.summed(sum_over_processes, model.device))
    num_bytes = [count.tokens * part.bytes_per_token for count, part in zip(counts, parts, strict=True)]
    whole = reduce(add, counts).metrics(sum(num_bytes))
    if len(parts) == 1:
        return whole, {}
    return whole, {part.name: count.metrics(n) for part, count, n in zip(parts, counts, num_bytes, strict=True)}


def evaluate_text(
    model: BDHForCausalLM,
    tokens: np.ndarray,
    *,
    bytes_per_token: float,
    block_size: int,
    stride: int | None = None,
    carry_state: bool = False,
    stretch_tokens: int | None = None,
    window: int | None = None,
    document_end: int | None = None,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    max_batch_size: int = 16,
    progress: Callable[[int], None] = lambda num_tokens: None,
    announce: Callable[[str], None] = lambda path: None,
) -> Metrics:
    """Evaluates a model on a whole text, in which each token but the first is predicted once.

    Args:
        model: the model.
        tokens: (n,), any integer type.
        bytes_per_token: the mean number of UTF-8 bytes of a token.
        block_size: the number of tokens in a window.
        stride: the number of tokens between the starts of two windows. Each window predicts the tokens that no earlier
            one did. A stride below ``block_size`` gives predictions more context but takes more work. None for
            ``block_size``.
        carry_state: whether to read the text once and carry the state between windows, so that each token is predicted
            from the whole text before it.
        stretch_tokens: with ``carry_state``, the length of stretches into which the text is split. Each is read with an
            empty state, several at a time, and the loss by position covers this length. None reads the text as one.
        window: with ``carry_state``, attend only to this many last tokens, as in :mod:`bdh.ops.eager`.
        document_end: the token that ends a document, if tokens must not attend across documents. The token after it is
            not predicted.
        autocast: returns the context of the forward passes.
        progress: called with the number of tokens predicted so far.
        announce: with ``carry_state``, called with a readable line about the code in use.

    Raises:
        ValueError: there are fewer than two tokens, the stride is not within 1 to ``block_size``, or stretches or a
            window are given without ``carry_state``.
    """
    stride = block_size if stride is None else stride
    if len(tokens) < 2:
        raise ValueError(f"the text has {counted(len(tokens), 'token')}: at least 2 are needed to predict one")
    if block_size < 1 or not 1 <= stride <= block_size:
        raise ValueError(f"stride is {stride}: must be within 1 and block_size, {block_size}")
    if carry_state and stride != block_size:
        raise ValueError(f"stride is {stride}: with carry_state it must be block_size, {block_size}")
    if stretch_tokens is not None and (not carry_state or stretch_tokens < 1):
        raise ValueError(f"stretch_tokens is {stretch_tokens}: must be at least 1, and given with carry_state")
    if window is not None and not carry_state:
        raise ValueError(f"window is {window}: must be given with carry_state")
    batch_size = _batch_size(model, block_size, max_batch_size)
    with inference(model), autocast():
        if carry_state:
            reader = _reader_of(model, window)
            announce(reader.path)
            count = _read_on(reader, tokens, block_size, stretch_tokens, batch_size, document_end, progress)
        else:
            count = _Count()
            for windows, num_known in _window_batches(tokens, block_size, stride, batch_size):
                _score(model, _batch(windows, document_end), count, num_known=num_known)
                progress(count.tokens)
    return count.metrics(count.tokens * bytes_per_token)


class _ForwardReader:
    """Reads texts with ``model.forward``, which supports every device, every dtype and autocast."""

    def __init__(self, model: BDHForCausalLM):
        self.path = f"forward on {model.device}"
        self._model, self._state = model, model.new_state()

    def begin(self, num_texts: int) -> None:
        """Starts to read this many new texts."""
        self._state = self._model.new_state(num_texts)

    def read(self, tokens: torch.Tensor, starts: torch.Tensor | None) -> torch.Tensor:
        """Returns the logits (B, T, V) of the next tokens (B, T); ``starts``, bool (B, T) or None, marks documents."""
        device = self._model.device
        starts = None if starts is None else starts.to(device)
        return self._model(tokens.to(device), document_starts=starts, cache=self._state).logits


class _AdvancingReader:
    """Reads texts with an Advancer. A text starts with an empty state again when its document ends."""

    def __init__(self, advancer: Advancer):
        self.path, self._advancer = advancer.description, advancer
        self._states: list[SynapticState] = []

    def begin(self, num_texts: int) -> None:
        self._states = self._states[:num_texts]
        self._states += [self._advancer.new_state() for _ in range(num_texts - len(self._states))]
        for state in self._states:
            state.clear()

    def read(self, tokens: torch.Tensor, starts: torch.Tensor | None) -> torch.Tensor:
        found: list[torch.Tensor] = []
        is_start = torch.zeros_like(tokens, dtype=torch.bool) if starts is None else starts
        cuts = {0, *is_start.any(0).nonzero()[:, 0].tolist(), tokens.shape[1]}  # where any document starts
        for first, end in pairwise(sorted(cuts)):
            for state, is_new in zip(self._states, is_start[:, first].tolist(), strict=True):
                if is_new:
                    state.clear()
            pieces = tokens[:, first:end].tolist()
            inputs = [StepInput(state, piece, "all") for state, piece in zip(self._states, pieces, strict=True)]
            found.append(torch.stack([each for each in self._advancer.advance(inputs) if each is not None]))
        return torch.cat(found, 1)


def _reader_of(model: BDHForCausalLM, window: int | None) -> _ForwardReader | _AdvancingReader:
    """Returns the fastest reader for a model. Only an Advancer supports a window."""
    uses_kernels = model.dtype == torch.float32 and not torch.is_autocast_enabled(model.device.type)
    if window is None and not uses_kernels:
        return _ForwardReader(model)
    advancer = Advancer(model, window=window, path="auto" if uses_kernels else "torch")
    if window is None and advancer.backend == "eager":
        return _ForwardReader(model)  # it also reads several texts in a batch
    return _AdvancingReader(advancer)


def _read_on(
    reader: _ForwardReader | _AdvancingReader,
    tokens: np.ndarray,
    block_size: int,
    stretch_tokens: int | None,
    batch_size: int,
    document_end: int | None,
    progress: Callable[[int], None],
) -> _Count:
    """Counts the predictions of stretches, in batches of ``batch_size``, block by block with the state carried."""
    last = len(tokens) - 1
    stretch = min(stretch_tokens or last, last)
    count = _Count.by_position(stretch) if stretch_tokens else _Count()
    whole = list(range(0, last - stretch + 1, stretch))
    groups = [whole[i : i + batch_size] for i in range(0, len(whole), batch_size)]
    if (rest := whole[-1] + stretch) < last:
        groups.append([rest])
    for group in groups:
        length = min(stretch, last - group[0])
        reader.begin(len(group))
        for position in range(0, length, block_size):
            end = min(position + block_size, length)
            known = min(position, 1)  # includes the token before a block, which may end a document
            batch = _batch(
                _stack(tokens, [(start + position - known, start + end) for start in group]), document_end, known
            )
            count.add(reader.read(batch.input_ids, batch.starts), batch.targets, position=position)
            progress(count.tokens)
    return count


def _batch(tokens: torch.Tensor, document_end: int | None, known: int = 0) -> Batch:
    """Returns a batch without the first ``known`` tokens of each sequence, which only show the end of a document."""
    if document_end is None:
        return Batch(tokens[:, known:])
    return Batch.of_documents(tokens[:, known:], starts_after(tokens, document_end)[:, known:])


def _window_batches(
    tokens: np.ndarray, block_size: int, stride: int, batch_size: int
) -> Iterator[tuple[torch.Tensor, int]]:
    """Yields batches of windows (b, T + 1), with the number of each window's targets that were predicted before."""
    last = len(tokens) - 1
    windows = [(start, min(start + block_size, last)) for start in range(0, max(1, last - block_size + stride), stride)]
    for (_, num_known), group in groupby(windows, lambda w: (w[1] - w[0], block_size - stride if w[0] else 0)):
        alike = list(group)
        for first in range(0, len(alike), batch_size):
            yield _stack(tokens, alike[first : first + batch_size]), num_known


def _stack(tokens: np.ndarray, windows: list[tuple[int, int]]) -> torch.Tensor:
    return torch.from_numpy(np.stack([tokens[start : end + 1].astype(np.int64) for start, end in windows]))


def _score(model: BDHForCausalLM, batch: Batch, count: _Count, *, num_known: int = 0) -> None:
    """Counts the predictions of sequences read with an empty state, except the first ``num_known`` of each."""
    batch = batch.to(model.device)
    output = model(batch.input_ids, document_starts=batch.starts, use_cache=False)
    count.add(output.logits[:, num_known:], batch.targets[:, num_known:])


def _batch_size(model: BDHForCausalLM, block_size: int, largest: int) -> int:
    return max(1, min(largest, _MAX_LOGITS // (block_size * model.config.vocab_size)))
