import itertools

import pytest
import torch

from bdh import BDHConfig, BDHForCausalLM
from bdh.train.config import TrainSettings
from bdh.train.optim import Optimizers, learning_rate_factor


def factors(**settings) -> list[float]:
    s = TrainSettings(max_steps=100, warmup_steps=10, min_learning_rate_ratio=0.1, **settings)
    return [learning_rate_factor(step, s) for step in range(100)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
def test_every_schedule_warms_up_linearly_to_the_full_rate(schedule):
    assert factors(schedule=schedule)[:11] == pytest.approx([(i + 1) / 10 for i in range(10)] + [1.0])


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_schedules_fall_to_their_floor_and_never_rise_again(schedule):
    after_warmup = factors(schedule=schedule)[10:]
    assert all(a >= b for a, b in itertools.pairwise(after_warmup))
    # One step short of the end: the floor itself is reached at step max_steps.
    assert 0.1 <= after_warmup[-1] < 0.15


def test_cosine_and_linear_are_half_way_in_the_middle():
    for schedule in ("cosine", "linear"):
        assert factors(schedule=schedule)[55] == pytest.approx(0.55)


def test_wsd_is_constant_until_its_decay():
    values = factors(schedule="wsd", decay_steps=20)
    assert set(values[10:80]) == {1.0}
    assert values[90] == pytest.approx(0.55)


def test_constant_stays():
    assert set(factors(schedule="constant")[10:]) == {1.0}


def tiny_model() -> BDHForCausalLM:
    torch.manual_seed(0)
    return BDHForCausalLM(BDHConfig(n_embd=16, n_layer=2, n_head=2, mlp_internal_dim_multiplier=4, vocab_size=32))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_weight_is_in_one_group(optimizer):
    model = tiny_model()
    groups = [g for o in Optimizers(model, TrainSettings(optimizer=optimizer)).all for g in o.param_groups]
    ids = [id(p) for g in groups for p in g["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())


@pytest.mark.parametrize("decay_embeddings", [False, True])
def test_embeddings_decay_only_when_asked(decay_embeddings):
    model = tiny_model()
    settings = TrainSettings(weight_decay=0.3, decay_embeddings=decay_embeddings)
    decays = {
        id(p): g["weight_decay"] for o in Optimizers(model, settings).all for g in o.param_groups for p in g["params"]
    }
    assert decays[id(model.embed.weight)] == (0.3 if decay_embeddings else 0.0)
    assert decays[id(model.encoder.weight)] == decays[id(model.decoder.weight)] == 0.3


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_restored_optimizer_goes_on_bit_equal(optimizer):
    settings = TrainSettings(optimizer=optimizer, learning_rate=1e-2, warmup_steps=0, max_steps=10)
    batches = torch.randint(0, 32, (6, 2, 9), generator=torch.Generator().manual_seed(1))

    def steps(model, optimizers, rows, start):
        for i, row in enumerate(rows):
            optimizers.set_learning_rate(start + i)
            optimizers.zero_grad()
            model(row[:, :-1], shift_labels=row[:, 1:]).loss.backward()
            for each in optimizers.all:
                each.step()

    straight = tiny_model().eval()
    optimizers = Optimizers(straight, settings)
    steps(straight, optimizers, batches, 0)

    first = tiny_model().eval()
    optimizers = Optimizers(first, settings)
    steps(first, optimizers, batches[:3], 0)
    second = tiny_model().eval()
    second.load_state_dict(first.state_dict())
    restored = Optimizers(second, settings)
    stored = {name: tensor.clone() for name, tensor in optimizers.tensors().items()}
    restored.make_room({name: (tensor.shape, tensor.dtype) for name, tensor in stored.items()})
    assert restored.tensors().keys() == stored.keys()
    for name, tensor in restored.tensors().items():
        tensor.copy_(stored[name])
    steps(second, restored, batches[3:], 3)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), second.parameters(), strict=True))
