"""Parts and readers: nothing is lost at a cut, and every position can be stored."""

import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bdh.data import DataConfig, tables
from bdh.data.reading import CHUNK_BYTES, cut_position, split_document, to_plain
from bdh.data.sources import training_source
from bdh.tokenizer import encode_texts, train_tokenizer
from tests.data.conftest import write_table, write_text

LONG_TEXTS = {
    "lines": "A line of some words.\n" * 50_000,
    "blank lines": "word\n\n\n" * 150_000,
    "only line ends": "\n" * 600_000,
    "no line ends": "words and words " * 50_000,
    "no white space": "x" * 600_000,
    "wide characters": "🙂" * 200_000,
    "carriage returns": "a\r\n" * 250_000,
}


@pytest.mark.parametrize("kind", LONG_TEXTS)
def test_parts_of_a_long_document_join_to_it(kind):
    utf8 = LONG_TEXTS[kind].encode()
    parts = list(split_document(utf8))
    assert b"".join(part.utf8 for part in parts) == utf8
    assert [part.ends_document for part in parts] == [False] * (len(parts) - 1) + [True]
    assert all(0 < len(part.utf8) <= CHUNK_BYTES for part in parts)
    for part in parts:
        part.utf8.decode()  # no character is cut


@pytest.mark.parametrize("kind", LONG_TEXTS)
def test_a_file_gives_the_same_parts_as_the_text(tmp_path, kind):
    write_text(tmp_path / "t.txt", LONG_TEXTS[kind])
    parts = list(training_source(DataConfig(source=str(tmp_path))).open())
    assert b"".join(part.utf8 for part in parts) == LONG_TEXTS[kind].encode()
    assert [part.ends_document for part in parts] == [False] * (len(parts) - 1) + [True]
    assert all(0 < len(part.utf8) <= CHUNK_BYTES for part in parts)


def test_best_cut_is_a_line_end_between_words():
    assert cut_position(b"one\ntwo\n\n three four", 15) == 4
    assert cut_position(b"one \n two three four", 15) == 5
    assert cut_position(b"one two three four", 15) == 14
    assert cut_position("ééééé".encode(), 5) == 4


@pytest.mark.parametrize("kind", ["bpe", "unigram", "wordpiece"])
def test_a_cut_between_lines_does_not_change_the_tokens(kind):
    text = "Some words, and 12 more;\n\tindented  twice\nlast line here.\n" * 8_000
    tokenizer = train_tokenizer([text], kind, 300)
    parts = [part.utf8.decode() for part in split_document(text.encode())]
    assert len(parts) > 1
    whole = encode_texts(tokenizer, [text])[0].tolist()
    assert [token for part in encode_texts(tokenizer, parts) for token in part.tolist()] == whole


@pytest.fixture
def every_type(tmp_path):
    """A folder with files of every type, long ones among them."""
    long = "line of text\n" * 30_000
    write_text(tmp_path / "a.txt", long)
    write_table(tmp_path / "b.jsonl", [{"text": f"b {i}"} for i in range(5)] + [{"text": long}, {"text": "end"}])
    write_text(tmp_path / "c.txt.gz", long)
    write_table(tmp_path / "d.csv", [{"text": f"d {i}"} for i in range(5)])
    write_text(tmp_path / "e.txt.zst", long)
    write_text(tmp_path / "f.txt", "")
    write_table(tmp_path / "g.parquet", [{"text": f"g {i}"} for i in range(5)])
    write_table(tmp_path / "h.json", [{"text": f"h {i}"} for i in range(5)])
    write_table(tmp_path / "i.jsonl.gz", [{"text": f"i {i}"} for i in range(5)])
    return tmp_path


def test_reading_continues_after_any_part(every_type):
    source = training_source(DataConfig(source=str(every_type)))
    expected = list(source.open())
    reader = source.open()
    parts = iter(reader)
    for position in range(len(expected) + 1):
        state = reader.state()
        assert list(source.open(state=state)) == expected[position:]
        assert list(source.open(state=state)) == expected[position:], "reading from a state changed it"
        next(parts, None)


ROW_TEXTS = [f"row {i} " * (100_000 if i in (5, 17) else 1) for i in range(20)]


@pytest.fixture
def row_groups(tmp_path):
    """A parquet file of rows in groups of 7."""
    pq.write_table(pa.table({"id": range(20), "text": ROW_TEXTS}), tmp_path / "t.parquet", row_group_size=7)
    return training_source(DataConfig(source=str(tmp_path / "t.parquet")))


def test_parquet_is_read_without_datasets_in_pieces_of_row_groups_from_any_row(row_groups, monkeypatch):
    """``datasets`` took seven times as long for short rows, a context manager for each row a fifth of that."""
    monkeypatch.setattr(tables, "ROWS_AT_ONCE", 3)
    monkeypatch.setitem(sys.modules, "datasets", None)
    reader = row_groups.open()
    places = [(reader.state(), None)] + [(reader.state(), chunk) for chunk in reader]
    expected = [chunk for _, chunk in places[1:]]
    documents = b"".join(chunk.utf8 + b"|" * chunk.ends_document for chunk in expected).decode().split("|")
    assert documents == [*ROW_TEXTS, ""]
    assert len(expected) > 20
    for position, (state, _) in enumerate(places):
        assert list(row_groups.open(state=state)) == expected[position:]


def test_a_place_in_parquet_that_was_stored_by_datasets_is_continued_from(row_groups):
    expected = list(row_groups.open())
    first = next(number for number, chunk in enumerate(expected) if not chunk.ends_document)
    pending = [chunk for chunk in expected[first:] if b"row 5 " in chunk.utf8][1:]
    rows = {"examples_iterable": {"shard_idx": 0}, "epoch": 0}
    for inner, position in [
        ({"rows": rows, "num_rows": 6, "pending": to_plain(pending)}, first + 1),
        ({"rows": rows, "num_rows": 3, "pending": []}, 3),
        ({"rows": None, "num_rows": 0, "pending": []}, 0),
    ]:
        assert list(row_groups.open(state={"shard": 0, "inner": inner})) == expected[position:]


@pytest.mark.parametrize("name", ["pydoc", "stdlib"])
def test_reading_a_built_in_text_continues_after_any_part(name):
    source = training_source(DataConfig(source=name))
    expected = list(source.open())
    reader = source.open()
    parts = iter(reader)
    for position in range(0, 50, 10):
        assert list(source.open(state=reader.state())) == expected[position:]
        for _ in range(10):
            next(parts)
