"""What reads one token after the other: the backends' ``advance``, and what they are compared with.

Tokens are given to all of them, rather than each one's own continued, so that all do the work of the same text.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

from bdh.bench.models import naive_logits, naive_weights
from bdh.generate.advance import Advancer, StepInput
from bdh.model.modeling import BDHForCausalLM
from bdh.ops.attention import rotation_table
from bdh.ops.eager import Layer, layer_norm, layer_step


class Decoder(ABC):
    """A sequence that is continued token by token."""

    name: str

    @abstractmethod
    def read(self, token: int) -> torch.Tensor:
        """The logits (V,) after one more token."""


class StateDecoder(Decoder):
    """One sequence or several, whose states a backend advances.

    Args:
        settings: how, as :class:`bdh.generate.advance.Advancer` takes them.
    """

    def __init__(self, model: BDHForCausalLM, name: str = "", *, num_sequences: int = 1, **settings: Any):
        self.name, self.vocab_size = name, model.config.vocab_size
        self.advancer = Advancer(model, **settings)
        self.states = [self.advancer.new_state() for _ in range(num_sequences)]

    @property
    def description(self) -> str:
        return self.advancer.description

    def read(self, token: int) -> torch.Tensor:
        return self.read_each([token])[0]

    def read_each(self, tokens: Sequence[int]) -> torch.Tensor:
        """The logits (B, V) of the first B sequences, after one more token of each."""
        inputs = [StepInput(state, [token]) for state, token in zip(self.states, tokens, strict=False)]
        return torch.stack([row for row in self.advancer.advance(inputs) if row is not None])

    def read_prompt(self, tokens: Sequence[int]) -> torch.Tensor:
        """The logits (V,) after the last of the tokens, of a text that begins with them."""
        state = self.states[0]
        state.clear()
        (logits,) = self.advancer.advance([StepInput(state, tokens)])
        assert logits is not None
        return logits


class AllocatingDecoder(Decoder):
    """The dense recurrent step as it is commonly written: each token makes a new state, S + k v^T."""

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
    """``ops/naive.py`` over the last ``context`` tokens, again for each token."""

    def __init__(self, model: BDHForCausalLM, context: int, text: Sequence[int] = ()):
        self.name = f"ops/naive.py, the last {context} tokens recomputed"
        self.model, self.weights = model, naive_weights(model)
        self.text = deque(text, maxlen=context)

    def read(self, token: int) -> torch.Tensor:
        self.text.append(token)
        return naive_logits(self.model, torch.tensor([list(self.text)]), self.weights)[0, -1]


class Gpt2Decoder(Decoder):
    """A GPT-2 of about 26M parameters in transformers with its KV cache: 8 layers, width 512, 8 heads.

    Its forward pass is called directly, which spares the overhead of ``generate``. The cache is the one that
    transformers takes by default, and its attention PyTorch's own.
    """

    def __init__(self, vocab_size: int, text: Sequence[int], *, n_layer: int = 8, n_embd: int = 512, n_head: int = 8):
        config = GPT2Config(
            vocab_size=vocab_size,
            n_positions=2 * max(512, len(text)),
            n_layer=n_layer,
            n_embd=n_embd,
            n_head=n_head,
            bos_token_id=0,
            eos_token_id=0,
            attn_implementation="sdpa",  # type: ignore[call-arg]  # transformers takes it for every model
        )
        self.model = GPT2LMHeadModel(config).eval()
        millions = sum(weight.numel() for weight in self.model.parameters()) / 1e6
        self.name = f"GPT-2 of {millions:.1f}M in transformers, KV cache"
        self.cache = DynamicCache(config=config)
        self._read(list(text))

    def read(self, token: int) -> torch.Tensor:
        return self._read([token])

    @torch.inference_mode()
    def _read(self, tokens: list[int]) -> torch.Tensor:
        output = self.model(torch.tensor([tokens]), past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return output.logits[0, -1]
