"""Linear attention in its three equivalent forms, and the rotation of its queries and keys.

With strictly causal masking, no softmax and no scale, attention is a sum of outer products:

    a_t = sum_{s < t} (q_t . k_s) v_s = q_t @ S_t        S_{t+1} = S_t + k_t v_t^T        k = q

It can therefore be computed from all scores at once (parallel), with the state S carried from chunk to chunk (chunked),
or token by token (recurrent). The forms differ only in rounding.

In every function ``q`` is (B, H, T, N), already rotated; ``v`` is (B, T, D), shared by the heads; ``state`` is S,
(B, H, N, D) in float32 (float64 if q is), or None for zeros; ``decay_mask`` tells where documents start and how fast
the state decays, or is None if all earlier tokens count alike. The functions return ``a`` (B, H, T, D) in the dtype of
S, which the following layer norm needs, and the new state, or None unless ``keep_state``.

Documents and decay are weights on the recurrence (:class:`DecayMask`). If token t starts a document, the state is
cleared before it. The update is

    S_{t+1} = g S_t + k_t v_t^T        g = 2^(-1 / half-life), one for each head

so token s < t of the same document contributes to token t with weight g^(t - 1 - s), which is 1 for the nearest token.
This is the decay of RetNet (arXiv 2307.08621, eq. 5). The weights are computed as powers of differences of positions,
never as quotients of powers, so that they cannot overflow.

A pair of neurons is rotated by ``position * frequency`` turns, of which only the fraction matters. In float32 this
product is off by a 64th of a turn at position 10^6; in float64 it is accurate to 4e-8 of a turn at position 10^9. The
fraction is therefore computed in float64 and rounded afterwards.
"""

import math
from typing import NamedTuple

import torch

from bdh.ops import ATTENTION_FORMS


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of sums over a whole text, such as the state, for tensors of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class DecayMask(NamedTuple):
    """What determines the weights of earlier tokens: document starts, decay and padding. Each can be None.

    Attributes:
        starts: bool (B, T): True for the first token of a document.
        half_lives: (H,), in tokens: the half-life of each head's state; inf for a head that never forgets.
        mask: bool (B, T): False for padding, which does not count in distances.
    """

    starts: torch.Tensor | None = None
    half_lives: torch.Tensor | None = None
    mask: torch.Tensor | None = None

    def part(self, sequences: slice, heads: slice, tokens: slice) -> "DecayMask":
        """Returns the part for some sequences, heads and tokens."""
        starts, mask = (None if each is None else each[sequences, tokens] for each in (self.starts, self.mask))
        return DecayMask(starts, None if self.half_lives is None else self.half_lives[heads], mask)

    def weights(self, num_tokens: int, device: torch.device) -> "DecayWeights":
        """Returns the weights of ``num_tokens`` tokens for each other and for the state."""
        T = num_tokens
        clock = torch.arange(T, device=device)[None]  # the number of tokens before each one
        total = torch.full((1,), T, device=device)
        if self.mask is not None and self.half_lives is not None:
            clock = self.mask.long().cumsum(1) - self.mask.long()
            total = self.mask.sum(1)
        clock, total = clock[:, None], total[:, None, None]  # (B or 1, 1, T), (B or 1, 1, 1)
        is_before = torch.ones(T, T, dtype=torch.bool, device=device).tril(-1)
        between = self._decayed(clock[..., :, None] - clock[..., None, :] - 1) * is_before
        to_end = self._decayed(total - clock - 1)
        from_state, through = self._decayed(clock), self._decayed(total)
        if self.starts is not None:
            document = self.starts.long().cumsum(1)[:, None]  # (B, 1, T): number 0 continues from the state
            between = between * (document[..., :, None] == document[..., None, :])
            to_end = to_end * (document == document[..., -1:])
            from_state = from_state * (document == 0)
            through = through * (document[..., -1:] == 0)
        return DecayWeights(between, from_state[..., None], to_end[..., None], through[..., None])

    def _decayed(self, distance: torch.Tensor) -> torch.Tensor:
        """Returns the weights for distances (..., H or 1, T) or (..., H or 1, T, T)."""
        if self.half_lives is None:
            return torch.ones_like(distance, dtype=torch.float32)
        half_lives = self.half_lives.view(-1, *[1] * (distance.ndim - 2))
        # Negative distances belong to later tokens and padding, whose weights are not used.
        return torch.exp2(-distance.clamp_min(0) / half_lives)


