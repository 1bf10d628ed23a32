import pytest
import torch

from bdh.generate.stepper import Feed, TorchStepper


def read_whole(model, tokens):
    with torch.no_grad():
        return model(torch.tensor([tokens]), use_cache=False).logits[0]


def random_tokens(count, seed=0, vocabulary=61):
    return torch.randint(vocabulary, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("decay", [None, 5])
def test_pieces_and_single_tokens_give_the_logits_of_the_whole(make_model, decay):
    model = make_model(decay=decay).double()
    stepper = TorchStepper(model)
    tokens = random_tokens(23)
    state = stepper.new_state()
    pieces = [tokens[:9], tokens[9:10], tokens[10:11], tokens[11:20], tokens[20:21], tokens[21:]]
    logits = torch.cat([stepper.step([Feed(state, piece, "all")])[0] for piece in pieces])
    torch.testing.assert_close(logits, read_whole(model, tokens).float())  # the stepper returns float32
    assert state.position == 23


def test_sequences_at_different_places_share_a_step(make_model):
    model = make_model().double()
    stepper = TorchStepper(model)
    texts = [random_tokens(12, 1), random_tokens(7, 2), random_tokens(9, 3)]
    states = [stepper.new_state() for _ in texts]
    stepper.step([Feed(state, text[:-1], "none") for state, text in zip(states, texts, strict=True)])
    rows = stepper.step([Feed(state, text[-1:]) for state, text in zip(states, texts, strict=True)])
    for row, text in zip(rows, texts, strict=True):
        torch.testing.assert_close(row, read_whole(model, text)[-1].float())


def test_a_copy_goes_its_own_way(model):
    stepper = TorchStepper(model)
    state = stepper.new_state()
    stepper.step([Feed(state, random_tokens(10))])
    fork, slot = state.clone(), stepper.new_state()
    slot.copy_(state)
    expected = stepper.step([Feed(state, [5])])[0]
    assert torch.equal(stepper.step([Feed(fork, [5])])[0], expected)
    assert torch.equal(stepper.step([Feed(slot, [5])])[0], expected)
    slot.clear()
    assert slot.position == 0
    assert not slot.tensors["sums"].any()
    assert state.nbytes == stepper.state_bytes


@pytest.mark.parametrize(("tokens", "message"), [([], "no tokens"), ([3, 61], "token id 61"), ([-1], "token id -1")])
def test_wrong_tokens_leave_every_state_alone(model, tokens, message):
    stepper = TorchStepper(model)
    good, bad = stepper.new_state(), stepper.new_state()
    with pytest.raises(ValueError, match=message):
        stepper.step([Feed(good, [1, 2]), Feed(bad, tokens)])
    assert good.position == 0
    assert not good.tensors["sums"].any()
