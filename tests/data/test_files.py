"""Files: every type, every order, every fault."""

import gzip
import re

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from bdh.data import DataConfig, training_texts
from tests.data.conftest import documents_of, write_table, write_text

TEXTS = ["first", "zweites — 2", "третий", "四", "fifth\nwith lines\r\n", "🙂 six", "seven", "eight", "nine", "ten"]
ROWS = [{"id": i, "body": text} for i, text in enumerate(TEXTS)]


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_each_row_of_a_table_is_a_document(tmp_path, corpus_of, suffix, compression):
    path = write_table(tmp_path / f"t{suffix}{compression}", ROWS)
    assert documents_of(corpus_of(path)) == TEXTS


def test_each_row_of_parquet_is_a_document(tmp_path, corpus_of):
    assert documents_of(corpus_of(write_table(tmp_path / "t.parquet", ROWS))) == TEXTS


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("column", [None, "text"])
@pytest.mark.parametrize("schema", [{"text": pa.null()}, {"text": pa.string()}, {"id": pa.int64()}, {}])
@pytest.mark.parametrize("number", [0, 1])
def test_a_parquet_shard_without_rows_is_empty_whatever_its_columns(
    tmp_path, corpus_of, schema, number, column, streaming
):
    """Of a column of nulls, or of none, it was a fault, in the middle of the training where it was streamed."""
    shards = [TEXTS[:5], TEXTS[5:]]
    shards.insert(number, None)
    for index, texts in enumerate(shards):
        table = pa.table({"text": texts}) if texts else pa.schema(schema).empty_table()
        pq.write_table(table, tmp_path / f"{index}.parquet")
    corpus = corpus_of(tmp_path, text_column=column, streaming=streaming)
    assert corpus.facts["skipped"] == {"empty files": 1}
    if not streaming:
        assert documents_of(corpus) == TEXTS


def test_parquet_shards_that_are_all_empty_are_said_to_be(tmp_path, corpus_of):
    for index, kind in enumerate([pa.null(), pa.string()]):
        pq.write_table(pa.schema({"text": kind}).empty_table(), tmp_path / f"{index}.parquet")
    for streaming in (False, True):
        with pytest.raises(ValueError, match=r"holds no text: left out empty files \(2\)"):
            corpus_of(tmp_path, streaming=streaming)


def test_a_parquet_shard_of_nulls_alone_is_rows_without_text(tmp_path, corpus_of):
    pq.write_table(pa.table({"body": pa.nulls(3), "id": [1, 2, 3]}), tmp_path / "a.parquet")
    write_table(tmp_path / "b.parquet", ROWS)
    corpus = corpus_of(tmp_path)
    assert documents_of(corpus) == TEXTS
    assert corpus.facts["skipped"] == {"rows without text": 3}


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
@pytest.mark.parametrize("suffix", [".txt", ".md", ".py", ".TXT"])
def test_each_text_file_is_a_document_exactly_as_it_is(tmp_path, corpus_of, suffix, compression):
    texts = ["in \ufeff the middle\r\n", "  spaces \0 and a NUL\n\n"]
    for number, text in enumerate(texts):
        write_text(tmp_path / f"{number}{suffix}{compression}", text)
    assert documents_of(corpus_of(tmp_path)) == texts


def test_a_zst_file_of_several_frames_is_read_to_its_end(tmp_path, corpus_of):
    (tmp_path / "a.txt.zst").write_bytes(zstandard.compress(b"one, ") + zstandard.compress(b"two and three"))
    write_text(tmp_path / "b.txt", "another document")
    assert documents_of(corpus_of(tmp_path)) == ["one, two and three", "another document"]


def test_folder_is_read_recursively_sorted_and_by_each_files_type(tmp_path, corpus_of):
    write_text(tmp_path / "b" / "z.txt", "b/z")
    write_table(tmp_path / "b" / "a.jsonl", [{"text": "b/a 1"}, {"text": "b/a 2"}])
    write_text(tmp_path / "a.md", "# a")
    write_table(tmp_path / "c.parquet", [{"text": "c"}])
    write_text(tmp_path / "B.py", "print()")
    write_text(tmp_path / ".git" / "hidden.txt", "hidden")
    write_text(tmp_path / "image.png", "no text")
    corpus = corpus_of(tmp_path)
    assert documents_of(corpus) == ["print()", "# a", "b/a 1", "b/a 2", "b/z", "c"]
    assert corpus.facts["skipped"] == {"files of other types": 1}


