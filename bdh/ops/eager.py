"""The layer in torch's plain operations: for any device, with autograd, hooks, ``torch.func``, tracing and export.

:func:`layer_step` has the equations. It calls E, Ev and Dec instead of multiplying with their weights, so these may be
modules with hooks, adapters or quantized weights; and it leaves the attention to its caller, who knows what came before.

With a window of W, token t sees the W - 1 tokens before it (:func:`attend_window`):

    a_t = sum_{t - W < s < t} (q_t . k_s) v_s

so what is predicted after t follows, in one layer step, from the last W tokens, t included: what a block of W tokens from
nothing gives its last token. Positions are absolute, but a score depends on t - s only. In later layer steps the values are
those of tokens that saw their own windows, so L of them see back L (W - 1) tokens. A :class:`Ring` keeps them: token s stands
in column s mod (W - 1), where the token that leaves the window stood. The keys are kept neuron by neuron, a line of columns for
each, as the state of the recurrence is with its D columns: the scores of a token are its query times that matrix, and only the
lines of neurons that fire count.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from bdh.ops.attention import DecayMask, attend, parallel_attention, rotate, sum_dtype

Linear = Callable[[torch.Tensor], torch.Tensor]
Points = Mapping[str, Callable[[torch.Tensor], torch.Tensor]]
HOOK_POINTS = ("x", "q", "a", "y", "z", "v")
"""The values of a layer step that can be seen and replaced, in the order in which :func:`layer_step` computes them."""
T = TypeVar("T")


def layer_norm(v: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalises the last dimension of ``v``. Half precision is computed in, and returned as, float32."""
    return F.layer_norm(v.to(sum_dtype(v.dtype)), v.shape[-1:], eps=eps)


class Layer(NamedTuple):
    """E, Ev and Dec, as functions of the last dimension."""

    encoder: Linear  # D -> H * N
    encoder_v: Sequence[Linear]  # H of D -> N
    decoder: Linear  # H * N -> D
    points: Points = {}  # noqa: RUF012 (nothing writes to it)
    """What some of :data:`HOOK_POINTS` pass through: a function of the value gives what is computed with instead."""


def _through(points: Points, name: str, value: torch.Tensor) -> torch.Tensor:
    return points[name](value) if name in points else value


def layer_step(
    v: torch.Tensor,
    layer: Layer,
    attention: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, T]],
    table: torch.Tensor,
    *,
    eps: float,
    dtype: torch.dtype,
    mask: torch.Tensor | None = None,
    dropout: float = 0.0,
) -> tuple[torch.Tensor, T]:
    """One application of the layer.

    Args:
        v: (B, T, D) of a batch, or (R, D): tokens of any sequences.
        attention: from the rotated queries, (B, H, T, N) or (H, R, N), and the values, v in ``dtype``, to
            a (B, H, T, D) or (H, R, D), and anything else that the caller wants back, such as the new state.
        table: of :func:`bdh.ops.attention.rotation_table`, broadcast against the queries' pairs.
        dtype: of the layer's products; autocast, where it is on, overrides it.
        mask: bool, v's shape without D; False for padding, at which no neuron fires.
        dropout: share of z = x * y that is dropped.

    Returns:
        v after the layer step, and what ``attention`` gave beside a.
    """
    num_heads, values, points = len(layer.encoder_v), v.to(dtype), layer.points
    x = F.relu(layer.encoder(values))  # (..., H*N): which neurons fire
    if mask is not None:
        x = x * mask.to(x.dtype)[..., None]
    x = _through(points, "x", x)
    q = rotate(x.unflatten(-1, (num_heads, -1)).transpose(-2, -3), table).contiguous()  # (..., H, T, N)
    q = _through(points, "q", q)
    a, kept = attention(q, values)
    a = layer_norm(_through(points, "a", a), eps).to(dtype)  # (..., H, T, D)
    # The heads' outputs are let go at once: what is as wide as the neurons is kept no longer than needed.
    y = F.relu(torch.cat([head(a.select(-3, h)) for h, head in enumerate(layer.encoder_v)], dim=-1))  # (..., H*N)
    y = _through(points, "y", y)
    z = _through(points, "z", x * y)
    if dropout != 0:
        z = F.dropout(z, dropout)
    return _through(points, "v", layer_norm(v + layer_norm(layer.decoder(z), eps), eps)), kept


@dataclass(frozen=True)
class EagerSpec:
    """What the layer steps of one forward pass have in common."""

    table: torch.Tensor
    """(1 or B, 1, T, N/2), complex: one row where all sequences stand at the same positions."""
    eps: float
    dtype: torch.dtype
    form: str = "auto"
    """Of the attention, one of :data:`bdh.ops.ATTENTION_FORMS`."""
    chunk_size: int = 128
    decay_mask: DecayMask | None = None
    mask: torch.Tensor | None = None
    dropout: float = 0.0
    keep_state: bool = False


