import random

import pytest

from bdh.train.spikes import NormStatistics


def norms(number: int, mean: float = 2.0) -> list[float]:
    generator = random.Random(3)
    return [generator.gauss(mean, 0.1) for _ in range(number)]


def test_a_spike_stands_out_and_hardly_moves_the_statistics():
    statistics = NormStatistics()
    for norm in norms(200):
        statistics.take_in(norm, 6)
    assert statistics.mean == pytest.approx(2.0, abs=0.1)
    assert statistics.z_score(2.1) < 4
    assert statistics.z_score(20.0) > 50
    statistics.take_in(20.0, 6)
    assert statistics.mean < 2.2
    assert statistics.z_score(20.0) > 50


def test_a_lasting_new_level_is_learned():
    statistics = NormStatistics()
    for norm in norms(100):
        statistics.take_in(norm, 6)
    assert statistics.z_score(4.0) > 6
    for norm in norms(300, mean=4.0):
        statistics.take_in(norm, 6)
    assert statistics.z_score(4.0) < 3


def test_the_first_steps_only_count():
    statistics = NormStatistics()
    for norm in norms(24):
        assert statistics.z_score(1000 * norm) == 0.0
        statistics.take_in(norm, 6)
    statistics.take_in(2.0, 6)
    assert statistics.z_score(1000.0) > 100
