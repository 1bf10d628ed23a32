"""What the kernels are measured against: forms of the same model, and a transformer of its size."""

from collections.abc import Callable

import torch
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

from bdh.bench.weights import naive_weights
from bdh.generate.stepper import Feed, TorchStepper
from bdh.model.modeling import BDHForCausalLM
from bdh.ops import naive

Step = Callable[[], object]


class AllocatingStepper(TorchStepper):
    """The dense recurrent step that makes a new state for each token, ``S = S + k v^T``, as public ports do."""

    def _attend(self, feed: Feed, index: int, q: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        kept = self._states(feed)
        sums = kept[index]
        a = (q[:, None] @ sums)[:, 0]
        kept[index] = sums + q[:, :, None] * v.to(q.dtype)
        return a

    def _states(self, feed: Feed) -> list[torch.Tensor]:
        """One tensor for each pass, which can be replaced."""
        if not hasattr(feed.state, "passes"):
            feed.state.passes = list(feed.state.tensors["sums"])  # type: ignore[attr-defined]
        return feed.state.passes  # type: ignore[attr-defined]


def recomputing(model: BDHForCausalLM, context: list[int]) -> Step:
    """``ops/naive.py`` over the whole context for each token."""
    weights, tokens = naive_weights(model), torch.tensor([context])
    return lambda: int(naive_logits(model, weights, tokens)[-1].argmax())


@torch.no_grad()
def naive_logits(model: BDHForCausalLM, weights: naive.Weights, tokens: torch.Tensor) -> torch.Tensor:
    """The ground truth: (T, V) of tokens (1, T)."""
    config = model.config
    return naive.forward(tokens, weights, config.n_layer, theta=config.rope_theta, eps=config.layer_norm_eps)[0]


def transformer(context: int, *, n_layer: int = 8, n_embd: int = 512, n_head: int = 8) -> tuple[Step, int]:
    """GPT-2 in transformers, greedy, a token a call with its cache of keys and values; and its number of parameters.

    The cache is cut back to the context behind each call, so that all calls cost the same.
    """
    config = GPT2Config(
        vocab_size=256,
        n_positions=max(1024, context + 1),
        n_embd=n_embd,
        n_layer=n_layer,
        n_head=n_head,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config).eval()
    cache = DynamicCache(config=config)
    with torch.inference_mode():
        token = model(torch.zeros(1, context, dtype=torch.int64), past_key_values=cache).logits[:, -1:].argmax(-1)

    def step() -> int:
        with torch.inference_mode():
            following = int(model(token, past_key_values=cache).logits[0, -1].argmax())
            cache.crop(-1)
            return following

    return step, sum(parameter.numel() for parameter in model.parameters())
