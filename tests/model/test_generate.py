"""transformers' own `generate`, on the state."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer


def generate(model, ids, **arguments):
    torch.manual_seed(0)
    return model.generate(ids, max_new_tokens=12, pad_token_id=0, **arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {"do_sample": False},
        {"do_sample": True, "temperature": 0.7, "top_k": 9},
        {"do_sample": True, "top_p": 0.8},
        {"do_sample": False, "num_beams": 4},
        {"do_sample": False, "num_beams": 4, "num_return_sequences": 3},
        {"do_sample": True, "num_return_sequences": 3},
        {"do_sample": False, "repetition_penalty": 1.3},
    ],
    ids=str,
)
def test_with_the_state_it_is_what_it_is_without(model, tokens, arguments):
    """use_cache=False reads the whole text again for each token."""
    ids = tokens[:, :6]
    assert torch.equal(generate(model, ids, **arguments), generate(model, ids, use_cache=False, **arguments))


def test_a_left_padded_batch_is_its_rows_alone(model, tokens):
    rows = [tokens[0, :9], tokens[1, :4], tokens[0, 9:10]]
    width = max(map(len, rows))
    ids = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0)) for row in rows])
    mask = torch.stack([torch.nn.functional.pad(torch.ones_like(row), (width - len(row), 0)) for row in rows])
    batch = generate(model, ids, attention_mask=mask, do_sample=False)
    for row, out in zip(rows, batch, strict=True):
        assert torch.equal(generate(model, row[None], do_sample=False)[0, len(row) :], out[width:])


def test_it_goes_on_from_a_given_state(model, tokens):
    ids = tokens[:1, :10]
    whole = generate(model, ids, do_sample=False)
    state = model(ids[:, :7], use_cache=True).cache
    assert torch.equal(generate(model, ids, cache=state, do_sample=False), whole)


@pytest.fixture
def unpadded(tokens):
    """Tokens (2, 21) without the padding token, at which `generate` would mask them."""
    return tokens.clamp_min(1)


CHOICES = [
    {"do_sample": False},
    {"do_sample": False, "num_beams": 4},
    {"do_sample": False, "num_beams": 4, "num_return_sequences": 3},
    {"do_sample": True, "num_return_sequences": 3},
]


@pytest.mark.parametrize("choice", CHOICES, ids=str)
@pytest.mark.parametrize("num_read", [2, 5, 10, 18])
def test_the_whole_text_on_a_state_is_the_text_read_anew(model, unpadded, num_read, choice):
    """Beams and several sequences refused the state, which has a row for each text, not for each of them."""
    whole = generate(model, unpadded, **choice)
    state = model(unpadded[:, :num_read], use_cache=True).cache
    assert torch.equal(generate(model, unpadded, cache=state, **choice), whole)


@pytest.mark.parametrize("choice", CHOICES, ids=str)
@pytest.mark.parametrize("num_read", [2, 5, 10, 18])
def test_new_tokens_alone_with_a_mask_of_all_columns_go_on_from_a_state(model, unpadded, num_read, choice):
    whole = generate(model, unpadded, **choice)
    state = model(unpadded[:, :num_read], use_cache=True).cache
    out = generate(model, unpadded[:, num_read:], cache=state, attention_mask=torch.ones_like(unpadded), **choice)
    assert torch.equal(out, whole[:, num_read:])


@pytest.mark.parametrize("pieces", [{}, {"prefill_chunk_size": 2}], ids=str)
@pytest.mark.parametrize("num_new", [2, 6, 7])
def test_new_tokens_alone_without_such_a_mask_are_refused_not_dropped(model, unpadded, num_new, pieces):
    """Taken for the whole text, of which the state had read the beginning, some of them went missing."""
    state = model(unpadded[:1, :7], use_cache=True).cache
    before = state.clone()
    message = rf"the text has {num_new} tokens, but the given cache has read 7 already: .*\(sequences, 7 \+ the number"
    with pytest.raises(ValueError, match=message):
        generate(model, unpadded[:1, 7 : 7 + num_new], cache=state, do_sample=False, **pieces)
    assert state.num_columns == 7
    assert all(torch.equal(a, b) for a, b in zip(state.sums, before.sums, strict=True))


def test_a_padded_batch_goes_on_from_its_state(model, unpadded):
    mask = torch.ones_like(unpadded)
    mask[0, :3] = 0
    whole = generate(model, unpadded, attention_mask=mask, do_sample=False)
    state = model(unpadded[:, :9], attention_mask=mask[:, :9], use_cache=True).cache
    again = generate(model, unpadded[:, 9:], attention_mask=mask, cache=state.clone(), do_sample=False)
    assert torch.equal(again, whole[:, 9:])
    assert torch.equal(generate(model, unpadded, attention_mask=mask, cache=state, do_sample=False), whole)


def test_several_sequences_leave_the_given_state_as_it_was(model, tokens):
    state = model(tokens[:1, :7], use_cache=True).cache
    generate(model, tokens[:1], cache=state, do_sample=True, num_return_sequences=2)
    assert (state.batch_size, state.num_columns) == (1, 7)


def test_a_state_without_use_cache_is_refused(model, tokens):
    """Each step would have read the whole text again, on top of the state."""
    state = model(tokens[:1, :7], use_cache=True).cache
    with pytest.raises(ValueError, match="use_cache is False: must be True"):
        generate(model, tokens[:1], cache=state, use_cache=False, do_sample=False)


def test_the_state_that_comes_back_goes_on(model, tokens):
    first = generate(model, tokens[:1, :5], do_sample=False, return_dict_in_generate=True)
    again = generate(model, first.sequences, cache=first.cache, do_sample=False)
    torch.manual_seed(0)
    straight = model.generate(tokens[:1, :5], max_new_tokens=24, do_sample=False, pad_token_id=0)
    assert torch.equal(again, straight)


def test_streamers_see_every_token_once(model, tokens):
    class Collector(BaseStreamer):
        seen: list[int] = []  # noqa: RUF012
        ended = False

        def put(self, value):
            self.seen.extend(value.flatten().tolist())

        def end(self):
            self.ended = True

    streamer = Collector()
    out = generate(model, tokens[:1, :4], do_sample=False, streamer=streamer)
    assert streamer.seen == out[0].tolist()
    assert streamer.ended


def test_stopping_criteria_stop(model, tokens):
    class AfterThree(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 7)

    out = generate(model, tokens[:1, :4], do_sample=False, stopping_criteria=StoppingCriteriaList([AfterThree()]))
    assert out.shape == (1, 7)


@pytest.fixture
def other():
    """A model of another kind, with keys and values."""
    torch.manual_seed(3)
    config = GPT2Config(
        vocab_size=61, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=None, eos_token_id=None
    )
    return GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize("decay", [None, 7])
@pytest.mark.parametrize("assistant", ["itself", "bdh", "other", "lookup"])
def test_assisted_generation_gives_the_text_of_the_model_alone(make_model, other, tokens, assistant, decay):
    """The state takes back the tokens that were proposed in vain."""
    model = make_model(decay=decay)
    ids = tokens[:1, :9].clamp_min(1)
    expected = generate(model, ids, do_sample=False)
    by = {"itself": model, "bdh": make_model(seed=1), "other": other}.get(assistant)
    how = {"prompt_lookup_num_tokens": 3} if by is None else {"assistant_model": by}
    assert torch.equal(generate(model, ids, do_sample=False, **how), expected)


def test_assisted_generation_on_a_state_is_refused(model, tokens):
    """transformers reads the whole text again, on top of what the state has read."""
    state = model(tokens[:1, :5], use_cache=True).cache
    with pytest.raises(ValueError, match="the given cache has read 5 columns: must be left out"):
        generate(model, tokens[:1], do_sample=False, cache=state, prompt_lookup_num_tokens=3)


@pytest.mark.parametrize("mask", [False, True])
def test_it_assists_a_model_of_another_kind(model, other, tokens, mask):
    """Which hands its position_ids on."""
    ids = tokens[:1, :9].clamp_min(1)
    given = {"attention_mask": (torch.arange(9) > 2).long()[None]} if mask else {}
    expected = generate(other, ids, do_sample=False, **given)
    assert torch.equal(generate(other, ids, do_sample=False, assistant_model=model, **given), expected)


def test_assistance_while_sampling_and_the_state_that_comes_back(model, make_model, tokens):
    out = generate(
        model,
        tokens[:1, :9].clamp_min(1),
        do_sample=True,
        assistant_model=make_model(seed=1),
        return_dict_in_generate=True,
    )
    read = model(out.sequences[:, : out.cache.num_columns], use_cache=True).cache
    assert torch.equal(read.positions, out.cache.positions)
    for a, b in zip(read.sums, out.cache.sums, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arguments", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}], ids=str)
def test_a_prompt_may_be_read_in_pieces(model, unpadded, arguments):
    arguments = {"do_sample": False, **arguments}
    whole = generate(model, unpadded, **arguments)
    assert torch.equal(generate(model, unpadded, prefill_chunk_size=8, **arguments), whole)
    state = model(unpadded[:, :3], use_cache=True).cache
    assert torch.equal(generate(model, unpadded, prefill_chunk_size=8, cache=state.clone(), **arguments), whole)
    new = {"cache": state, "attention_mask": torch.ones_like(unpadded)}
    assert torch.equal(generate(model, unpadded[:, 3:], prefill_chunk_size=8, **new, **arguments), whole[:, 3:])


@pytest.mark.parametrize("num_read", [0, 3, 12])
@pytest.mark.parametrize("num_masked", [0, 2])
def test_embeddings_are_not_read_in_pieces_but_at_once(model, unpadded, num_read, num_masked, caplog):
    """Beside a state all of them were read again, and with padding their mask was refused."""
    mask = torch.ones_like(unpadded)
    mask[0, :num_masked] = 0
    embedded = {"inputs_embeds": model.get_input_embeddings()(unpadded), "attention_mask": mask, "do_sample": False}
    state = model(unpadded[:, :num_read], attention_mask=mask[:, :num_read], use_cache=True).cache if num_read else None
    whole = generate(model, None, **embedded)
    pieces = generate(model, None, prefill_chunk_size=4, cache=state, **embedded)
    assert torch.equal(pieces, whole)
    assert "inputs_embeds are read at once" in caplog.text


def test_stop_strings_end_a_text(byte_model, tokenizer):
    """`generate` hands the tokenizer on to the model."""
    ids = tokenizer("ab", return_tensors="pt")["input_ids"]
    free = generate(byte_model, ids, do_sample=False)[0].tolist()
    end = free.index(ord(" ")) + 1
    assert end < len(free)
    out = generate(byte_model, ids, do_sample=False, stop_strings=[" "], tokenizer=tokenizer)
    assert out[0].tolist() == free[:end]


def test_what_tokenizers_return_may_be_given_as_it_is(model, tokens):
    """Some return types of tokens, which are all 0."""
    ids = tokens[:, :6].clamp_min(1)
    expected = generate(model, ids, do_sample=False)
    given = {"token_type_ids": torch.zeros_like(ids), "position_ids": torch.arange(6)[None]}
    assert torch.equal(generate(model, ids, do_sample=False, **given), expected)
    with pytest.raises(ValueError, match="token_type_ids is 1"):
        generate(model, ids, token_type_ids=torch.ones_like(ids))
