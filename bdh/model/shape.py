"""Which sizes and half-lives of a model are possible. Apart from its configuration, which is slow to import."""

import math

Decay = list[float | int | None] | float | int | None


def shape_faults(n_embd: int, n_head: int, n_layer: int, multiplier: int, vocab_size: int) -> list[str]:
    """What is wrong with the sizes of a model, one sentence a fault; empty where they fit together."""
    sizes = {
        "n_embd": n_embd,
        "n_head": n_head,
        "n_layer": n_layer,
        "mlp_internal_dim_multiplier": multiplier,
        "vocab_size": vocab_size,
    }
    faults = [f"{name} is {size}: must be at least 1" for name, size in sizes.items() if size < 1]
    if faults:
        return faults
    neurons = n_embd * multiplier
    if neurons % n_head:
        return [
            f"n_embd * mlp_internal_dim_multiplier = {n_embd} * {multiplier} = {neurons} neurons cannot be split "
            f"over n_head = {n_head} heads: {neurons} % {n_head} = {neurons % n_head}, must be 0"
        ]
    if neurons // n_head % 2:
        return [
            f"n_embd * mlp_internal_dim_multiplier / n_head = {n_embd} * {multiplier} / {n_head} = "
            f"{neurons // n_head} neurons in a head: must be even, since rotary positions turn pairs of neurons"
        ]
    return []


def half_lives_of_heads(decay: Decay, n_head: int) -> list[float] | None:
    """The tokens in which the state of each head halves; infinite for a head that never forgets.

    One number is the half-life of the first head, and each further head has twice that of the one before, so that
    the heads see from near to far: geometric, as ALiBi's slopes (arXiv 2108.12409, section 3) and RetNet's decays
    (arXiv 2307.08621, eq. 8) are.
    """
    if decay is None:
        return None
    if isinstance(decay, list):
        return [math.inf if each is None else float(each) for each in decay]
    return [float(decay) * 2**head for head in range(n_head)]


def decay_fault(decay: Decay, n_head: int) -> str | None:
    """What ``decay`` must be, where it is not; None where it is right."""
    if isinstance(decay, list) and len(decay) != n_head:
        return f"one half-life for each of the n_head = {n_head} heads, or a single number"
    given = decay if isinstance(decay, list) else [decay]
    if all(each is None or 0 < each < math.inf for each in given):
        return None
    return "half-lives in tokens, numbers above 0, or null where nothing is forgotten"


class DerivedSizes:
    """What follows from the fields of a configuration, for the two classes that have these."""

    n_embd: int
    n_head: int
    n_layer: int
    mlp_internal_dim_multiplier: int
    decay: Decay

    @property
    def neurons_per_head(self) -> int:
        """N."""
        return self.n_embd * self.mlp_internal_dim_multiplier // self.n_head

    @property
    def half_lives(self) -> list[float] | None:
        """Of each head's state, in tokens; None where the model has no decay."""
        return half_lives_of_heads(self.decay, self.n_head)

    @property
    def state_bytes_per_sequence(self) -> int:
        """Bytes of one sequence's float32 state, at any length of text."""
        return self.n_layer * self.n_head * self.neurons_per_head * self.n_embd * 4
