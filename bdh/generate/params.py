"""The settings of a request and of an engine, and the statistics of an engine."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Self

from annotated_types import Ge, Le

from bdh.generate.grammar import collect_grammar_faults
from bdh.ops import StateFormat, StepPath, WeightFormat
from bdh.validation import Allowed, Faults, Fraction, NonNegativeInt, PositiveInt, Settings, checked, collect_faults

_LEAST = 1e-6  # dividing logits by a smaller number could overflow
_Temperature = Annotated[
    float, Allowed(lambda t: t == 0 or t >= _LEAST, f"0 (greedy) or above; if above, at least {_LEAST:g}")
]
_Seed = Annotated[int, Allowed(range(-(2**63), 2**64).__contains__, "from -2**63 to 2**64 - 1")]  # as PyTorch
LogprobCount = Annotated[int, Ge(0), Le(100)]


@dataclass
class DrawSettings(Settings):
    """How the next token is sampled. Names and meanings are those of OpenAI's API and of transformers."""

    temperature: _Temperature = 1.0
    """The logits are divided by this: below 1 makes the distribution sharper, above 1 flatter; 0 always takes the
    likeliest token (greedy)."""
    top_k: NonNegativeInt = 0
    """Sample only from the k likeliest tokens; 0: from all."""
    top_p: Annotated[float, Allowed(lambda p: 0 < p <= 1, "above 0, up to 1")] = 1.0
    """Sample only from the likeliest tokens that together have this probability."""
    min_p: Fraction = 0.0
    """Drop tokens whose probability is below this share of the likeliest token's."""
    repetition_penalty: Annotated[float, Allowed(lambda p: p >= _LEAST, f"above 0, at least {_LEAST:g}")] = 1.0
    """The logits of tokens that are already in the text, including the prompt, are divided by this (negative ones
    multiplied); 1: no penalty."""
    seed: _Seed | None = None
    """Seed of the sampling: the same seed gives the same text, whatever else runs. None: a different seed each time."""
    stop: Annotated[list[str], Allowed(all, "strings of at least one character")] = field(default_factory=list)
    """Strings that end the text; the text does not include them."""


@dataclass
class TextSettings(DrawSettings):
    """How the next token is sampled, when the text ends, and what is returned with it."""

    min_tokens: int = 0
    """Least number of generated tokens: before that, neither end tokens nor stop strings end the text."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens that have been generated."""
    frequency_penalty: float = 0.0
    """Subtracted from the logits of a token once for each time that it has been generated."""
    logit_bias: dict[int, float] = field(default_factory=dict)
    """Added to the logits of tokens, by token id; -100 practically forbids a token, 100 practically forces it."""
    stop_token_ids: list[int] = field(default_factory=list)
    """Ids of tokens that end the text, in addition to the model's own; the text does not include them."""
    ignore_eos: bool = False
    """Do not stop at the model's end-of-text token."""
    logprobs: LogprobCount | None = None
    """Return the log-probability of each generated token and of this many likeliest ones, before temperature and
    penalties; 0: of the token alone. None: return none."""
    prompt_logprobs: LogprobCount | None = None
    """The same for each token of the prompt except the first, which is not predicted."""
    echo: bool = False
    """Put the prompt in front of the text."""


@dataclass
class SamplingParams(TextSettings):
    """The settings of a generation request."""

    max_tokens: NonNegativeInt = 200
    """Largest number of generated tokens; 0 only reads the prompt."""
    n: PositiveInt = 1
    """Number of continuations of the prompt, which is read once. The first uses the seed itself, the others derived
    seeds."""
    grammar: dict[str, Any] | None = None
    """A grammar that the text must match: ``{"json_schema": SCHEMA}`` or ``{"regex": PATTERN}``. The text can only end
    where it matches, and ends where nothing can follow, even before ``min_tokens``. If ``max_tokens`` or a stop string
    cuts it off, it is a prefix of a match. To continue from a snapshot in the middle of such a text, set ``"written"``
    to the number of the snapshot's last tokens that belong to the text."""

    def collect_faults(self, faults: Faults) -> None:
        is_right = 0 <= self.min_tokens <= max(0, self.max_tokens)
        faults.require(is_right, "min_tokens", self.min_tokens, "within 0 and max_tokens")
        faults.found += [] if self.grammar is None else collect_grammar_faults(self.grammar)

    def validated(self, vocab_size: int | None = None) -> Self:
        """Returns this object, or raises a ``ValueError`` that lists all faults.

        Args:
            vocab_size: if given, token ids are checked against a vocabulary of this size.
        """
        faults = Faults()
        collect_faults(self, faults)
        for name, ids in (("logit_bias", list(self.logit_bias)), ("stop_token_ids", self.stop_token_ids)):
            if vocab_size is not None and (wrong := [token for token in ids if not 0 <= token < vocab_size]):
                faults.require(False, name, wrong, f"token ids within 0 and {vocab_size - 1}")
        faults.raise_if_any()
        return self

    def seed_of(self, index: int) -> int | None:
        """Returns the seed of a continuation. The first one has ``seed`` itself, the others have derived seeds."""
        if self.seed is None or index == 0:
            return self.seed
        return (self.seed + index * 0x9E3779B97F4A7C15) % 2**63  # steps of the golden ratio: far apart for small seeds


