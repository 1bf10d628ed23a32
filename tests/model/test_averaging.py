import pytest
import torch
from torch import nn

from bdh.model.conversion import MovingAverage, average_weights


def made(value: float, dtype=torch.float32) -> dict[str, torch.Tensor]:
    return {"a": torch.full((2, 3), value, dtype=dtype), "b": torch.tensor([value, -value], dtype=dtype)}


def test_equal_and_given_shares():
    assert torch.equal(average_weights([made(1.0), made(4.0)])["a"], torch.full((2, 3), 2.5))
    averaged = average_weights(iter([made(1.0), made(4.0), made(100.0)]), [2, 1, 0])
    assert torch.equal(averaged["b"], torch.tensor([2.0, -2.0]))


def test_sums_are_exact_beyond_the_weights_own_dtype():
    """In bfloat16, 256 + 1 is 256: the sum of 300 ones would stop there."""
    averaged = average_weights(made(1.0, torch.bfloat16) for _ in range(300))
    assert averaged["a"].dtype == torch.bfloat16
    assert torch.equal(averaged["a"], torch.ones(2, 3, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("models", "shares", "message"),
    [
        ([], None, "no models to average"),
        ([made(1), made(2)], [1], "more models than the 1 share:"),
        ([made(1)], [1, 2], "1 model has 2 shares"),
        ([made(1), made(2)], [1, -1], "none may be negative"),
        ([made(1), made(2)], [0, 0], "sum must be above 0"),
        ([made(1), {"a": torch.ones(2, 2), "b": torch.ones(2)}], None, "model 2 differ in name or shape .*: a"),
        ([made(1), {"a": torch.ones(2, 3)}], None, "model 2 differ in name or shape .*: b"),
    ],
)
def test_what_cannot_be_averaged_is_refused(models, shares, message):
    with pytest.raises(ValueError, match=message):
        average_weights(models, shares)


def test_the_moving_average_follows_its_formula_and_forgets_the_start():
    model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    average, decay = MovingAverage(model, 0.9), 0.9
    expected = model.weight.item()
    for step in range(1, 200):
        with torch.no_grad():
            model.weight.fill_(step % 7)
        average.update(model, step)
        d = min(decay, (1 + step) / (10 + step))
        expected = d * expected + (1 - d) * (step % 7)
    assert average.weights["weight"].item() == pytest.approx(expected, rel=1e-12)


def test_swapping_twice_is_exact():
    model = nn.Linear(5, 5)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    average = MovingAverage(model, 0.5)
    with torch.no_grad():
        model.weight.mul_(3.1)
    after = model.weight.clone()
    average.swap(model)
    assert torch.equal(model.weight, before["weight"])
    average.swap(model)
    assert torch.equal(model.weight, after)
    assert torch.equal(average.weights["weight"], before["weight"])
