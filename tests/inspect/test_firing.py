import pytest
import torch

from bdh.inspect import concentration, density, tracing, untrained_twin

from .conftest import H, L, N


@pytest.fixture(params=["one piece", "pieces"], autouse=True)
def pieces(request, monkeypatch):
    if request.param == "pieces":
        monkeypatch.setattr(tracing, "MAX_BYTES", 10 * H * N * 8)


def test_densities_are_those_of_the_plain_computation(model, ids, computed_plainly):
    found = density(model, ids, seed=5)
    for shares, of in ((found.model, model), (found.untrained, untrained_twin(model, 5))):
        for name, values in computed_plainly(of, ids).items():
            if name in ("x", "y", "z"):
                fires = (values > 0).double()
                torch.testing.assert_close(shares.by_head[name], fires.mean((2, 3)))
                torch.testing.assert_close(shares.by_position[name], fires.mean((1, 3)))
    assert not found.model.by_position["y"][:, 0].any()
    assert found.model.by_head["x"].shape == (L, H)


def test_concentration_is_that_of_the_plain_computation(model, ids, computed_plainly):
    found = concentration(model, ids, k=9, seed=5)
    assert (found.k, found.num_neurons, found.even_share) == (9, H * N, 9 / (H * N))
    for shares, of in ((found.model, model), (found.untrained, untrained_twin(model, 5))):
        values = computed_plainly(of, ids)
        for name in ("x", "y", "z"):
            for step in range(L):
                first, second = (part.sum(1).flatten() for part in values[name][step].split((31, 32), dim=1))
                both = first + second
                ways = [
                    b[a.argsort(descending=True)[:9]].sum() / b.sum() for a, b in ((first, second), (second, first))
                ]
                torch.testing.assert_close(shares.cross_fitted[name][step], sum(ways) / 2)
                torch.testing.assert_close(shares.uncorrected[name][step], both.sort().values[-9:].sum() / both.sum())


def test_of_noise_only_the_uncorrected_figure_is_concentrated(make_model, ids, monkeypatch):
    """Neurons that carry mass by chance, others on each token, were taken for strong ones."""
    noise = torch.Generator().manual_seed(0)
    model = make_model()
    model.hook_points.x.register_forward_hook(
        lambda point, inputs, x: torch.rand(x.shape, generator=noise, dtype=x.dtype) ** 20
    )
    found = concentration(model, ids, k=13)
    assert found.model.uncorrected["x"].min() > 1.4 * found.even_share
    assert found.model.cross_fitted["x"].sub(found.even_share).abs().max() < 0.3 * found.even_share


def test_all_neurons_carry_all(model, ids):
    found = concentration(model, ids, k=H * N)
    assert found.model.cross_fitted["z"].tolist() == pytest.approx([1] * L)
    assert concentration(model, ids).k == H * N // 10


def test_an_untrained_twin_has_weights_of_its_own(model):
    random_state = torch.get_rng_state()
    twin = untrained_twin(model, 1)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert twin.dtype == torch.float64
    assert not twin.training
    assert twin.encoder.weight.std().item() == pytest.approx(model.config.initializer_range, rel=0.1)
    assert not torch.equal(twin.encoder.weight, model.encoder.weight)
    assert torch.equal(twin.encoder.weight, untrained_twin(model, 1).encoder.weight)
    assert not torch.equal(twin.encoder.weight, untrained_twin(model, 2).encoder.weight)


@pytest.mark.parametrize(
    ("ids", "k", "message"),
    [
        ([1, 2], 0, r"k is 0: must be within 1 to 132"),
        ([1, 2], 133, r"k is 133: must be within 1 to 132"),
        ([1], 3, r"has 1 token: at least 2 are needed"),
    ],
)
def test_what_is_wrong_is_said(model, ids, k, message):
    with pytest.raises(ValueError, match=message):
        concentration(model, ids, k=k)
