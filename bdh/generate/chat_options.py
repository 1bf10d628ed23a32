"""How replies are sampled, as settings. Apart from the conversation, so that `bdh chat --help` needs no PyTorch."""

from dataclasses import dataclass, field, fields, replace

from bdh.generate.params import SamplingParams
from bdh.validation import Faults, Settings


@dataclass
class ChatOptions(Settings):
    max_tokens: int = 500
    """Tokens of a reply at most."""
    temperature: float = 1.0
    """Divides the logits: below 1 sharper, above 1 flatter, 0 takes the likeliest token (greedy)."""
    top_k: int = 0
    """Sample from the k likeliest tokens only; 0 for all."""
    top_p: float = 1.0
    """Sample from the likeliest tokens that together have this probability."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the likeliest one's probability."""
    repetition_penalty: float = 1.0
    """Divides the scores of tokens already in the conversation; 1 for none."""
    seed: int | None = None
    """Seed of the sampling: the same seed and messages give the same replies. None for different ones each time."""
    stop: list[str] = field(default_factory=list)
    """Strings that end a reply; they are not shown."""

    def collect_faults(self, faults: Faults) -> None:
        faults.require(self.max_tokens >= 1, "max_tokens", self.max_tokens, "at least 1 token")
        replace(self.params(), max_tokens=1).collect_faults(faults)

    def params(self) -> SamplingParams:
        """How the tokens of a reply are drawn."""
        return SamplingParams(**{each.name: getattr(self, each.name) for each in fields(ChatOptions)})