class DecayWeights(NamedTuple):
    """The weights of tokens for each other, and between tokens and the states before and after them; 1 without loss.

    B and H are 1 if the weights are the same for all sequences or heads.
    """

    between: torch.Tensor  # (B, H, T, T): of each earlier token for each token
    from_state: torch.Tensor  # (B, H, T, 1): of the earlier state for each token
    to_end: torch.Tensor  # (B, H, T, 1): of each token in the new state
    through: torch.Tensor  # (B, H, 1, 1): of the earlier state in the new state


def weighted(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Returns ``values`` times ``weights``, but 0 for a weight of 0 even if the value is infinite or NaN."""
    return torch.where(weights == 0, 0.0, values * weights.to(values.dtype))


def choose_form(requested: str, num_tokens: int, width: int, *, has_state: bool, chunk_size: int = 128) -> str:
    """Returns the attention form to use: ``requested``, or for "auto" the one with the least work.

    A single token that continues a state is a recurrent step. Otherwise, T tokens take T^2 (N + D) multiplications per
    head in the parallel form, and T C (N + D) + 2 T N D in chunks of C tokens. If N is much larger than D, parallel
    takes fewer up to T = C + 2 D. Measured on 2 CPU cores, the two are within a tenth of each other at that length; at
    twice the length, chunked is about twice as fast, unless the state is too large for the processor's cache (D = 256,
    N = 8,192).

    Raises:
        ValueError: ``requested`` is not a form.
    """
    if requested not in ATTENTION_FORMS:
        raise ValueError(f"attention form {requested!r} is unknown: must be one of {', '.join(ATTENTION_FORMS)}")
    if requested != "auto":
        return requested
    if num_tokens == 1 and has_state:
        return "recurrent"
    if torch.compiler.is_exporting():  # one program for all lengths: the number of chunks would be fixed in it
        return "parallel"
    return "parallel" if num_tokens <= chunk_size + 2 * width else "chunked"


def attend(
    q: torch.Tensor,
    v: torch.Tensor,
    state: torch.Tensor | None = None,
    *,
    form: str = "auto",
    chunk_size: int = 128,
    decay_mask: DecayMask | None = None,
    keep_state: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Computes attention of rotated queries over values and an earlier state.

    Args:
        q: (B, H, T, N), the queries, which are also the keys.
        v: (B, T, D), the values.
        state: (B, H, N, D), the state of the tokens before, or None. With ``keep_state`` and without gradients, the
            recurrent form updates it in place.
        form: one of :data:`bdh.ops.ATTENTION_FORMS`.
        chunk_size: the number of tokens in a chunk of the chunked form.
        decay_mask: document starts, decay and padding; None if all earlier tokens count alike.
        keep_state: whether to return the state after the last token.

    Returns:
        ``a`` (B, H, T, D) in float32 (float64 for float64), and the new state or None.

    Raises:
        ValueError: ``form`` is unknown.
    """
    form = choose_form(form, q.shape[2], v.shape[-1], has_state=state is not None, chunk_size=chunk_size)
    if form == "chunked":
        return chunked_attention(q, v, state, chunk_size=chunk_size, decay_mask=decay_mask, keep_state=keep_state)
    of_form = parallel_attention if form == "parallel" else recurrent_attention
    return of_form(q, v, state, decay_mask=decay_mask, keep_state=keep_state)


