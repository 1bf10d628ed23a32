"""Documents packed into one row are each what it is alone, with and without decay, in every form, in float64.

A document alone and in a row adds the same numbers in another order, so 1e-10 is far above rounding.
"""

import copy
import shutil
from functools import partial
from itertools import pairwise

import pytest
import torch

from bdh import SynapticState
from bdh.ops import naive

FORMS = ["parallel", "chunked", "recurrent", "auto"]
DECAYS = [None, 3.0, [2.0, None, 40.0]]
assert_close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)
# Chunks have 4 tokens: starts at, before and behind their edges, consecutive ones, at 0 and at the last token.
LAYOUTS = [(21, [0]), (21, [5]), (21, [4, 8, 16]), (21, [0, 3, 5, 9, 11]), (13, [6, 7, 8, 9]), (17, [16]), (1, [0])]


@pytest.fixture(params=DECAYS, ids=str)
def model64(make_model, request):
    return make_model(decay=request.param).double()


def row_of(num_tokens, seed=3):
    return torch.randint(61, (1, num_tokens), generator=torch.Generator().manual_seed(seed))


def starts_at(positions, num_tokens):
    return torch.tensor([[t in positions for t in range(num_tokens)]])


def documents(tokens, positions):
    bounds = [0, *(p for p in positions if p > 0), tokens.shape[1]]
    return [tokens[:, start:end] for start, end in pairwise(bounds)]


def gradients(model, logits):
    weight = torch.sin(torch.arange(logits.numel(), dtype=torch.float64)).view_as(logits)
    return torch.autograd.grad((logits * weight).sum(), list(model.parameters()))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_a_packed_row_has_the_logits_and_gradients_of_its_documents_alone(model64, form, layout):
    num_tokens, positions = layout
    tokens = row_of(num_tokens)
    alone = torch.cat([model64(document).logits for document in documents(tokens, positions)], 1)
    packed = model64(tokens, document_starts=starts_at(positions, num_tokens), attention_form=form).logits
    assert_close(packed, alone)
    for got, expected in zip(gradients(model64, packed), gradients(model64, alone), strict=True):
        assert_close(got, expected, rtol=1e-9)  # sums over all tokens of products of many factors


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("positions", [[0], [4], [3, 8]], ids=str)
def test_a_state_is_read_up_to_the_first_start_and_holds_the_last_document_behind(model64, form, positions):
    tokens, earlier = row_of(12), row_of(7, seed=4)
    first, *rest = documents(tokens, positions)
    with torch.no_grad():
        before = model64(earlier, use_cache=True).cache
        state = model64.new_state() if positions[0] == 0 else before.clone()
        outputs = [model64(first, cache=state)]
        outputs += [model64(document, use_cache=True) for document in rest]
        packed = model64(tokens, document_starts=starts_at(positions, 12), cache=before, attention_form=form)
    assert_close(packed.logits, torch.cat([output.logits for output in outputs], 1))
    expected = outputs[-1].cache
    assert packed.cache.positions.tolist() == expected.positions.tolist()
    assert_close(packed.cache.sums, expected.sums)


@pytest.mark.parametrize("form", FORMS)
def test_rows_with_other_documents_and_padding_are_the_rows_alone(model64, form):
    tokens = torch.cat([row_of(15), row_of(15, seed=5), row_of(15, seed=6)])
    starts = torch.cat([starts_at([4, 9], 15), starts_at([], 15), starts_at([8], 15)])
    mask = torch.ones(3, 15, dtype=torch.bool)
    mask[0, 9:12] = False  # the start at 9 is padding: the document starts with the next token, 12
    mask[2, :3] = False
    with torch.no_grad():
        batch = model64(tokens, attention_mask=mask, document_starts=starts, use_cache=True, attention_form=form)
        rows = [
            [tokens[:1, :4], tokens[:1, 4:9], tokens[:1, 12:]],
            [tokens[1:2]],
            [tokens[2:, 3:8], tokens[2:, 8:]],
        ]
        for row, parts in enumerate(rows):
            outputs = [model64(part, use_cache=True) for part in parts]
            assert_close(batch.logits[row : row + 1, mask[row]], torch.cat([o.logits for o in outputs], 1))
            state = batch.cache.filter([row])
            assert state.positions.tolist() == outputs[-1].cache.positions.tolist()
            assert_close(state.sums, outputs[-1].cache.sums)


@pytest.mark.parametrize("form", FORMS)
def test_a_row_that_is_fed_in_parts_is_the_whole(model64, form):
    tokens, starts = row_of(21), starts_at([5, 9, 10, 18], 21)
    state, parts = None, []
    with torch.no_grad():
        whole = model64(tokens, document_starts=starts, use_cache=True)
        for part, at in zip(tokens.split((5, 1, 4, 9, 2), 1), starts.split((5, 1, 4, 9, 2), 1), strict=True):
            output = model64(part, document_starts=at, cache=state, use_cache=True, attention_form=form)
            state = output.cache
            parts.append(output.logits)
    assert_close(torch.cat(parts, 1), whole.logits)
    assert_close(state.sums, whole.cache.sums)
    assert state.positions.tolist() == whole.cache.positions.tolist() == [3]


