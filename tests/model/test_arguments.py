"""What libraries hand to `forward` besides what it needs: harmless, about packed batches, or refused by name."""

import pytest
import torch
from transformers import DataCollatorWithFlattening, DynamicCache, StaticCache

from bdh.ops.blocks.plan import LayerOptions

LENGTHS = [5, 1, 9, 6]


@pytest.fixture
def model64(make_model):
    return make_model().double()


@pytest.fixture
def documents():
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(61, (length,), generator=generator).tolist() for length in LENGTHS]


def separately(model, documents):
    """Logits (1, tokens of all, V) of each document alone, one after the other."""
    return torch.cat([model(torch.tensor([ids])).logits for ids in documents], 1)


HARMLESS = {
    "output_attentions": False,
    "output_router_logits": False,
    "is_causal": True,
    "return_dict": True,
    "position_ids": torch.arange(21)[None],
    "cache_position": torch.arange(21),
    "token_type_ids": torch.zeros(2, 21, dtype=torch.int64),
    "seq_idx": torch.zeros(1, 21, dtype=torch.int32),
    "head_mask": None,
    "anything": None,
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_says_nothing_new_is_accepted(model64, tokens, name):
    expected = model64(tokens).logits
    for model, logits in ((model64, expected), (model64.base_model, None)):
        output = model(tokens, **{name: HARMLESS[name]})
        if logits is not None:
            torch.testing.assert_close(output.logits, logits, rtol=1e-9, atol=1e-9)


def test_positions_of_a_padded_batch_are_accepted(model64, tokens):
    """As transformers computes them: padding has any position."""
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    mask[1, -3:] = 0
    for filler in (0, 1):
        positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, filler)
        expected = model64(tokens, attention_mask=mask, use_cache=True)
        got = model64(tokens, attention_mask=mask, position_ids=positions, use_cache=True)
        assert torch.equal(got.logits, expected.logits)
        assert torch.equal(got.cache.positions, expected.cache.positions)


def test_positions_after_a_state_are_accepted(model64, tokens):
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    expected = model64(tokens, attention_mask=mask).logits
    state, pieces = None, []
    for start, end in ((0, 9), (9, 10), (10, 21)):
        output = model64(
            tokens[:, start:end],
            attention_mask=mask[:, :end],
            position_ids=positions[:, start:end],
            cache_position=torch.arange(start, end),
            cache=state,
            use_cache=True,
        )
        state = output.cache
        pieces.append(output.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "told",
    [
        {"return_position_ids": True},
        {"return_position_ids": False, "return_seq_idx": True},
        {"return_position_ids": False, "return_flash_attn_kwargs": True},
        {"return_position_ids": True, "return_seq_idx": True, "return_flash_attn_kwargs": True},
    ],
    ids=lambda told: "+".join(told),
)
@pytest.mark.parametrize("form", ["auto", "chunked", "parallel"])
def test_a_packed_batch_is_its_documents_alone(model64, documents, told, form):
    batch = DataCollatorWithFlattening(**told)([{"input_ids": ids} for ids in documents])
    expected = separately(model64, documents)
    output = model64(**batch, attention_form=form)
    assert output.loss.isfinite()
    torch.testing.assert_close(output.logits, expected, rtol=1e-9, atol=1e-9)
    batch.pop("labels")
    v = model64.base_model(**batch, attention_form=form).last_hidden_state
    torch.testing.assert_close(model64.lm_head(v), expected, rtol=1e-9, atol=1e-9)


def test_gradients_of_a_packed_batch_are_those_of_its_documents(make_model, documents):
    packed, alone = make_model().double().train(), make_model().double().train()
    packed(**DataCollatorWithFlattening()([{"input_ids": ids} for ids in documents])).loss.backward()
    counted = sum(LENGTHS) - len(LENGTHS)
    for ids in documents:
        if len(ids) > 1:
            row = torch.tensor([ids])
            alone(row, labels=row, num_items_in_batch=counted).loss.backward()
    for (name, one), two in zip(packed.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-8, atol=1e-10, msg=name)


def test_a_document_that_starts_on_a_state_forgets_it(model64, tokens):
    """Position 0 after a state means a new document."""
    state = model64(tokens[:, :8], use_cache=True).cache
    positions = torch.arange(13)[None]
    got = model64(tokens[:, 8:], cache=state, position_ids=positions)
    torch.testing.assert_close(got.logits, model64(tokens[:, 8:]).logits, rtol=1e-9, atol=1e-9)
    assert got.cache.positions.tolist() == [13, 13]


