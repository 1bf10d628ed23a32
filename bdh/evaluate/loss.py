"""Loss, perplexity, bits per byte and accuracy of a model on tokens."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F

from bdh.model import BDHForCausalLM, SynapticState

# Logits of one forward pass, at most: 256 MiB in float32.
_MAX_LOGITS = 2**26


@dataclass(frozen=True)
class Metrics:
    """What a model made of a text."""

    loss: float
    """Mean cross-entropy, nats per token."""
    bits_per_byte: float
    """Mean cross-entropy, bits per byte of the UTF-8 text: comparable between tokenizers."""
    accuracy: float
    """Share of the tokens that were the likeliest prediction."""
    num_tokens: int
    """Tokens that were predicted."""
    loss_by_position: tuple[float, ...] = ()
    """Nats per token at each position of the windows, where all were read from nothing and of one length."""

    @property
    def perplexity(self) -> float:
        """e^loss; infinite where that is more than a float holds."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def nats_per_byte(self) -> float:
        return self.bits_per_byte * math.log(2)

    def as_dict(self, prefix: str = "") -> dict[str, float]:
        return {
            f"{prefix}loss": self.loss,
            f"{prefix}perplexity": self.perplexity,
            f"{prefix}bits_per_byte": self.bits_per_byte,
            f"{prefix}accuracy": self.accuracy,
        }

    def loss_at(self, prefix: str = "") -> dict[str, float]:
        """The loss by position, in octaves: ``loss_at/8`` is the mean of the positions 8 to 15, counted from 1.

        The model has seen 8 to 15 tokens then. Empty without a loss by position.
        """
        starts = [2**i for i in range(len(self.loss_by_position).bit_length())]
        octaves = {start: self.loss_by_position[start - 1 : 2 * start - 1] for start in starts}
        return {f"{prefix}loss_at/{start}": sum(part) / len(part) for start, part in octaves.items()}


@dataclass
class _Count:
    nats: float = 0.0
    correct: float = 0
    tokens: float = 0
    by_position: torch.Tensor = field(default_factory=lambda: torch.zeros(()))

    def metrics(self, bytes_per_token: float) -> Metrics:
        loss = self.nats / self.tokens
        return Metrics(loss, loss / math.log(2) / bytes_per_token, self.correct / self.tokens, int(self.tokens))