def parallel_attention(
    q: torch.Tensor,
    v: torch.Tensor,
    state: torch.Tensor | None = None,
    *,
    decay_mask: DecayMask | None = None,
    keep_state: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Computes attention from all T x T scores at once: the fastest form for short texts."""
    weights = None if decay_mask is None else decay_mask.weights(q.shape[2], q.device)
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
    decay_mask: DecayMask | None = None,
    keep_state: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Computes attention with scores within chunks of ``chunk_size`` tokens and the state between them: linear in T."""
    found = []
    chunks = list(zip(q.split(chunk_size, dim=2), v.split(chunk_size, dim=1), strict=True))
    for index, (q_chunk, v_chunk) in enumerate(chunks):
        tokens = slice(index * chunk_size, (index + 1) * chunk_size)
        of_chunk = None if decay_mask is None else decay_mask.part(slice(None), slice(None), tokens)
        is_read_later = keep_state or index < len(chunks) - 1
        a, state = parallel_attention(q_chunk, v_chunk, state, decay_mask=of_chunk, keep_state=is_read_later)
        found.append(a)
    return torch.cat(found, dim=2), state


def recurrent_attention(
    q: torch.Tensor,
    v: torch.Tensor,
    state: torch.Tensor | None = None,
    *,
    decay_mask: DecayMask | None = None,
    keep_state: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Computes attention token by token. With ``keep_state`` and without gradients, ``state`` is updated in place."""
    B, H, T, N = q.shape
    D, dtype = v.shape[-1], sum_dtype(q.dtype)
    has_gradients = torch.is_grad_enabled() and any(t.requires_grad for t in (q, v, state) if t is not None)
    # An exported program must not modify its inputs.
    in_place = (state is None or keep_state) and not has_gradients and not torch.compiler.is_exporting()
    if state is None:
        state = q.new_zeros(B, H, N, D, dtype=dtype)
    flat_state = state.view(B * H, N, D)
    with torch.autocast(q.device.type, enabled=False):
        keys = q.to(dtype).transpose(1, 2).reshape(B, T, H * N)
        values = v.to(dtype)
        starts, kept = _by_token(decay_mask or DecayMask(), B, H, T, dtype)
        found = []
        for t in range(T):
            if starts is not None:
                cleared = starts[:, t]
                flat_state = flat_state.masked_fill_(cleared, 0) if in_place else flat_state.masked_fill(cleared, 0)
            k = keys[:, t].reshape(B * H, N, 1)
            value = values[:, t, None].expand(B, H, D).reshape(B * H, 1, D)
            found.append(torch.bmm(k.transpose(1, 2), flat_state).view(B, H, 1, D))
            if t == T - 1 and not keep_state:
                break
            if kept is not None:
                flat_state = flat_state.mul_(kept[:, t]) if in_place else flat_state * kept[:, t]
            flat_state = flat_state.baddbmm_(k, value) if in_place else torch.baddbmm(flat_state, k, value)
    return torch.cat(found, dim=2), flat_state.view(B, H, N, D) if keep_state else None


def _by_token(
    decay_mask: DecayMask, B: int, H: int, T: int, dtype: torch.dtype
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Returns for each head's state and each token whether it is cleared, and the factor of decay, (B * H, T, 1, 1)."""
    starts = kept = None
    if decay_mask.starts is not None:
        starts = decay_mask.starts[:, None].expand(B, H, T).reshape(B * H, T, 1, 1)
    if decay_mask.half_lives is not None:
        shares = torch.exp2(-1 / decay_mask.half_lives).to(dtype)[None, :, None].expand(B, H, T)
        if decay_mask.mask is not None:
            shares = shares.masked_fill(~decay_mask.mask[:, None], 1)
        kept = shares.reshape(B * H, T, 1, 1)
    return starts, kept


def _attention_within(q: torch.Tensor, v: torch.Tensor, weights: DecayWeights | None) -> torch.Tensor:
    """Computes the attention of the tokens of one block among themselves, (B, H, T, D)."""
    B, H, T, _ = q.shape
    half_is_used = q.dtype == torch.float16 or (
        torch.is_autocast_enabled(q.device.type)
        and torch.get_autocast_dtype(q.device.type) == torch.float16
        and q.dtype != torch.float64
    )
    keys = queries = q
    scale = None
    if half_is_used:
        queries, keys, query_scale, key_scale = scaled_for_float16(q, neurons=-1, tokens=-2)
        scale = query_scale * key_scale
    scores = queries @ keys.transpose(-1, -2)  # (B, H, T, T)
    scores = scores.tril(-1) if weights is None else scores * weights.between.to(scores.dtype)
    values = v.to(scores.dtype)
    if torch.compiler.is_exporting():  # T can be a symbol there, and the reshape below to H * T is not supported
        a = scores @ values[:, None]
    else:  # one (H*T, T) @ (T, D) product for each sequence, without repeating v for the heads
        a = (scores.view(B, H * T, T) @ values).view(B, H, T, -1)
    a = a.to(sum_dtype(a.dtype))
    return a if scale is None else a * scale


def scaled_for_float16(
    q: torch.Tensor, *, neurons: int, tokens: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scales queries and keys so that scores and their sums stay within the range of float16.

    By Cauchy-Schwarz every score q_t . k_s is at most |q_t| max_s |k_s|. After dividing by these norms and by a further
    sqrt(T), no sum of T scores times a layer-normed value, which is at most sqrt(D), exceeds sqrt(T D). That is below
    65,504 up to T = 10^7 at D = 256. The caller multiplies the factors back in float32. Since they cancel exactly, they
    are constants for the gradients.

    Args:
        q: the queries.
        neurons: the dimension of q that holds the neurons; its size is 1 in the factors.
        tokens: the dimension of q that holds the tokens; its size is 1 in the factor of the keys.

    Returns:
        The scaled queries and keys, and the factors that were divided out of each.
    """
    norms = torch.linalg.vector_norm(q.detach(), dim=neurons, keepdim=True, dtype=torch.float32)
    norms = norms.clamp_min(1e-6)  # the norm is 0 for a token at which no neuron fires
    largest = norms.amax(dim=tokens, keepdim=True)
    query_scale = norms * q.shape[tokens] ** 0.5
    wide = q.float()
    return (wide / query_scale).half(), (wide / largest).half(), query_scale, largest


def turns_per_token(num_neurons: int, theta: float, device: torch.device | str = "cpu") -> torch.Tensor:
    """Returns the frequency of each pair of a head's N neurons in turns per token, float64 (N/2,)."""
    if torch.compiler.is_exporting():  # ONNX rounds scalar constants to float32, but not tensors
        turns = [theta ** (-2 * i / num_neurons) / (2 * math.pi) for i in range(num_neurons // 2)]
        return torch.tensor(turns, dtype=torch.float64, device=device)
    pair = torch.arange(num_neurons // 2, dtype=torch.float64, device=device)
    return theta ** (-2 * pair / num_neurons) / (2 * math.pi)


def rotation_table(
    positions: torch.Tensor, num_neurons: int, theta: float, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Returns the rotation of every pair of neurons at every position, as unit complex numbers.

    Args:
        positions: int64 (...,), the absolute positions.
        num_neurons: N, the number of neurons in a head.
        theta: the base of the frequencies.
        dtype: float64 gives complex128, and any other dtype complex64, since half-precision phases would be off by
            0.01 turns.

    Returns:
        (..., N/2) complex. Under torch.compile and torch.export it is (..., N/2, 2), cosine and sine, because their
        backends, such as ONNX, do not support complex numbers.
    """
    device = positions.device
    # MPS has no float64. The table is small, so it is computed on the CPU.
    exact_device = torch.device("cpu") if device.type == "mps" else device
    frequencies = turns_per_token(num_neurons, theta, exact_device)
    turns = torch.remainder(positions.to(exact_device)[..., None].double() * frequencies, 1.0)
    angles = (2 * math.pi * turns).to(torch.float64 if dtype == torch.float64 else torch.float32).to(device)
    if torch.compiler.is_compiling():
        return torch.stack((angles.cos(), angles.sin()), dim=-1)
    return torch.polar(torch.ones_like(angles), angles)


def rotate(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Rotates the pairs (2i, 2i + 1) of ``x`` (..., N): (a, b) becomes (a cos - b sin, b cos + a sin), in x's dtype.

    It is computed as a complex product, in one sweep over memory. Unless compiled, separate products would take six.

    Args:
        x: (..., N).
        table: from :func:`rotation_table`, broadcastable to the pairs of x.
    """
    pairs = x.to(sum_dtype(x.dtype)).unflatten(-1, (-1, 2))
    if table.is_complex():
        return torch.view_as_real(torch.view_as_complex(pairs) * table).flatten(-2).to(x.dtype)
    (a, b), (cos, sin) = pairs.unbind(-1), table.unbind(-1)
    return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2).to(x.dtype)


class Rotation(NamedTuple):
    """Cosine and sine of each pair of neurons at each position that occurs, with the column of each token.

    With documents and padding the positions differ between sequences, but most occur in several. A table for every
    token would be as large as the activations of the neurons.
    """

    cos: torch.Tensor  # (N/2, positions)
    sin: torch.Tensor
    places: torch.Tensor | None  # int64 (B, T): the column of each token; None if token t has column t in all sequences

    def of_block(self, sequences: slice, tokens: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the cosine and sine for some sequences and tokens, (N/2, 1 or G, C)."""
        if self.places is None:
            # Copied, because torch.compile would compile again for views with other memory offsets.
            return self.cos[:, None, tokens].contiguous(), self.sin[:, None, tokens].contiguous()
        places = self.places[sequences, tokens]
        return self.cos[:, places], self.sin[:, places]

    def runs(self, sequences: slice, tokens: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the runs of a block's G * C tokens with consecutive columns in the table, each within one sequence.

        Returns:
            The first token of each run, followed by the number of tokens, int64 (runs + 1,); and the column of each
            run's first token, int64 (runs,).
        """
        G, C = sequences.stop - sequences.start, tokens.stop - tokens.start
        if self.places is None:
            return torch.arange(G + 1, device="cpu") * C, torch.full((G,), tokens.start, device="cpu")
        places = self.places[sequences, tokens].flatten()
        begins = torch.ones_like(places, dtype=torch.bool)
        begins[1:] = places[1:] != places[:-1] + 1
        begins[::C] = True
        starts = begins.nonzero().flatten()
        return torch.cat([starts, starts.new_tensor([G * C])]), places[starts]


def make_rotation(
    positions: torch.Tensor, num_neurons: int, theta: float, dtype: torch.dtype, *, bound: int | None = None
) -> Rotation:
    """Returns the table for the given positions, in float64 if ``dtype`` is float64, and otherwise in float32.

    Args:
        positions: int64 (1 or B, T), the absolute positions.
        num_neurons: N, the number of neurons in a head.
        theta: the base of the frequencies.
        dtype: the dtype of the model.
        bound: an upper bound (exclusive) of the positions, if known. It avoids synchronizing with a GPU.
    """
    places = None
    if len(positions) > 1:
        if bound is None or positions.device.type == "cpu":
            positions, places = torch.unique(positions, return_inverse=True)
        else:  # the number of distinct positions is only known after synchronizing with the device
            positions, places = torch.arange(bound, device=positions.device), positions
    table = rotation_table(positions.flatten(), num_neurons, theta, dtype).t()
    return Rotation(table.real.contiguous(), table.imag.contiguous(), places)