REFUSED = {
    "unknown": ({"atention_mask": 1}, TypeError, "forward does not know atention_mask: did you mean attention_mask"),
    "attentions": ({"output_attentions": True}, ValueError, "output_attentions is True.*must be False"),
    "not_causal": ({"is_causal": False}, ValueError, "is_causal is False.*must be True"),
    "backwards": ({"position_ids": torch.arange(20, -1, -1)[None]}, ValueError, "position_ids is 20, 19.*from 0"),
    "from_one": ({"position_ids": torch.arange(1, 22)[None]}, ValueError, "position_ids is 1, 2, .*from 0"),
    "short": ({"position_ids": torch.arange(20)[None]}, ValueError, r"position_ids has shape \(1, 20\).*\(2, 21\)"),
    "columns": ({"cache_position": torch.arange(1, 22)}, ValueError, "cache_position is 1, .*columns 0 to 20"),
    "types": ({"token_type_ids": torch.ones(2, 21)}, ValueError, "token_type_ids is 1.*must be all 0"),
    "rows": ({"cu_seq_lens_q": torch.tensor([0, 21])}, ValueError, "cu_seq_lens_q is given for 2 rows"),
    "lone": ({"max_length_q": 3}, ValueError, "max_length_q is given without cu_seq_lens_q"),
    "numbers": ({"seq_idx": torch.zeros(1, 3)}, ValueError, r"seq_idx has shape \(1, 3\): must be \(2, 21\)"),
    "legacy": ({"cache": ((1, 2),)}, TypeError, "cache is a tuple: must be a SynapticState"),
    "dynamic": ({"cache": DynamicCache()}, TypeError, "cache is a DynamicCache: .*no keys and val"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_the_rest_is_refused_by_name(model, tokens, case):
    arguments, error, message = REFUSED[case]
    for each in (model, model.base_model):
        with pytest.raises(error, match=message):
            each(tokens, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cu_seq_lens_q": torch.tensor([0, 5, 20])}, "cu_seq_lens_q is 0, 5, 20: must rise from 0 to 21"),
        ({"cu_seq_lens_q": torch.tensor([0, 9, 5, 21])}, "must rise from 0 to 21"),
        ({"cu_seq_lens_q": torch.tensor([])}, "must rise from 0 to 21"),
        (
            {"cu_seq_lens_q": torch.tensor([0, 5, 21]), "cu_seq_lens_k": torch.tensor([0, 6, 21])},
            "cu_seq_lens_k is 0, 6, 21: must be cu_seq_lens_q",
        ),
        ({"cu_seq_lens_q": torch.tensor([0, 5, 21]), "max_length_k": 5}, "max_length_k is 5: the longest .* 16"),
        (
            {"cu_seq_lens_q": torch.tensor([0, 5, 21]), "seq_idx": torch.tensor([[0] * 6 + [1] * 15])},
            "seq_idx and cu_seq_lens_q say that documents start at different tokens",
        ),
        (
            {"cu_seq_lens_q": torch.tensor([0, 5, 21]), "position_ids": torch.arange(21)[None]},
            "position_ids is 0, 1, .*where documents start as cu_seq_lens_q says",
        ),
    ],
)
def test_packing_that_contradicts_itself_is_refused(model, tokens, arguments, message):
    with pytest.raises(ValueError, match=message):
        model(tokens[:1], **arguments)


def test_packing_on_a_state_is_refused_and_the_state_stays(model, tokens):
    state = model(tokens[:1, :4]).cache
    before = state.clone()
    for arguments in ({"seq_idx": torch.zeros(1, 17)}, {"position_ids": torch.arange(17)[None] + 3}):
        with pytest.raises(ValueError, match=f"{next(iter(arguments))} is .*cache"):
            model(tokens[:1, 4:], cache=state, **arguments)
    assert state.num_columns == 4
    assert all(torch.equal(a, b) for a, b in zip(state.sums, before.sums, strict=True))


@pytest.mark.parametrize("cache", [DynamicCache, StaticCache])
def test_generate_refuses_the_cache_of_another_kind_of_model(model, tokens, cache):
    given = cache() if cache is DynamicCache else cache(config=model.config, max_cache_len=40)
    with pytest.raises(TypeError, match=f"cache is a {cache.__name__}: must be a SynapticState"):
        model.generate(tokens[:1], cache=given, max_new_tokens=2, pad_token_id=0)


@pytest.mark.slow
def test_arguments_are_traced_in_one_graph(make_model, tokens):
    """Nothing of them is looked at there that would break the graph."""
    model = make_model(n_layer=1).double()
    model.layer_options = LayerOptions(path="plain")
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():  # with another number of tokens after it, that is a symbol
        compiled(tokens[:1, :15], use_cache=False)
    positions = torch.cat([torch.arange(9), torch.arange(12)])[None]
    with torch.no_grad():
        for arguments in (
            {},
            {"position_ids": positions},
            {"cu_seq_lens_q": torch.tensor([0, 9, 21]), "max_length_q": 12, "position_ids": positions},
            {"seq_idx": torch.tensor([[0] * 9 + [1] * 12]), "output_attentions": False},
        ):
            ids = tokens[:1]
            expected = model(ids, use_cache=False, **arguments).logits
            got = compiled(ids, use_cache=False, **arguments).logits
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
