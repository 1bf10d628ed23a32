"""Decoders that continue sequences token by token: the toolkit's, and those that it is compared with."""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from typing import Any

import torch
from transformers import Cache, DynamicCache, GPT2LMHeadModel, StaticCache

from bdh.bench.common import gpt2_config, naive_logits, naive_weights
from bdh.generate.advance import Advancer, StepInput
from bdh.model.modeling import BDHForCausalLM
from bdh.ops.attention import rotation_table
from bdh.ops.eager import Layer, layer_norm, layer_step

TOLERANCE = 1e-4
"""The allowed difference of two logits. If their standard deviation is above 1, it is multiplied by that."""
GPT2_CHUNK = 2048
"""Number of tokens that a GPT-2 reads in a forward pass. More are hardly faster, and their mask grows with the cache."""


def allowed_difference(logits: torch.Tensor) -> float:
    """Returns the allowed difference from these logits, by :data:`TOLERANCE`."""
    return TOLERANCE * max(1.0, logits.std().item())


class Decoder(ABC):
    """Continues a sequence token by token."""

    name: str

    @abstractmethod
    def read(self, token: int) -> torch.Tensor:
        """Reads one more token, and returns the logits (V,) after it."""


class StateDecoder(Decoder):
    """Continues one or several sequences, whose states a backend advances.

    Args:
        settings: the arguments of :class:`bdh.generate.advance.Advancer`.
    """

    def __init__(self, model: BDHForCausalLM, name: str = "", *, num_sequences: int = 1, **settings: Any):
        self.name, self.advancer = name, Advancer(model, **settings)
        self.states = [self.advancer.new_state() for _ in range(num_sequences)]

    def read(self, token: int) -> torch.Tensor:
        return self.read_each([token])[0]

    def read_each(self, tokens: Sequence[int]) -> torch.Tensor:
        """Reads one more token in each of the first B sequences, and returns their logits (B, V)."""
        inputs = [StepInput(state, [token]) for state, token in zip(self.states, tokens, strict=False)]
        return torch.stack([logits for logits in self.advancer.advance(inputs) if logits is not None])

    def read_prompt(self, tokens: Sequence[int]) -> torch.Tensor:
        """Begins a text with these tokens, and returns the logits (V,) after the last one."""
        self.states[0].clear()
        return self.read_on(tokens)

    def read_on(self, tokens: Sequence[int]) -> torch.Tensor:
        """Reads more tokens, and returns the logits (V,) after the last one."""
        (logits,) = self.advancer.advance([StepInput(self.states[0], tokens)])
        assert logits is not None
        return logits

    @property
    def num_tokens(self) -> int:
        """The number of tokens that the first sequence has read."""
        return self.states[0].position

    @property
    def memory_bytes(self) -> int:
        """The size of the first sequence's state."""
        return self.states[0].nbytes


class AllocatingDecoder(Decoder):
    """The dense recurrent step as it is commonly written: each token allocates a new state, S + k v^T."""

    name = "dense recurrent, a new state for each token"

    def __init__(self, model: BDHForCausalLM):
        config = model.config
        self.model, self.position = model, 0
        shape = (config.n_head, config.neurons_per_head, config.n_embd)
        self.states = [torch.zeros(shape) for _ in range(config.n_layer)]
        lives = config.half_lives
        self._kept = None if lives is None else torch.exp2(-1 / torch.tensor(lives))[:, None, None]

    @torch.no_grad()
    def read(self, token: int) -> torch.Tensor:
        model, config = self.model, self.model.config
        table = rotation_table(torch.tensor([self.position]), config.neurons_per_head, config.rope_theta)
        v = layer_norm(model.embed(torch.tensor([token])), config.layer_norm_eps)  # (1, D)
        layer = Layer(model.encoder, list(model.encoder_v), model.decoder)
        for index, state in enumerate(self.states):

            def attention(q: torch.Tensor, v: torch.Tensor, state: torch.Tensor = state) -> tuple[torch.Tensor, ...]:
                kept = state if self._kept is None else state * self._kept
                return q @ state, kept + q.transpose(1, 2) * v

            step = layer_step(v, layer, attention, table, eps=config.layer_norm_eps, dtype=torch.float32)  # type: ignore[arg-type, var-annotated]
            v, self.states[index] = step
        self.position += 1
        return model.lm_head(v)[0]