def test_several_files_keep_the_order_they_are_given_in(tmp_path, corpus_of):
    for name in "abc":
        write_text(tmp_path / f"{name}.txt", f"text {name}")
    names = [str(tmp_path / f"{name}.txt") for name in "cab"]
    assert documents_of(corpus_of(names)) == ["text c", "text a", "text b"]
    assert documents_of(corpus_of(", ".join(names))) == ["text c", "text a", "text b"]


def test_a_name_with_a_comma_or_a_bracket_is_a_name(tmp_path, corpus_of):
    path = write_text(tmp_path / "a, b.txt", "with a comma in its name")
    assert corpus_of(path).facts["train_bytes"] > 0
    path = write_table(tmp_path / "t[1].jsonl", ROWS)
    assert documents_of(corpus_of(path)) == TEXTS


def test_glob_takes_what_it_matches_sorted(tmp_path, corpus_of):
    for name in ("2/b.txt", "1/b.txt", "1/a.txt", "1/a.md"):
        write_text(tmp_path / name, f"text {name}")
    assert documents_of(corpus_of(f"{tmp_path}/**/*.txt")) == ["text 1/a.txt", "text 1/b.txt", "text 2/b.txt"]


def test_rows_without_text_and_empty_files_are_skipped_and_counted(tmp_path, corpus_of, caplog):
    rows = [{"text": "one"}, {"text": None}, {"text": ""}, {"id": 3}, {"text": "two"}]
    write_table(tmp_path / "a.jsonl", rows)
    write_text(tmp_path / "b.txt", "")
    write_text(tmp_path / "c.csv", "")
    corpus = corpus_of(tmp_path)
    assert documents_of(corpus) == ["one", "two"]
    assert corpus.facts["skipped"] == {"rows without text": 3, "empty files": 2}
    assert "rows without text (3), empty files (2)" in caplog.text


def test_words_that_spell_missing_values_in_csv_are_text(tmp_path, corpus_of):
    texts = ["NA", "null", "None", "123", "4.50", "nan"]
    write_text(tmp_path / "t.csv", "text,id\nsome words,1\n" + "".join(f"{text},2\n" for text in texts))
    assert documents_of(corpus_of(tmp_path, text_column="text")) == ["some words", *texts]


def test_a_column_whose_later_rows_hold_only_digits_stays_text(tmp_path, corpus_of):
    """pandas guesses the type of each 10,000 rows anew."""
    write_text(tmp_path / "t.csv", "text\n" + "word\n" * 10_000 + "007\n" * 10_000)
    assert documents_of(corpus_of(tmp_path))[-1] == "007"


def test_long_document_in_a_table_stays_one_document(tmp_path, corpus_of):
    long = "line of text\n" * 60_000
    write_table(tmp_path / "t.jsonl", [{"text": long}, {"text": "short"}])
    assert documents_of(corpus_of(tmp_path)) == [long, "short"]


