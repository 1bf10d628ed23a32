import pytest
import torch

from bdh.bench.common import half_lives, naive_weights
from bdh.inspect import synapse_trace, tracing
from bdh.ops import naive

from .conftest import H, N


@pytest.mark.parametrize("decay", [None, [3, 20, None]])
@pytest.mark.parametrize("source", [6, 7])
def test_strength_is_read_from_the_state_of_the_equations(
    make_model, ids, computed_plainly, monkeypatch, decay, source
):
    monkeypatch.setattr(tracing, "MAX_BYTES", 10 * H * N * 8)
    model, ids = make_model(decay=decay), ids[:23]
    found = synapse_trace(model, ids, 1, 2, source, 30, num_shuffles=2, seed=5)
    generator = torch.Generator().manual_seed(5)
    orders = [torch.arange(23), *(torch.randperm(23, generator=generator) for _ in range(2))]
    unit = torch.zeros(1, N, dtype=torch.float64)
    unit[0, source] = 1
    for order, strengths in zip(orders, [found.strength, *found.shuffled], strict=True):
        values = computed_plainly(model, ids[order])
        q, v = values["q"][2][None], values["v"][2][None]
        state = None
        for t, strength in enumerate(strengths):
            if t > 0:
                _, state = naive.attention_by_state(
                    q[:, :, t - 1 : t], v[:, t - 1 : t], state, half_lives=half_lives(model)
                )
            S = torch.zeros(N, v.shape[-1]).double() if state is None else state[0, 1]
            expected = naive.rope(unit, torch.tensor([t])) @ S @ naive_weights(model).encoder_v[1][:, 30].detach()
            assert strength.item() == pytest.approx(expected.item(), abs=1e-8)
    assert torch.equal(found.shuffled_mean, found.shuffled.mean(0))
    assert torch.equal(found.shuffled_spread, found.shuffled.std(0))


def test_the_first_token_reads_nothing(model, ids):
    assert synapse_trace(model, ids, 0, 0, 0, 0).strength[0] == 0


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"head": 3}, r"head is 3: must be within -3 to 2"),
        ({"layer_step": 3}, r"layer_step is 3"),
        ({"source": 44}, r"source is 44: must be within -44 to 43, of 44 neurons"),
        ({"target": -45}, r"target is -45"),
        ({"num_shuffles": 1}, r"num_shuffles is 1"),
        ({"ids": []}, r"at least 1 token"),
    ],
)
def test_what_is_wrong_is_said(model, ids, choice, message):
    with pytest.raises(ValueError, match=message):
        synapse_trace(model, **{"ids": ids, "head": 0, "layer_step": 0, "source": 0, "target": 0, **choice})
