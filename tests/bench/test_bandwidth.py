"""Bytes of a token, counted by hand."""

import pytest

from bdh import BDHConfig
from bdh.bench.bandwidth import Bandwidth, measure_bandwidth, traffic
from bdh.bench.weights import Density

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


def test_bandwidth_is_measured():
    found = measure_bandwidth(1 << 26, rounds=3)
    # Any memory of this century, and none.
    assert 1e8 < found.copy < 1e13
    assert 1e8 < found.read < 1e13
