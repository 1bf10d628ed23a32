"""How the next token is chosen, as settings."""

from dataclasses import dataclass, field
from typing import Any

from bdh.validation import Faults, Settings

_SMALLEST_DIVISOR = 1e-6


@dataclass
class SamplingOptions(Settings):
    max_new_tokens: int = 200
    """Tokens generated at most."""
    temperature: float = 1.0
    """Divides the logits: below 1 sharper, above 1 flatter, 0 takes the likeliest token (greedy)."""
    top_k: int = 0
    """Sample from the k likeliest tokens only; 0 for all."""
    top_p: float = 1.0
    """Sample from the likeliest tokens that together have this probability."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the likeliest one's probability."""
    repetition_penalty: float = 1.0
    """Divides the scores of tokens already in the text; 1 for none."""
    num_beams: int = 1
    """Beams of a beam search; 1 for none."""
    num_return_sequences: int = 1
    """Continuations of each prompt."""
    seed: int | None = None
    """Seed of the sampling: the same seed gives the same text. None for a different one each time."""
    stop: list[str] = field(default_factory=list)
    """Strings that end the text; they are not part of it."""

    def collect_faults(self, faults: Faults) -> None:
        faults.require(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "at least 1 token")
        # The logits divided by less would overflow.
        is_right = self.temperature == 0 or self.temperature >= _SMALLEST_DIVISOR
        allowed = f"0 (greedy) or above; if above, at least {_SMALLEST_DIVISOR:g}"
        faults.require(is_right, "temperature", self.temperature, allowed)
        faults.require(self.top_k >= 0, "top_k", self.top_k, "0 (all tokens) or above")
        faults.require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0, up to 1")
        faults.require(0 <= self.min_p < 1, "min_p", self.min_p, "at least 0 and below 1")
        is_right = self.repetition_penalty >= _SMALLEST_DIVISOR
        allowed = f"above 0, at least {_SMALLEST_DIVISOR:g}"
        faults.require(is_right, "repetition_penalty", self.repetition_penalty, allowed)
        faults.require(self.num_beams >= 1, "num_beams", self.num_beams, "at least 1")
        faults.require(self.num_return_sequences >= 1, "num_return_sequences", self.num_return_sequences, "at least 1")
        is_right = self.seed is None or -(2**63) <= self.seed < 2**64  # what PyTorch takes
        faults.require(is_right, "seed", self.seed, "from -2**63 to 2**64 - 1, or null")
        faults.require(all(self.stop), "stop", self.stop, "strings of at least one character")
        greedy = self.temperature == 0
        faults.require(
            not greedy or self.num_beams > 1 or self.num_return_sequences == 1,
            "num_return_sequences",
            self.num_return_sequences,
            "1 with temperature 0, which always gives the same text",
        )
        faults.require(
            self.num_beams == 1 or self.num_return_sequences <= self.num_beams,
            "num_return_sequences",
            self.num_return_sequences,
            f"at most num_beams, {self.num_beams}",
        )

    def generate_arguments(self) -> dict[str, Any]:
        """The arguments of transformers' ``generate`` that mean the same.

        Neutral values are among them: left out, those of the model's ``generation_config`` would count.
        """
        arguments: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "do_sample": self.temperature > 0,
            "num_beams": self.num_beams,
            "num_return_sequences": self.num_return_sequences,
            "repetition_penalty": self.repetition_penalty,
        }
        if self.temperature > 0:
            arguments |= {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
            arguments["min_p"] = self.min_p or None
        return arguments
