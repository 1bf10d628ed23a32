"""Candidates in rounds, percentiles, and reports: tables of aligned columns, and the same figures as JSON."""

import json
import os

import pytest
import torch

from bdh import BDHConfig
from bdh.bench.common import Report, Timing, interleaved, machine, machine_line, percentile, sparse_model


def test_tables_are_aligned():
    report = Report("decode")
    report.table("times", ["who", "ms"], [["kernels", "1.25"], ["dense", "100.00"]])
    assert report.text().splitlines() == ["", "times", "  who          ms", "  kernels    1.25", "  dense    100.00"]


def test_what_is_no_finite_number_is_null_in_json():
    report = Report(
        "train", figures={"agreement": {"loss": float("nan"), "all": [float("inf"), 1.5], "pair": (2, None)}}
    )
    found = json.loads(report.json(), parse_constant=pytest.fail)
    assert found["agreement"] == {"loss": None, "all": [None, 1.5], "pair": [2, None]}


def test_the_introduction_says_what_fires():
    report = Report("decode")
    model = sparse_model(BDHConfig(n_embd=32, n_head=2, n_layer=2, mlp_internal_dim_multiplier=16))
    found = report.introduce(model, seed=0)
    figures = json.loads(report.json())
    assert figures["benchmark"] == "decode"
    assert [each["x"] for each in figures["density"]] == [each.x for each in found]
    assert figures["model"]["neurons_per_head"] == 256
    assert "D 32, H 2, N 256, L 2, V 256" in report.text()


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
