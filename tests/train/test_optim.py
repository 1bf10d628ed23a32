import itertools
import random

import pytest
import torch

from bdh import BDHConfig, BDHForCausalLM
from bdh.train.config import TrainSettings
from bdh.train.optim import LossScale, NormStatistics, Optimizers, learning_rate_factor


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


KEPT = {"adamw": ("step", "exp_avg", "exp_avg_sq"), "muon": ("momentum_buffer",)}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_restored_optimizer_goes_on_bit_equal(optimizer):
    settings = TrainSettings(optimizer=optimizer, learning_rate=1e-2, warmup_steps=0, max_steps=10)
    batches = torch.randint(0, 32, (6, 2, 9), generator=torch.Generator().manual_seed(1))

    def steps(model, optimizers, rows, start):
        for i, row in enumerate(rows):
            optimizers.set_learning_rate(start + i)
            optimizers.zero_grad()
            model(row[:, :-1], shift_labels=row[:, 1:]).loss.backward()
            optimizers.step(torch.tensor(False), on_device=False)

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
    assert restored.tensors() == {}
    restored.make_state()
    assert restored.tensors().keys() == stored.keys()
    assert {f"encoder.weight.{key}" for key in KEPT[optimizer]} | {"embed.weight.step"} <= stored.keys()
    for name, tensor in restored.tensors().items():
        tensor.copy_(stored[name])
    steps(second, restored, batches[3:], 3)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("when", ["first", "later"])
def test_a_step_is_left_out_on_the_device_to_the_bit(optimizer, when):
    """AdamW by ``found_inf``, which no documentation of PyTorch promises; Muon by taking its changes back."""
    model = tiny_model()
    optimizers = Optimizers(model, TrainSettings(optimizer=optimizer, learning_rate=1e-2))

    def step(factor: float, skip: bool) -> None:
        optimizers.zero_grad()
        ids = torch.arange(16)[None]
        model(ids, labels=ids).loss.backward()
        for weight in model.parameters():
            weight.grad *= factor
        optimizers.step(torch.tensor(skip), on_device=True)

    if when == "later":
        step(1.0, skip=False)
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    state = {name: tensor.clone() for name, tensor in optimizers.tensors().items()}
    step(float("nan"), skip=True)
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    assert all(torch.equal(t, state.get(name, torch.zeros_like(t))) for name, t in optimizers.tensors().items())
    step(1.0, skip=False)
    assert not any(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())


def norms(number: int, mean: float = 2.0) -> list[torch.Tensor]:
    generator = random.Random(3)
    return [torch.tensor(generator.gauss(mean, 0.1)) for _ in range(number)]


def statistics_of(values: list[torch.Tensor]) -> NormStatistics:
    statistics = NormStatistics(torch.device("cpu"), threshold=6)
    for value in values:
        statistics.take_in(value)
    return statistics


def test_a_spike_stands_out_and_hardly_moves_the_statistics():
    statistics = statistics_of(norms(200))
    assert statistics.mean.item() == pytest.approx(2.0, abs=0.1)
    assert statistics.z_score(torch.tensor(2.1)) < 4
    spike = torch.tensor(20.0)
    assert statistics.z_score(spike) > 50
    statistics.take_in(spike)
    assert statistics.mean < 2.2
    assert statistics.z_score(spike) > 50
    before = statistics.state_dict()
    statistics.take_in(torch.tensor(float("nan")))
    assert statistics.state_dict() == before


def test_a_lasting_new_level_is_learned():
    statistics = statistics_of(norms(100))
    assert statistics.z_score(torch.tensor(4.0)) > 6
    for norm in norms(300, mean=4.0):
        statistics.take_in(norm)
    assert statistics.z_score(torch.tensor(4.0)) < 3


def test_the_first_steps_only_count():
    statistics = statistics_of([])
    for norm in norms(24):
        assert statistics.z_score(1000 * norm) == 0.0
        statistics.take_in(norm)
    statistics.take_in(torch.tensor(2.0))
    assert statistics.z_score(torch.tensor(1000.0)) > 100
    again = statistics_of([])
    again.load_state_dict(statistics.state_dict())
    assert again.state_dict() == statistics.state_dict()
    assert again.state_dict()["count"] == 25


def test_the_loss_scale_halves_at_an_overflow_and_grows_after_2000_good_steps():
    """As torch.amp.GradScaler does, whose state it can take over."""
    reference = torch.amp.GradScaler("cpu", enabled=True)
    reference.scale(torch.ones(()))
    scale = LossScale(torch.device("cpu"), is_float16=True)
    scale.load_state_dict(reference.state_dict())
    assert scale.value.item() == reference.get_scale() == 65536
    scale.update(torch.tensor(float("inf")))
    assert scale.value.item() == 32768
    for _ in range(1999):
        scale.update(torch.tensor(1.0))
    assert scale.value.item() == 32768
    scale.update(torch.tensor(1.0))
    assert scale.value.item() == 65536
    assert scale.state_dict() == {"scale": 65536.0, "_growth_tracker": 0}
