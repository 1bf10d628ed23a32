"""How fast the state of each head fades, as settings say it. (``bdh.ops.attention`` computes with it.)"""

import math

Decay = list[float | int | None] | float | int | None


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
