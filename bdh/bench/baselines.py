"""What the sparse kernels are compared with. Each reads one token, and says which one is likeliest to follow.

Tokens are given to all of them, rather than each one's own continued, so that all do the work of the same text.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence

import torch
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

from bdh.bench.weights import naive_logits, naive_weights
from bdh.generate.advance import Advancer, StepInput
from bdh.model.modeling import BDHForCausalLM
from bdh.model.state import SynapticState
from bdh.ops.eager import Layer, layer_norm, layer_step
from bdh.ops.rope import rotation_table


class Decoder(ABC):
    """One sequence that is continued token by token."""

    name: str

    @abstractmethod
    def read(self, token: int) -> torch.Tensor:
        """The logits (V,) behind one more token."""

    def next(self, token: int) -> int:
        """The likeliest token behind one more token: what a greedy loop does."""
        return int(self.read(token).argmax())


class AdvancerDecoder(Decoder):
    """An Advancer with one sequence, or with several that read the same token."""

    def __init__(self, name: str, advancer: Advancer, batch: int = 1):
        self.name, self.advancer = name, advancer
        self.states = [advancer.new_state() for _ in range(batch)]

    def read(self, token: int) -> torch.Tensor:
        return self.read_each([token] * len(self.states))[0]

    def read_each(self, tokens: Sequence[int]) -> list[torch.Tensor]:
        """The logits (V,) of each sequence behind its next token."""
        logits = self.advancer.advance([StepInput(state, [t]) for state, t in zip(self.states, tokens, strict=True)])
        return [row for row in logits if row is not None]

    @property
    def state(self) -> SynapticState:
        return self.states[0]


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
        table = rotation_table(torch.tensor([self.position]), config.neurons_per_head, config.rope_theta, torch.float32)
        v = layer_norm(model.embed(torch.tensor([token])), config.layer_norm_eps)  # (1, D)
        layer = Layer(model.encoder, list(model.encoder_v), model.decoder)
        for index, state in enumerate(self.states):

            def attention(
                q: torch.Tensor, v: torch.Tensor, state: torch.Tensor = state
            ) -> tuple[torch.Tensor, torch.Tensor]:
                kept = state if self._kept is None else state * self._kept
                return q @ state, kept + q.transpose(1, 2) * v

            v, self.states[index] = layer_step(
                v, layer, attention, table, eps=config.layer_norm_eps, dtype=torch.float32
            )
        self.position += 1
        return model.lm_head(v)[0]


class RecomputingDecoder(Decoder):
    """``ops/naive.py`` over the last ``context`` tokens, again for each token."""

    def __init__(self, model: BDHForCausalLM, context: int, text: Sequence[int] = ()):
        self.name = f"ops/naive.py, the last {context} tokens recomputed"
        self.model, self.weights = model, naive_weights(model)
        self.text = deque(text, maxlen=context)

    @torch.no_grad()
    def read(self, token: int) -> torch.Tensor:
        self.text.append(token)
        logits = naive_logits(self.model, torch.tensor([list(self.text)]), self.weights)
        return logits[0, -1]


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
        self._read([list(text)])

    def read(self, token: int) -> torch.Tensor:
        return self._read([[token]])

    @torch.inference_mode()
    def _read(self, tokens: list[list[int]]) -> torch.Tensor:
        output = self.model(torch.tensor(tokens), past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return output.logits[0, -1]
