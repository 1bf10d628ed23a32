"""The eager backend: the layer in plain PyTorch operations.

It supports any device, autograd, hooks, ``torch.func``, tracing and export. :func:`layer_step` implements the
equations. It calls E, Ev and Dec as functions instead of multiplying with their weights, so that these can be modules
with hooks, adapters or quantized weights. Attention is a function that the caller passes, because only the caller knows
the state.

With a window of W, token t attends to the W - 1 tokens before it (:func:`attend_window`):

    a_t = sum_{t - W < s < t} (q_t . k_s) v_s

In one layer step, the prediction after t therefore depends on the last W tokens, t included, as in a block of W tokens.
Positions are absolute, but a score depends only on t - s. In later layer steps the values are those of tokens that
attended to their own windows, so L layer steps reach back L (W - 1) tokens.

A :class:`Ring` stores the tokens of the window. Token s is in column s mod (W - 1), where it replaces the token that
leaves the window. The keys are stored neuron by neuron, like the state of the recurrence: the scores of a token are the
product of its query and this matrix, in which only the rows of neurons that fire contribute.
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
"""The values of a layer step that hooks can read and replace, in the order in which they are computed."""
T = TypeVar("T")


def layer_norm(v: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalizes the last dimension of ``v``. Half precision is computed and returned in float32."""
    return F.layer_norm(v.to(sum_dtype(v.dtype)), v.shape[-1:], eps=eps)


class Layer(NamedTuple):
    """E, Ev and Dec as functions on the last dimension, with the hook points in use."""

    encoder: Linear  # D -> H * N
    encoder_v: Sequence[Linear]  # H of D -> N
    decoder: Linear  # H * N -> D
    points: Points = {}  # noqa: RUF012 (nothing writes to it)
    """Functions by the name of their hook point: each receives the value, and returns the value to compute with."""


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
    """Applies the layer once.

    Args:
        v: the residual stream, (B, T, D) for a batch, or (R, D) for tokens of any sequences.
        layer: E, Ev and Dec.
        attention: maps the rotated queries, (B, H, T, N) or (H, R, N), and the values, v in ``dtype``, to the attention
            output a, (B, H, T, D) or (H, R, D), and any second result, such as the new state.
        table: from :func:`bdh.ops.attention.rotation_table`, broadcastable to the pairs of the queries.
        eps: added to the variance in the layer norms.
        dtype: the dtype of the matrix products; autocast overrides it if enabled.
        mask: bool, the shape of v without D. Where False (padding), no neuron fires.
        dropout: the fraction of z = x * y that is dropped.

    Returns:
        v after the layer step, and the second result of ``attention``.
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
    # Not kept in a variable, so that the outputs of the heads, which are as wide as the neurons, are freed at once.
    y = F.relu(torch.cat([head(a.select(-3, h)) for h, head in enumerate(layer.encoder_v)], dim=-1))  # (..., H*N)
    y = _through(points, "y", y)
    z = _through(points, "z", x * y)
    if dropout != 0:
        z = F.dropout(z, dropout)
    return _through(points, "v", layer_norm(v + layer_norm(layer.decoder(z), eps), eps)), kept


@dataclass(frozen=True)
class EagerSpec:
    """The settings that all layer steps of a forward pass share."""

    table: torch.Tensor
    """The rotations, complex (1 or B, 1, T, N/2); the first size is 1 if all sequences have the same positions."""
    eps: float
    dtype: torch.dtype
    form: str = "auto"
    """The attention form, one of :data:`bdh.ops.ATTENTION_FORMS`."""
    chunk_size: int = 128
    decay_mask: DecayMask | None = None
    mask: torch.Tensor | None = None
    dropout: float = 0.0
    keep_state: bool = False


def train(
    v: torch.Tensor, layer: Layer, spec: EagerSpec, state: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Computes a layer step over all tokens at once, with autograd.

    Returns:
        v (B, T, D) after the layer step, and the new state (B, H, N, D), or None unless ``spec.keep_state``.
    """
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
    """The next tokens of one sequence in a call of :func:`advance`."""

    state: Mapping[str, Sequence[torch.Tensor]]
    """By name, a tensor for each layer step: ``sums`` (1, H, N, D), or the tensors of a :class:`Ring` with a leading
    dimension of 1."""
    position: int
    """The position of the first token."""
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
    """Computes all layer steps for tokens of many sequences, which share the products with the weights.

    Args:
        v: (R, D), the embedded tokens of all pieces, concatenated.
        layer: E, Ev and Dec.
        table: complex (R, N/2), the rotations at the tokens' positions.
        pieces: the states of the sequences, and their positions.
        num_layer_steps: L.
        eps: added to the variance in the layer norms.
        dtype: the dtype of the matrix products.
        half_lives: (H,), in tokens: the half-life of each head's state; None for no decay.
        on_layer_step: called in each layer step with x (R, H*N).

    Returns:
        v (R, D) after the last layer step, and for each piece a function that writes its state. Memory that can run out
        has been allocated before.
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
    """Computes a (H, T, D) for the next tokens of a sequence, and returns it with a function that writes the state.

    Args:
        q: (H, T, N).
        v: (T, D).
    """
    if "sums" not in state:
        ring = Ring(**{name: tensor[0] for name, tensor in state.items()})
        length, first = ring.values.shape[0], position
        a = attend_window(q, v, ring, position, half_lives=half_lives)
        if len(v) > length:  # do not keep all of a long piece in memory for the ring
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
"""The number of columns of a ring is padded to a multiple of this: as many as processors read at once."""


class Ring(NamedTuple):
    """The last tokens of a sequence in one layer step. Columns without a token are 0."""

    keys: torch.Tensor
    """(H, N, C) with C columns, float32 (float64 for a float64 model)."""
    fired: torch.Tensor
    """uint8 (H, W - 1, ceil(N / 16)): which pairs of neurons fire in each column, 8 pairs to a byte, lowest bit first.
    The kernels skip pairs whose bit is 0, since their keys are 0."""
    values: torch.Tensor
    """(W - 1, D), in the dtype of the keys."""


def ring_shapes(
    window: int, H: int, N: int, D: int, dtype: torch.dtype = torch.float32
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Returns the dtype and shape of each tensor of a ring, for a model of ``dtype``."""
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
    """Computes windowed attention of the next tokens to each other and to the ring, which is not modified.

    Args:
        q: (H, T, N), rotated by the absolute positions.
        v: (T, D).
        ring: the tokens before them.
        position: the position of the first token.
        half_lives: (H,), in tokens: the weight of an earlier token halves with this distance; None for no decay.

    Returns:
        ``a`` (H, T, D), in the dtype of the ring.
    """
    length, T = ring.values.shape[0], q.shape[1]
    q, v = q.to(ring.keys.dtype), v.to(ring.keys.dtype)
    if length == 0:
        return q.new_zeros(*q.shape[:2], v.shape[1])
    tokens = torch.arange(position, position + T, device=q.device)
    columns = torch.arange(length, device=q.device)
    # The position of the token in each column: the latest one before `position` with that remainder.
    standing = position - 1 - (position - 1 - columns) % length  # (W - 1,)
    scores = torch.cat([(q @ ring.keys)[..., :length], q @ q.transpose(1, 2)], dim=2)  # (H, T, W - 1 + T)
    distance = tokens[:, None] - torch.cat([standing, tokens])
    scores = torch.where((distance >= 1) & (distance <= length), scores, 0)
    if half_lives is not None:
        scores = scores * torch.exp2(-(distance - 1).clamp(0, length) / half_lives[:, None, None]).to(scores.dtype)
    return scores @ torch.cat([ring.values, v])


