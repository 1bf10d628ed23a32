"""What an engine may use, and how it runs its steps, as settings."""

from dataclasses import dataclass

from bdh.validation import Faults, Settings


@dataclass
class EngineConfig(Settings):
    path: str = "auto"
    """Code of the steps: kernels (sparse, on the CPU), torch, or auto, which takes the kernels where they run."""
    weights: str = "float32"
    """The kernels' weights: float32, or bfloat16 in half the memory."""
    state: str = "float32"
    """The kernels' states: float32, or bfloat16 in half the memory, which drifts with the length of the text."""
    window: int | None = None
    """Attend to the last so many tokens only, for models that were trained on short blocks. None for all of the text."""
    max_state_bytes: int | None = None
    """Bytes of the states of all running sequences. None takes half of the memory that is free at the start."""
    max_running: int = 64
    """Sequences that run at once, at most."""
    tokens_per_step: int = 64
    """Tokens in a step: one for each sequence that is being continued, the rest for prompts. More reads prompts a little
    faster, and makes the others wait longer for their next token."""
    prefix_cache_bytes: int = 0
    """Bytes of states that are kept for prompts with the same beginning; 0 for no such cache."""

    def collect_faults(self, faults: Faults) -> None:
        faults.require_one_of("path", self.path, ("auto", "kernels", "torch"))
        for name in ("weights", "state"):
            faults.require_one_of(name, getattr(self, name), ("float32", "bfloat16"))
        faults.require(self.window is None or self.window >= 1, "window", self.window, "at least 1, or null")
        is_right = self.max_state_bytes is None or self.max_state_bytes >= 1
        faults.require(is_right, "max_state_bytes", self.max_state_bytes, "at least 1, or null")
        faults.require(self.max_running >= 1, "max_running", self.max_running, "at least 1")
        faults.require(self.tokens_per_step >= 1, "tokens_per_step", self.tokens_per_step, "at least 1")
        faults.require(self.prefix_cache_bytes >= 0, "prefix_cache_bytes", self.prefix_cache_bytes, "at least 0")
