"""Trained tokenizers: exact where they promise it, of the size asked for, and text is text."""

import logging
import random
from pydoc_data.topics import topics

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from bdh.tokenizer import compression_ratio, encode_texts, train_tokenizer
from tests.tokenizer.conftest import TRAINING_TEXT

KINDS = ["bpe", "wordpiece", "unigram"]
EXACT = ["bpe", "unigram"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Of each kind, the tokenizer that was trained and the same one saved and opened by AutoTokenizer."""
    found = {}
    for kind in KINDS:
        tokenizer = train_tokenizer([TRAINING_TEXT], kind, 300 if kind in EXACT else 70)
        folder = tmp_path_factory.mktemp(kind)
        tokenizer.save_pretrained(folder)
        found[kind] = (tokenizer, AutoTokenizer.from_pretrained(folder))
    return found


@pytest.mark.parametrize("kind", EXACT)
def test_any_text_comes_back_exactly(trained, kind, nasty_text):
    for tokenizer in trained[kind]:
        ids = encode_texts(tokenizer, [nasty_text])[0].tolist()
        assert tokenizer.decode(ids) == nasty_text
        assert tokenizer.decode(ids, skip_special_tokens=True) == nasty_text
        assert tokenizer(nasty_text, add_special_tokens=False, split_special_tokens=True)["input_ids"] == ids


@pytest.mark.parametrize("kind", EXACT)
def test_random_characters_of_all_of_unicode_come_back_exactly(trained, kind):
    draw = random.Random(1)
    characters = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    texts = ["".join(draw.choices(characters, k=50)) for _ in range(100)]
    texts += ["".join(draw.choices(" \n\t<>eos▁0xAF'#", k=50)) for _ in range(200)]
    tokenizer = trained[kind][1]
    assert [tokenizer.decode(ids.tolist()) for ids in encode_texts(tokenizer, texts)] == texts


@pytest.mark.parametrize("kind", EXACT)
def test_any_text_comes_back_from_a_tokenizer_of_another_corpus(kind, nasty_text):
    """Trained on what could be mistaken for special tokens and for signs of other tokenizers."""
    corpus = ["<eos> <pad><unk> ▁▁ <0x41> ##a Ġ the <eos>"] * 50
    tokenizer = train_tokenizer(corpus, kind, 290)
    ids = encode_texts(tokenizer, [nasty_text])[0]
    assert tokenizer.decode(ids.tolist(), skip_special_tokens=True) == nasty_text


@pytest.mark.parametrize("kind", KINDS)
def test_spelled_out_special_token_is_never_the_token(trained, kind):
    for tokenizer in (*trained[kind], train_tokenizer(["<eos> <pad><bos>"] * 99, kind, 280)):
        ids = encode_texts(tokenizer, ["<eos><pad> <bos>", "<eos>"])
        assert all(token > 2 for row in ids for token in row.tolist())


def test_wordpiece_loses_white_space_and_unknown_characters_as_documented(trained):
    tokenizer = trained["wordpiece"][1]
    assert tokenizer.decode(encode_texts(tokenizer, ["the  dragon\n"])[0].tolist()) == "the dragon"
    assert encode_texts(tokenizer, ["\u4e2d"])[0].tolist() == [tokenizer.unk_token_id]


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_come_first(trained, kind):
    for tokenizer in trained[kind]:
        ids = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id]
        assert ids == [0, 1, 2, 3]
        assert tokenizer.convert_ids_to_tokens(ids) == ["<pad>", "<bos>", "<eos>", "<unk>"]
        assert tokenizer("the", add_special_tokens=True)["input_ids"] == tokenizer("the")["input_ids"]


@pytest.mark.parametrize("kind", KINDS)
def test_saved_folder_opens_as_the_plain_fast_class_and_encodes_alike(trained, kind, nasty_text):
    tokenizer, reloaded = trained[kind]
    assert type(tokenizer) is type(reloaded) is PreTrainedTokenizerFast
    assert reloaded.clean_up_tokenization_spaces is False
    assert encode_texts(reloaded, [nasty_text])[0].tolist() == encode_texts(tokenizer, [nasty_text])[0].tolist()


@pytest.mark.parametrize(("kind", "vocab_size"), [
    ("bpe", 261), ("bpe", 4_000), ("unigram", 261), ("unigram", 1_000), ("unigram", 3_600),
    ("wordpiece", 200), ("wordpiece", 4_000),
])  # fmt: skip
def test_vocabulary_has_the_size_asked_for(kind, vocab_size, caplog):
    texts = list(topics.values())[: None if vocab_size > 1_000 else 10]
    assert len(train_tokenizer(texts, kind, vocab_size)) == vocab_size
    assert caplog.records == []


@pytest.mark.parametrize("kind", KINDS)
def test_corpus_too_small_for_the_size_is_said_with_the_size_reached(kind, caplog):
    with caplog.at_level(logging.WARNING):
        tokenizer = train_tokenizer(["a few words, a few words"], kind, 5_000)
    assert len(tokenizer) < 5_000
    assert f"the vocabulary has {len(tokenizer)} entries, not the 5000 requested" in caplog.text


@pytest.mark.parametrize(("kind", "vocab_size", "least"), [
    ("bpe", 260, 261), ("unigram", 260, 261), ("unigram", -1, 261), ("wordpiece", 5, 6)
])  # fmt: skip
def test_too_small_a_vocabulary_is_refused_with_the_least_size(kind, vocab_size, least):
    with pytest.raises(ValueError, match=f"vocab_size is {vocab_size}: must be at least {least}, as"):
        train_tokenizer([TRAINING_TEXT], kind, vocab_size)


def test_wordpiece_vocabulary_below_its_alphabet_is_refused_with_the_size_needed():
    with pytest.raises(ValueError, match=r"vocab_size is 10: the characters of this corpus alone take 5[0-9] entries"):
        train_tokenizer([TRAINING_TEXT], "wordpiece", 10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("texts", [[], [""], ["", ""]])
def test_empty_corpus_is_refused(kind, texts):
    with pytest.raises(ValueError, match="the corpus is empty"):
        train_tokenizer(texts, kind, 300)


def test_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="kind is 'char': must be one of bpe, wordpiece, unigram"):
        train_tokenizer([TRAINING_TEXT], "char", 300)


@pytest.mark.parametrize("kind", KINDS)
def test_error_of_the_texts_comes_through(kind):
    def texts():
        yield TRAINING_TEXT
        raise ValueError("cannot read on")

    with pytest.raises(ValueError, match="cannot read on"):
        train_tokenizer(texts(), kind, 300)


def test_texts_are_read_once_in_order_and_progress_is_reported():
    calls = []
    train_tokenizer(iter(["one", "twö"]), "bpe", 300, progress=lambda *call: calls.append(call))
    assert calls == [("reading", 3, None), ("reading", 7, None), ("training", 0, None)]


def test_training_bpe_twice_gives_the_same_tokenizer():
    """The library's other trainers break ties at random."""
    first, second = (train_tokenizer([TRAINING_TEXT], "bpe", 300) for _ in range(2))
    assert first.get_vocab() == second.get_vocab()


def test_compression_ratio_is_bytes_per_token(trained):
    from bdh.tokenizer import byte_tokenizer

    assert compression_ratio(byte_tokenizer(), ["é", "ab"]) == 1.0
    tokenizer = trained["bpe"][0]
    num_tokens = len(encode_texts(tokenizer, [TRAINING_TEXT])[0])
    assert compression_ratio(tokenizer, iter([TRAINING_TEXT])) == len(TRAINING_TEXT) / num_tokens > 2
    with pytest.raises(ValueError, match="no text to measure"):
        compression_ratio(tokenizer, [])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("long", ["a" * 150_000, " " * 150_000, "".join(random.Random(3).choices("abc", k=30_000))])
def test_words_of_any_length_are_trained_on_in_bounded_pieces_which_is_said(kind, long, caplog):
    """unigram died of it, with a segmentation fault; the others took the square of the length in time."""
    tokenizer = train_tokenizer([TRAINING_TEXT, long], kind, 300)
    assert "1 runs of more than 1,000 characters without a space" in caplog.text
    if kind in EXACT:
        part = f"x{long[:5000]}x"
        assert tokenizer.decode(encode_texts(tokenizer, [part])[0].tolist()) == part


@pytest.mark.parametrize("kind", KINDS)
def test_words_of_usual_length_are_trained_on_whole(kind, caplog):
    train_tokenizer([TRAINING_TEXT, f"{'b' * 1000} {'c' * 999}\n\n{' ' * 500}d"], kind, 300)
    assert "characters without a space" not in caplog.text
