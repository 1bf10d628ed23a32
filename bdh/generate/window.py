"""Steps with attention to the last tokens only: :mod:`bdh.ops.window`.

The states of both steppers are alike, and what one has read the other goes on from, where both keep it in float32.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from bdh.generate.stepper import Feed, SequenceState, TorchStepper
from bdh.model.modeling import BDHForCausalLM
from bdh.ops.attention import sum_dtype
from bdh.ops.eager import layer_norm
from bdh.ops.rope import rotate, rotation_table
from bdh.ops.window import Ring, attend_window, empty_ring, take_in

MAX_ROWS = 256
"""Tokens that go through torch's operations together."""


def check_window(window: int) -> int:
    """
    Raises:
        ValueError: it is no window.
    """
    if not isinstance(window, int) or isinstance(window, bool) or window < 1:
        raise ValueError(f"window is {window!r}: must be a whole number of tokens, at least 1")
    return window


def _shape(model: BDHForCausalLM) -> tuple[int, int, int, int]:
    config = model.config
    return config.n_layer, config.n_head, config.neurons_per_head, config.n_embd


def new_state(model: BDHForCausalLM, window: int) -> SequenceState:
    ring = empty_ring(window, _shape(model), dtype=model.dtype, device=model.device)
    return SequenceState(f"window:{window}", ring._asdict())


def state_bytes(model: BDHForCausalLM, window: int) -> int:
    return sum(tensor.nbytes for tensor in empty_ring(window, _shape(model), dtype=model.dtype, device="meta"))


def _ring(state: SequenceState) -> Ring:
    return Ring(**state.tensors)


class WindowTorchStepper(TorchStepper):
    """On every device and in every precision. A token's bits depend on what it was fed with: up to rounding all agree.

    Args:
        window: W: a prediction attends from the last W tokens, of which each sees the W - 1 before it.

    Raises:
        ValueError: the window is no whole number of at least 1.
    """

    def __init__(self, model: BDHForCausalLM, window: int, reason: str = "asked for"):
        super().__init__(model, reason)
        self.window = check_window(window)
        half_lives = model.config.half_lives
        self._half_lives: torch.Tensor | None = None  # (H,)
        if half_lives is not None:
            self._half_lives = torch.tensor(half_lives, dtype=sum_dtype(model.dtype), device=model.device)

    @property
    def path(self) -> str:
        return f"torch on {self.model.device}, a window of {self.window} tokens ({self._reason})"

    def new_state(self) -> SequenceState:
        return new_state(self.model, self.window)

    @property
    def state_bytes(self) -> int:
        return state_bytes(self.model, self.window)

    def _step(self, feeds: Sequence[Feed]) -> None:
        while unread := [feed for feed in feeds if not feed.is_done]:
            taken = []
            room = MAX_ROWS
            for feed in unread:
                if count := min(len(feed.tokens) - feed.num_read, room):
                    taken.append((feed, count))
                    room -= count
            self._read_rows(taken)

    def _logits(self, v: torch.Tensor) -> torch.Tensor:
        return self.model.lm_head(v.to(self.model.embed.weight.dtype)).float().cpu()

    def _read_rows(self, taken: Sequence[tuple[Feed, int]]) -> None:
        """The next tokens of each sequence, one after the other in one batch of rows."""
        model, config = self.model, self.model.config
        H, N, eps = config.n_head, config.neurons_per_head, config.layer_norm_eps
        dtype, device = model.embed.weight.dtype, model.device
        counts = [count for _, count in taken]
        positions = torch.cat(
            [torch.arange(f.state.position, f.state.position + count, device=device) for f, count in taken]
        )
        table = rotation_table(positions, N, config.rope_theta, dtype)[:, None]  # (R, 1, N/2)
        ids = torch.tensor([token for f, count in taken for token in f.tokens[f.num_read :][:count]], device=device)
        v = layer_norm(model.embed(ids), eps)  # (R, D)
        # Of each pass and sequence what its ring takes in, once nothing can fail any more: q (H, T, N) and v (T, D).
        kept: list[list[tuple[torch.Tensor, torch.Tensor]]] = []
        for index in range(config.n_layer):
            self.mark_progress()
            v_in = v.to(dtype)
            x = F.relu(model.encoder(v_in))  # (R, H*N)
            for (feed, count), of_feed in zip(taken, x.split(counts), strict=True):
                if feed.watch is not None and feed.is_last(count):
                    feed.look(of_feed[-1].float().cpu().numpy())
            q = rotate(x.unflatten(-1, (H, N)), table).transpose(0, 1)  # (H, R, N)
            pieces = list(zip(q.split(counts, dim=1), v_in.split(counts), strict=True))
            attended = []
            for (feed, _), piece in zip(taken, pieces, strict=True):
                ring = _ring(feed.state).of_pass(index)
                attended.append(attend_window(*piece, ring, feed.state.position, half_lives=self._half_lives))
            kept.append([self._newest(*piece) for piece in pieces])
            a = layer_norm(torch.cat(attended, dim=1), eps).to(dtype)  # (H, R, D)
            y = F.relu(torch.cat([head(a[h]) for h, head in enumerate(model.encoder_v)], dim=-1))
            v = layer_norm(v + layer_norm(model.decoder(x * y), eps), eps)
        logits: list[torch.Tensor | None] = []
        for (feed, count), rows in zip(taken, v.split(counts), strict=True):
            num_wanted = feed.num_wanted(count)
            logits.append(self._logits(rows[-num_wanted:]) if num_wanted else None)
        for number, ((feed, count), rows) in enumerate(zip(taken, v.split(counts), strict=True)):
            feed.state.is_torn = True
            for index, of_pass in enumerate(kept):
                q, values = of_pass[number]
                take_in(q, values, _ring(feed.state).of_pass(index), feed.state.position + count - len(values))
            feed.commit(count, logits[number], rows)

    def _newest(self, q: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What stays in a ring; the rest of a long piece is not to be kept in memory for it."""
        length = self.window - 1
        if len(v) <= length:
            return q, v
        return q[:, len(v) - length :].clone(), v[len(v) - length :].clone()
