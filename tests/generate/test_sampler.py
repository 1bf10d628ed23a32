"""The sampler against transformers' logits processors, to the bit."""

import itertools

import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from bdh.generate.params import SamplingParams
from bdh.generate.sequence import Sampler, warped

V = 61
NO_TOKENS = torch.empty(1, 0, dtype=torch.int64)


def all_logits():
    generator = torch.Generator().manual_seed(0)
    yield torch.randn(V, generator=generator) * 4
    yield torch.zeros(V)  # all tie
    yield torch.randn(V, generator=generator).round()  # many tie
    yield torch.randn(V, generator=generator).masked_fill(torch.arange(V) % 3 > 0, -torch.inf)
    yield torch.full((V,), -torch.inf).index_fill(0, torch.tensor([5]), 0.0)


@pytest.mark.parametrize("temperature", [1.0, 0.3, 1.7])
def test_the_warped_scores_are_those_of_transformers(temperature):
    for k, p, m in itertools.product((0, 1, 7, 500), (1.0, 0.9, 0.01), (0.0, 0.2)):
        settings = SamplingParams(temperature=temperature, top_k=k, top_p=p, min_p=m)
        processors = [TemperatureLogitsWarper(temperature)] if temperature != 1 else []
        processors += [TopKLogitsWarper(k)] if k else []
        processors += [TopPLogitsWarper(p)] if p < 1 else []
        processors += [MinPLogitsWarper(m)] if m else []
        for logits in all_logits():
            expected = logits[None]
            for processor in processors:
                expected = processor(NO_TOKENS, expected)
            found = warped(logits, settings)
            assert torch.equal(found.isneginf(), expected[0].isneginf()), (k, p, m)
            assert torch.equal(found, expected[0])


def test_the_repetition_penalty_is_that_of_transformers():
    prompt, generated = [3, 5, 5, 8], [9, 3]
    for penalty, logits in itertools.product((1.3, 0.7), all_logits()):
        processor = RepetitionPenaltyLogitsProcessor(penalty)
        expected = processor(torch.tensor([[*prompt, *generated]]), logits[None])[0].softmax(-1)
        params = SamplingParams(repetition_penalty=penalty, seed=4)
        sampler = Sampler(params, vocab_size=V, prompt=prompt, generated=generated)
        drawn = torch.multinomial(expected, 1, generator=torch.Generator().manual_seed(4))
        assert sampler.sample(logits) == int(drawn)
        greedy = Sampler(
            SamplingParams(repetition_penalty=penalty, temperature=0), vocab_size=V, prompt=prompt, generated=generated
        )
        assert greedy.sample(logits) == int(expected.argmax())