def test_text_column_is_taken_as_set(tmp_path, corpus_of):
    write_table(tmp_path / "t.jsonl", [{"title": f"t{i}", "text": f"x{i}"} for i in range(3)])
    assert documents_of(corpus_of(tmp_path, text_column="text")) == ["x0", "x1", "x2"]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_two_columns_of_strings_ask_for_text_column_and_name_the_columns(tmp_path, corpus_of, suffix):
    path = write_table(tmp_path / f"t{suffix}", [{"title": "a", "text": "b", "n": 1}])
    with pytest.raises(ValueError, match=r"set data\.text_column.*2 columns.*title, text.*columns are title, text, n"):
        corpus_of(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_missing_text_column_names_the_columns_there_are(tmp_path, corpus_of, suffix):
    path = write_table(tmp_path / f"t{suffix}", [{"title": "a", "text": "b"}])
    with pytest.raises(ValueError, match=rf"'body', but {re.escape(str(path))} has no such column: it has title, text"):
        corpus_of(path, text_column="body")


def test_column_of_numbers_is_no_text(tmp_path, corpus_of):
    path = write_table(tmp_path / "t.jsonl", [{"n": 1}, {"n": 2}])
    with pytest.raises(ValueError, match="no column holds strings; its columns are n"):
        corpus_of(path)
    with pytest.raises(ValueError, match=r"line 1: column 'n' holds 1 \(int\): it must be text"):
        corpus_of(path, text_column="n")


@pytest.mark.parametrize("name", ["missing.txt", "./missing", "/no/such/folder/", "a/b/c", "missing.jsonl.gz"])
def test_missing_file_is_named(name, corpus_of):
    with pytest.raises(FileNotFoundError, match=f"{re.escape(name)}.*no such file or folder"):
        corpus_of(name)


def test_missing_second_file_is_named(tmp_path, corpus_of):
    write_text(tmp_path / "a.txt", "text")
    with pytest.raises(FileNotFoundError, match=r"b\.txt"):
        corpus_of(f"{tmp_path}/a.txt,{tmp_path}/b.txt")


def test_glob_without_a_match_and_folder_without_text_are_named(tmp_path, corpus_of):
    with pytest.raises(FileNotFoundError, match=r"x\*\.txt.* gives no file to read"):
        corpus_of(f"{tmp_path}/x*.txt")
    write_text(tmp_path / "image.png", "no text")
    with pytest.raises(FileNotFoundError, match=r"files of other types \(1\); known types are \.txt"):
        corpus_of(tmp_path)


def test_unknown_type_names_the_known_ones(tmp_path, corpus_of):
    with pytest.raises(ValueError, match=r"text\.doc.*unknown type: known are \.txt, \.md"):
        corpus_of(write_text(tmp_path / "text.doc", "text"))


@pytest.mark.parametrize("source", ["empty.txt", "empty.jsonl", "header.csv", "blank.jsonl"])
def test_empty_corpus_is_said_to_be_empty(tmp_path, corpus_of, source):
    write_text(tmp_path / "empty.txt", "")
    write_text(tmp_path / "empty.jsonl", "")
    write_text(tmp_path / "header.csv", "text,n\n")
    write_text(tmp_path / "blank.jsonl", '{"text": ""}\n{"text": null}\n')
    with pytest.raises(ValueError, match="holds no text"):
        corpus_of(tmp_path / source)
    with pytest.raises(ValueError, match="holds no text"):
        corpus_of(tmp_path / source, streaming=True)


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
@pytest.mark.parametrize(
    ("suffix", "before", "after"),
    [(".txt", "é" * 200_000, "x"), (".jsonl", '{"text": "one"}\n{"text": "t', '"}\n'), (".csv", "text\none\nt", "\n")],
)
def test_bytes_that_are_not_utf8_are_located(tmp_path, corpus_of, suffix, before, after, compression):
    path = tmp_path / f"t{suffix}{compression}"
    data = before.encode() + b"\xff" + after.encode()
    compress = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[compression]
    path.write_bytes(compress(data))
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))} is not UTF-8: byte {len(before.encode())} is 0xFF"):
        corpus_of(path)


def test_a_character_cut_off_at_the_end_is_located(tmp_path, corpus_of):
    path = tmp_path / "t.txt"
    path.write_bytes(b"abc" + "é".encode()[:1])
    with pytest.raises(ValueError, match="byte 3 is 0xC3"):
        corpus_of(path)


@pytest.mark.parametrize(("name", "data"), [
    ("t.txt", b"one t\xffwo"),
    ("t.jsonl", b'{"text": "one t\xffwo"}\n'),
    ("t.csv", b"text\none t\xffwo\n"),
])  # fmt: skip
def test_encoding_errors_replace_continues(tmp_path, corpus_of, name, data):
    (tmp_path / name).write_bytes(data)
    write_text(tmp_path / "z.txt", "another")
    assert documents_of(corpus_of(tmp_path, encoding_errors="replace")) == ["one t\ufffdwo", "another"]