@pytest.mark.parametrize("decay", DECAYS, ids=str)
def test_the_model_is_naive(make_model, decay):
    plain = make_model()
    reference = plain.to_reference()
    names = ("embed.weight", "encoder", "encoder_v", "decoder", "lm_head")
    weights = naive.Weights(*(reference[name].double() for name in names))
    model = make_model(decay=decay).double()
    half_lives = None if decay is None else torch.tensor(model.config.half_lives, dtype=torch.float64)
    tokens, starts = row_of(21), starts_at([4, 5, 13], 21)
    for at in (None, starts):
        expected = naive.forward(tokens, weights, model.config.n_layer, half_lives=half_lives, starts=at)
        assert_close(model(tokens, document_starts=at).logits, expected)


@pytest.mark.parametrize("decay", [3.0, [2.0, None, 40.0]], ids=str)
def test_decay_changes_what_is_seen_from_the_third_token_on(make_model, decay):
    tokens = row_of(9)
    with torch.no_grad():
        plain, decayed = make_model()(tokens).logits, make_model(decay=decay)(tokens).logits
    torch.testing.assert_close(decayed[:, :2], plain[:, :2])  # the nearest token counts whole
    assert (decayed[:, 2:] - plain[:, 2:]).abs().amax() > 1e-2


def test_generation_goes_on_from_the_decayed_state(make_model):
    model = make_model(decay=4.0).double()
    prompt = torch.cat([row_of(6), row_of(6, seed=8)])
    mask = torch.ones(2, 6, dtype=torch.int64)
    mask[1, :2] = 0
    generated = model.generate(prompt, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0)
    for row, start in ((0, 0), (1, 2)):
        text = prompt[row : row + 1, start:]
        for _ in range(8):  # all of it read again for each token
            following = model(text, attention_form="parallel", use_cache=False).logits[:, -1:].argmax(-1)
            text = torch.cat([text, following], 1)
        assert generated[row, start:].tolist() == text[0].tolist()


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("form", ["parallel", "chunked"])
def test_gradient_checkpointing_gives_equal_gradients_from_a_state(make_model, form, use_reentrant):
    model = make_model(decay=5.0, attention_form=form).double().train()
    tokens, starts = row_of(21), starts_at([4, 13], 21)
    state = model(row_of(9, seed=4), use_cache=True).cache.detach()

    def of_a_step():
        model.zero_grad()
        output = model(tokens, labels=tokens, document_starts=starts, cache=state.clone(), use_cache=True)
        output.loss.backward()
        return [output.loss, *output.cache.sums], [p.grad.clone() for p in model.parameters()]

    outputs, expected = of_a_step()
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    for got, truth in zip(of_a_step(), (outputs, expected), strict=True):
        assert_close(got, truth)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs a C++ compiler")
def test_a_compiled_step_with_documents_decay_and_a_state_is_the_plain_one(make_model):
    model = make_model(decay=5.0, n_layer=2).train()
    tokens, starts = row_of(21), starts_at([4, 13], 21)
    state = model(row_of(9, seed=4), use_cache=True).cache.detach()

    def of_a_step(step_model):
        model.zero_grad()
        output = step_model(tokens, labels=tokens, document_starts=starts, cache=copy.deepcopy(state), use_cache=True)
        output.loss.backward()
        return [output.loss, *output.cache.sums], [p.grad.clone() for p in model.parameters()]

    outputs, expected = of_a_step(model)
    compiled_outputs, gradients_ = of_a_step(torch.compile(model))
    # Fused kernels round elsewhere.
    torch.testing.assert_close(compiled_outputs, outputs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients_, expected, rtol=1e-3, atol=1e-5)


def test_positions_restart_so_that_the_state_can_go_on(model64):
    tokens = row_of(10)
    state = SynapticState.zeros((1, 3, 48, 24), 3, dtype=torch.float64)
    state.positions += 10**9
    with torch.no_grad():
        model64(tokens, document_starts=starts_at([7], 10), cache=state)
    assert state.positions.tolist() == [3]
    assert state.num_columns == 10


@pytest.mark.parametrize(
    ("starts", "named"),
    [(torch.zeros(1, 9, dtype=torch.bool), r"\(1, 9\)"), (torch.zeros(1, 10, dtype=torch.int64), "torch.int64")],
)
def test_starts_of_another_shape_or_type_are_refused(make_model, starts, named):
    with pytest.raises(ValueError, match=rf"document_starts is .*{named}.*: must be bool \(1, 10\)"):
        make_model()(row_of(10), document_starts=starts)
