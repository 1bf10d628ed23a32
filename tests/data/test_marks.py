"""Byte order marks and endings in capitals: neither changes what the text is."""

import codecs
import gzip
import json

import pytest
import zstandard

from bdh.data import DataConfig
from bdh.data.reading import CHUNK_BYTES
from bdh.data.sources import training_source
from tests.data.conftest import documents_of, write_table, write_text

ROWS = [{"text": "first row"}, {"text": "second"}]
MARKS = {
    "utf-16-le": codecs.BOM_UTF16_LE,
    "utf-16-be": codecs.BOM_UTF16_BE,
    "utf-32-le": codecs.BOM_UTF32_LE,
    "utf-32-be": codecs.BOM_UTF32_BE,
}


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
@pytest.mark.parametrize("suffix", [".txt", ".md", ".jsonl", ".json", ".csv"])
def test_a_byte_order_mark_is_not_text(tmp_path, corpus_of, suffix, compression):
    """It was trained on as the first character of each text file."""
    path = write_table(tmp_path / "t.csv", ROWS).rename(tmp_path / "rows")
    if suffix in (".jsonl", ".json"):
        path = write_table(tmp_path / f"t{suffix}", ROWS)
    text = path.read_text() if suffix in (".jsonl", ".json", ".csv") else "first row"
    path.unlink()
    write_text(tmp_path / f"t{suffix}{compression}", "\ufeff" + text)
    write_text(tmp_path / "u.txt", "\ufeffsecond")
    expected = ["first row", "second"] if suffix in (".txt", ".md") else ["first row", "second", "second"]
    assert documents_of(corpus_of(tmp_path)) == expected


def test_a_file_that_holds_a_mark_only_is_empty(tmp_path, corpus_of):
    write_text(tmp_path / "a.txt", "\ufeff")
    write_text(tmp_path / "b.txt", "some text" * 9)
    write_text(tmp_path / "c.csv", "\ufeff")
    corpus = corpus_of(tmp_path, special_tokens=False)
    assert bytes([*corpus.train_tokens(), *corpus.validation_tokens()]) == b"some text" * 9
    assert corpus.facts["skipped"] == {"empty files": 2}


def test_a_conversation_after_a_mark_is_found_and_read(tmp_path):
    """The first line was no JSON, and so the file was taken for text, or refused as chat."""
    from bdh.data.chat import holds_chat, read_conversations

    row = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
    path = write_text(tmp_path / "t.jsonl", f"\ufeff{row}\n{row}\n")
    assert holds_chat(DataConfig(source=str(path)))
    assert [len(each.messages) for each in read_conversations([path], None, "strict")] == [2, 2]
    path.write_bytes(path.read_bytes() + b"\xff")
    with pytest.raises(ValueError, match=f"byte {path.stat().st_size - 1} is 0xFF"):
        list(read_conversations([path], None, "strict"))


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".csv", ".txt.gz", ".jsonl.gz"])
@pytest.mark.parametrize("encoding", MARKS)
@pytest.mark.parametrize("encoding_errors", ["strict", "replace"])
def test_other_encodings_are_named_and_refused(tmp_path, corpus_of, suffix, encoding, encoding_errors):
    """With encoding_errors=replace they became a text of U+FFFD and NUL."""
    path = write_table(tmp_path / f"t{suffix.removesuffix('.gz')}", ROWS) if "txt" not in suffix else None
    data = MARKS[encoding] + (path.read_text() if path else "first row, second").encode(encoding)
    (tmp_path / f"t{suffix}").write_bytes(gzip.compress(data) if suffix.endswith(".gz") else data)
    with pytest.raises(ValueError, match=rf"t{suffix} is {encoding[:6].upper()}, .*must be UTF-8.*iconv"):
        corpus_of(tmp_path / f"t{suffix}", encoding_errors=encoding_errors)


def test_reading_a_long_file_with_a_mark_continues_after_any_part(tmp_path):
    write_text(tmp_path / "t.txt", "\ufeff" + "line of text\n" * 60_000)
    source = training_source(DataConfig(source=str(tmp_path)))
    expected = list(source.open())
    assert b"".join(part.utf8 for part in expected) == b"line of text\n" * 60_000
    assert len(expected) > 2
    assert all(len(part.utf8) <= CHUNK_BYTES for part in expected)
    reader = source.open()
    parts = iter(reader)
    for position in range(len(expected) + 1):
        assert list(source.open(state=reader.state())) == expected[position:]
        next(parts, None)


@pytest.mark.parametrize("name", ["t.TXT.GZ", "t.txt.Gz", "t.Txt.ZST", "t.JSONL.GZ", "t.Csv.Zst", "t.JSON", "t.CSV"])
def test_endings_may_be_in_capitals(tmp_path, corpus_of, name):
    """A .GZ or .ZST was read as it is: its compressed bytes, with encoding_errors=replace, were the text."""
    kind = name.lower().split(".")[1]
    text = "first row" if kind == "txt" else write_table(tmp_path / f"rows.{kind}", ROWS).read_text()
    (tmp_path / f"rows.{kind}").unlink(missing_ok=True)
    compress = {"gz": gzip.compress, "zst": zstandard.compress}.get(name.lower().split(".")[-1], bytes)
    (tmp_path / name).write_bytes(compress(text.encode()))
    write_text(tmp_path / "u.txt", "last")
    expected = ["first row", "last"] if kind == "txt" else ["first row", "second", "last"]
    for encoding_errors in ("strict", "replace"):
        assert documents_of(corpus_of(tmp_path, encoding_errors=encoding_errors)) == expected


def test_a_file_that_is_compressed_twice_is_of_no_known_type(tmp_path, corpus_of):
    """One of the two was undone, and the other's bytes taken for the text."""
    (tmp_path / "t.txt.zst.gz").write_bytes(gzip.compress(zstandard.compress(b"some text")))
    with pytest.raises(ValueError, match="unknown type"):
        corpus_of(tmp_path / "t.txt.zst.gz", encoding_errors="replace")
