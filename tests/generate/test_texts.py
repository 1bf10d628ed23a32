import random
import threading
import time

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bdh.generate.params import SamplingParams
from bdh.generate.sequence import TextDecoder, encode_prompt
from bdh.tokenizer import byte_tokenizer


def pieces(tokenizer, ids, stop=()):
    """What comes out for one token at a time, the rest at the end included."""
    decoder = TextDecoder(tokenizer, stop)
    return [*(decoder.push([i]) for i in ids), decoder.flush()]


@pytest.mark.parametrize("text", ["plain", "naïve 日本語", "🙂🙃", "a🙂b", "\u0000é\n\t", "👩‍👩‍👧"])
def test_text_comes_in_whole_characters(tokenizer, text):
    out = pieces(tokenizer, text.encode())
    assert "".join(out) == text
    assert not any("\ufffd" in piece for piece in out)


def test_a_character_comes_with_its_last_byte(tokenizer):
    assert pieces(tokenizer, "é!".encode()) == ["", "é", "!", ""]
    assert pieces(tokenizer, "🙂".encode()) == ["", "", "", "🙂", ""]


def test_bytes_that_are_no_character_become_replacement_characters(tokenizer):
    ids = [0x61, 0xFF, 0x62, 0xC3]
    assert "".join(pieces(tokenizer, ids)) == "a\ufffdb\ufffd"


@pytest.mark.parametrize("seed", range(5))
def test_long_texts_are_what_the_tokenizer_decodes(tokenizer, seed):
    """Longer than the window that is decoded anew for each token."""
    characters = random.Random(seed).choices("abc \néß日本🙂\u0301", k=500)
    ids = list("".join(characters).encode())
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)


def test_a_stop_string_ends_the_text_and_never_leaks(tokenizer):
    out = pieces(tokenizer, b"one END two", stop=["END", "two"])
    assert "".join(out) == "one "
    decoder = TextDecoder(tokenizer, ["END"])
    assert decoder.push(list(b"one END two")) == "one "
    assert decoder.stopped
    assert decoder.push(list(b"more")) == decoder.flush() == ""


def test_what_might_become_a_stop_string_waits(tokenizer):
    assert pieces(tokenizer, b"EN-END", stop=["END"]) == ["", "", "EN-", "", "", "", ""]
    assert pieces(tokenizer, b"an EN", stop=["END"]) == ["a", "n", " ", "", "", "EN"]


def test_a_very_long_stop_string_holds_up_nothing(tokenizer):
    """Each token took time that grew with the square of its length: seconds for one of a few hundred kilobytes."""
    decoder = TextDecoder(tokenizer, ["ab" * 200_000])
    start = time.process_time()
    assert [decoder.push([token]) for token in b"xabx"] == ["x", "", "", "abx"]
    assert time.process_time() - start < 1


def test_the_first_complete_stop_string_counts_however_the_text_comes(tokenizer):
    assert "".join(pieces(tokenizer, b"abcde", stop=["bcde", "cd"])) == "ab"
    assert TextDecoder(tokenizer, ["bcde", "cd"]).push(list(b"abcde")) == "ab"


def test_streamed_batched_and_single_text_are_the_same(byte_model, tokenizer):
    prompts = ["The ", "A much longer prompt: ", "é"]
    for options in ({"temperature": 0}, {"seed": 3, "temperature": 0.8, "top_k": 20}):
        single = [byte_model.generate_text(tokenizer, p, max_new_tokens=30, **options) for p in prompts]
        streamed = ["".join(byte_model.stream_text(tokenizer, p, max_new_tokens=30, **options)) for p in prompts]
        assert single == streamed
    greedy = [byte_model.generate_text(tokenizer, p, max_new_tokens=30, temperature=0) for p in prompts]
    batch = byte_model.generate_texts(tokenizer, prompts, max_new_tokens=30, temperature=0)
    assert batch == [[text] for text in greedy]


def test_stop_strings_cut_alike_in_a_stream_and_in_a_batch(byte_model, tokenizer):
    whole = byte_model.generate_text(tokenizer, "The ", max_new_tokens=60, seed=1)
    stop = next(whole[i : i + 2] for i in range(10, len(whole)) if "\ufffd" not in whole[i : i + 2])
    expected = whole[: whole.index(stop)]
    options = {"max_new_tokens": 60, "seed": 1, "stop": [stop]}
    assert byte_model.generate_text(tokenizer, "The ", **options) == expected
    assert "".join(byte_model.stream_text(tokenizer, "The ", **options)) == expected


def test_seeds_repeat_and_leave_the_global_generator_alone(byte_model, tokenizer):
    before = torch.get_rng_state()
    one, same, other = (byte_model.generate_text(tokenizer, "a", max_new_tokens=20, seed=s) for s in (1, 1, 2))
    assert one == same != other
    assert torch.equal(torch.get_rng_state(), before)


def test_two_streams_at_once_do_not_disturb_each_other(byte_model, tokenizer):
    alone = [byte_model.generate_text(tokenizer, "a", max_new_tokens=20, seed=s) for s in (1, 2)]
    streams = [byte_model.stream_text(tokenizer, "a", max_new_tokens=20, seed=s) for s in (1, 2)]
    texts = ["", ""]
    for step in range(40):
        texts[step % 2] += next(streams[step % 2], "")
    texts = [text + "".join(stream) for text, stream in zip(texts, streams, strict=True)]
    assert texts == alone


