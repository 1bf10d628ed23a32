"""What the kernels are compared with computes what it says."""

import pytest
import torch
from transformers import GPT2LMHeadModel

from bdh import BDH, BDHConfig
from bdh.bench import QUICK_SIZES
from bdh.bench.common import gpt2_config, gpt2_shape, naive_weights, sparse_model
from bdh.bench.decoders import AllocatingDecoder, Gpt2Decoder, RecomputingDecoder, StateDecoder, made_gpt2
from bdh.ops import naive

TOKENS = torch.randint(256, (40,), generator=torch.Generator().manual_seed(9)).tolist()
# float32 sums of 2048 neurons in another order, through three passes; the logits are of order 1.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def sparse():
    return sparse_model(BDHConfig(**QUICK_SIZES))


@pytest.fixture(scope="module")
def expected(sparse):
    return naive.forward(torch.tensor([TOKENS]), naive_weights(sparse), sparse.config.n_layer)[0]


def test_the_allocating_step_is_the_model(sparse, expected):
    decoder = AllocatingDecoder(sparse)
    logits = torch.stack([decoder.read(token) for token in TOKENS])
    assert torch.allclose(logits, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("path", ["kernels", "torch"])
def test_states_of_several_sequences_are_advanced_as_the_model_reads(sparse, expected, path):
    decoder = StateDecoder(sparse, path=path, num_sequences=2)
    logits = torch.stack([decoder.read_each([token, 0])[0] for token in TOKENS])
    assert torch.allclose(logits, expected, rtol=0, atol=TOLERANCE)


def test_recomputing_sees_the_last_tokens_only(sparse, expected):
    long = RecomputingDecoder(sparse, context=40)
    assert torch.allclose(torch.stack([long.read(token) for token in TOKENS]), expected, rtol=0, atol=TOLERANCE)
    short = RecomputingDecoder(sparse, context=8, text=TOKENS[:-1])
    alone = naive.forward(torch.tensor([TOKENS[-8:]]), naive_weights(sparse), sparse.config.n_layer)[0, -1]
    assert torch.equal(short.read(TOKENS[-1]), alone)


@pytest.mark.parametrize("is_static", [False, True], ids=["dynamic", "static"])
def test_gpt2_goes_on_with_its_cache(monkeypatch, is_static):
    monkeypatch.setattr("bdh.bench.decoders.GPT2_CHUNK", 16)  # its prompt is two of them
    decoder = Gpt2Decoder(made_gpt2(256, 64, (2, 32, 2), seed=0), TOKENS[:30])
    if is_static:
        decoder = decoder.with_static_cache(10)
    logits = [decoder.read(token) for token in TOKENS[30:]]
    assert decoder.num_tokens == len(TOKENS)
    assert decoder.memory_bytes == 2 * 2 * 32 * 4 * len(TOKENS)  # keys and values of two layers
    whole = decoder.model(torch.tensor([TOKENS])).logits[0, 30:]
    # Fresh weights of width 32: float32 rounding only.
    assert torch.allclose(torch.stack(logits), whole, rtol=0, atol=1e-5)


def test_a_static_cache_leaves_the_other_as_it_was():
    decoder = Gpt2Decoder(made_gpt2(256, 64, (2, 32, 2), seed=0), TOKENS[:30])
    static = decoder.with_static_cache(10)
    assert torch.allclose(static.read(TOKENS[30]), decoder.read(TOKENS[30]), rtol=0, atol=1e-5)
    assert (static.num_tokens, decoder.num_tokens) == (31, 31)


@pytest.mark.parametrize(
    ("width", "multiplier", "shape"), [(256, 128, (8, 512, 8)), (128, 128, (5, 320, 5)), (48, 32, (2, 96, 6))]
)
def test_gpt2_has_about_the_size_of_the_model(width, multiplier, shape):
    """Models of other sizes than the default were compared with the GPT-2 of 26M parameters."""
    with torch.device("meta"):
        model = BDH(BDHConfig(n_embd=width, mlp_internal_dim_multiplier=multiplier, vocab_size=256))
        assert gpt2_shape(model) == shape
        gpt2 = GPT2LMHeadModel(gpt2_config(256, 64, *shape, dropout=0.0))
    sizes = [sum(weight.numel() for weight in each.parameters()) for each in (gpt2, model)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05)
