import sys

import pytest
import torch

import bdh.generate.window
from bdh.generate.kernel_window import WindowKernelStepper
from bdh.generate.stepper import Feed, make_stepper
from bdh.generate.window import WindowTorchStepper
from bdh.ops import naive
from tests.generate.test_kernel_stepper import in_pieces
from tests.generate.test_stepper import random_tokens, read_whole

STEPPERS = [WindowTorchStepper, WindowKernelStepper]
SIZES = [
    {},
    {"n_embd": 23, "n_head": 1, "mlp_internal_dim_multiplier": 2, "n_layer": 2},
    {"n_embd": 33, "n_head": 3, "mlp_internal_dim_multiplier": 38, "n_layer": 2},
    {"n_embd": 16, "n_head": 5, "mlp_internal_dim_multiplier": 350, "n_layer": 1},  # N of several stretches
]


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


def read(stepper, pieces, position=0):
    state = stepper.new_state()
    state.position = position
    return torch.cat([stepper.step([Feed(state, piece, "all")])[0] for piece in pieces]), state


@pytest.mark.parametrize("decay", [None, 3])
@pytest.mark.parametrize("window", [1, 2, 17, 33, 128])
@pytest.mark.parametrize("sizes", SIZES, ids=["3 heads", "1 head", "38 neurons a width", "5 heads"])
def test_both_steppers_agree_with_banded_scores(make_model, sizes, window, decay):
    tokens = random_tokens(100)
    expected = naive_logits(make_model, tokens, window, decay=decay, **sizes)
    exact, _ = read(WindowTorchStepper(make_model(**sizes, decay=decay).double(), window), in_pieces(tokens, 3))
    torch.testing.assert_close(exact, expected, rtol=1e-6, atol=1e-6)  # float64, returned as float32
    logits, _ = read(WindowKernelStepper(make_model(**sizes, decay=decay), window), in_pieces(tokens, 4))
    # Sums of up to some thousand float32 products, through a few passes.
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stepper", STEPPERS)
def test_a_position_far_out_is_exact(make_model, stepper):
    tokens, first = random_tokens(50), 10**9 + 5
    expected = naive_logits(make_model, tokens, 9, first_position=first)
    logits, state = read(stepper(make_model(), 9), in_pieces(tokens, 5), position=first)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert state.position == first + 50