def take_in(q: torch.Tensor, v: torch.Tensor, ring: Ring, position: int) -> None:
    """Writes the next tokens of a sequence, q (H, T, N) and v (T, D), into the ring, or the last ones that fit."""
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
    """Computes :func:`cross_entropy` in chunks of tokens, to save memory.

    The logits of a chunk are freed after the forward pass, and recomputed in the backward pass.

    Args:
        hidden: (tokens, D), the inputs of the head.
        head: maps (tokens, D) to logits (tokens, V).
        targets: int64 (tokens,); :data:`IGNORE_INDEX` is ignored.
        tokens_per_chunk: the number of tokens whose logits exist at once.
        num_items: the divisor of the sum; by default the number of targets that are not ignored.
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
    """Returns the mean cross-entropy, in nats, of ``logits`` (tokens, V) against ``targets`` (tokens,).

    Args:
        logits: (tokens, V).
        targets: int64 (tokens,); :data:`IGNORE_INDEX` is ignored.
        num_items: the divisor of the sum; by default the number of targets that are not ignored.
    """
    return _summed_loss(logits, targets) / _divisor(targets, num_items)


def _summed_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    wide = logits.to(sum_dtype(logits.dtype))
    return F.cross_entropy(wide, targets, ignore_index=IGNORE_INDEX, reduction="sum")


def _divisor(targets: torch.Tensor, num_items: torch.Tensor | int | None) -> torch.Tensor | int:
    return (targets != IGNORE_INDEX).sum() if num_items is None else num_items
