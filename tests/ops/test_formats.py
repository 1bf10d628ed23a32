"""Weights in whole numbers with scales."""

import pytest
import torch

from bdh.model.quantized import QuantizedLinear
from bdh.ops.formats import Codes, pack, rounded, row_bytes, unpack

FORMATS = ("int8", "int4")


@pytest.mark.parametrize("D", [1, 31, 32, 48, 64, 257])
@pytest.mark.parametrize("format", FORMATS)
def test_packed_rows_hold_what_was_rounded(format, D):
    found = rounded(torch.randn(7, D), format)
    packed = pack(found, format)
    assert packed.shape == (7, row_bytes(format, D))
    again = unpack(packed, D, format)
    assert torch.equal(again.codes, found.codes)
    assert torch.equal(again.scales, found.scales)


@pytest.mark.parametrize("format", FORMATS)
def test_no_weight_is_far_from_its_code(format):
    weight = torch.randn(50, 96) * torch.logspace(-20, 20, 50)[:, None]
    found = rounded(weight, format)
    steps = found.scales.float().abs().repeat_interleave(96 // found.scales.shape[1], dim=1)
    # In int4 the largest is at most 9 steps from 0, and the code that is furthest there is 7 or -8.
    most = {"int8": 1.0, "int4": 2.0}[format]
    assert ((found.dequantized() - weight).abs() <= most * steps).all()


@pytest.mark.parametrize(("format", "most"), [("int8", 1e-4), ("int4", 1e-2)])
def test_the_error_of_normal_weights_is_small(format, most):
    weight = torch.randn(200, 256)
    error = (rounded(weight, format).dequantized() - weight).square().sum() / weight.square().sum()
    # A step of amax / 127 has a variance of (3 / 127)^2 / 12; one of 4 bits is measured at 7e-3.
    assert error < most


@pytest.mark.parametrize("format", FORMATS)
def test_a_row_of_zeros_stays_zero(format):
    weight = torch.zeros(3, 40)
    assert torch.equal(rounded(weight, format).dequantized(), weight)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_weights_that_are_not_finite_are_refused_with_their_place(format, value):
    weight = torch.zeros(3, 40)
    weight[2, 5] = value
    with pytest.raises(ValueError, match=f"weight 5 of row 2 of the matrix is {value}"):
        rounded(weight, format)


def test_rows_of_another_length_are_refused():
    with pytest.raises(ValueError, match="rows of 64 weights in int4 have 36 bytes, not 35"):
        unpack(torch.zeros(2, 35, dtype=torch.uint8), 64, "int4")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("by_input", [False, True])
def test_a_module_multiplies_with_what_its_codes_stand_for(format, by_input):
    found = rounded(torch.randn(48, 40), format)
    module = QuantizedLinear.of(found, format, by_input=by_input)
    weight = found.dequantized().t() if by_input else found.dequantized()
    v = torch.randn(3, weight.shape[1])
    assert torch.equal(module(v), torch.nn.functional.linear(v, weight))
    other = QuantizedLinear(module.in_features, module.out_features, format, by_input=by_input)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other.weight, module.weight)


def test_codes_of_a_row_of_one_group_have_one_scale():
    assert Codes(torch.ones(2, 20, dtype=torch.int8), torch.ones(2, 1, dtype=torch.bfloat16)).dequantized().sum() == 40


@pytest.mark.parametrize("format", FORMATS)
def test_codes_do_not_depend_on_how_the_weights_lie_in_memory(format):
    """Where two scales have close errors, that of a transposed matrix was another one: its errors were added in another order."""
    weight = torch.randn(96, 3000)
    rows = weight.t()
    found, of_copy = rounded(rows, format), rounded(rows.contiguous(), format)
    in_parts = [rounded(some, format).codes for some in rows.split(7)]
    assert torch.equal(found.scales, of_copy.scales)
    assert torch.equal(found.codes, of_copy.codes)
    assert torch.equal(found.codes, torch.cat(in_parts))