class RecomputingDecoder(Decoder):
    """Computes ``ops/naive.py`` over the last ``context`` tokens again for each token."""

    def __init__(self, model: BDHForCausalLM, context: int, text: Sequence[int] = ()):
        self.name = f"ops/naive.py, the last {context} tokens recomputed"
        self.model, self.weights = model, naive_weights(model)
        self.text = deque(text, maxlen=context)

    def read(self, token: int) -> torch.Tensor:
        self.text.append(token)
        return naive_logits(self.model, torch.tensor([list(self.text)]), self.weights)[0, -1]


class Gpt2Decoder(Decoder):
    """A GPT-2 of transformers with a KV cache.

    Its forward pass is called directly, without the overhead of ``generate``. It uses PyTorch's attention.

    Args:
        model: a model from :func:`made_gpt2`.
        text: the tokens to read first.
        cache: the KV cache; by default an empty one of the type that transformers uses by default.
    """

    def __init__(self, model: GPT2LMHeadModel, text: Sequence[int] = (), cache: Cache | None = None, name: str = ""):
        self.model, self.cache = model, DynamicCache(config=model.config) if cache is None else cache
        self.name = name or f"GPT-2 of {num_millions(model):.3g}M in transformers, KV cache"
        if text:
            self.read_on(text)

    def read(self, token: int) -> torch.Tensor:
        return self._read([token])

    def read_on(self, tokens: Sequence[int]) -> torch.Tensor:
        """Reads more tokens, and returns the logits (V,) after the last one."""
        for start in range(0, len(tokens), GPT2_CHUNK):
            logits = self._read(list(tokens[start : start + GPT2_CHUNK]))
        return logits

    @torch.inference_mode()
    def with_static_cache(self, num_more: int, name: str = "") -> "Gpt2Decoder":
        """Returns the same text in a cache that is allocated for ``num_more`` more tokens, so that they do not copy it."""
        cache = StaticCache(self.model.config, max_cache_len=self.num_tokens + num_more)
        for index, (keys, values) in enumerate(self._keys_and_values()):
            cache.update(keys, values, index)
        return Gpt2Decoder(self.model, cache=cache, name=name)

    @property
    def num_tokens(self) -> int:
        return int(self.cache.get_seq_length())

    @property
    def memory_bytes(self) -> int:
        """The size of the cache."""
        return sum(keys.nbytes + values.nbytes for keys, values in self._keys_and_values())

    def _keys_and_values(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        layers: Sequence[Any] = self.cache.layers
        return [(layer.keys, layer.values) for layer in layers]

    @torch.inference_mode()
    def _read(self, tokens: list[int]) -> torch.Tensor:
        output = self.model(torch.tensor([tokens]), cache=self.cache, use_cache=True, logits_to_keep=1)
        return output.logits[0, -1]


def made_gpt2(vocab_size: int, num_positions: int, shape: tuple[int, int, int], seed: int) -> GPT2LMHeadModel:
    """Returns a GPT-2 with fresh weights. ``shape`` is its layers, width and heads."""
    torch.manual_seed(seed)
    return GPT2LMHeadModel(gpt2_config(vocab_size, num_positions, *shape, dropout=0.0)).eval()


def num_millions(model: torch.nn.Module) -> float:
    """Returns the number of parameters in millions."""
    return sum(weight.numel() for weight in model.parameters()) / 1e6


def reader(decoder: Decoder, tokens: list[int]) -> Callable[[], int]:
    """Returns a function that reads one more token of an endless text, and returns the likeliest next one."""
    text: Iterator[int] = cycle(tokens)
    return lambda: int(decoder.read(next(text)).argmax())
