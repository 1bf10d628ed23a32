"""The byte-level tokenizer: ids are bytes, and no text is lost."""

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from bdh.generate.sequence import encode_prompt
from bdh.tokenizer import (
    TextEncoder,
    byte_tokenizer,
    encode_texts,
    is_byte_tokenizer,
    stop_token_ids,
    train_tokenizer,
    with_chat_template,
    with_padding,
)
from bdh.tokenizer.plain import document_end_id, vocabulary_size
from tests.tokenizer.conftest import TRAINING_TEXT


@pytest.fixture(params=[False, True], ids=["256 entries", "260 entries"])
def tokenizer(request):
    return byte_tokenizer(special_tokens=request.param)


@pytest.fixture
def reloaded(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    return AutoTokenizer.from_pretrained(tmp_path)


def test_ids_are_the_bytes_of_the_text(tokenizer, reloaded, nasty_text):
    expected = list(nasty_text.encode())
    for one in (tokenizer, reloaded):
        assert one(nasty_text, add_special_tokens=False, split_special_tokens=True)["input_ids"] == expected
        assert encode_texts(one, [nasty_text])[0].tolist() == expected
        assert one.decode(expected) == nasty_text


def test_entries_and_special_tokens():
    assert len(byte_tokenizer()) == 256
    assert byte_tokenizer().all_special_ids == []
    tokenizer = byte_tokenizer(special_tokens=True)
    assert len(tokenizer) == 260
    ids = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id]
    assert ids == [256, 257, 258, 259]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<pad>", "<bos>", "<eos>", "<unk>"]


def test_special_tokens_are_skipped_in_decoding_when_asked():
    tokenizer = byte_tokenizer(special_tokens=True)
    assert tokenizer.decode([65, 258, 66], skip_special_tokens=True) == "AB"
    assert tokenizer.decode([65, 258, 66]) == "A<eos>B"


def test_saved_folder_opens_as_the_plain_fast_class(tokenizer, reloaded):
    assert type(tokenizer) is type(reloaded) is PreTrainedTokenizerFast
    assert len(reloaded) == len(tokenizer)
    assert reloaded.clean_up_tokenization_spaces is False
    assert reloaded.eos_token_id == tokenizer.eos_token_id


def test_byte_tokenizer_is_known_as_one_and_others_are_not(tokenizer, reloaded):
    assert is_byte_tokenizer(tokenizer)
    assert is_byte_tokenizer(reloaded)
    other = byte_tokenizer()
    other.add_tokens(["word"])
    assert not is_byte_tokenizer(other)
    other = byte_tokenizer()
    other.add_tokens(["wo", "rd", "wor", "ord"])
    assert not is_byte_tokenizer(other)
    assert not is_byte_tokenizer(train_tokenizer([TRAINING_TEXT], "wordpiece", 60))
    assert not is_byte_tokenizer(train_tokenizer([TRAINING_TEXT], "bpe", 261))


@pytest.fixture
def padding(tmp_path):
    """The byte tokenizer with ``<pad>`` and ``<eos>`` among its bytes, saved and loaded."""
    with_padding(byte_tokenizer()).save_pretrained(tmp_path / "padding")
    return AutoTokenizer.from_pretrained(tmp_path / "padding")


def test_padding_takes_the_place_of_bytes_that_no_text_has(padding, nasty_text):
    assert (len(padding), vocabulary_size(padding)) == (256, 256)
    assert (padding.pad_token, padding.pad_token_id) == ("<pad>", 255)
    assert (padding.eos_token, padding.eos_token_id) == ("<eos>", 254)
    assert is_byte_tokenizer(padding)
    expected = list(nasty_text.encode())
    assert padding(nasty_text, add_special_tokens=False, split_special_tokens=True)["input_ids"] == expected
    assert padding.decode(expected) == nasty_text
    characters = "".join(map(chr, range(0x80, 0x400)))  # those that stand for bytes in the vocabulary among them
    assert padding(characters)["input_ids"] == list(characters.encode())
    assert padding.decode([65, 254, 255], skip_special_tokens=True) == "A"
    assert padding("A<eos>")["input_ids"] == [65, 254]
    batch = padding(["ab", "c"], padding=True)
    assert [sorted(row) for row in batch["input_ids"]] == [[97, 98], [99, 255]]


def test_padding_changes_nothing_in_what_is_trained_and_measured(padding):
    """An export has it, the run that it comes from has not: their tokens mean the same."""
    plain, with_it = TextEncoder(byte_tokenizer()), TextEncoder(padding)
    assert with_it.hash == plain.hash
    assert with_it.dtype == plain.dtype
    assert with_it.is_byte_level
    assert with_it.eos_token_id is None  # it ends no document: the model has learned none
    assert document_end_id(byte_tokenizer(special_tokens=True)) == 258
    with pytest.raises(ValueError, match="give at least one character"):
        encode_prompt(padding, "")


def test_padding_keeps_what_a_tokenizer_has(padding):
    for tokenizer in (byte_tokenizer(special_tokens=True), train_tokenizer([TRAINING_TEXT], "bpe", 261), padding):
        assert with_padding(tokenizer) is tokenizer
    chat = with_padding(with_chat_template(byte_tokenizer(), "default", needs_one=True))
    assert (chat.pad_token_id, chat.eos_token_id, len(chat)) == (255, 254, 260)
    assert is_byte_tokenizer(chat)
    assert chat.convert_tokens_to_ids("<|end|>") == 259
    assert stop_token_ids(chat) == [254, 259]