@pytest.mark.parametrize(("name", "data"), [
    ("t.txt.gz", gzip.compress(b"some text" * 99, mtime=0)[:-9]),
    ("t.txt.zst", zstandard.compress(b"some text" * 99)[:-3]),
    ("t.txt.zst", b"no zstandard at all"),
    ("t.txt.gz", b"no gzip at all"),
    ("t.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 999, mtime=0)[:-9]),
    ("t.jsonl", b'{"text": "a"}\n{"text": "b'),
    ("t.jsonl", b"no json at all"),
    ("t.parquet", b"PAR1 no parquet at all"),
    ("t.parquet", b""),
])  # fmt: skip
def test_damaged_file_is_named(tmp_path, corpus_of, name, data):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        corpus_of(path)


def test_settings_of_the_hub_are_refused_for_files(tmp_path, corpus_of):
    path = write_text(tmp_path / "a.txt", "text")
    for field, value in (("name", "x"), ("split", "test"), ("revision", "main")):
        with pytest.raises(ValueError, match=rf"data\.{field} is '{value}'.*is not a data set on the hub"):
            corpus_of(path, **{field: value})
    with pytest.raises(ValueError, match=r"data\.val_split is 'test'.*val_source"):
        corpus_of(path, val_split="test")


@pytest.mark.parametrize("compression", ["gz", "zst"])
def test_compressed_parquet_is_of_no_known_type(tmp_path, corpus_of, compression):
    """It was called a known type, and one such file in a folder stopped the run."""
    write_text(tmp_path / "a.txt", "some words")
    path = write_text(tmp_path / f"b.parquet.{compression}", "no table")
    assert corpus_of(tmp_path).facts["skipped"] == {"files of other types": 1}
    with pytest.raises(
        ValueError, match=r"unknown type: known are .*\.tsv, each also as \.gz or \.zst, and \.parquet; a link"
    ):
        corpus_of(path)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix", ["json", "jsonl", "jsonl.gz", "parquet"])
def test_the_column_that_was_guessed_is_shown(tmp_path, corpus_of, caplog, suffix, streaming):
    """Only that of .csv files was: a column of names was trained on without a word."""
    long = "many words \u00e9 " * 20
    for name in "ab":
        write_table(
            tmp_path / f"{name}.{suffix}", [{"n": 1, "body": None}, {"n": 2, "body": long}, {"n": 3, "body": "more"}]
        )
    shown = f"{tmp_path}/a.{suffix}: the text is column 'body', the first text begins {long[:60]!r}\n"
    for _ in range(2):  # also where the tokens are in the cache
        caplog.clear()
        corpus_of(tmp_path, streaming=streaming)
        assert (caplog.text.count(shown), caplog.text.count("the text is column")) == (1, 1)
    caplog.clear()
    list(training_texts(DataConfig(source=str(tmp_path), streaming=streaming)))
    assert caplog.text.count(shown) == 1
    caplog.clear()
    corpus_of(tmp_path, streaming=streaming, text_column="body")
    assert "the text is column" not in caplog.text


@pytest.mark.parametrize("streaming", [False, True])
def test_guessed_columns_of_other_names_are_refused(tmp_path, corpus_of, streaming):
    """One file's titles and another one's texts were trained on."""
    write_table(tmp_path / "a.jsonl", [{"body": "some words"}] * 9)
    write_table(tmp_path / "b.parquet", [{"title": "other words"}] * 9)
    match = r"set data\.text_column, as the only column of strings is 'body' in .*a\.jsonl, but 'title' in .*b\.parquet"
    with pytest.raises(ValueError, match=match):
        corpus_of(tmp_path, streaming=streaming)
    with pytest.raises(ValueError, match=match):
        list(training_texts(DataConfig(source=str(tmp_path), streaming=streaming)))


def test_the_guessed_column_of_a_set_that_datasets_reads_is_shown(tmp_path, corpus_of, caplog):
    datasets.Dataset.from_dict({"n": [1, 2], "body": ["some words", "more"]}).save_to_disk(tmp_path / "set")
    corpus_of(tmp_path / "set")
    assert "set, split train: the text is column 'body', the first text begins 'some words'\n" in caplog.text
