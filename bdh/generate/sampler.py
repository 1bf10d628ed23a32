"""The next token of one sequence, from its logits, its settings and its own generator."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    LogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from bdh.generate.params import SamplingParams

_NO_TOKENS: Any = torch.empty(1, 0, dtype=torch.int64)


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
        self._seen: set[int] | None = None  # for the repetition penalty: each token once
        self._penalty: RepetitionPenaltyLogitsProcessor | None = None
        if params.repetition_penalty != 1:
            self._penalty = RepetitionPenaltyLogitsProcessor(float(params.repetition_penalty))
            self._seen = set(prompt)
        self._counts: torch.Tensor | None = None
        if params.presence_penalty or params.frequency_penalty:
            self._counts = torch.zeros(vocab_size)
        self._warpers = list(_warpers(params))
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
        scores = self._adjusted(logits)[None]
        if allowed is not None and bool(scores.isneginf().all()):
            raise ValueError("the model's logits rule out all tokens that the grammar allows: none can be drawn")
        if self._params.temperature == 0:
            token = int(scores.argmax())
        else:
            # The warpers look at the scores only.
            for warper in self._warpers:
                scores = warper(_NO_TOKENS, scores)
            token = int(torch.multinomial(scores.softmax(-1), 1, generator=self.generator))
        self._count(token)
        return token

    def _adjusted(self, logits: torch.Tensor) -> torch.Tensor:
        """With penalties and biases, in the order that OpenAI's API and transformers have them."""
        params, scores = self._params, logits
        if self._penalty is not None and self._seen:
            scores = self._penalty(torch.tensor([list(self._seen)]), scores[None])[0]
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
            self._seen.add(token)


def _warpers(params: SamplingParams) -> Iterable[LogitsProcessor]:
    if params.temperature == 0:
        return
    if params.temperature != 1:
        yield TemperatureLogitsWarper(float(params.temperature))
    if params.top_k:
        yield TopKLogitsWarper(params.top_k)
    if params.top_p < 1:
        yield TopPLogitsWarper(float(params.top_p))
    if params.min_p > 0:
        yield MinPLogitsWarper(params.min_p)
