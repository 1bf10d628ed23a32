"""Rounds of candidates, percentiles and what is said of the machine."""

import os

import torch

from bdh.bench.timing import Timing, interleaved, machine, machine_line, percentile


def test_candidates_take_turns():
    calls = []
    found = interleaved(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=2, warm_up=1, repeats={"b": 2}
    )
    assert calls == ["a", "b", "b"] * 3
    assert len(found["a"].seconds) == 2
    assert len(found["b"].seconds) == 4


def test_median_and_least():
    timing = Timing([3.0, 1.0, 2.0])
    assert (timing.median, timing.least) == (2.0, 1.0)


def test_percentiles_are_of_the_numbers():
    numbers = [float(n) for n in range(100, 0, -1)]
    assert percentile(numbers, 0.5) == 50
    assert percentile(numbers, 0.99) == 99
    assert percentile(numbers, 1) == 100
    assert percentile([7.0], 0.99) == 7


def test_the_machine_is_described():
    assert machine()["cores"] == os.cpu_count()
    assert torch.__version__.split("+")[0] in machine_line()
