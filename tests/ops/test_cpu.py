"""The sparse kernels against naive.py, and the vector instructions that they consist of."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numba import njit
from numba.core.errors import TypingError

from bdh.ops import backends, naive
from bdh.ops.backends import Work, choose_backend
from bdh.ops.cpu import entries, kernels, state_rows, vector
from bdh.ops.cpu.recurrence import KernelWeights, Recurrence, TokenRows
from bdh.ops.cpu.runtime import Team, compiled, most_threads
from bdh.ops.formats import Rows, row_bytes, unpack

LENGTHS = [1, 2, 15, 16, 17, 32, 48, 63]
MATRIX_FORMATS = ["float32", "bfloat16", "int8", "int4"]
FORMATS = [torch.float32, torch.bfloat16]


def numbers(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def like(dtype):
    return kernels.LIKE[str(dtype).removeprefix("torch.")]


@njit
def all_tiles(like, relu, weights, values, length, out):
    row_bytes = vector.row_bytes(like, length)
    vector.tile_8x1(like, relu, weights, row_bytes, values, 4 * length, length, out[0].ctypes.data, 16)
    for n in range(8):
        vector.tile_1x1(like, relu, weights + n * row_bytes, 0, values, 0, length, out[1, n].ctypes.data, 0)
        vector.tile_1x4(like, relu, weights + n * row_bytes, 0, values, 4 * length, length, out[2, n].ctypes.data, 0)
    for n in (0, 4):
        place = out[3, n].ctypes.data
        vector.tile_4x4(like, relu, weights + n * row_bytes, row_bytes, values, 4 * length, length, place, 16)
    for n in range(8):
        out[4, n, 0] = vector.dot(like, weights + n * row_bytes, values, length)


@njit
def rows_as_float32(like, rows, count, length, out):
    return vector.float_rows(like, rows, count, vector.address(out), length)


@njit
def added(like, row, factor, length, out):
    vector.add_scaled(like, vector.address(out), row, factor, length)


def stored(format, *shape):
    """Weights in a format, what tells it to the kernels, and what they stand for."""
    rows = Rows.of(numbers(*shape), format)
    meant = rows.tensor if rows.tensor.is_floating_point() else unpack(rows.tensor, shape[1], format).dequantized()
    return rows.tensor, kernels.LIKE[format], meant.double()


@pytest.mark.parametrize("format", MATRIX_FORMATS)
@pytest.mark.parametrize("length", LENGTHS)
def test_rows_of_each_format_are_read_as_what_they_stand_for(length, format):
    """To the bit; in the whole vectors of a row and in what is left of it."""
    tensor, mark, meant = stored(format, 5, length)
    assert row_bytes(format, length) == tensor.stride(0) * tensor.itemsize
    out = np.full((5, length), np.nan, np.float32)
    place = rows_as_float32(mark, tensor.data_ptr(), 5, length, out)
    found = tensor if format == "float32" else torch.from_numpy(out)
    assert place == found.data_ptr()
    assert torch.equal(found.double(), meant)
    total = np.zeros(length, np.float32)
    added(mark, tensor[3].data_ptr(), np.float32(2), length, total)
    assert torch.equal(torch.from_numpy(total).double(), 2 * meant[3])


@pytest.mark.parametrize("format", MATRIX_FORMATS)
@pytest.mark.parametrize("length", LENGTHS)
def test_products_have_the_same_bits_in_every_tile(length, format):
    tensor, mark, meant = stored(format, 8, length)
    values = numbers(4, length, seed=1)
    out = np.full((5, 8, 4), np.nan, np.float32)
    all_tiles(mark, False, tensor.data_ptr(), values.data_ptr(), length, out)
    expected = meant @ values.double().T
    # At most 63 products of numbers of about 1, rounded to 2^-24 each.
    np.testing.assert_allclose(out[3], expected.numpy(), rtol=0, atol=2e-5)
    for part, columns in ((0, 1), (1, 1), (2, 4), (4, 1)):
        np.testing.assert_array_equal(out[part, :, :columns], out[3, :, :columns])
    all_tiles(mark, True, tensor.data_ptr(), values.data_ptr(), length, out)
    assert (out[3] >= 0).all()
    np.testing.assert_allclose(out[3], expected.clamp_min(0).numpy(), rtol=0, atol=2e-5)


def test_relu_keeps_nan():
    weights, values = torch.full((8, 3), torch.nan), numbers(4, 3)
    out = np.zeros((5, 8, 4), np.float32)
    all_tiles(kernels.FLOAT32, True, weights.data_ptr(), values.data_ptr(), 3, out)
    assert np.isnan(out[3]).all()


@njit
def address_after(array, num_bytes):
    return vector.address(array) + num_bytes


def test_addresses_are_signed_integers():
    """An unsigned one plus a number is a float to numba: the kernels were compiled a second time for those."""
    array = np.zeros(3, np.float32)
    after = address_after(array, 4)
    assert isinstance(after, int)
    assert after == array[1:].ctypes.data
    folder = Path(vector.__file__).parent
    assert [file.name for file in folder.glob("*.py") if re.search(r"\w\.ctypes\.data", file.read_text())] == [
        "vector.py"  # which says why not
    ]


@njit
def sweep(like, rows, lists, count, values, out, length):
    room, entries = lists.strides[0], vector.address(lists)
    state_rows.attend_and_update(like, rows, entries, room, count, values, out, length)


def listed(tokens, factors):
    """A list of entries: tokens (count,), and their factors (count, 4)."""
    lists = np.zeros((state_rows.LIST_ARRAYS, len(tokens) + vector.LANES), np.float32)
    lists[0].view(np.int32)[: len(tokens)] = tokens
    lists[1:, : len(tokens)] = np.array(factors, np.float32).T
    return lists


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("length", [*LENGTHS, 64, 81, 130])
def test_a_sweep_reads_before_it_writes(length, dtype):
    rows, value, out = numbers(2, length, dtype=dtype), numbers(length, seed=1), numbers(length, seed=2)
    expected_out = out.double() + 0.5 * rows[0].double() - 2 * rows[1].double()
    exact = rows.double() + torch.tensor([[3.0], [0.25]]) * value.double()
    lists = listed([0], [(0.5, -2, 3, 0.25)])
    sweep(like(dtype), rows.data_ptr(), lists, 1, value.data_ptr(), out.data_ptr(), length)
    torch.testing.assert_close(out.double(), expected_out, rtol=0, atol=1e-6)
    # One rounding to float32, and for bfloat16 a second one, to the nearest: where the first one does not fall on a
    # tie that the exact number is beside, it is that of the exact number.
    expected = exact.float().to(dtype)
    assert torch.equal(rows, expected)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("length", [*LENGTHS, 64, 81, 130])
def test_tokens_of_a_list_have_the_same_bits_as_one_by_one(length, dtype):
    tokens, factors = [0, 2, 3, 6], numbers(4, 4, seed=3).numpy()
    values = numbers(7, length, seed=1)
    results = []
    for lists, counts in (([listed(tokens, factors)], [4]), ([listed([t], f[None]) for t, f in zip(tokens, factors, strict=True)], [1] * 4)):  # fmt: skip
        rows, out = numbers(2, length, dtype=dtype), numbers(7, length, seed=2)
        for each, count in zip(lists, counts, strict=True):
            sweep(like(dtype), rows.data_ptr(), each, count, values.data_ptr(), out.data_ptr(), length)
        results.append((rows, out))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@njit
def list_pair(x, cos, sin, read, write, lists):
    places = [vector.address(each) for each in (x[0], x[1], cos, sin, read, write)]
    return state_rows.list_pair(
        places[0],
        places[1],
        places[2],
        places[3],
        places[4],
        places[5],
        x.shape[1],
        vector.address(lists),
        lists.strides[0],
    )


@njit
def list_gated(x, y, lists):
    room, place = lists.strides[0], vector.address(lists)
    count = entries.list_above_0(vector.address(x), x.shape[0], place, place + room)
    return count, entries.list_products(
        vector.address(y), place + room, place, count, place + 2 * room, place + 3 * room
    )


@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 40])
def test_lists_have_the_tokens_at_which_a_neuron_fires(count):
    x, y = numbers(2, count).clamp_min(0).numpy()
    y = numbers(count, seed=1).numpy()
    lists = np.zeros((4, count + vector.LANES), np.float32)
    tokens = np.flatnonzero(x > 0)
    kept = tokens[y[: len(tokens)] > 0]  # y stands in the order of the list
    assert list_gated(x, y, lists) == (len(tokens), len(kept))
    np.testing.assert_array_equal(lists[0].view(np.int32)[: len(tokens)], tokens)
    np.testing.assert_array_equal(lists[2].view(np.int32)[: len(kept)], kept)
    np.testing.assert_array_equal(lists[3, : len(kept)], (x[tokens] * y[: len(tokens)])[y[: len(tokens)] > 0])


@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 40])
def test_a_list_has_the_tokens_at_which_a_pair_fires(count):
    x = numbers(2, count).clamp_min(0).numpy()
    cos, sin, read, write = numbers(4, count, seed=1).numpy()
    lists = np.zeros((state_rows.LIST_ARRAYS, count + vector.LANES), np.float32)
    tokens = np.flatnonzero((x > 0).any(0))
    assert list_pair(x, cos, sin, read, write, lists) == len(tokens)
    q = np.stack([x[0] * cos - x[1] * sin, x[1] * cos + x[0] * sin])
    expected = np.concatenate([q * read, q * write])[:, tokens]
    np.testing.assert_array_equal(lists[0].view(np.int32)[: len(tokens)], tokens)
    np.testing.assert_array_equal(lists[1:, : len(tokens)], expected)


@pytest.mark.parametrize(("H", "N", "D"), [(1, 2, 1), (3, 10, 7), (2, 1030, 20), (5, 64, 33)])
def test_layer_steps_are_those_of_naive(H, N, D):
    """Over rows read at once, and one by one; 1030 neurons are three stretches, of which one has 6."""
    V, L, T = 19, 3, 30
    scale = D**-0.5
    weights = naive.Weights(
        numbers(V, D), numbers(H, D, N, seed=1) * scale, numbers(H, D, N, seed=2) * scale,
        numbers(H * N, D, seed=3) * scale, numbers(D, V, seed=4) * scale,
    )  # fmt: skip
    tokens = torch.randint(V, (1, T), generator=torch.Generator().manual_seed(5))
    expected = naive.forward(tokens, naive.Weights(*(w.double() for w in weights)), L)[0]
    recurrence = Recurrence(
        KernelWeights.of(
            [
                weights.embed,
                weights.encoder.transpose(1, 2).reshape(H * N, D),
                *weights.encoder_v.transpose(1, 2),
                weights.decoder.T,
                weights.lm_head.T,
            ],
            rope_theta=naive.ROPE_THETA,
            eps=naive.LAYER_NORM_EPS,
            num_layer_steps=L,
        )
    )
    results = []
    for cuts in ([0, T], range(T + 1)):
        sums = torch.zeros(L, 1, H, N, D)
        logits = []
        for start, end in zip(list(cuts)[:-1], list(cuts)[1:], strict=True):
            rows = TokenRows(tokens[0, start:end].numpy(), np.arange(start, end), np.array([0, end - start]))
            logits.append(recurrence.logits(recurrence.advance(rows, [{"sums": list(sums)}])))
        results.append(torch.cat(logits))
    # Float32 through three layer steps, whose layer norms can amplify what little there is at D = 1.
    torch.testing.assert_close(results[0].double(), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(*results)


def test_rows_of_another_format_are_refused():
    """Integers were read as float32."""
    values = numbers(8)
    with pytest.raises(TypingError, match="rows of int32: none of float32, "):
        all_tiles(
            np.zeros(0, np.int32), False, values.data_ptr(), values.data_ptr(), 3, np.zeros((5, 8, 4), np.float32)
        )


def test_rotations_are_exact_at_a_position_of_a_thousand_million():
    positions = np.array([0, 7, 10**6 + 1, 10**9 - 1, 10**9])
    turns = (65536.0 ** (-2 * np.arange(4) / 8)) / (2 * np.pi)
    cos, sin = np.empty((4, 5), np.float32), np.empty((4, 5), np.float32)
    kernels.rotations(Team(1).new_progress(1).ctypes.data, positions, turns, cos, sin)
    phases = 2 * np.longdouble(np.pi) * np.fmod(positions[None].astype(np.longdouble) * turns[:, None], 1)
    # The product in float64 is good to 4e-8 turns at 10^9, a phase of 2.4e-7.
    np.testing.assert_allclose(cos, np.cos(phases).astype(np.float64), rtol=0, atol=4e-7)
    np.testing.assert_allclose(sin, np.sin(phases).astype(np.float64), rtol=0, atol=4e-7)


def test_threads_follow_torch():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert most_threads() == 1
        torch.set_num_threads(4096)  # more than there are
        assert most_threads() >= 1
    finally:
        torch.set_num_threads(before)


def test_a_compilation_says_that_it_compiles_and_how_long_it_took():
    said = []
    function = njit(lambda number: number + 1)
    compiled("a test", lambda: function(1), said.append)
    assert said[0].startswith("compiling the kernels for a test, once")
    assert "ready, after" in said[1]
    said.clear()
    compiled("a test", lambda: function(1), said.append)
    assert said == []


@pytest.mark.slow
def test_kernels_are_compiled_once_and_then_loaded(tmp_path):
    """In two new processes that share a cache; the first one alone says that it compiles.

    And their first launch leaves torch's threads alone: numba asks the OpenMP that both share for all cores.
    """
    program = (
        "import shutil, sys; from pathlib import Path\n"
        "import torch; torch.set_num_threads(1); from tests.networks import random_network\n"
        "from bdh.generate.advance import Advancer, StepInput\n"
        "from bdh.ops.cpu import kernels\n"
        "folder = Path(kernels.layer_steps.stats.cache_path)\n"
        "if not list(folder.glob('*.nbi')):  # the outermost kernels are enough to compile\n"
        "    few = lambda _, names: [name for name in names if 'layer_steps' in name or not name.endswith(('nbi', 'nbc'))]\n"
        "    shutil.copytree(sys.argv[1], folder, ignore=few, dirs_exist_ok=True)\n"
        "model = random_network(n_embd=8, n_head=1, n_layer=1, mlp_internal_dim_multiplier=2)\n"
        "advancer = Advancer(model)\n"
        "print(advancer.description)\n"
        "advancer.advance([StepInput(advancer.new_state(), [1, 2])])\n"
        "print(torch.get_num_threads(), sum(kernels.layer_steps.stats.cache_hits.values()))\n"
    )
    command = [sys.executable, "-c", program, kernels.layer_steps.stats.cache_path]
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    runs = [subprocess.run(command, env=environment, capture_output=True, text=True, check=True) for _ in range(2)]
    assert all("sparse kernels" in run.stdout for run in runs)
    assert [run.stdout.split()[-2:] for run in runs] == [["1", "0"], ["1", "1"]]
    assert "compiling the kernels for reading and writing, once on this processor ..." in runs[0].stderr
    assert "the kernels for reading and writing are ready, after" in runs[0].stderr
    assert "the kernels" not in runs[1].stderr  # however long loading them takes


def test_the_backend_is_chosen_in_one_place(monkeypatch):
    def choose(requested, device="cpu", obstacle=None):
        chosen = choose_backend("advance", requested, Work(torch.device(device), obstacle=obstacle))
        return chosen.backend.name, chosen.reason

    assert choose("auto") == ("cpu", "float32 or bfloat16 on the cpu")
    assert choose("torch") == ("eager", "asked for")
    assert choose("auto", "cuda:0") == ("eager", "the model is on cuda:0, the kernels run on the cpu")
    assert choose("auto", obstacle="a layer has hooks") == ("eager", "a layer has hooks")
    with pytest.raises(ValueError, match="path is 'fast': must be one of auto, kernels, torch"):
        choose("fast")
    with pytest.raises(ValueError, match="cannot run here: a layer has hooks; must be auto or torch"):
        choose("kernels", obstacle="a layer has hooks")
    monkeypatch.setattr("bdh.ops.backends.unavailable_reason", lambda: "numba cannot be imported: not there")
    assert choose("auto") == ("eager", "numba cannot be imported: not there")


def test_the_reason_for_a_further_backend_is_its_own(monkeypatch):
    """It was the blocks' on a GPU, and a KeyError where it was preferred."""

    def choose(*offered):
        monkeypatch.setattr(backends, "BACKENDS", offered)
        return choose_backend("advance", "auto", Work(torch.device("cuda:0")))

    other = backends.Backend("other", words={"advance": "other"})
    expected = "no kernels: the model is on cuda:0, the kernels run on the cpu"
    assert choose(backends.CPU, other, backends.EAGER) == (other, expected)
    assert choose(other, backends.EAGER) == (other, "float32 on the cuda")


@pytest.mark.slow
def test_two_threads_may_read_at_once_on_numbas_own_threading_layer():
    """It ends the process if two threads use it at once. (On OpenMP, tests/ops/cpu/test_pieces.py does the same.)"""
    program = (
        "import threading, torch; from tests.networks import random_network\n"
        "from bdh.generate.advance import Advancer, StepInput\n"
        "model = random_network(n_embd=64, n_head=2, n_layer=2, mlp_internal_dim_multiplier=16)\n"
        "advancer = Advancer(model)\n"
        "def read():\n"
        "    for _ in range(20): advancer.advance([StepInput(advancer.new_state(), [1, 2, 3])])\n"
        "threads = [threading.Thread(target=read) for _ in range(4)]\n"
        "[t.start() for t in threads]; [t.join() for t in threads]\n"
        "import numba; print(numba.threading_layer())\n"
    )
    environment = {**os.environ, "NUMBA_THREADING_LAYER": "workqueue"}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "workqueue"
