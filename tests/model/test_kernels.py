import pytest
import torch
from torch import nn

from bdh import BDHForCausalLM
from bdh.generate.advance import Advancer, StepInput
from bdh.model.weights import forget_kernels, kernel_obstacle, recurrence_of


def step(model, state, tokens, **arguments):
    with torch.no_grad():
        return model(tokens, cache=state, **arguments)


def test_single_tokens_take_the_kernels_and_agree_with_the_dense_form(model, tokens):
    states = [step(model, None, tokens[:, :9], use_cache=True).cache for _ in range(2)]
    for t in range(9, 21):
        sparse = step(model, states[0], tokens[:, t : t + 1])
        dense = step(model, states[1], tokens[:, t : t + 1], attention_form="recurrent")
        torch.testing.assert_close(sparse.logits, dense.logits, rtol=1e-4, atol=1e-4)  # another order of float32 sums
    assert torch.equal(states[0].positions, states[1].positions)
    assert states[0].num_columns == states[1].num_columns == 21
    for kernels, torchs in zip(states[0].sums, states[1].sums, strict=True):
        torch.testing.assert_close(kernels, torchs, rtol=1e-4, atol=1e-4)


def test_the_model_and_the_advancer_give_the_same_bits(model, tokens):
    state, advancer = model.new_state(), Advancer(model, path="kernels")
    alone = advancer.new_state()
    for token in tokens[0]:
        logits = step(model, state, token.view(1, 1)).logits[0, 0]
        assert torch.equal(logits, advancer.advance([StepInput(alone, [int(token)])])[0])


def test_rows_of_a_reordered_state_are_read_in_their_order(model, tokens):
    """A beam search takes rows out of a state, whose memory may then lie anyhow."""
    state = step(model, None, tokens, use_cache=True).cache
    turned = state.filter([1, 0])
    turned.sums = [sums.transpose(0, 1).contiguous().transpose(0, 1) for sums in turned.sums]
    last = tokens[:, :1]
    expected = step(model, state, last).logits
    assert torch.equal(step(model, turned, last.flip(0)).logits.flip(0), expected)


def test_gradients_and_training_stay_with_torch(model, tokens):
    state = model.new_state(2)
    assert model(tokens[:, :1], cache=state).logits.requires_grad
    seen = []
    handle = model.encoder.register_forward_hook(lambda *_: seen.append(1))
    step(model, model.new_state(2), tokens[:, :1])
    assert len(seen) == model.config.n_layer  # a hook sees its layer at work
    handle.remove()


def test_a_backward_pass_notices_that_its_state_has_been_advanced(model, tokens):
    state = step(model, None, tokens, use_cache=True).cache
    loss = model(tokens, labels=tokens, cache=state.clone()).loss
    loss.backward()  # on a copy it goes through
    kept = state.clone()
    loss = sum((sums.requires_grad_(False) * torch.ones(1, requires_grad=True)).sum() for sums in kept.sums)
    step(model, kept, tokens[:, :1])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_model_made_in_inference_mode_runs(make_model):
    with torch.inference_mode():
        model = make_model()
        advancer = Advancer(model, path="kernels")
        assert advancer.advance([StepInput(advancer.new_state(), [1, 2])])[0].shape == (61,)


def test_what_the_kernels_do_not_run_is_said(make_model):
    assert kernel_obstacle(make_model()) is None
    assert kernel_obstacle(make_model().bfloat16()) is None
    assert "torch.float64" in kernel_obstacle(make_model().double())
    model = make_model()
    model.encoder = nn.Sequential(model.encoder)
    assert "Sequential" in kernel_obstacle(model)
    assert Advancer(make_model().double()).backend == "eager"
    with pytest.raises(ValueError, match="float64"):
        Advancer(make_model().double(), path="kernels")
    with pytest.raises(ValueError, match="weights is 'bfloat16': must be float32 with torch's operations"):
        Advancer(make_model(), path="torch", weights="bfloat16")
    with pytest.raises(ValueError, match="state is 'int8': must be one of None, float32, bfloat16, int16"):
        Advancer(make_model(), state="int8")


def test_weights_are_packed_once_and_given_back(make_model):
    model = make_model()
    first = recurrence_of(model)
    assert recurrence_of(model) is first
    assert first.weights.encoder.tensor.data_ptr() == model.encoder.weight.data_ptr()  # not copied
    model.load_state_dict(make_model(seed=1).state_dict())
    assert recurrence_of(model) is not first
    second = recurrence_of(model)
    forget_kernels(model)
    assert recurrence_of(model) is not second


def test_bfloat16_weights_are_those_of_a_bfloat16_model(make_model):
    """Storing the weights in bfloat16 rounds them, and nothing else."""
    model, rounded = make_model(), make_model()
    with torch.no_grad():
        for name, weight in rounded.named_parameters():
            if not name.startswith("embed"):
                weight.copy_(weight.bfloat16())
    tokens = list(range(40))
    logits = [
        advancer.advance([StepInput(advancer.new_state(), tokens, "all")])[0]
        for advancer in (Advancer(model, weights="bfloat16", path="kernels"), Advancer(rounded, path="kernels"))
    ]
    assert torch.equal(*logits)


@pytest.mark.parametrize("path", ["kernels", "torch"])
def test_greedy_continuations_are_the_references_on_every_path(golden, path):
    model = BDHForCausalLM.from_reference(golden.weights, golden.config)
    advancer = Advancer(model, path=path)
    for row in golden.greedy_32.tolist():
        state, text = advancer.new_state(), row[:-32]
        logits = advancer.advance([StepInput(state, text)])[0]
        for _ in range(32):
            text.append(int(logits.argmax()))
            logits = advancer.advance([StepInput(state, text[-1:])])[0]
        assert text == row
