"""What `forward` takes, gives and refuses."""

import pytest
import torch
import torch.nn.functional as F

from bdh import BDHConfig, BDHForCausalLM, SynapticState
from bdh.model import modeling
from bdh.ops import naive

FORMS = ["parallel", "chunked", "recurrent"]


@pytest.fixture
def model64(make_model):
    return make_model().double()


def continued(model, tokens, sizes, **arguments):
    """Logits of a text that is fed in parts."""
    state, logits = None, []
    for part in tokens.split(sizes, dim=1):
        output = model(part, cache=state, use_cache=True, **arguments)
        state = output.cache
        logits.append(output.logits)
    return torch.cat(logits, 1), state


@pytest.mark.parametrize("form", [*FORMS, "auto"])
@pytest.mark.parametrize("sizes", [(1, 20), (5, 1, 1, 14), (7, 7, 7)])
def test_any_split_is_the_whole(model64, tokens, form, sizes):
    with torch.no_grad():
        whole = model64(tokens, use_cache=True)
        logits, state = continued(model64, tokens, sizes, attention_form=form)
    # Float64: only the order of sums differs.
    torch.testing.assert_close(logits, whole.logits, rtol=1e-9, atol=1e-9)
    for a, b in zip(state.sums, whole.cache.sums, strict=True):
        assert a.dtype == torch.float64
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert state.positions.tolist() == [21, 21]
    assert state.num_columns == 21


