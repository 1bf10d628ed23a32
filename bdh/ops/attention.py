"""Linear attention in its three equal forms.

With strictly causal masking, no softmax and no scale, attention is a sum of outer products:

    a_t = sum_{s < t} (q_t . k_s) v_s = q_t @ S_t        S_{t+1} = S_t + k_t v_t^T        k = q

so it can be computed from all scores at once (parallel), with the state S carried from chunk to chunk
(chunked), or token by token (recurrent). The forms differ in rounding only.

In every function ``q`` is (B, H, T, N), already rotated; ``v`` is (B, T, D), shared by the heads; ``state``
is S, (B, H, N, D) in float32 (float64 where q is), or None for zeros; ``reach`` says where documents start and
how fast the state decays, and is None where a token sees all of the past alike. They return ``a`` (B, H, T, D)
in the dtype of S, which the layer norm behind it wants, and the new state, or None unless ``keep_state``.
"""

import torch

from bdh.ops.reach import Reach, Weights, weighted


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over a whole text are kept, for tensors of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def parallel_attention(
    q: torch.Tensor,
    v: torch.Tensor,
    state: torch.Tensor | None = None,
    *,
    reach: Reach | None = None,
    keep_state: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """All T x T scores at once: the fastest form for short texts."""
    weights = None if reach is None else reach.weights(q.shape[2], q.device)
    a = _attention_within(q, v, weights)
    if state is None and not keep_state:
        return a, None
    with torch.autocast(q.device.type, enabled=False):
        wide_q, wide_v = q.to(a.dtype), v.to(a.dtype)
        if state is not None:
            read = wide_q @ state
            a = a + (read if weights is None else weighted(read, weights.from_state))
        new_state = None
        if keep_state:
            keys = wide_q if weights is None else wide_q * weights.to_end.to(a.dtype)
            new_state = keys.transpose(-1, -2) @ wide_v[:, None]  # (B, H, N, D)
            if state is not None:
                new_state = (state if weights is None else weighted(state, weights.through)) + new_state
    return a, new_state


def chunked_attention(
    q: torch.Tensor,
    v: torch.Tensor,
    state: torch.Tensor | None = None,
    *,
    chunk_size: int,
    reach: Reach | None = None,
    keep_state: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scores inside chunks of ``chunk_size`` tokens, the state between them: linear in T."""
    parts = []
    chunks = list(zip(q.split(chunk_size, dim=2), v.split(chunk_size, dim=1), strict=True))
    reaches = [None] * len(chunks) if reach is None else list(reach.split(q.shape[2], chunk_size))
    for index, (q_chunk, v_chunk) in enumerate(chunks):
        state_is_read_later = keep_state or index < len(chunks) - 1
        a, state = parallel_attention(q_chunk, v_chunk, state, reach=reaches[index], keep_state=state_is_read_later)
        parts.append(a)
    return torch.cat(parts, dim=2), state


def recurrent_attention(
    q: torch.Tensor,
    v: torch.Tensor,
    state: torch.Tensor | None = None,
    *,
    reach: Reach | None = None,
    keep_state: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Token by token. With ``keep_state`` and without gradients, a given ``state`` is updated in place."""
    B, H, T, N = q.shape
    D = v.shape[-1]
    dtype = sum_dtype(q.dtype)
    has_gradients = torch.is_grad_enabled() and any(t.requires_grad for t in (q, v, state) if t is not None)
    may_write = (
        not has_gradients and not torch.compiler.is_exporting()
    )  # what is exported leaves its inputs as they are
    if state is None:
        state = q.new_zeros(B, H, N, D, dtype=dtype)
        in_place = may_write
    else:
        in_place = keep_state and may_write
    flat_state = state.view(B * H, N, D)
    with torch.autocast(q.device.type, enabled=False):
        rows = q.to(dtype).transpose(1, 2).reshape(B, T, H * N)
        values = v.to(dtype)
        starts, kept = _by_token(reach or Reach(), B, H, T, dtype)
        parts = []
        for t in range(T):
            if starts is not None:
                cleared = starts[:, t]
                flat_state = flat_state.masked_fill_(cleared, 0) if in_place else flat_state.masked_fill(cleared, 0)
            k = rows[:, t].reshape(B * H, N, 1)
            value = values[:, t, None].expand(B, H, D).reshape(B * H, 1, D)
            parts.append(torch.bmm(k.transpose(1, 2), flat_state).view(B, H, 1, D))
            if t == T - 1 and not keep_state:
                break
            if kept is not None:
                flat_state = flat_state.mul_(kept[:, t]) if in_place else flat_state * kept[:, t]
            flat_state = flat_state.baddbmm_(k, value) if in_place else torch.baddbmm(flat_state, k, value)
    return torch.cat(parts, dim=2), flat_state.view(B, H, N, D) if keep_state else None


def _by_token(
    reach: Reach, B: int, H: int, T: int, dtype: torch.dtype
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """For each row of the flat state and each token, (B * H, T, 1, 1): whether it is cleared, and the share kept."""
    starts = kept = None
    if reach.starts is not None:
        starts = reach.starts[:, None].expand(B, H, T).reshape(B * H, T, 1, 1)
    if reach.half_lives is not None:
        shares = torch.exp2(-1 / reach.half_lives).to(dtype)[None, :, None].expand(B, H, T)
        if reach.mask is not None:
            shares = shares.masked_fill(~reach.mask[:, None], 1)
        kept = shares.reshape(B * H, T, 1, 1)
    return starts, kept


def _attention_within(q: torch.Tensor, v: torch.Tensor, weights: Weights | None) -> torch.Tensor:
    """Attention of the tokens of one block among themselves: (B, H, T, D)."""
    B, H, T, _ = q.shape
    half_is_used = q.dtype == torch.float16 or (
        torch.is_autocast_enabled(q.device.type)
        and torch.get_autocast_dtype(q.device.type) == torch.float16
        and q.dtype != torch.float64
    )
    keys = queries = q
    scale = None
    if half_is_used:
        queries, keys, scale = _scaled_for_float16(q)
    scores = queries @ keys.transpose(-1, -2)  # (B, H, T, T)
    scores = scores.tril(-1) if weights is None else scores * weights.between.to(scores.dtype)
    values = v.to(scores.dtype)
    if torch.compiler.is_exporting():  # where T may be a symbol, with which H * T cannot be reasoned about
        a = scores @ values[:, None]
    else:  # one (H*T, T) @ (T, D) product for each sequence: v need not be repeated for the heads
        a = (scores.view(B, H * T, T) @ values).view(B, H, T, -1)
    a = a.to(sum_dtype(a.dtype))
    return a if scale is None else a * scale


def _scaled_for_float16(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries and keys whose scores, and sums of scores, stay in float16's range, and the factor left out.

    By Cauchy-Schwarz every score q_t . k_s is at most |q_t| max_s |k_s|. With those divided out, and a further
    sqrt(T), no score exceeds 1 / sqrt(T), and no sum of T of them times a layer-normed value, which is at most
    sqrt(D), exceeds sqrt(T D): below 65,504 up to T = 10^7 at D = 256. The factor is put back in float32, so
    the result is the unscaled one; since it cancels exactly, it is a constant for the gradients.
    """
    T = q.shape[-2]
    norms = torch.linalg.vector_norm(q.detach(), dim=-1, keepdim=True, dtype=torch.float32)
    norms = norms.clamp_min(1e-6)  # a token for which no neuron fires
    largest = norms.amax(dim=-2, keepdim=True)
    query_scale = norms * T**0.5
    queries, keys = (q.float() / query_scale).half(), (q.float() / largest).half()
    return queries, keys, query_scale * largest
