"""How fast memory can be, and how much of it a token has to move."""

from collections.abc import Sequence

import torch

from bdh.bench.timing import timed
from bdh.bench.weights import Density
from bdh.model.configuration import BDHConfig

_LARGEST_CACHE_BYTES = 1 << 30  # more than any processor's
_CACHE_LINE_BYTES = 64


def copy_bandwidth(num_bytes: int = _LARGEST_CACHE_BYTES, rounds: int = 5) -> float:
    """Bytes read and bytes written, together, in a second, where a buffer that fits into no cache is copied."""
    source, target = torch.ones(num_bytes // 4), torch.zeros(num_bytes // 4)
    timing = timed({"copy": lambda: target.copy_(source)}, rounds=rounds)["copy"]
    return 2 * source.nbytes / timing.median


def bytes_of_a_token(
    config: BDHConfig, densities: Sequence[Density], *, weight_bytes: int = 4, state_bytes: int = 4
) -> dict[str, float]:
    """Bytes that a token has to move, by what they belong to.

    Args:
        densities: of each pass.
        weight_bytes, state_bytes: of one number.
    """
    D, H, N = config.n_embd, config.n_head, config.neurons_per_head
    neurons = H * N
    return {
        "E, all rows": len(densities) * neurons * D * weight_bytes,
        "state, pairs that fire, read and written": sum(d.pairs for d in densities) * neurons * D * state_bytes * 2,
        "Ev, where x fires": sum(d.x for d in densities) * neurons * D * weight_bytes,
        "Dec, where y fires too": sum(d.xy for d in densities) * neurons * D * weight_bytes,
        "head": config.vocab_size * D * weight_bytes,
    }
