"""What a token's bytes cost at least: the traffic that the sparse form cannot avoid, over what the memory gives."""

import time
from dataclasses import dataclass
from statistics import mean, median

import torch

from bdh.bench.weights import Density
from bdh.model.configuration import BDHConfig

COPY_BYTES = 1 << 30  # far above any cache
_ITEM_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Bandwidth:
    """Bytes a second, of as many threads as torch has."""

    copy: float
    """Copying: what is read and what is written, counted together."""
    read: float


def measure_bandwidth(num_bytes: int = COPY_BYTES, rounds: int = 7) -> Bandwidth:
    """The medians of several rounds, by turns, over a buffer of so many bytes (and a second one)."""
    source = torch.ones(num_bytes // 4)
    target = torch.empty_like(source)
    target.copy_(source)  # so that its pages are there
    copies, reads = [], []
    for _ in range(rounds):
        start = time.perf_counter()
        target.copy_(source)
        copies.append(2 * source.nbytes / (time.perf_counter() - start))
        start = time.perf_counter()
        source.sum()
        reads.append(source.nbytes / (time.perf_counter() - start))
    return Bandwidth(median(copies), median(reads))


@dataclass(frozen=True)
class Traffic:
    """Bytes that must move for one token of one sequence, read and written ones counted alike."""

    encoder: int
    """E, whole, in each pass: which neurons fire is not known before."""
    state: int
    """The rows of pairs that fire: two a pair, read and written."""
    encoder_v: int
    """Rows of Ev where x fires."""
    decoder: int
    """Rows of Dec where x * y is not zero."""
    lm_head: int

    @property
    def total(self) -> int:
        return self.encoder + self.state + self.encoder_v + self.decoder + self.lm_head

    def limit_seconds(self, bandwidth: Bandwidth, batch: int = 1) -> float:
        """The least time of a step of ``batch`` sequences: E and the head once, the rest for each of them.

        Rows of weights that several sequences use are counted for each, so the limit of a batch is not quite one.
        """
        each = self.state + self.encoder_v + self.decoder
        return (self.encoder + self.lm_head + batch * each) / bandwidth.copy


def traffic(config: BDHConfig, found: list[Density], weights: str = "float32", state: str = "float32") -> Traffic:
    """Of a model whose passes are as dense as was found."""
    L, D, V = config.n_layer, config.n_embd, config.vocab_size
    neurons = config.n_head * config.neurons_per_head
    weight_row, state_row = D * _ITEM_BYTES[weights], D * _ITEM_BYTES[state]
    x, pairs, xy = (mean(getattr(each, name) for each in found) for name in ("x", "pairs", "xy"))
    return Traffic(
        encoder=L * neurons * weight_row,
        state=round(L * pairs * neurons) * state_row * 2,
        encoder_v=round(L * x * neurons) * weight_row,
        decoder=round(L * xy * neurons) * weight_row,
        lm_head=V * weight_row,
    )
