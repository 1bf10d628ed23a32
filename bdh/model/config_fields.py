"""The fields of a model configuration and the checks of their values.

Plain Python without transformers, so that the settings of a training run can be checked with it as well.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from bdh.ops import ATTENTION_FORMS
from bdh.words import counted, nearest

ALIASES = {"hidden_size": "n_embd", "num_attention_heads": "n_head", "num_hidden_layers": "n_layer"}
"""The names of sizes in transformers, each with the field that it stands for."""


@dataclass(kw_only=True, repr=False)
class ConfigFields:
    """The fields that :class:`bdh.BDHConfig` and :class:`bdh.model.network.ModelConfig` share.

    :class:`bdh.BDHConfig` documents them.
    """

    vocab_size: int = 256
    n_embd: int = 256
    n_head: int = 4
    n_layer: int = 6
    mlp_internal_dim_multiplier: int = 128
    dropout: float | int = 0.1
    rope_theta: float | int = 65536.0
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    attention_form: str = "auto"
    chunk_size: int = 128
    decay: list[float | int | None] | float | int | None = None
    train_block_size: int | None = None
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    @property
    def neurons_per_head(self) -> int:
        """N, the number of neurons in each head."""
        return self.n_embd * self.mlp_internal_dim_multiplier // self.n_head

    @property
    def half_lives(self) -> list[float] | None:
        """The half-life of each head's state, in tokens: inf for a head that never forgets; None without decay.

        When ``decay`` is a single number, the half-lives double from head to head, so that the heads cover short to
        long ranges. ALiBi's slopes (arXiv 2108.12409, section 3) and RetNet's decays (arXiv 2307.08621, eq. 8) form
        geometric series in the same way.
        """
        if self.decay is None:
            return None
        if isinstance(self.decay, list):
            return [math.inf if each is None else float(each) for each in self.decay]
        return [float(self.decay) * 2**head for head in range(self.n_head)]

    @property
    def state_bytes_per_sequence(self) -> int:
        """The size of one sequence's float32 state, in bytes. It does not depend on the length of the text."""
        return self.n_layer * self.n_head * self.neurons_per_head * self.n_embd * 4

    def value_faults(self) -> list[str]:
        """Returns what is wrong with the values, one sentence for each fault."""
        faults = shape_faults(self.n_embd, self.n_head, self.n_layer, self.mlp_internal_dim_multiplier, self.vocab_size)
        if fault := decay_fault(self.decay, self.n_head):
            faults.append(f"decay is {self.decay}: must be {fault}")
        if not 0 <= self.dropout < 1:
            faults.append(f"dropout is {self.dropout}: must be at least 0 and below 1")
        for name in ("rope_theta", "layer_norm_eps", "initializer_range"):
            if not 0 < getattr(self, name) < math.inf:
                faults.append(f"{name} is {getattr(self, name)}: must be a number above 0")
        if self.chunk_size < 1:
            faults.append(f"chunk_size is {self.chunk_size}: must be at least 1")
        if self.train_block_size is not None and self.train_block_size < 1:
            faults.append(f"train_block_size is {self.train_block_size}: must be at least 1, or None")
        if self.attention_form not in ATTENTION_FORMS:
            faults.append(f"attention_form is {self.attention_form!r}: must be one of {', '.join(ATTENTION_FORMS)}")
        if self.tie_word_embeddings:
            faults.append("tie_word_embeddings is True: must be False, embed and lm_head are separate weights")
        return faults


def name_faults(given: Mapping[str, Any], others: Mapping[str, Any], known: Collection[str]) -> list[str]:
    """Returns what is wrong with names that are not fields, one sentence for each fault.

    A fault is an alias whose value differs from that of its field, or a name that looks like a misspelt field.

    Args:
        given: the fields that were given, with their values.
        others: the names that were given and are not fields, with their values.
        known: the names of all fields.
    """
    faults = []
    for name, value in others.items():
        field = ALIASES.get(name)
        if field is not None:
            if given.get(field, value) != value:
                faults.append(f"{name} is {value} and {field} is {given[field]}: they are the same, give one of them")
        elif near := nearest(name, [*known, *ALIASES], 0.8):
            faults.append(f"{name} is unknown: did you mean {near}?")
    return faults


def shape_faults(n_embd: int, n_head: int, n_layer: int, multiplier: int, vocab_size: int) -> list[str]:
    """Returns what is wrong with the sizes of a model, one sentence for each fault; empty if they fit together."""
    sizes = {
        "n_embd": n_embd,
        "n_head": n_head,
        "n_layer": n_layer,
        "mlp_internal_dim_multiplier": multiplier,
        "vocab_size": vocab_size,
    }
    faults = [f"{name} is {size}: must be at least 1" for name, size in sizes.items() if size < 1]
    neurons = n_embd * multiplier
    if faults or neurons % (2 * n_head) == 0:
        return faults
    if neurons % n_head:
        return [
            f"n_embd * mlp_internal_dim_multiplier = {n_embd} * {multiplier} = {neurons} neurons cannot be split "
            f"over n_head = {n_head} heads: {neurons} % {n_head} = {neurons % n_head}, must be 0"
        ]
    return [
        f"n_embd * mlp_internal_dim_multiplier / n_head = {n_embd} * {multiplier} / {n_head} = "
        f"{neurons // n_head} neurons in a head: must be even, since rotary positions turn pairs of neurons"
    ]


def decay_fault(decay: list[float | int | None] | float | int | None, n_head: int) -> str | None:
    """Returns what ``decay`` must be if it is invalid, and None if it is valid."""
    if isinstance(decay, list) and len(decay) != n_head:
        return f"one half-life for each of the n_head = {counted(n_head, 'head')}, or a single number"
    given = decay if isinstance(decay, list) else [decay]
    if all(each is None or 0 < each < math.inf for each in given):
        return None
    return "half-lives in tokens, numbers above 0, or null where nothing is forgotten"
