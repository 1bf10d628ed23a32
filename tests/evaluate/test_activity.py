"""What is counted is what a plain computation of the model counts."""

import pytest
import torch

from bdh import BDHConfig, BDHForCausalLM
from bdh.evaluate import probes
from bdh.evaluate.probes import measure_activity
from bdh.model.network import exact_dtype
from bdh.ops import naive

L, D, H, N = 3, 16, 2, 32


@pytest.fixture
def model() -> BDHForCausalLM:
    torch.manual_seed(3)
    config = BDHConfig(n_embd=D, n_layer=L, n_head=H, mlp_internal_dim_multiplier=4, vocab_size=32, dropout=0.5)
    model = BDHForCausalLM(config).double()
    with torch.no_grad():
        model.encoder.weight[5] = 0.0  # a neuron that cannot fire
    return model.train()


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(32, (5, 23), generator=torch.Generator().manual_seed(4))


def by_hand(model, tokens):
    """x, y and x * y of every pass, (B, T, H * N) each."""
    v = naive.layer_norm(model.embed(tokens))
    E = model.encoder.weight.view(H, N, D).transpose(1, 2)
    found = {"x": [], "y": [], "xy": []}
    for _ in range(L):
        x = torch.relu(v[:, None] @ E)
        a = naive.attention(naive.rope(x, torch.arange(tokens.shape[1])), v)
        Ev = torch.stack([head.weight.T for head in model.encoder_v])
        y = torch.relu(naive.layer_norm(a) @ Ev)
        for kind, values in (("x", x), ("y", y), ("xy", x * y)):
            found[kind].append(values.transpose(1, 2).flatten(2))
        v = naive.layer_norm(v + naive.layer_norm(found["xy"][-1] @ model.decoder.weight.T))
    return found


@pytest.mark.parametrize("max_batch_size", [5, 2])
def test_figures_are_those_of_the_plain_computation(model, tokens, max_batch_size):
    with torch.no_grad():
        expected = by_hand(model, tokens)
    activity = measure_activity(model, tokens, max_batch_size=max_batch_size)
    for kind, passes in expected.items():
        densities = [(values > 0).double().mean().item() for values in passes]
        norms = [values.norm(dim=-1).mean().item() for values in passes]
        assert activity.density[kind] == pytest.approx(densities, abs=1e-12)
        assert activity.norm[kind] == pytest.approx(norms, rel=1e-9)
    ever = torch.stack(expected["x"]).flatten(0, 2).gt(0).any(0)
    assert activity.dead_neurons == pytest.approx(1 - ever.double().mean().item())
    assert activity.dead_neurons >= 1 / (H * N)


def test_it_counts_in_float32_where_a_device_has_no_float64(model, tokens, monkeypatch):
    """On MPS the first evaluation of a training raised."""
    assert exact_dtype(torch.device("mps")) == torch.float32
    expected, asked = measure_activity(model, tokens), []
    monkeypatch.setattr(probes, "exact_dtype", lambda device: asked.append(device) or torch.float32)
    found = measure_activity(model.float(), tokens)
    assert set(asked) == {model.device}
    for kind in ("x", "y", "xy"):
        assert found.norm[kind] == pytest.approx(expected.norm[kind], rel=1e-5)
        assert found.density[kind] == pytest.approx(expected.density[kind], abs=1e-3)


def test_samples_are_values_that_fired(model, tokens):
    with torch.no_grad():
        expected = by_hand(model, tokens)
    activity = measure_activity(model, tokens)
    for kind, passes in expected.items():
        for values, sample in zip(passes, activity.samples[kind], strict=True):
            above = values[values > 0].float()
            assert 0 < len(sample) <= 4096
            assert sample.min() >= above.min() - 1e-6
            assert sample.max() <= above.max() + 1e-6


def test_names_have_the_pass(model, tokens):
    figures = measure_activity(model, tokens).as_dict("val/")
    kinds = [f"val/{name}/{kind}/{i}" for name in ("density", "norm") for kind in ("x", "y", "xy") for i in range(L)]
    assert set(figures) == {"val/dead_neurons", *kinds}


def test_the_model_and_the_random_numbers_are_left_as_they_were(model, tokens):
    before = torch.get_rng_state()
    measure_activity(model, tokens)
    assert torch.equal(before, torch.get_rng_state())
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
