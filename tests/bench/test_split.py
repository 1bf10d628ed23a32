"""The parts of a step are those of one step, and add up to it."""

from types import SimpleNamespace

import pytest

from bdh.bench import split
from bdh.ops.blocks import train


@pytest.fixture
def clock(monkeypatch):
    """Goes on where it is told to."""
    clock = SimpleNamespace(now=100.0)
    clock.perf_counter = lambda: clock.now
    monkeypatch.setattr(split, "time", clock)
    return clock


@pytest.mark.parametrize(("rounds", "median"), [(3, (0.4, 0.3)), (2, (0.2, 0.1))])
def test_the_parts_add_up_to_the_step_of_median_length(clock, monkeypatch, rounds, median):
    """The rest was what other steps had left of their time, and so was often cut at 0."""

    def take(seconds):
        clock.now += seconds

    monkeypatch.setattr(train, "learn_block", take)
    times = iter([(0.2, 0.1), (2.0, 0.0), (0.4, 0.3)])

    def step():
        in_part, outside = next(times)
        train.learn_block(in_part)
        take(outside)

    seconds, parts = split.median_step(step, "cpu", rounds)
    assert seconds == pytest.approx(sum(median))
    assert parts == pytest.approx(dict(zip(("attention: the state behind a block", split.REST), median, strict=True)))
