"""Made weights fire as trained ones do, in every layer step, also on other tokens than those they were made with; and the bytes of
a token, counted by hand."""

from statistics import mean

import pytest
import torch

from bdh import BDHConfig, BDHForCausalLM
from bdh.bench.common import (
    Bandwidth,
    Density,
    densities,
    half_lives,
    naive_weights,
    sparse_model,
    traffic,
)
from bdh.ops import naive

SIZES = {"n_embd": 64, "n_head": 2, "n_layer": 4, "mlp_internal_dim_multiplier": 32, "vocab_size": 256}


def random_tokens(count, seed=5):
    return torch.randint(256, (count,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_pass_fires_as_sparsely_as_in_a_trained_model(seed):
    model = sparse_model(BDHConfig(**SIZES), seed)
    found = densities(model, random_tokens(400))
    # The bands in which trained models lie, a little wider for one pass of a small model.
    assert 0.12 <= mean(each.x for each in found) <= 0.14
    assert 0.03 <= mean(each.xy for each in found) <= 0.05
    for each in found:
        assert 0.10 <= each.x <= 0.16
        assert 0.025 <= each.xy <= 0.055
        # Of independent neurons 1 - (1 - x)^2.
        assert each.x < each.pairs < 2 * each.x


def test_logits_are_of_order_1():
    logits = sparse_model(BDHConfig(**SIZES))(random_tokens(64)[None]).logits
    assert 0.5 < logits.std().item() < 2


def test_the_same_seed_gives_the_same_weights():
    first, again, other = (sparse_model(BDHConfig(**SIZES), seed) for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.encoder.weight, other.encoder.weight)


def test_half_lives_are_where_the_model_is():
    """On a GPU the plain equations met those of the processor."""
    config = BDHConfig(**SIZES, decay=[7, None])
    with torch.device("meta"):
        found = half_lives(BDHForCausalLM(config))
    assert found.device.type == "meta"
    assert half_lives(BDHForCausalLM(config)).tolist() == [7, float("inf")]


def test_weights_for_naive_are_those_of_the_model():
    model, tokens = sparse_model(BDHConfig(**SIZES)), random_tokens(40)[None]
    expected = naive.forward(tokens, naive_weights(model), model.config.n_layer)
    # float32 sums of 2048 neurons in another order, through four passes.
    assert torch.allclose(model(tokens).logits, expected, rtol=0, atol=1e-4)


CONFIG = BDHConfig()  # D 256, H 4, N 8192, L 6, V 256


def test_bytes_of_a_token_of_the_25m_model():
    found = traffic(CONFIG, [Density(x=0.125, pairs=0.25, xy=0.03125)] * 6)
    assert found.encoder == 6 * 32768 * 1024
    # A quarter of 16384 pairs, two rows each, read and written.
    assert found.state == 6 * 4096 * 2 * 2 * 1024
    assert found.encoder_v == 6 * 4096 * 1024
    assert found.decoder == 6 * 1024 * 1024
    assert found.lm_head == 256 * 1024
    assert found.total == 6 * (32768 + 16384 + 4096 + 1024) * 1024 + 256 * 1024


def test_bfloat16_halves_what_it_holds():
    density = [Density(x=0.125, pairs=0.25, xy=0.03125)] * 6
    full = traffic(CONFIG, density)
    weights = traffic(CONFIG, density, weights="bfloat16")
    both = traffic(CONFIG, density, weights="bfloat16", state="bfloat16")
    assert weights.state == full.state
    assert weights.total - weights.state == (full.total - full.state) // 2
    assert both.total == full.total // 2


def test_a_batch_shares_the_dense_part():
    found = traffic(CONFIG, [Density(x=0.125, pairs=0.25, xy=0.03125)] * 6)
    bandwidth = Bandwidth(copy=1e10, read=1e10)
    assert found.limit_seconds(bandwidth) == pytest.approx(found.total / 1e10)
    shared = found.encoder + found.lm_head
    assert found.limit_seconds(bandwidth, batch=8) == pytest.approx((8 * found.total - 7 * shared) / 1e10)
