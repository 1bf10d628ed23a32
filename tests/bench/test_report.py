"""Reports: tables of aligned columns, and the same figures as JSON."""

import json

import pytest

from bdh import BDHConfig
from bdh.bench.report import Report
from bdh.bench.weights import sparse_model


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
