import sys

import pytest
import torch

from bdh.generate.advance import Advancer, StepInput
from bdh.ops import naive
from tests.generate.test_advance import (
    PATHS,
    SIZES,
    in_pieces,
    random_tokens,
    read,
    read_side_by_side,
    read_whole,
    same_bits,
    with_threads,
)


def naive_logits(make_model, tokens, window, *, decay=None, first_position=0, **sizes):
    """Those of banded scores in float64; the weights do not depend on the decay."""
    plain = make_model(**sizes)
    reference = plain.to_reference()
    names = ("embed.weight", "encoder", "encoder_v", "decoder", "lm_head")
    weights = naive.Weights(*(reference[name].double() for name in names))
    lives = make_model(**sizes, decay=decay).config.half_lives
    return naive.forward(
        torch.tensor([tokens]),
        weights,
        plain.config.n_layer,
        window=window,
        half_lives=None if lives is None else torch.tensor(lives, dtype=torch.float64),
        first_position=first_position,
    )[0].float()


@pytest.mark.parametrize("decay", [None, 3])
@pytest.mark.parametrize("window", [1, 2, 17, 33, 128])
@pytest.mark.parametrize("sizes", SIZES, ids=["3 heads", "1 head", "38 neurons a width", "5 heads"])
def test_both_paths_agree_with_banded_scores(make_model, sizes, window, decay):
    tokens = random_tokens(100)
    expected = naive_logits(make_model, tokens, window, decay=decay, **sizes)
    exact, _ = read(Advancer(make_model(**sizes, decay=decay).double(), window=window), in_pieces(tokens, 3))
    torch.testing.assert_close(exact, expected, rtol=1e-6, atol=1e-6)  # float64, returned as float32
    logits, _ = read(Advancer(make_model(**sizes, decay=decay), path="kernels", window=window), in_pieces(tokens, 4))
    # Sums of up to some thousand float32 products, through a few passes.
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("path", PATHS)
def test_a_position_far_out_is_exact(make_model, path):
    tokens, first = random_tokens(50), 10**9 + 5
    expected = naive_logits(make_model, tokens, 9, first_position=first)
    logits, state = read(Advancer(make_model(), path=path, window=9), in_pieces(tokens, 5), position=first)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert state.position == first + 50