def evaluate_windows(
    model: BDHForCausalLM,
    windows: torch.Tensor,
    *,
    bytes_per_token: float,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    max_batch_size: int = 16,
    sum_over_processes: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> Metrics:
    """Predicts every token but the first of each window (n, T + 1), each from the ones before it in its window.

    It draws no random numbers, and leaves the model in the mode, training or not, that it was in.

    Args:
        sum_over_processes: where several processes have each a share of the windows, which may be none: sums a
            float64 tensor over them.
    """
    count = _Count(by_position=torch.zeros(windows.shape[1] - 1, dtype=torch.float64, device=model.device))
    batch_size = _batch_size(model, windows.shape[1] - 1, max_batch_size)
    with inference(model), autocast():
        for batch in windows.split(batch_size):
            nats = _score(model, batch, count)
            count.by_position = count.by_position + nats.view(len(batch), -1).sum(0, dtype=torch.float64)
    num_windows: float = len(windows)
    if sum_over_processes is not None:
        counts = [count.nats, count.correct, count.tokens, num_windows]
        numbers = torch.tensor(counts, dtype=torch.float64, device=model.device)
        sums = sum_over_processes(torch.cat([numbers, count.by_position]))
        count.by_position = sums[4:]
        count.nats, count.correct, count.tokens, num_windows = sums[:4].tolist()
    by_position = (count.by_position / num_windows).tolist()
    return replace(count.metrics(bytes_per_token), loss_by_position=tuple(by_position))


def evaluate_text(
    model: BDHForCausalLM,
    tokens: np.ndarray,
    *,
    bytes_per_token: float,
    block_size: int,
    stride: int | None = None,
    carry_state: bool = False,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    max_batch_size: int = 16,
    progress: Callable[[int], None] = lambda num_tokens: None,
) -> Metrics:
    """Predicts every token but the first of a whole text, once.

    Args:
        tokens: (n,), any integer type.
        block_size: tokens that a window reads.
        stride: tokens between the starts of two windows; each predicts what no earlier one did. Less than
            ``block_size`` gives every prediction more context, at more work. None for ``block_size``.
        carry_state: go through the text once with the state handed from window to window, so that every
            token is predicted from all of the text before it.
        progress: called with the number of tokens predicted so far.

    Raises:
        ValueError: fewer than two tokens, or a stride that is not within 1 to ``block_size``.
    """
    stride = block_size if stride is None else stride
    if len(tokens) < 2:
        raise ValueError(f"the text has {len(tokens)} tokens: at least 2 are needed to predict one")
    if block_size < 1 or not 1 <= stride <= block_size:
        raise ValueError(f"stride is {stride}: must be within 1 and block_size, {block_size}")
    if carry_state and stride != block_size:
        raise ValueError(f"stride is {stride}: with carry_state it must be block_size, {block_size}")
    count = _Count()
    batch_size = 1 if carry_state else _batch_size(model, block_size, max_batch_size)
    state = model.new_state() if carry_state else None
    with inference(model), autocast():
        for windows, num_known in _window_batches(tokens, block_size, stride, batch_size):
            _score(model, windows, count, num_known=num_known, state=state)
            progress(int(count.tokens))
    return count.metrics(bytes_per_token)


def _window_batches(
    tokens: np.ndarray, block_size: int, stride: int, batch_size: int
) -> Iterator[tuple[torch.Tensor, int]]:
    """Batches of windows (b, T + 1), and how many of each window's targets earlier windows have predicted."""
    last = len(tokens) - 1
    starts = list(range(0, max(1, last - block_size + stride), stride))
    pending: list[tuple[int, int, int]] = []  # (start, end, num_known)
    for start in starts:
        end = min(start + block_size, last)
        num_known = 0 if start == 0 else block_size - stride
        if pending and (end - start, num_known) != (pending[0][1] - pending[0][0], pending[0][2]):
            yield _stack(tokens, pending), pending[0][2]
            pending = []
        pending.append((start, end, num_known))
        if len(pending) == batch_size:
            yield _stack(tokens, pending), num_known
            pending = []
    if pending:
        yield _stack(tokens, pending), pending[0][2]


def _stack(tokens: np.ndarray, windows: list[tuple[int, int, int]]) -> torch.Tensor:
    return torch.from_numpy(np.stack([tokens[start : end + 1].astype(np.int64) for start, end, _ in windows]))


def _score(
    model: BDHForCausalLM,
    windows: torch.Tensor,
    count: _Count,
    *,
    num_known: int = 0,
    state: SynapticState | None = None,
) -> torch.Tensor:
    """Counts the predictions of windows (b, T + 1), and returns their losses in nats, (b * (T - num_known),)."""
    windows = windows.to(model.device)
    logits = model(windows[:, :-1], past_key_values=state, use_cache=state is not None).logits[:, num_known:]
    logits = logits if logits.dtype == torch.float64 else logits.float()
    targets = windows[:, 1 + num_known :]
    nats = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    count.nats += nats.sum(dtype=torch.float64).item()
    count.correct += int((logits.argmax(-1) == targets).sum().item())
    count.tokens += targets.numel()
    return nats


def _batch_size(model: BDHForCausalLM, block_size: int, largest: int) -> int:
    return max(1, min(largest, _MAX_LOGITS // (block_size * model.config.vocab_size)))


@contextmanager
def inference(model: BDHForCausalLM) -> Iterator[None]:
    """Evaluation mode without gradients; the mode before comes back at the end."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
