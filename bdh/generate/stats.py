"""What an engine counts."""

from dataclasses import dataclass, field


@dataclass
class EngineStats:
    """Gauges of what is there now, and counters since the engine was made."""

    running: int = 0
    """Sequences that have a state."""
    waiting: int = 0
    """Requests that have none yet."""
    state_bytes: int = 0
    """Of states in use or promised."""
    prefix_cache_bytes: int = 0
    prompt_tokens: int = 0
    """Read. Those that a stored prefix spared are not among them."""
    generated_tokens: int = 0
    finished: dict[str, int] = field(default_factory=dict)
    """Continuations, by the reason of their end."""
    prefix_cache_hits: int = 0
    prefix_cache_tokens: int = 0
    """Tokens that need not be read."""
    prefix_cache_failures: int = 0
    """Beginnings of prompts that could not be stored, for want of memory say."""