def train(
    v: torch.Tensor, layer: Layer, spec: EagerSpec, state: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One layer step over all tokens at once: v (B, T, D) after it, and the new state (B, H, N, D) where it is kept."""
    attention = partial(
        attend,
        state=state,
        form=spec.form,
        chunk_size=spec.chunk_size,
        decay_mask=spec.decay_mask,
        keep_state=spec.keep_state,
    )
    return layer_step(
        v, layer, attention, spec.table, eps=spec.eps, dtype=spec.dtype, mask=spec.mask, dropout=spec.dropout
    )


class Piece(NamedTuple):
    """The next tokens of one sequence."""

    state: Mapping[str, Sequence[torch.Tensor]]
    """By name a tensor for each layer step: ``sums`` (1, H, N, D), or those of a :class:`Ring` with a dimension of 1 before
    the others."""
    position: int
    """Of the first token."""
    num_tokens: int


def advance(
    v: torch.Tensor,
    layer: Layer,
    table: torch.Tensor,
    pieces: Sequence[Piece],
    *,
    num_layer_steps: int,
    eps: float,
    dtype: torch.dtype,
    half_lives: torch.Tensor | None = None,
    on_layer_step: Callable[[torch.Tensor], None] = lambda x: None,
) -> tuple[torch.Tensor, list[Callable[[], object]]]:
    """Takes tokens of many sequences through all layer steps, beside one another in the products with the weights.

    Args:
        v: (R, D), embedded: those of each piece in order, one piece after the other.
        table: (R, N/2), complex: the rotations at the tokens' positions.
        half_lives: (H,) tokens in which what a head keeps halves.
        on_layer_step: is called in each layer step with x (R, H*N).

    Returns:
        v after the last layer step, and for each piece what writes its state: all that can fail for want of memory has
        been done before.
    """
    counts = [piece.num_tokens for piece in pieces]
    writes: list[list[Callable[[], object]]] = [[] for _ in pieces]

    def report(x: torch.Tensor) -> torch.Tensor:
        x = _through(layer.points, "x", x)
        on_layer_step(x)
        return x

    reporting = layer._replace(points={**layer.points, "x": report})
    for index in range(num_layer_steps):

        def attention(q: torch.Tensor, values: torch.Tensor, index: int = index) -> tuple[torch.Tensor, None]:
            found = []
            for piece, of_piece, q_piece, v_piece in zip(
                pieces, writes, q.split(counts, dim=1), values.split(counts), strict=True
            ):
                state = {name: tensors[index] for name, tensors in piece.state.items()}
                a, write = _attend_state(q_piece, v_piece, state, piece.position, half_lives)
                found.append(a)
                of_piece.append(write)
            return torch.cat(found, dim=1), None

        v, _ = layer_step(v, reporting, attention, table, eps=eps, dtype=dtype)

    def write_all(of_piece: list[Callable[[], object]]) -> None:
        for write in of_piece:
            write()

    return v, [partial(write_all, of_piece) for of_piece in writes]


def _attend_state(
    q: torch.Tensor,
    v: torch.Tensor,
    state: Mapping[str, torch.Tensor],
    position: int,
    half_lives: torch.Tensor | None,
) -> tuple[torch.Tensor, Callable[[], object]]:
    """a (H, T, D) of the next tokens of a sequence, q (H, T, N) and v (T, D), and what writes its state."""
    if "sums" not in state:
        ring = Ring(**{name: tensor[0] for name, tensor in state.items()})
        length, first = ring.values.shape[0], position
        a = attend_window(q, v, ring, position, half_lives=half_lives)
        if len(v) > length:  # the rest of a long piece is not to be kept in memory for the ring
            q, v, first = q[:, len(v) - length :].clone(), v[len(v) - length :].clone(), position + len(v) - length
        return a, partial(take_in, q, v, ring, first)
    sums = state["sums"]
    if len(v) > 1:
        mask = None if half_lives is None else DecayMask(half_lives=half_lives)
        attended, new = parallel_attention(q[None], v[None], sums, decay_mask=mask, keep_state=True)
        assert new is not None
        return attended[0], partial(sums.copy_, new)
    q, v = q.to(sums.dtype), v.to(sums.dtype)

    def write() -> None:
        if half_lives is not None:
            sums[0].mul_(torch.exp2(-1 / half_lives)[:, None, None])
        sums[0].baddbmm_(q.transpose(1, 2), v.expand(len(q), 1, -1))

    return torch.bmm(q, sums[0]), write


COLUMNS_AT_ONCE = 16
"""The columns of a ring are filled up with empty ones to a multiple of this: what processors read in one piece."""


class Ring(NamedTuple):
    """The last tokens of a sequence, as one layer step sees them. All is 0 where there is no token."""

    keys: torch.Tensor
    """(H, N, C), C the columns; float32 (float64 for a float64 model)."""
    fired: torch.Tensor
    """uint8 (H, W - 1, ceil(N / 16)): which pairs of neurons fire in each column, 8 pairs to a byte, the lowest bit
    first. Where a bit is 0, so are the keys: the kernels need not look."""
    values: torch.Tensor
    """(W - 1, D), of the dtype of the keys."""


def ring_shapes(
    window: int, H: int, N: int, D: int, dtype: torch.dtype = torch.float32
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of each tensor of a ring, for a model of ``dtype``."""
    length = window - 1
    columns = -(-length // COLUMNS_AT_ONCE) * COLUMNS_AT_ONCE
    return {
        "keys": (sum_dtype(dtype), (H, N, columns)),
        "fired": (torch.uint8, (H, length, -(-N // 16))),
        "values": (sum_dtype(dtype), (length, D)),
    }


def attend_window(
    q: torch.Tensor, v: torch.Tensor, ring: Ring, position: int, *, half_lives: torch.Tensor | None = None
) -> torch.Tensor:
    """Attention of the next tokens of a sequence to each other and to the ring, which stays as it is; all scores at once.

    Args:
        q: (H, T, N), rotated by the absolute positions.
        v: (T, D).
        position: of the first of the tokens.
        half_lives: (H,) tokens in which what a head keeps of another halves.

    Returns:
        ``a`` (H, T, D) in the dtype of the ring.
    """
    length, T = ring.values.shape[0], q.shape[1]
    q, v = q.to(ring.keys.dtype), v.to(ring.keys.dtype)
    if length == 0:
        return q.new_zeros(*q.shape[:2], v.shape[1])
    tokens = torch.arange(position, position + T, device=q.device)
    columns = torch.arange(length, device=q.device)
    # In each column stands the newest token before this position whose number has that remainder.
    standing = position - 1 - (position - 1 - columns) % length  # (W - 1,)
    scores = torch.cat([(q @ ring.keys)[..., :length], q @ q.transpose(1, 2)], dim=2)  # (H, T, W - 1 + T)
    distance = tokens[:, None] - torch.cat([standing, tokens])
    scores = torch.where((distance >= 1) & (distance <= length), scores, 0)
    if half_lives is not None:
        scores = scores * torch.exp2(-(distance - 1).clamp(0, length) / half_lives[:, None, None]).to(scores.dtype)
    return scores @ torch.cat([ring.values, v])


def take_in(q: torch.Tensor, v: torch.Tensor, ring: Ring, position: int) -> None:
    """Puts the next tokens of a sequence, q (H, T, N) and v (T, D), into the ring, as far as they stay there."""
    length, T = ring.values.shape[0], q.shape[1]
    if length == 0:
        return
    newest = slice(-min(length, T), None)
    q, v = q[:, newest].to(ring.keys.dtype), v[newest].to(ring.keys.dtype)
    columns = torch.arange(position, position + T, device=q.device)[newest] % length
    ring.keys[:, :, columns] = q.transpose(1, 2)
    ring.values[columns] = v
    pairs = (q.unflatten(-1, (-1, 2)) != 0).any(-1)  # (H, T, N/2)
    missing = ring.fired.shape[-1] * 8 - pairs.shape[-1]
    octets = F.pad(pairs, (0, missing)).unflatten(-1, (-1, 8))
    bits = 2 ** torch.arange(8, device=q.device)
    ring.fired[:, columns] = (octets * bits).sum(-1).to(torch.uint8)


IGNORE_INDEX = -100


def chunked_cross_entropy(
    hidden: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
    targets: torch.Tensor,
    *,
    tokens_per_chunk: int,
    num_items: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """:func:`cross_entropy` over chunks of tokens, whose logits are recomputed for the backward pass: no more exist at a time.

    Args:
        hidden: (tokens, D), the inputs of the head.
        head: maps (tokens, D) to logits (tokens, V).
        targets: (tokens,) int64; :data:`IGNORE_INDEX` is not counted.
        num_items: divides the sum instead of the number of counted targets.
    """
    total = hidden.new_zeros((), dtype=sum_dtype(hidden.dtype))
    for hidden_chunk, target_chunk in zip(hidden.split(tokens_per_chunk), targets.split(tokens_per_chunk), strict=True):
        total = total + checkpoint(
            lambda hidden, targets: _summed_loss(head(hidden), targets),
            hidden_chunk,
            target_chunk,
            use_reentrant=False,
            preserve_rng_state=False,
        )
    return total / _divisor(targets, num_items)


def cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, *, num_items: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Mean cross-entropy in nats of ``logits`` (tokens, V) against ``targets`` (tokens,)."""
    return _summed_loss(logits, targets) / _divisor(targets, num_items)


def _summed_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    wide = logits.to(sum_dtype(logits.dtype))
    return F.cross_entropy(wide, targets, ignore_index=IGNORE_INDEX, reduction="sum")


def _divisor(targets: torch.Tensor, num_items: torch.Tensor | int | None) -> torch.Tensor | int:
    return (targets != IGNORE_INDEX).sum() if num_items is None else num_items
