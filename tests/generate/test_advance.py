"""Tokens in pieces, one by one and beside others, by the kernels and by torch's operations."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bdh.generate.advance import Advancer, LayerActivity, StepInput
from bdh.model.state import SynapticState
from bdh.ops.eager import layer_norm

PATHS = ["kernels", "torch"]
SIZES = [
    {},
    {"n_embd": 23, "n_head": 1, "mlp_internal_dim_multiplier": 2, "n_layer": 2},
    {"n_embd": 33, "n_head": 3, "mlp_internal_dim_multiplier": 38, "n_layer": 2},
    {"n_embd": 16, "n_head": 5, "mlp_internal_dim_multiplier": 350, "n_layer": 1},  # N of several stretches
]


def read_whole(model, tokens):
    with torch.no_grad():
        return model(torch.tensor([tokens]), use_cache=False).logits[0]


def random_tokens(count, seed=0, vocabulary=61):
    return torch.randint(vocabulary, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def in_pieces(tokens, seed):
    """The tokens in pieces of random lengths."""
    generator = torch.Generator().manual_seed(seed)
    pieces = []
    while tokens:
        count = int(torch.randint(1, 9, (), generator=generator))
        pieces.append(tokens[:count])
        tokens = tokens[count:]
    return pieces


def read(advancer, pieces, position=0):
    """The logits of all tokens, and the state."""
    state = advancer.new_state()
    state.positions.fill_(position)
    return torch.cat([advancer.advance([StepInput(state, piece, "all")])[0] for piece in pieces]), state


def read_side_by_side(advancer, texts):
    """As :func:`read`, of texts in pieces of different lengths that share steps."""
    states = [advancer.new_state() for _ in texts]
    queues = [in_pieces(text, seed) for seed, text in enumerate(texts)]
    logits = [[] for _ in texts]
    while any(queues):
        running = [index for index, queue in enumerate(queues) if queue]
        results = advancer.advance([StepInput(states[index], queues[index].pop(0), "all") for index in running])
        for index, rows in zip(running, results, strict=True):
            logits[index].append(rows)
    return [(torch.cat(rows), state) for rows, state in zip(logits, states, strict=True)]


def same_bits(a, b):
    """Of logits and states."""
    return torch.equal(a[0], b[0]) and all(
        torch.equal(x, y)
        for name, tensors in a[1].tensors.items()
        for x, y in zip(tensors, b[1].tensors[name], strict=True)
    )


def with_threads(count, run):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return run()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("decay", [None, 3, [2, None, 0.01]])
@pytest.mark.parametrize("sizes", SIZES, ids=["3 heads", "1 head", "38 neurons a width", "5 heads"])
def test_pieces_give_the_logits_of_the_whole_on_both_paths(make_model, sizes, decay):
    if sizes and isinstance(decay, list):
        decay = [2.0, *[None] * (sizes["n_head"] - 1)]
    tokens = random_tokens(150)
    exact = make_model(**sizes, decay=decay).double()
    expected = read_whole(exact, tokens).float()
    logits, state = read(Advancer(exact), in_pieces(tokens, 2))
    torch.testing.assert_close(logits, expected)  # float64, returned as float32
    assert state.position == 150
    logits, state = read(Advancer(make_model(**sizes, decay=decay), path="kernels"), in_pieces(tokens, 3))
    # Sums of up to some thousand float32 products, through a few layer steps.
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert state.position == 150


@pytest.mark.parametrize("decay", [None, 3, [2, None, 0.01]])
@pytest.mark.parametrize(
    ("weights", "state"),
    [
        ("float32", "float32"),
        ("float32", "bfloat16"),
        ("int8", "float32"),
        ("int4", "float32"),
        ("mixed", "bfloat16"),
        ("float32", "int16"),
        ("int8", "int16"),
    ],
)
def test_any_pieces_beside_any_neighbours_have_the_same_bits_by_the_kernels(make_model, decay, weights, state):
    advancer = Advancer(make_model(decay=decay), path="kernels", weights=weights, state=state)
    texts = [random_tokens(180, 1), random_tokens(37, 2), random_tokens(90, 3)]
    for text, found in zip(texts, read_side_by_side(advancer, texts), strict=True):
        assert same_bits(found, read(advancer, [text]))


@pytest.mark.parametrize("decay", [None, [2, None, 0.01]])
def test_states_in_int16_stay_close_to_float32(make_model, decay):
    model, tokens = make_model(decay=decay), random_tokens(300)
    logits, _ = read(Advancer(model, path="kernels", state="int16"), [tokens])
    expected, _ = read(Advancer(model, path="kernels"), [tokens])
    torch.testing.assert_close(logits, expected, rtol=0, atol=0.01)


def test_a_state_in_int16_that_was_saved_continues_with_the_same_bits(model, tmp_path):
    advancer, tokens = Advancer(model, path="kernels", state="int16"), random_tokens(80)
    state = advancer.new_state()
    advancer.advance([StepInput(state, tokens[:50])])
    state.save(tmp_path / "state.safetensors")
    loaded = SynapticState.load(tmp_path / "state.safetensors")
    assert loaded.pattern == advancer.pattern
    expected = advancer.advance([StepInput(state, tokens[50:], "all")])[0]
    assert torch.equal(advancer.advance([StepInput(loaded, tokens[50:], "all")])[0], expected)


def test_a_state_in_int16_takes_two_bytes_a_number_and_64_a_neuron_and_is_of_a_kind_of_its_own(model):
    codes, numbers = Advancer(model, path="kernels", state="int16"), Advancer(model, path="kernels")
    L, D, num_neurons = model.config.n_layer, model.config.n_embd, model.decoder.weight.shape[1]
    assert codes.state_bytes == L * (num_neurons * (2 * D + 64) + 16 * 4 * D) == codes.new_state().nbytes - 8
    assert codes.pattern[0] == "rows int16"
    with pytest.raises(ValueError, match="cannot be copied into one"):
        numbers.new_state().copy_(codes.new_state())
    with pytest.raises(ValueError, match="state is 'int16': must be float32 with torch's operations"):
        Advancer(model, path="torch", state="int16")
    with pytest.raises(ValueError, match="state is 'int16': must be float32 with a window"):
        Advancer(model, state="int16", window=9)


def test_sequences_at_different_places_share_a_step_of_torch(make_model):
    model = make_model().double()
    texts = [random_tokens(60, 1), random_tokens(7, 2), random_tokens(29, 3)]
    for text, (logits, _) in zip(texts, read_side_by_side(Advancer(model), texts), strict=True):
        torch.testing.assert_close(logits, read_whole(model, text).float())


def test_texts_cut_at_multiples_of_the_chunk_size_have_the_bits_of_the_whole_by_torch(make_model):
    advancer, text = Advancer(make_model(chunk_size=16, decay=9), path="torch"), random_tokens(70)
    whole = read(advancer, [text])
    assert same_bits(read(advancer, [text[:16], text[16:64], text[64:]]), whole)


@pytest.mark.parametrize("state", ["float32", "int16"])
def test_threads_do_not_change_a_bit(model, state):
    advancer, tokens = Advancer(model, path="kernels", state=state), random_tokens(40)
    assert same_bits(*(with_threads(count, lambda: read(advancer, [tokens])) for count in (1, 2)))


@pytest.mark.parametrize("path", PATHS)
def test_a_copy_goes_its_own_way_and_a_cleared_state_is_a_new_one(model, path):
    advancer = Advancer(model, path=path)
    state = advancer.new_state()
    assert state.pattern == advancer.pattern
    assert state.nbytes == advancer.state_bytes + 8
    fresh = advancer.advance([StepInput(state, random_tokens(10))])[0]
    fork, slot = state.clone(), advancer.new_state()
    slot.copy_(state)
    expected = advancer.advance([StepInput(state, [5])])[0]
    assert torch.equal(advancer.advance([StepInput(fork, [5])])[0], expected)
    assert torch.equal(advancer.advance([StepInput(slot, [5])])[0], expected)
    slot.clear()
    assert torch.equal(advancer.advance([StepInput(slot, random_tokens(10))])[0], fresh)


@pytest.mark.parametrize("path", PATHS)
def test_views_of_a_batch_are_advanced_in_its_memory(model, path):
    advancer, texts = Advancer(model, path=path), [random_tokens(20, 1), random_tokens(9, 2), [7]]
    batch = advancer.new_state(3)
    logits = advancer.advance([StepInput(batch.sequence(b), text, "all") for b, text in enumerate(texts)])
    assert batch.positions.tolist() == [20, 9, 1]
    for index, (text, found) in enumerate(zip(texts, logits, strict=True)):
        expected, state = read(advancer, [text])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)  # torch's depend on the neighbours
        torch.testing.assert_close([sums[index : index + 1] for sums in batch.sums], state.sums, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("tokens", "message"), [([], "no tokens"), ([3, 61], "token id 61"), ([-1], "token id -1")])
def test_wrong_tokens_leave_every_state_alone(model, tokens, message):
    advancer = Advancer(model)
    good, bad = advancer.new_state(), advancer.new_state()
    with pytest.raises(ValueError, match=message):
        advancer.advance([StepInput(good, [1, 2]), StepInput(bad, tokens)])
    assert good.position == 0
    assert not any(sums.any() for sums in good.sums)


@pytest.mark.parametrize("path", PATHS)
def test_changed_weights_are_seen(model, path):
    advancer = Advancer(model, path=path)
    before, _ = read(advancer, [[1, 2, 3]])
    with torch.no_grad():
        model.decoder.weight.mul_(-1)
    after, _ = read(advancer, [[1, 2, 3]])
    torch.testing.assert_close(after, read_whole(model, [1, 2, 3]), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before, after)


def test_layer_steps_of_a_large_call_are_progress(make_model, monkeypatch):
    """And the bits of the result are the same."""
    model, found = make_model(), []
    for long_call in (1 << 60, 1):
        monkeypatch.setattr("bdh.generate.advance.LONG_CALL", long_call)
        advancer, marks = Advancer(model, path="kernels"), []
        monkeypatch.setattr(advancer, "mark_progress", lambda marks=marks: marks.append(1))
        found.append((read(advancer, [list(range(20))]), len(marks)))
    (whole, num_whole), (by_layer, num_by_layer) = found
    assert same_bits(whole, by_layer)
    assert num_by_layer == num_whole + model.config.n_layer


def test_the_strongest_come_first_and_only_those_that_fire():
    x = np.array([0, 3, 0, 5, 3, 0.5], np.float32)
    found = LayerActivity.of(x, 3)
    assert (found.fired, found.neurons, found.values) == (4 / 6, [3, 1, 4], [5.0, 3.0, 3.0])
    assert LayerActivity.of(x, 60).neurons == [3, 1, 4, 5]
    assert LayerActivity.of(x, 0).neurons == []
    nothing = LayerActivity.of(np.zeros(4, np.float32), 2)
    assert (nothing.fired, nothing.neurons) == (0, [])


@pytest.mark.parametrize("settings", [{}, {"path": "torch"}, {"window": 8}, {"window": 8, "path": "torch"}])
def test_a_recorded_sequence_tells_what_fired_and_gets_the_same_bits(byte_model, settings):
    advancer = Advancer(byte_model, **settings)
    inputs, results = {}, {}
    for num_neurons in (None, 5):
        one, other = advancer.new_state(), advancer.new_state()
        advancer.advance([StepInput(one, list(b"What is ")), StepInput(other, [9])])
        inputs[num_neurons] = [StepInput(other, [3]), StepInput(one, [7], record_activations=num_neurons)]
        logits = advancer.advance(inputs[num_neurons])
        results[num_neurons] = [*logits, *(tensor for many in one.tensors.values() for tensor in many)]
    assert all(a.equal(b) for a, b in zip(results[None], results[5], strict=True))
    assert inputs[5][0].activity is None
    activity = inputs[5][1].activity
    assert len(activity) == byte_model.config.n_layer
    # The first layer step knows the token alone.
    v = layer_norm(byte_model.embed(torch.tensor(7)), byte_model.config.layer_norm_eps)
    x = F.relu(byte_model.encoder(v)).detach().numpy()
    assert activity[0].fired == pytest.approx(np.count_nonzero(x) / len(x))
    assert activity[0].neurons == np.argsort(-x, kind="stable")[:5].tolist()
    assert activity[0].values == pytest.approx(np.sort(x)[::-1][:5].tolist(), rel=1e-5)  # sums in another order


@pytest.mark.parametrize("path", PATHS)
def test_the_last_token_of_a_prompt_is_recorded(byte_model, path):
    advancer = Advancer(byte_model, path=path)
    prompt = list(b"a prompt that is longer than what the kernels read at once: " * 4)
    whole = StepInput(advancer.new_state(), prompt, record_activations=3)
    advancer.advance([whole])
    state = advancer.new_state()
    advancer.advance([StepInput(state, prompt[:-1])])
    last = StepInput(state, prompt[-1:], record_activations=3)
    advancer.advance([last])
    if path == "kernels":
        assert whole.activity == last.activity
    else:  # other groups of tokens, other rounding
        for a, b in zip(whole.activity, last.activity, strict=True):
            assert a.values == pytest.approx(b.values, rel=1e-3)
