"""The next token of one sequence, from its logits, its settings and its own generator."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from bdh.generate.params import DrawSettings, SamplingParams


@dataclass
class TokenLogprobs:
    """Natural logarithms of the probabilities that the model gives, before temperature and penalties."""

    token: int
    logprob: float
    top: list[tuple[int, float]]
    """The likeliest tokens, as many as asked for."""


def token_logprobs(logits: torch.Tensor, token: int, num_top: int) -> TokenLogprobs:
    """Of a token under logits (V,)."""
    logprobs = logits.float().log_softmax(-1)
    values, ids = logprobs.topk(min(num_top, len(logprobs)))
    return TokenLogprobs(token, float(logprobs[token]), list(zip(ids.tolist(), values.tolist(), strict=True)))


def generator_of(seed: int | None) -> torch.Generator:
    """A generator that begins with a seed; with None, differently each time."""
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


class Sampler:
    """Draws the tokens of one sequence. What it draws depends on its seed and text alone.

    Args:
        prompt: the tokens in front of what is generated; they count for the repetition penalty only.
        generated: tokens that have been generated already, where a sequence goes on.
        ends: tokens that may not come before ``min_tokens``.
        generator: draw from this one, instead of one that begins with the seed.
    """

    def __init__(
        self,
        params: SamplingParams,
        *,
        vocab_size: int,
        prompt: Iterable[int] = (),
        generated: Iterable[int] = (),
        ends: Iterable[int] = (),
        index: int = 0,
        generator: torch.Generator | None = None,
    ):
        self._params = params
        self.generator = generator or generator_of(params.seed_of(index))
        self._num_generated = 0
        self._ends = torch.tensor(sorted(set(ends)), dtype=torch.int64)
        self._bias: torch.Tensor | None = None
        if params.logit_bias:
            self._bias = torch.zeros(vocab_size)
            self._bias[list(params.logit_bias)] = torch.tensor(list(params.logit_bias.values()))
        self._seen: torch.Tensor | None = None  # bool (V,): which tokens are in the text, for the repetition penalty
        if params.repetition_penalty != 1:
            self._seen = torch.zeros(vocab_size, dtype=torch.bool)
            self._seen[list(prompt)] = True
        self._counts: torch.Tensor | None = None
        if params.presence_penalty or params.frequency_penalty:
            self._counts = torch.zeros(vocab_size)
        for token in generated:
            self._count(token)
        self._num_generated = 0  # by this request

    def sample(self, logits: torch.Tensor, allowed: torch.Tensor | None = None) -> int:
        """The next token, from float32 logits (V,), which stay as they are.

        Args:
            allowed: bool (V,), the tokens that may be drawn; None for all.

        Raises:
            ValueError: the logits hold NaN, or leave no token that could be drawn.
        """
        if bool(logits.isnan().any()):
            raise ValueError("the model's logits hold NaN: no token can be drawn from them")
        if allowed is not None:
            logits = logits.masked_fill(~allowed, -torch.inf)
        scores = self._adjusted(logits)
        if allowed is not None and bool(scores.isneginf().all()):
            raise ValueError("the model's logits rule out all tokens that the grammar allows: none can be drawn")
        if self._params.temperature == 0:
            token = int(scores.argmax())
        else:
            probabilities = warped(scores, self._params).softmax(-1)
            token = int(torch.multinomial(probabilities, 1, generator=self.generator))
        self._count(token)
        return token

    def _adjusted(self, logits: torch.Tensor) -> torch.Tensor:
        """With penalties and biases, in the order that OpenAI's API and transformers have them."""
        params, scores = self._params, logits
        if self._seen is not None:
            factor = params.repetition_penalty
            scores = torch.where(self._seen, torch.where(scores < 0, scores * factor, scores / factor), scores)
        if self._counts is not None:
            scores = scores - params.frequency_penalty * self._counts - params.presence_penalty * (self._counts > 0)
        if self._bias is not None:
            scores = scores + self._bias
        if self._num_generated < params.min_tokens and len(self._ends):
            scores = scores.index_fill(0, self._ends, -torch.inf)
        return scores

    def _count(self, token: int) -> None:
        self._num_generated += 1
        if self._counts is not None:
            self._counts[token] += 1
        if self._seen is not None:
            self._seen[token] = True


def warped(scores: torch.Tensor, settings: DrawSettings) -> torch.Tensor:
    """Scores (V,) after temperature, ``top_k``, ``top_p`` and ``min_p``, in this order and as transformers applies them:
    tokens that are not to be drawn have minus infinity."""
    if settings.temperature != 1:
        scores = scores / settings.temperature
    if settings.top_k:
        least = scores.topk(min(settings.top_k, len(scores))).values[-1]
        scores = scores.masked_fill(scores < least, -torch.inf)
    if settings.top_p < 1:
        ascending, places = scores.sort()
        is_rest = ascending.softmax(-1).cumsum(-1) <= 1 - settings.top_p
        is_rest[-1] = False
        scores = scores.masked_fill(is_rest.scatter(0, places, is_rest), -torch.inf)
    if settings.min_p > 0:
        probabilities = scores.softmax(-1)
        is_unlikely = probabilities < settings.min_p * probabilities.max()
        is_unlikely[scores.argmax()] = False
        scores = scores.masked_fill(is_unlikely, -torch.inf)
    return scores
