import pytest
import torch

from bdh.generate.kernel_stepper import KernelStepper
from bdh.generate.stepper import Feed, TorchStepper
from tests.generate.test_stepper import random_tokens


def in_pieces(tokens, seed):
    """The tokens in pieces of random lengths."""
    generator = torch.Generator().manual_seed(seed)
    pieces = []
    while tokens:
        count = int(torch.randint(1, 9, (), generator=generator))
        pieces.append(tokens[:count])
        tokens = tokens[count:]
    return pieces


@pytest.mark.parametrize("decay", [None, 3, [2, None, 0.01]])
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"n_embd": 23, "n_head": 1, "mlp_internal_dim_multiplier": 2, "n_layer": 2},
        {"n_embd": 33, "n_head": 3, "mlp_internal_dim_multiplier": 38, "n_layer": 2},
        {"n_embd": 16, "n_head": 5, "mlp_internal_dim_multiplier": 350, "n_layer": 1},  # N of several stretches
    ],
)
def test_kernels_agree_with_the_dense_recurrent_form(make_model, sizes, decay):
    if sizes and isinstance(decay, list):
        decay = [2.0, *[None] * (sizes["n_head"] - 1)]
    model = make_model(**sizes, decay=decay)
    exact, kernels = TorchStepper(make_model(**sizes, decay=decay).double()), KernelStepper(model)
    tokens = random_tokens(150)
    expected = exact.step([Feed(exact.new_state(), tokens, "all")])[0]
    state = kernels.new_state()
    logits = torch.cat([kernels.step([Feed(state, piece, "all")])[0] for piece in in_pieces(tokens, 3)])
    # Sums of up to some thousand float32 products, through a few passes.
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert state.position == 150


@pytest.mark.parametrize("decay", [None, 3, [2, None, 0.01]])
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
def test_any_pieces_beside_any_neighbours_give_the_same_bits(make_model, decay, state_dtype):
    stepper = KernelStepper(make_model(decay=decay), state=state_dtype)
    texts = [random_tokens(180, 1), random_tokens(37, 2), random_tokens(90, 3)]
    alone = []
    for text in texts:
        state = stepper.new_state()
        alone.append((stepper.step([Feed(state, text, "all")])[0], state))
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
    stepper, tokens = KernelStepper(model), random_tokens(40)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(stepper.step([Feed(stepper.new_state(), tokens, "all")])[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


def test_changed_weights_are_seen(model):
    stepper = KernelStepper(model)
    before = stepper.step([Feed(stepper.new_state(), [1, 2, 3])])[0]
    with torch.no_grad():
        model.decoder.weight.mul_(-1)
    after = stepper.step([Feed(stepper.new_state(), [1, 2, 3])])[0]
    expected = TorchStepper(model)
    torch.testing.assert_close(after, expected.step([Feed(expected.new_state(), [1, 2, 3])])[0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before, after)


def test_layer_steps_of_a_large_call_are_progress(make_model, monkeypatch):
    """And the bits of the result are the same."""
    model = make_model()
    found = []
    for long_call in (1 << 60, 1):
        monkeypatch.setattr("bdh.generate.kernel_stepper._LONG_CALL", long_call)
        stepper, marks = KernelStepper(model), []
        monkeypatch.setattr(stepper, "mark_progress", lambda marks=marks: marks.append(1))
        feed = Feed(stepper.new_state(), list(range(20)))
        found.append((stepper.step([feed])[0], len(marks)))
    (whole, num_whole), (by_layer, num_by_layer) = found
    assert torch.equal(whole, by_layer)
    assert num_by_layer == num_whole + model.config.n_layer
