"""The byte-level tokenizer: ids are bytes, and no text is lost."""

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from bdh.tokenizer import byte_tokenizer, encode_texts, is_byte_tokenizer, train_tokenizer
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