def test_a_stream_generates_what_is_asked_for_alone(byte_model, tokenizer):
    """Without a thread that runs ahead."""
    before = threading.active_count()
    stream = byte_model.stream_text(tokenizer, "a", max_new_tokens=100_000, seed=1)
    next(stream)
    assert threading.active_count() == before
    stream.close()


def test_a_model_in_training_is_evaluated_and_trains_on(make_model, tokenizer):
    model = make_model(vocab_size=256, dropout=0.5).train()
    texts = {model.generate_text(tokenizer, "a", temperature=0, max_new_tokens=9) for _ in range(3)}
    assert texts == {"".join(model.stream_text(tokenizer, "a", temperature=0, max_new_tokens=9))}
    assert model.training


def test_without_a_seed_the_generator_of_pytorch_gives_it(byte_model, tokenizer):
    def text():
        torch.manual_seed(5)
        return byte_model.generate_text(tokenizer, "a", max_new_tokens=9)

    assert text() == text() != byte_model.generate_text(tokenizer, "a", max_new_tokens=9)


def test_an_error_in_the_generation_reaches_the_reader(byte_model, tokenizer):
    def fail(*args, **kwargs):
        raise RuntimeError("out of luck")

    byte_model.decoder.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of luck"):
        list(byte_model.stream_text(tokenizer, "a", max_new_tokens=5))
    with pytest.raises(RuntimeError, match="out of luck"):
        byte_model.generate_text(tokenizer, "a", max_new_tokens=5)


def test_several_sequences_and_beams(byte_model, tokenizer):
    texts = byte_model.generate_texts(tokenizer, ["a", "b"], num_return_sequences=3, max_new_tokens=8, seed=1)
    assert [len(group) for group in texts] == [3, 3]
    assert len(set(texts[0])) > 1
    beams = byte_model.generate_texts(
        tokenizer, ["a"], num_beams=4, num_return_sequences=2, temperature=0, max_new_tokens=8
    )
    assert len(beams[0]) == 2


def test_a_special_token_spelt_in_a_prompt_is_text():
    tokenizer = byte_tokenizer(special_tokens=True)
    assert encode_prompt(tokenizer, "<eos>") == list(b"<eos>")
    assert encode_prompt(tokenizer, "") == [tokenizer.bos_token_id]


def test_a_text_ends_at_eos(make_model):
    tokenizer = byte_tokenizer(special_tokens=True)
    model = make_model(vocab_size=260)
    with torch.no_grad():  # whatever comes in, <eos> is likeliest
        model.lm_head.weight[:] = 0
        model.lm_head.weight[:, 0] = torch.nn.functional.one_hot(torch.tensor(tokenizer.eos_token_id), 260) * 50.0
    hidden = model(torch.tensor([[97]]), output_hidden_states=True).hidden_states[-1]
    with torch.no_grad():
        model.lm_head.weight *= hidden[0, 0, 0].sign()
    assert model.generate_text(tokenizer, "a", temperature=0, max_new_tokens=5) == ""


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1: must be 0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"min_p": 1.0}, "min_p is 1.0"),
        ({"stop": [""]}, "stop is"),
        ({"temperature": 0, "num_return_sequences": 2}, "always gives the same text"),
        ({"num_beams": 2, "num_return_sequences": 3}, "at most num_beams, 2"),
        (
            {"max_tokens": 3, "max_new_tokens": 5},
            "max_new_tokens is another name for max_tokens, which is also given: give only one of them",
        ),
    ],
)
def test_settings_out_of_range_are_refused(byte_model, tokenizer, settings, message):
    with pytest.raises(ValueError, match=message):
        byte_model.generate_text(tokenizer, "a", **settings)


def test_a_misspelt_setting_is_answered_with_the_one_that_is_meant(byte_model, tokenizer):
    with pytest.raises(TypeError, match=r"^temprature is not a generation parameter: did you mean temperature\?$"):
        byte_model.generate_text(tokenizer, "a", temprature=0.5)


def test_what_cannot_stream_or_start_is_refused(byte_model, model, tokenizer):
    with pytest.raises(ValueError, match="a stream carries one text"):
        byte_model.stream_text(tokenizer, "a", num_return_sequences=2)
    with pytest.raises(ValueError, match="the prompt is empty"):
        byte_model.generate_text(tokenizer, "")
    with pytest.raises(ValueError, match="the tokenizer has 256 entries and the model 61"):
        model.generate_text(tokenizer, "a")
    with pytest.raises(ValueError, match="either params or keywords"):
        byte_model.generate_text(tokenizer, "a", SamplingParams(), seed=1)


def test_word_pieces_keep_their_spaces(make_model):
    """Whether a piece begins with a space depends on what is in front of it, the prompt included."""
    vocabulary = {"[UNK]": 0, "the": 1, "cat": 2, "##s": 3}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece(cleanup=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", clean_up_tokenization_spaces=False)
    decoder = TextDecoder(tokenizer, context=[1])
    assert [decoder.push([2]), decoder.push([3]), decoder.push([1])] == [" cat", "s", " the"]
