"""What an engine may use, and how it runs its steps, as settings; and what it counts."""

from dataclasses import dataclass, field

from bdh.ops import StepPath, Storage
from bdh.validation import NonNegativeInt, PositiveInt, Settings


@dataclass
class EngineConfig(Settings):
    path: StepPath = "auto"
    """Code of the steps: kernels (sparse, on the CPU), torch, or auto, which takes the kernels where they run."""
    weights: Storage = "float32"
    """The kernels' weights: float32, or bfloat16 in half the memory."""
    state: Storage = "float32"
    """The kernels' states: float32, or bfloat16 in half the memory, which drifts with the length of the text."""
    window: PositiveInt | None = None
    """Attend to the last so many tokens only, for models that were trained on short blocks. None for all of the text."""
    max_state_bytes: PositiveInt | None = None
    """Bytes of the states of all running sequences. None takes half of the memory that is free at the start."""
    max_running: PositiveInt = 64
    """Sequences that run at once, at most."""
    tokens_per_step: PositiveInt = 64
    """Tokens in a step: one for each sequence that is being continued, the rest for prompts. More reads prompts a little
    faster, and makes the others wait longer for their next token."""
    prefix_cache_bytes: NonNegativeInt = 0
    """Bytes of states that are kept for prompts with the same beginning; 0 for no such cache."""


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