def test_a_prediction_of_one_pass_is_that_of_the_last_tokens_alone(make_model):
    model, tokens = make_model(n_layer=1), random_tokens(30)
    logits, _ = read(WindowKernelStepper(model, 8), [tokens])
    for newest in range(7, 30):
        alone = read_whole(model, tokens[newest - 7 : newest + 1])[-1]
        torch.testing.assert_close(logits[newest], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stepper", STEPPERS)
def test_a_window_longer_than_the_text_is_none(model, stepper):
    tokens = random_tokens(40)
    logits, _ = read(stepper(model, 500), in_pieces(tokens, 6))
    torch.testing.assert_close(logits, read_whole(model, tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("decay", [None, 3])
@pytest.mark.parametrize("sizes", [{}, SIZES[3]], ids=["3 heads", "5 heads"])
def test_any_pieces_beside_any_neighbours_give_the_same_bits(make_model, sizes, decay):
    stepper = WindowKernelStepper(make_model(**sizes, decay=decay), 20)
    texts = [random_tokens(180, 1), random_tokens(37, 2), random_tokens(90, 3)]
    alone = [read(stepper, [text]) for text in texts]
    states = [stepper.new_state() for _ in texts]
    queues = [in_pieces(text, seed) for seed, text in enumerate(texts)]
    logits = [[] for _ in texts]
    while any(queues):
        running = [index for index, queue in enumerate(queues) if queue]
        results = stepper.step([Feed(states[index], queues[index].pop(0), "all") for index in running])
        for index, rows in zip(running, results, strict=True):
            logits[index].append(rows)
    for index, (expected, state) in enumerate(alone):
        assert torch.equal(torch.cat(logits[index]), expected)
        for name, tensor in state.tensors.items():
            assert torch.equal(states[index].tensors[name], tensor)


def test_threads_do_not_change_a_bit(model):
    stepper, tokens = WindowKernelStepper(model, 11), random_tokens(40)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(read(stepper, [tokens])[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


def test_sequences_at_different_places_share_a_step_of_torch(make_model):
    model = make_model().double()
    stepper = WindowTorchStepper(model, 6)
    texts = [random_tokens(300, 1), random_tokens(7, 2), random_tokens(20, 3)]
    states = [stepper.new_state() for _ in texts]
    results = stepper.step(
        [Feed(state, text, kind) for state, text, kind in zip(states, texts, ["all", "none", "last"], strict=True)]
    )
    expected = [naive_logits(make_model, text, 6) for text in texts]
    torch.testing.assert_close(results[0], expected[0], rtol=1e-6, atol=1e-6)
    assert results[1] is None
    torch.testing.assert_close(results[2], expected[2][-1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("stepper", STEPPERS)
def test_a_copy_goes_its_own_way_and_a_cleared_state_is_a_new_one(model, stepper):
    stepper = stepper(model, 5)
    state = stepper.new_state()
    assert (state.kind, state.nbytes) == ("window:5", stepper.state_bytes)
    fresh = stepper.step([Feed(state, random_tokens(10))])[0]
    fork, slot = state.clone(), stepper.new_state()
    slot.copy_(state)
    stepper.step([Feed(state, [9, 9, 9])])
    expected = stepper.step([Feed(fork, [5, 7])])[0]
    assert torch.equal(stepper.step([Feed(slot, [5, 7])])[0], expected)
    slot.clear()
    assert torch.equal(stepper.step([Feed(slot, random_tokens(10))])[0], fresh)
    with pytest.raises(ValueError, match="window:5"):
        WindowTorchStepper(model, 6).new_state().copy_(state)


def test_either_stepper_goes_on_from_the_others_state(model):
    torch_stepper, kernel_stepper = WindowTorchStepper(model, 9), WindowKernelStepper(model, 9)
    text, rest = random_tokens(40, 1), random_tokens(30, 2)
    for first, second in ((torch_stepper, kernel_stepper), (kernel_stepper, torch_stepper)):
        _, state = read(first, [text])
        expected = first.step([Feed(state.clone(), rest, "all")])[0]
        logits = second.step([Feed(state, rest, "all")])[0]
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_single_precision(make_model, dtype):
    tokens = random_tokens(40)
    expected, _ = read(WindowTorchStepper(make_model(), 9), [tokens])
    logits, state = read(WindowTorchStepper(make_model().to(dtype), 9), in_pieces(tokens, 1))
    # Half precision keeps 2 to 3 digits of logits up to 10, and neurons near 0 fire or do not.
    assert (logits - expected).abs().mean() < 0.05 * expected.abs().mean()
    assert state.tensors["keys"].dtype == torch.float32


def test_kernels_take_weights_in_bfloat16(make_model):
    model, tokens = make_model(), random_tokens(40)
    rounded = make_model().bfloat16().float()
    with torch.no_grad():  # the embedding and the head's sums stay in float32
        rounded.embed.weight.copy_(model.embed.weight)
    logits, _ = read(make_stepper(model, window=9, weights="bfloat16"), in_pieces(tokens, 2))
    expected, _ = read(make_stepper(rounded, window=9), [tokens])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_make_stepper_takes_the_window(model):
    assert isinstance(make_stepper(model, window=4), WindowKernelStepper)
    stepper = make_stepper(model, window=4, path="torch")
    assert isinstance(stepper, WindowTorchStepper)
    assert isinstance(make_stepper(model.double(), window=4), WindowTorchStepper)
    assert "window of 4 tokens" in stepper.path


@pytest.mark.parametrize("window", [0, -3, 2.5, "8", True])
def test_what_is_no_window_is_refused(model, window):
    message = f"window is {window!r}: must be a whole number of tokens, at least 1"
    for make in (make_stepper, WindowTorchStepper, WindowKernelStepper):
        with pytest.raises(ValueError, match=message):
            make(model, window=window)


def test_a_state_in_bfloat16_and_a_window_are_refused_together(model):
    with pytest.raises(ValueError, match="state is 'bfloat16': must be float32 with a window"):
        make_stepper(model, window=4, state="bfloat16")


def test_changed_weights_are_seen(model):
    stepper = WindowKernelStepper(model, 5)
    before, _ = read(stepper, [[1, 2, 3]])
    with torch.no_grad():
        model.decoder.weight.mul_(-1)
    after, _ = read(stepper, [[1, 2, 3]])
    torch.testing.assert_close(after, read_whole(model, [1, 2, 3]), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before, after)


def test_a_window_needs_no_numba_where_torch_computes(model, monkeypatch):
    """As without a window: its module imported the kernels for both."""
    monkeypatch.setattr(bdh.generate, "window", bdh.generate.window)  # put back afterwards, as what is deleted
    monkeypatch.setitem(sys.modules, "numba", None)
    for name in [name for name in sys.modules if name.startswith(("bdh.ops.cpu.", "bdh.generate.window"))]:
        if name != "bdh.ops.cpu.runtime":
            monkeypatch.delitem(sys.modules, name)
    stepper = make_stepper(model, path="torch", window=4)
    assert len(stepper.step([Feed(stepper.new_state(), [1, 2, 3])])) == 1