def test_a_prediction_of_one_pass_is_that_of_the_last_tokens_alone(make_model):
    model, tokens = make_model(n_layer=1), random_tokens(30)
    logits, _ = read(Advancer(model, path="kernels", window=8), [tokens])
    for newest in range(7, 30):
        alone = read_whole(model, tokens[newest - 7 : newest + 1])[-1]
        torch.testing.assert_close(logits[newest], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("path", PATHS)
def test_a_window_longer_than_the_text_is_none(model, path):
    tokens = random_tokens(40)
    logits, _ = read(Advancer(model, path=path, window=500), in_pieces(tokens, 6))
    torch.testing.assert_close(logits, read_whole(model, tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("decay", [None, 3])
@pytest.mark.parametrize("sizes", [{}, SIZES[3]], ids=["3 heads", "5 heads"])
def test_any_pieces_beside_any_neighbours_give_the_same_bits(make_model, sizes, decay):
    advancer = Advancer(make_model(**sizes, decay=decay), path="kernels", window=20)
    texts = [random_tokens(180, 1), random_tokens(37, 2), random_tokens(90, 3)]
    for text, found in zip(texts, read_side_by_side(advancer, texts), strict=True):
        assert same_bits(found, read(advancer, [text]))


def test_threads_do_not_change_a_bit(model):
    advancer, tokens = Advancer(model, path="kernels", window=11), random_tokens(40)
    assert same_bits(*(with_threads(count, lambda: read(advancer, [tokens])) for count in (1, 2)))


def test_sequences_at_different_places_share_a_step_of_torch(make_model):
    model = make_model().double()
    advancer = Advancer(model, path="torch", window=6)
    texts = [random_tokens(300, 1), random_tokens(7, 2), random_tokens(20, 3)]
    states = [advancer.new_state() for _ in texts]
    results = advancer.advance(
        [StepInput(state, text, kind) for state, text, kind in zip(states, texts, ["all", "none", "last"], strict=True)]
    )
    expected = [naive_logits(make_model, text, 6) for text in texts]
    torch.testing.assert_close(results[0], expected[0], rtol=1e-6, atol=1e-6)
    assert results[1] is None
    torch.testing.assert_close(results[2], expected[2][-1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("path", PATHS)
def test_a_copy_goes_its_own_way_and_a_cleared_state_is_a_new_one(model, path):
    advancer = Advancer(model, path=path, window=5)
    state = advancer.new_state()
    assert (state.kind, state.nbytes) == ("window:5", advancer.state_bytes + 8)
    assert state.pattern == advancer.pattern
    fresh = advancer.advance([StepInput(state, random_tokens(10))])[0]
    fork, slot = state.clone(), advancer.new_state()
    slot.copy_(state)
    advancer.advance([StepInput(state, [9, 9, 9])])
    expected = advancer.advance([StepInput(fork, [5, 7])])[0]
    assert torch.equal(advancer.advance([StepInput(slot, [5, 7])])[0], expected)
    slot.clear()
    assert torch.equal(advancer.advance([StepInput(slot, random_tokens(10))])[0], fresh)
    with pytest.raises(ValueError, match="window:5"):
        Advancer(model, path="torch", window=6).new_state().copy_(state)


def test_either_path_continues_from_the_others_state(model):
    by_torch, by_kernels = Advancer(model, path="torch", window=9), Advancer(model, path="kernels", window=9)
    text, rest = random_tokens(40, 1), random_tokens(30, 2)
    for first, second in ((by_torch, by_kernels), (by_kernels, by_torch)):
        _, state = read(first, [text])
        expected = first.advance([StepInput(state.clone(), rest, "all")])[0]
        logits = second.advance([StepInput(state, rest, "all")])[0]
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_single_precision(make_model, dtype):
    tokens = random_tokens(40)
    expected, _ = read(Advancer(make_model(), path="torch", window=9), [tokens])
    logits, state = read(Advancer(make_model().to(dtype), path="torch", window=9), in_pieces(tokens, 1))
    # Half precision keeps 2 to 3 digits of logits up to 10, and neurons near 0 fire or do not.
    assert (logits - expected).abs().mean() < 0.05 * expected.abs().mean()
    assert state.tensors["keys"][0].dtype == torch.float32


def test_kernels_take_weights_in_bfloat16(make_model):
    model, tokens = make_model(), random_tokens(40)
    rounded = make_model().bfloat16().float()
    with torch.no_grad():  # the embedding and the head's sums stay in float32
        rounded.embed.weight.copy_(model.embed.weight)
    logits, _ = read(Advancer(model, window=9, weights="bfloat16"), in_pieces(tokens, 2))
    expected, _ = read(Advancer(rounded, window=9), [tokens])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_the_backend_is_said_with_the_window(model):
    assert Advancer(model, window=4).backend == "cpu"
    advancer = Advancer(model, window=4, path="torch")
    assert advancer.backend == Advancer(model.double(), window=4).backend == "eager"
    assert "window of 4 tokens" in advancer.description


@pytest.mark.parametrize("window", [0, -3, 2.5, "8", True])
def test_what_is_no_window_is_refused(model, window):
    message = f"window is {window!r}: must be a whole number of tokens, at least 1"
    with pytest.raises(ValueError, match=message):
        Advancer(model, window=window)


def test_a_state_in_bfloat16_and_a_window_are_refused_together(model):
    with pytest.raises(ValueError, match="state is 'bfloat16': must be float32 with a window"):
        Advancer(model, window=4, state="bfloat16")


def test_changed_weights_are_seen(model):
    advancer = Advancer(model, path="kernels", window=5)
    before, _ = read(advancer, [[1, 2, 3]])
    with torch.no_grad():
        model.decoder.weight.mul_(-1)
    after, _ = read(advancer, [[1, 2, 3]])
    torch.testing.assert_close(after, read_whole(model, [1, 2, 3]), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before, after)


def test_a_window_needs_no_numba_where_torch_computes(model, monkeypatch):
    """As without a window: its module imported the kernels for both."""
    monkeypatch.setitem(sys.modules, "numba", None)
    for name in [name for name in sys.modules if name.startswith("bdh.ops.cpu.") and name != "bdh.ops.cpu.runtime"]:
        monkeypatch.delitem(sys.modules, name)
    advancer = Advancer(model, path="torch", window=4)
    assert len(advancer.advance([StepInput(advancer.new_state(), [1, 2, 3])])) == 1