def test_gradients_flow_through_the_state(model64, tokens):
    whole = torch.autograd.grad(model64(tokens).logits.square().sum(), list(model64.parameters()))
    logits, _ = continued(model64, tokens, (5, 1, 1, 14))
    for a, b in zip(torch.autograd.grad(logits.square().sum(), list(model64.parameters())), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_positions_are_exact_far_into_a_text(model64, tokens):
    """Attention sees differences of positions only, so a text far away must look like one at the beginning."""
    with torch.no_grad():
        near = model64(tokens, cache=model64.new_state(2)).logits
        state = model64.new_state(2)
        state.positions += 10**9
        far = model64(tokens, cache=state).logits
    # Float64 phases are good to 4e-8 of a turn there; logits are of the order of 10.
    torch.testing.assert_close(far, near, rtol=0, atol=1e-4)


def test_padding_on_either_side_changes_nothing(model64, tokens):
    filler = torch.full((2, 4), 9)
    ones, zeros = torch.ones(2, 21, dtype=torch.int64), torch.zeros(2, 4, dtype=torch.int64)
    with torch.no_grad():
        alone = model64(tokens).logits
        left = model64(torch.cat([filler, tokens], 1), attention_mask=torch.cat([zeros, ones], 1))
        right = model64(torch.cat([tokens, filler], 1), attention_mask=torch.cat([ones, zeros], 1), use_cache=True)
        after = model64(tokens[:, :1], cache=right.cache).logits
        expected_after = model64(torch.cat([tokens, tokens[:, :1]], 1)).logits[:, -1:]
    torch.testing.assert_close(left.logits[:, 4:], alone, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(right.logits[:, :21], alone, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(after, expected_after, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_rows_with_different_padding_are_the_rows_alone(model64, tokens, form):
    lengths = [21, 13]
    mask = torch.stack([torch.arange(21) >= 21 - n for n in lengths])
    with torch.no_grad():
        batch = model64(tokens, attention_mask=mask, use_cache=True, attention_form=form)
        for row, length in enumerate(lengths):
            alone = model64(tokens[row : row + 1, -length:], use_cache=True)
            torch.testing.assert_close(batch.logits[row : row + 1, -length:], alone.logits, rtol=1e-9, atol=1e-9)
            part = batch.cache.filter([row])
            assert part.positions.tolist() == [length]
            torch.testing.assert_close(part.sums, alone.cache.sums, rtol=1e-9, atol=1e-9)


def test_a_mask_may_count_the_columns_fed_before(model64, tokens):
    mask = torch.ones(2, 21, dtype=torch.int64)
    mask[1, :3] = 0
    with torch.no_grad():
        whole = model64(tokens, attention_mask=mask).logits
        state = model64(tokens[:, :10], attention_mask=mask[:, :10], use_cache=True).cache
        rest = model64(tokens[:, 10:], attention_mask=mask, cache=state).logits
    torch.testing.assert_close(rest, whole[:, 10:], rtol=1e-9, atol=1e-9)


def test_states_of_texts_of_different_lengths_go_on_together(model64, tokens):
    with torch.no_grad():
        short = model64(tokens[:1, :4], use_cache=True).cache
        long = model64(tokens[1:, :15], use_cache=True).cache
        together = model64(tokens[:, 15:16], cache=SynapticState.concat([short.clone(), long.clone()]))
        for row, state in enumerate((short, long)):
            alone = model64(tokens[row : row + 1, 15:16], cache=state).logits
            torch.testing.assert_close(together.logits[row : row + 1], alone, rtol=1e-9, atol=1e-9)


def test_the_state_is_returned_when_asked_for_and_by_default_when_of_use(model, tokens):
    state = model(tokens).cache
    assert state is not None
    assert model(tokens, use_cache=False).cache is None
    assert model(tokens, labels=tokens).cache is None  # an evaluation does not go on
    assert model(tokens, labels=tokens, use_cache=True).cache is not None
    assert model(tokens, cache=state).cache is state
    model.train()
    assert model(tokens).cache is None


@pytest.mark.parametrize("form", FORMS)
def test_without_use_cache_a_given_state_is_read_and_left_alone(model, tokens, form):
    with torch.no_grad():
        state = model(tokens[:, :10], use_cache=True).cache
        before = state.clone()
        output = model(tokens[:, 10:], cache=state, use_cache=False, attention_form=form)
        expected = model(tokens).logits[:, 10:]
    assert output.cache is None
    assert state.positions.tolist() == [10, 10]
    assert all(torch.equal(a, b) for a, b in zip(state.sums, before.sums, strict=True))
    torch.testing.assert_close(output.logits, expected, rtol=1e-4, atol=1e-4)  # float32, other order


def test_labels_are_shifted_and_shift_labels_are_not(model, tokens):
    logits = model(tokens).logits
    labels = tokens.clone()
    labels[0, :5] = -100
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    loss = model(tokens, labels=labels).loss
    torch.testing.assert_close(loss, expected)
    shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
    assert torch.equal(model(tokens, shift_labels=shifted).loss, loss)
    # Where both are given, as transformers' trainers may do, the shifted ones are taken.
    assert torch.equal(model(tokens, labels=labels, shift_labels=labels).loss, model(tokens, shift_labels=labels).loss)


def test_num_items_in_batch_replaces_the_number_of_labels(model, tokens):
    mean = model(tokens, labels=tokens).loss
    torch.testing.assert_close(model(tokens, labels=tokens, num_items_in_batch=10).loss, mean * 40 / 10)


def test_many_logits_give_the_same_loss_and_gradients_in_chunks(model, tokens, monkeypatch):
    def loss_and_gradients():
        model.zero_grad()
        output = model(tokens, labels=tokens)
        output.loss.backward()
        return output, [p.grad.clone() for p in model.parameters()]

    whole, expected = loss_and_gradients()
    monkeypatch.setattr(modeling, "MAX_LOGITS_IN_ONE_PIECE", 5 * 61)  # five tokens at a time
    chunked, gradients = loss_and_gradients()
    assert whole.logits.shape == (2, 21, 61)
    assert chunked.logits is None
    torch.testing.assert_close(chunked.loss, whole.loss)
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-6)  # float32, other order


def test_logits_to_keep(model, tokens):
    logits = model(tokens).logits
    for keep, kept in (
        (1, logits[:, -1:]),
        (5, logits[:, -5:]),
        (0, logits),
        (torch.tensor([3, 8]), logits[:, [3, 8]]),
    ):
        # The same sums, but a matmul of another size may take another order.
        torch.testing.assert_close(model(tokens, logits_to_keep=keep).logits, kept, rtol=1e-4, atol=1e-4)


def test_hidden_states_are_v_before_the_first_and_after_each_pass(model64, tokens):
    output = model64(tokens, output_hidden_states=True)
    assert len(output.hidden_states) == model64.config.n_layer + 1
    reference = model64.to_reference()
    weights = naive.Weights(
        *(reference[key].double() for key in ("embed.weight", "encoder", "encoder_v", "decoder", "lm_head"))
    )
    v = naive.layer_norm(weights.embed[tokens])
    torch.testing.assert_close(output.hidden_states[0], v)
    for hidden in output.hidden_states[1:]:
        v = naive.layer_step(v, weights, torch.arange(21))
        torch.testing.assert_close(hidden, v, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(output.logits, v @ weights.lm_head, rtol=1e-9, atol=1e-9)
    assert model64(tokens).hidden_states is None


def test_embeddings_may_be_given_instead_of_tokens(model, tokens):
    assert torch.equal(model(inputs_embeds=model.embed(tokens)).logits, model(tokens).logits)


def test_a_tuple_on_request_holds_what_there_is(model, tokens):
    output = model(tokens, labels=tokens, use_cache=True)
    loss, logits, state = model(tokens, labels=tokens, use_cache=True, return_dict=False)
    assert torch.equal(loss, output.loss)
    assert torch.equal(logits, output.logits)
    assert isinstance(state, SynapticState)
    (logits,) = model(tokens, use_cache=False, return_dict=False)
    assert torch.equal(logits, output.logits)


def test_fresh_weights_have_the_standard_deviation_of_the_configuration():
    torch.manual_seed(0)
    model = BDHForCausalLM(BDHConfig(n_embd=64, n_head=2, mlp_internal_dim_multiplier=32, initializer_range=0.05))
    for name, parameter in model.named_parameters():
        # Of 16,384 and more draws: good to 0.6 %; four times that.
        assert parameter.std().item() == pytest.approx(0.05, rel=0.024), name


def test_a_larger_vocabulary_keeps_the_rows_there_were(model, tokens):
    before = model(tokens).logits
    model.resize_token_embeddings(70)
    assert model.config.vocab_size == 70
    torch.testing.assert_close(model(tokens).logits[..., :61], before)
    assert model(torch.tensor([[69]])).logits.shape == (1, 1, 70)


class TestRefused:
    def test_ids_outside_of_the_vocabulary(self, model):
        with pytest.raises(ValueError, match="ids from 3 to 61: must be within 0 to 60, the model's vocabulary"):
            model(torch.tensor([[3, 61]]))
        with pytest.raises(ValueError, match="ids from -1 to 3"):
            model(torch.tensor([[3, -1]]))

    @pytest.mark.parametrize("shape", [(1, 0), (0, 1), (3,), (1, 2, 3)])
    def test_tokens_of_another_shape(self, model, shape):
        with pytest.raises(ValueError, match=r"input_ids has shape .* must be \(batch, tokens\) with at least 1 token"):
            model(torch.zeros(shape, dtype=torch.int64))

    def test_both_or_neither_of_tokens_and_embeddings(self, model, tokens):
        with pytest.raises(ValueError, match="give exactly one of them"):
            model()
        with pytest.raises(ValueError, match="give exactly one of them"):
            model(tokens, inputs_embeds=model.embed(tokens))

    @pytest.mark.parametrize("shape", [(1, 3, 25), (1, 0, 24), (3, 24)])
    def test_embeddings_of_another_shape(self, model, shape):
        with pytest.raises(ValueError, match=r"inputs_embeds has shape .* must be \(batch, tokens, 24\)"):
            model(inputs_embeds=torch.zeros(shape))

    @pytest.mark.parametrize("shape", [(2, 20), (2, 22), (1, 21), (21,), (2, 1, 21, 21)])
    def test_a_mask_of_another_shape(self, model, tokens, shape):
        with pytest.raises(ValueError, match=r"attention_mask has shape .*: must be \(2, 21\)"):
            model(tokens, attention_mask=torch.ones(shape))

    def test_a_mask_that_counts_other_columns_than_were_fed(self, model, tokens):
        state = model(tokens[:, :10], use_cache=True).cache
        message = r"\(2, 20\): must be \(2, 11\) or, with the columns fed before, \(2, 21\)"
        with pytest.raises(ValueError, match=message):
            model(tokens[:, 10:], attention_mask=torch.ones(2, 20), cache=state)
        assert state.num_columns == 10

    @pytest.mark.parametrize("name", ["labels", "shift_labels"])
    def test_labels_of_another_shape(self, model, tokens, name):
        with pytest.raises(ValueError, match=rf"{name} has shape \(2, 20\): must be \(2, 21\)"):
            model(tokens, **{name: tokens[:, 1:]})

    @pytest.mark.parametrize("keep", [1, torch.tensor([0])])
    def test_labels_with_only_some_logits(self, model, tokens, keep):
        with pytest.raises(ValueError, match="logits_to_keep was given with labels"):
            model(tokens, labels=tokens, logits_to_keep=keep)

    def test_a_state_of_another_batch_model_or_dtype(self, model, make_model, tokens):
        with pytest.raises(ValueError, match=r"\(3, 3, 48, 24\).* need \(2, 3, 48, 24\) for 3"):
            model(tokens, cache=model.new_state(3))
        with pytest.raises(ValueError, match=r"for 2 layer steps: this model and batch need .* for 3"):
            model(tokens, cache=make_model(n_layer=2).new_state(2))
        with pytest.raises(
            ValueError, match=r"in torch\.float64: a model in torch\.float32 keeps them in torch\.float32"
        ):
            model(tokens, cache=make_model().double().new_state(2))

    def test_an_unknown_form(self, model, tokens):
        with pytest.raises(ValueError, match="attention form 'flash' is unknown"):
            model(tokens, attention_form="flash")

    def test_unknown_arguments(self, model, tokens):
        with pytest.raises(TypeError, match="forward does not know position_bias"):
            model(tokens, position_bias=1)

    def test_attention_weights_which_there_are_none_of(self, model, tokens):
        assert model(tokens, output_attentions=False).logits is not None
        with pytest.raises(ValueError, match="output_attentions is True"):
            model(tokens, output_attentions=True)