def collect_text_faults(
    settings: TextSettings, faults: Faults, *, max_new_tokens: int, num_return_sequences: int, num_beams: int
) -> None:
    """Collects faults of settings for complete texts, by the names that the command line and transformers use."""
    faults.require(max_new_tokens >= 1, "max_new_tokens", max_new_tokens, "at least 1 token")
    faults.require(num_beams >= 1, "num_beams", num_beams, "at least 1")
    draws_alike = settings.temperature <= 0 and num_beams <= 1 and num_return_sequences != 1
    for is_right, allowed in (
        (num_return_sequences >= 1, "at least 1"),
        (not draws_alike, "1 with temperature 0, which always gives the same text"),
        (num_beams == 1 or num_return_sequences <= num_beams, f"at most num_beams, {num_beams}"),
    ):
        faults.require(is_right, "num_return_sequences", num_return_sequences, allowed)
    if num_beams > 1:
        neutral, shared = TextSettings(), DrawSettings.__dataclass_fields__
        for name in (each.name for each in fields(TextSettings) if each.name not in shared):
            value = getattr(settings, name)
            faults.require(value == getattr(neutral, name), name, value, "left out with num_beams above 1")


_IN_JSON = {
    "stop": "a string or a list of strings",
    "stop_token_ids": "a list of whole numbers",
    "logit_bias": "an object of numbers by token id, each once",
    "grammar": "an object with json_schema or regex, or null",
}


ALIASES = {"max_new_tokens": "max_tokens", "num_return_sequences": "n"}
"""The names of transformers and the command line, and the fields of :class:`SamplingParams` that they stand for."""


def by_own_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns settings with the names of transformers replaced by those of our fields.

    Raises:
        ValueError: a setting is given under both of its names.
    """
    for name, own_name in ALIASES.items():
        if name in settings and own_name in settings:
            raise ValueError(f"{name} is another name for {own_name}, which is also given: give only one of them")
    return {ALIASES.get(name, name): value for name, value in settings.items()}


def params_from(settings: dict[str, Any]) -> SamplingParams:
    """Returns the parameters for a JSON object.

    Raises:
        ValueError: a name is unknown, or a value has the wrong type.
    """
    faults = Faults()
    known = SamplingParams.__dataclass_fields__
    for name in [name for name in settings if name not in known]:
        faults.add(f"{name} is not a sampling parameter: must be one of {', '.join(known)}")
    values = {name: value for name, value in settings.items() if name in known}
    if isinstance(stop := values.get("stop"), str):
        values["stop"] = [stop]
    if isinstance(bias := values.get("logit_bias"), dict):  # keys in JSON are always strings
        values["logit_bias"] = {int(key) if str(key).isdecimal() else key: value for key, value in bias.items()}
        faults.require(len(values["logit_bias"]) == len(bias), "logit_bias", bias, _IN_JSON["logit_bias"])
    params = SamplingParams(**values)
    for fault in checked(params)[1]:
        name = fault.path[0]
        faults.require(fault.is_of_type, name, settings[name], _IN_JSON.get(name, fault.allowed))
    faults.raise_if_any()
    return params


@dataclass
class EngineConfig(Settings):
    path: StepPath = "auto"
    """Implementation of the steps: kernels (sparse, on the CPU), torch, or auto: the kernels if they can run."""
    weights: WeightFormat = "float32"
    """Format of the kernels' weights. float32: as they are in the model. Others round them when they are loaded:
    bfloat16 takes half of the memory, int8 a quarter, int4 a seventh; mixed: the encoder in int8, the rest in int4."""
    state: StateFormat | None = None
    """Format of the kernels' states. float32; or, in about half of the memory, int16, merged by windows of 16 tokens,
    or bfloat16, whose error grows with the length of the text. None: what the model recommends (bdh quantize
    --state), else float32."""
    window: PositiveInt | None = None
    """Attend only to this many last tokens, for models that were trained on short blocks. None: to all of the text."""
    max_state_bytes: PositiveInt | None = None
    """Memory in bytes for the states of all running sequences. None: half of the memory that is free at the start."""
    max_running: PositiveInt = 64
    """Largest number of sequences that run at once."""
    tokens_per_step: PositiveInt = 64
    """Tokens in a step: one for each sequence that is being generated, the rest for prompts. A larger number reads
    prompts a little faster, but other sequences wait longer for their next token."""
    prefix_cache_bytes: NonNegativeInt = 0
    """Memory in bytes for cached states of beginnings that prompts share; 0: no cache."""


@dataclass
class EngineStats:
    """Statistics of an engine: its current load, and counters since it was created."""

    running: int = 0
    """Sequences that have a state."""
    waiting: int = 0
    """Requests that wait for a state."""
    state_bytes: int = 0
    """Bytes of the states that are in use or reserved."""
    prefix_cache_bytes: int = 0
    prompt_tokens: int = 0
    """Prompt tokens read, without those that a stored prefix saved."""
    generated_tokens: int = 0
    finished: dict[str, int] = field(default_factory=dict)
    """Finished continuations by their finish reason."""
    prefix_cache_hits: int = 0
    prefix_cache_tokens: int = 0
    """Prompt tokens that were not read because a stored prefix had them."""
    prefix_cache_failures: int = 0
    """Prefixes that could not be stored, for example because memory ran out."""
