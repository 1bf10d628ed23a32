"""Texts for the training of tokenizers: split as the tokens are."""

import pytest

from bdh.data import DataConfig, training_texts, validation_texts
from tests.data.conftest import write_table, write_text


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("val_source", [None, "v.txt"])
@pytest.mark.parametrize("source", ["t.jsonl", "t.txt"])
def test_texts_are_split_as_the_corpus_is(tmp_path, corpus_of, source, val_source, streaming):
    if source == "t.jsonl":
        write_table(tmp_path / source, [{"text": f"row {i:02}"} for i in range(30)])
    else:
        write_text(tmp_path / source, "line of text\n" * 300_000)
    write_text(tmp_path / "v.txt", "text to validate on")
    settings = {
        "source": str(tmp_path / source),
        "val_source": val_source and str(tmp_path / val_source),
        "streaming": streaming,
        "val_tokens": 10**9,
    }
    corpus = corpus_of(**settings, special_tokens=False)
    config = DataConfig(**settings)
    assert "".join(validation_texts(config)).encode() == bytes(corpus.validation_tokens())
    if not streaming:
        assert "".join(training_texts(config)).encode() == bytes(corpus.train_tokens())
    assert all(len(text) <= 1 << 18 for text in training_texts(config))


def test_texts_are_read_as_they_are_asked_for(tmp_path):
    write_text(tmp_path / "a.txt", "good text")
    (tmp_path / "b.txt").write_bytes(b"\xff")
    texts = training_texts(DataConfig(source=str(tmp_path), val_source=str(write_text(tmp_path / "v" / "v.txt", "v"))))
    assert next(texts) == "good text"
    with pytest.raises(ValueError, match="not UTF-8"):
        next(texts)


def test_texts_of_the_validation_are_read_where_those_of_the_training_are_not_there(tmp_path):
    """As for a tokenizer that is measured on files of their own; a data set of the hub would be loaded for nothing."""
    held_out = tmp_path / "held_out.txt"
    held_out.write_text("held out")
    for source in (str(held_out), str(tmp_path / "missing.txt")):
        config = DataConfig(source=source, val_source=str(held_out))
        assert list(validation_texts(config)) == ["held out"]
        with pytest.raises((ValueError, FileNotFoundError)):
            list(training_texts(config))
