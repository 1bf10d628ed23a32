"""Encoding in batches: of the right type, and not disturbed by settings."""

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from bdh.tokenizer import PlainTokenizer, TextEncoder, byte_tokenizer, encode_texts, train_tokenizer
from tests.tokenizer.conftest import TRAINING_TEXT


@pytest.mark.parametrize(("num_entries", "dtype"), [
    (256, np.uint8), (257, np.uint16), (65_536, np.uint16), (65_537, np.uint32)
])  # fmt: skip
def test_smallest_type_holds_every_id(num_entries, dtype):
    words = {str(number): number for number in range(num_entries)}
    encoder = TextEncoder(PlainTokenizer(Tokenizer(models.WordLevel(words, unk_token="0"))))
    ids = encoder.encode([str(num_entries - 1)])[0]
    assert ids.tolist() == [num_entries - 1]
    assert ids.dtype == encoder.dtype == dtype


def test_each_text_gives_an_array():
    arrays = encode_texts(byte_tokenizer(), ["ab", "", "é"])
    assert [array.tolist() for array in arrays] == [[97, 98], [], [195, 169]]
    assert all(array.dtype == np.uint8 for array in arrays)
    assert encode_texts(byte_tokenizer(special_tokens=True), ["a"])[0].dtype == np.uint16


def test_a_batch_is_its_texts_alone():
    tokenizer = train_tokenizer([TRAINING_TEXT], "bpe", 300)
    texts = TRAINING_TEXT.splitlines(keepends=True)
    for ids, text in zip(encode_texts(tokenizer, texts), texts, strict=True):
        assert ids.tolist() == tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def test_padding_and_truncation_left_in_the_tokenizer_do_not_reach_the_encoding():
    tokenizer = train_tokenizer([TRAINING_TEXT], "bpe", 300)
    before = TextEncoder(tokenizer)
    expected = [ids.tolist() for ids in before.encode(["one", "and another one"])]
    tokenizer(["a", "b c d e"], padding=True, truncation=True, max_length=2)
    after = TextEncoder(tokenizer)
    assert [ids.tolist() for ids in after.encode(["one", "and another one"])] == expected
    assert after.hash == before.hash


def test_encoding_leaves_the_tokenizer_as_it_is():
    tokenizer = byte_tokenizer(special_tokens=True)
    encode_texts(tokenizer, ["<eos>"])
    assert tokenizer("<eos>")["input_ids"] == [258]


def test_hash_tells_tokenizers_apart(tmp_path):
    tokenizers = [byte_tokenizer(), byte_tokenizer(True), train_tokenizer([TRAINING_TEXT], "bpe", 300)]
    hashes = [TextEncoder(tokenizer).hash for tokenizer in tokenizers]
    assert len(set(hashes)) == 3
    from transformers import AutoTokenizer

    for tokenizer, expected in zip(tokenizers, hashes, strict=True):
        tokenizer.save_pretrained(tmp_path)
        assert TextEncoder(AutoTokenizer.from_pretrained(tmp_path)).hash == expected
