"""A pass in blocks is the plain equations: output, final state and all gradients, however it is cut."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch

from bdh.ops.attention import rotation_table
from bdh.ops.blocks.train import BlockSizes
from bdh.ops.cpu.runtime import unavailable_reason
from tests.ops.blocks.reference import THETA, Case, differences

needs_kernels = pytest.mark.skipif(unavailable_reason() is not None, reason=str(unavailable_reason()))
PATHS = [
    ("torch", torch.float64, 1e-9),  # sums of thousands of products in another order: 1e-13 and less
    ("torch", torch.float32, 1e-4),  # the same in float32
    pytest.param("kernels", torch.float32, 1e-4, marks=needs_kernels),
]
CASES = [
    {"T": 1, "D": 5, "H": 1, "N": 6},
    {"T": 1, "D": 9, "H": 3, "N": 8, "state": True, "dropout": 0.1},
    {"T": 63, "D": 7, "H": 3, "N": 10, "rows": 2},
    {"T": 63, "D": 7, "H": 2, "N": 10, "dropout": 0.1, "B": 3, "rows": 2},
    {"T": 63, "D": 17, "H": 5, "N": 6, "dropout": 0.1, "columns": 10, "rows": 2},
    {"T": 63, "D": 9, "H": 2, "N": 12, "state": True, "columns": 20},
    {"T": 63, "D": 9, "H": 2, "N": 12, "state": True, "rows": 2, "dropout": 0.1},
    {"T": 40, "D": 9, "H": 2, "N": 10, "half_lives": (3.0, float("inf"))},
    {"T": 40, "D": 9, "H": 2, "N": 10, "half_lives": (3.0, 20.0), "state": True, "columns": 7, "dropout": 0.1},
    {"T": 40, "D": 9, "H": 2, "N": 10, "starts": True, "rows": 2},
    {"T": 41, "D": 9, "H": 2, "N": 10, "starts": True, "state": True, "columns": 8},
    {"T": 41, "D": 9, "H": 2, "N": 10, "starts": True, "half_lives": (2.0, 9.0), "padding": True, "columns": 16},
    {"T": 41, "D": 9, "H": 4, "N": 10, "padding": True, "rows": 2, "dropout": 0.1},
    {"T": 128, "D": 33, "H": 4, "N": 64, "dropout": 0.1, "rows": 2},
    {"T": 128, "D": 33, "H": 4, "N": 64, "dropout": 0.1, "state": True, "columns": 32},
    {"T": 128, "D": 129, "H": 1, "N": 64, "columns": 50},
    {"T": 500, "D": 9, "H": 5, "N": 14, "dropout": 0.1},
    {"T": 500, "D": 9, "H": 5, "N": 14, "columns": 64, "rows": 2},
    {"T": 500, "D": 9, "H": 1, "N": 14, "columns": 64, "state": True, "dropout": 0.1},
    {"T": 2048, "D": 15, "H": 2, "N": 16, "B": 1},
    {"T": 2048, "D": 15, "H": 2, "N": 16, "B": 1, "columns": 256, "dropout": 0.1},
]


@pytest.mark.parametrize(("path", "dtype", "tolerance"), PATHS)
@pytest.mark.parametrize("sizes", CASES, ids=lambda sizes: "-".join(f"{k}{v}" for k, v in sizes.items()))
def test_a_pass_is_that_of_the_plain_equations(sizes, path, dtype, tolerance):
    case = Case(**sizes, path=path, dtype=dtype)
    exact = Case(**sizes)  # float32 is compared with float64: naive.py would add its own rounding
    expected = exact.found(exact.by_equations())
    # The same numbers, rounded; a neuron within that of 0 would fire in one of the two only.
    found = [tensor.double() for tensor in case.found(case.by_blocks())]
    assert max(differences(found, expected)) < tolerance


@needs_kernels
@pytest.mark.parametrize("share", [0.0, 2.0])
def test_dense_and_sparse_products_are_alike(share, monkeypatch):
    """Which of them runs depends on how many neurons fire: here each is made to, at about half of them."""
    monkeypatch.setattr("bdh.ops.cpu.train.DENSE_Y", share)
    monkeypatch.setattr("bdh.ops.cpu.train.DENSE_GRADIENT", share)
    sizes = {"T": 70, "D": 33, "H": 2, "N": 24, "B": 3, "rows": 2, "dropout": 0.1}
    case, exact = Case(**sizes, path="kernels", dtype=torch.float32), Case(**sizes)
    found = [tensor.double() for tensor in case.found(case.by_blocks())]
    assert max(differences(found, exact.found(exact.by_equations()))) < 1e-5


@pytest.mark.parametrize("sizes", [{}, {"state": True}, {"half_lives": (2.0, 30.0)}, {"starts": True}])
def test_any_cut_gives_the_same_pass(sizes):
    case = Case(T=37, D=9, H=2, N=10, B=5, dropout=0.1, **sizes)
    spec = case.spec()
    expected = case.found(case.by_blocks(spec))
    for rows, columns in ((1, 37), (5, 37), (2, 1), (3, 8), (5, 36)):
        found = case.found(case.by_blocks(replace(spec, sizes=BlockSizes(rows, columns))))
        assert max(differences(found, expected)) < 1e-12  # the same sums in another order


@pytest.mark.parametrize("path", ["torch", pytest.param("kernels", marks=needs_kernels)])
@pytest.mark.parametrize("columns", [None, 20])
def test_what_is_kept_changes_no_bit(path, columns):
    dtype = torch.float32
    case = Case(T=63, D=9, H=2, N=12, B=3, rows=2, columns=columns, dropout=0.1, path=path, dtype=dtype)
    expected = case.found(case.by_blocks())
    for kept in ({"keep_wide": True}, {"keep_scores": True}, {"keep_wide": True, "keep_scores": True}):
        found = case.found(case.by_blocks(replace(case.spec(), **kept)))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_nothing_wide_is_kept_unless_asked_for():
    case = Case(T=64, D=4, H=2, N=64, dropout=0.1)
    wide, narrow = case.B * case.T * case.H * case.N * 8, case.B * case.T * case.D * 8
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.nbytes) or t, lambda t: t):
        output = case.by_blocks()
    assert max(saved) <= max(narrow, case.encoder.nbytes)
    function = output[0].grad_fn
    assert function.kept == {}
    output = case.by_blocks(replace(case.spec(), keep_wide=True))
    kept = [each.x for each in output[0].grad_fn.kept.values()]
    assert sum(x.nbytes for x in kept) == wide
    references = [weakref.ref(x) for x in kept]
    function = output[0].grad_fn
    del kept
    case.found(output)
    del output
    assert function.kept == {}
    gc.collect()
    assert all(reference() is None for reference in references)


@pytest.mark.parametrize("given", ["starts", "padding"])
def test_a_table_of_own_positions_is_not_wide(given):
    """Documents and padding give each sequence positions of its own, of which few differ."""
    case = Case(T=64, D=4, H=2, N=64, B=16, **{given: True})
    rotation = case.spec().rotation
    assert rotation.cos.shape == (32, len(case.positions.unique()))
    assert rotation.cos.shape[1] <= 64 + 1
    cos, sin = rotation.of_block(slice(2, 5), slice(10, 30))
    turns = rotation_table(case.positions[2:5, 10:30], 64, THETA, torch.float64).permute(2, 0, 1)
    assert torch.equal(cos, turns.real)
    assert torch.equal(sin, turns.imag)
    starts, places = rotation.runs(slice(2, 5), slice(10, 30))
    assert (starts[0], starts[-1]) == (0, 60)
    for first, last, place in zip(starts[:-1].tolist(), starts[1:].tolist(), places.tolist(), strict=True):
        assert first // 20 == (last - 1) // 20
        assert torch.equal(rotation.cos[:, place : place + last - first], cos.flatten(1)[:, first:last])


def test_gradients_of_some_inputs_only():
    case = Case(T=20, D=5, H=2, N=6, state=True)
    expected = dict(zip(map(id, case.inputs), case.found(case.by_blocks())[2:], strict=True))
    for wanted in case.inputs:
        for tensor in case.inputs:
            tensor.requires_grad_(tensor is wanted)
        out, state = case.by_blocks()
        loss = (out * case.grad_out).sum() + (state * case.grad_state).sum()
        assert torch.equal(torch.autograd.grad(loss, wanted)[0], expected[id(wanted)])


def test_the_gradient_may_come_through_the_state_alone():
    case = Case(T=20, D=5, H=2, N=6, state=True, columns=8)
    (expected,) = torch.autograd.grad((case.by_equations()[1] * case.grad_state).sum(), case.v)
    (found,) = torch.autograd.grad((case.by_blocks()[1] * case.grad_state).sum(), case.v)
    assert max(differences([found], [expected])) < 1e-12


def test_a_second_backward_pass_gives_the_same():
    case = Case(T=20, D=5, H=2, N=6, keep_wide=True, keep_scores=True)
    out, _ = case.by_blocks()
    loss = (out * case.grad_out).sum()
    first = torch.autograd.grad(loss, case.inputs, retain_graph=True)
    second = torch.autograd.grad(loss, case.inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_second_derivatives_are_refused():
    case = Case(T=8, D=5, H=1, N=6)
    with pytest.raises(RuntimeError, match=r"no second derivatives \(create_graph=True\)"):
        torch.autograd.grad(case.by_blocks()[0].square().sum(), case.v, create_graph=True)


@pytest.mark.parametrize("path", ["torch", pytest.param("kernels", marks=needs_kernels)])
@pytest.mark.parametrize("rows", [1, 2])
def test_memory_in_any_order(path, rows):
    """A gradient of one number for all places, gradients and values transposed: not one row behind the other."""
    case = Case(T=20, D=8, H=2, N=6, rows=rows, columns=10, path=path, dtype=torch.float32)
    transposed = case.v.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    for gradient in (
        torch.tensor(2.0).expand(2, 20, 8),
        case.grad_out.float().transpose(1, 2).contiguous().transpose(1, 2),
    ):
        assert not gradient.is_contiguous()
        expected = torch.autograd.grad(case.by_blocks()[0], case.inputs, gradient.contiguous())
        assert all(
            torch.equal(a, b)
            for a, b in zip(torch.autograd.grad(case.by_blocks()[0], case.inputs, gradient), expected, strict=True)
        )
        case.v, was = transposed, case.v
        found = torch.autograd.grad(case.by_blocks()[0], case.inputs, gradient)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        case.v = was


@needs_kernels
def test_defaults_of_torch_are_no_matter():
    case = Case(T=20, D=8, H=2, N=6, path="kernels", dtype=torch.float32)
    expected = case.found(case.by_blocks())
    torch.set_default_dtype(torch.float64)
    try:
        found = case.found(case.by_blocks())
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("path", ["torch", pytest.param("kernels", marks=needs_kernels)])
def test_a_backward_pass_under_autocast_computes_as_the_forward_pass_did(path):
    case = Case(T=20, D=8, H=2, N=6, path=path, dtype=torch.float32)
    expected = case.found(case.by_blocks())
    output = case.by_blocks()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = case.found(output)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_what_cannot_be_is_refused():
    case = Case(T=8, D=5, H=1, N=6)
    case.v, case.mask = case.v[:, :0], case.mask[:, :0]
    with pytest.raises(ValueError, match=r"v has shape \(2, 0, 5\): must have at least 1 token"):
        case.by_blocks()
    with pytest.raises(ValueError, match="keep_scores is True: must be False in float16"):
        Case(T=8, D=5, H=1, N=6, dtype=torch.float16, keep_scores=True).by_blocks()


@needs_kernels
def test_what_is_not_a_number_stays_so():
    """A weight gone wrong must show in the loss: neurons that do not fire are skipped, one that is NaN is not."""
    case = Case(T=20, D=8, H=2, N=6, path="kernels", dtype=torch.float32)
    with torch.no_grad():
        case.encoder[0, :, 1] = float("nan")
    assert case.by_blocks()[0].isnan().any()
    case = Case(T=20, D=8, H=2, N=6, path="kernels", dtype=torch.float32)
    with torch.no_grad():
        case.encoder_v[1, :, 3] = float("nan")
    assert case.by_blocks()[0].isnan().any()
