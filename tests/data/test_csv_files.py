"""Files of comma-separated values: the right column, whole texts, no row lost in silence; else an error with the line."""

import random
import re

import pytest

from bdh.data import DataConfig, training_texts
from bdh.data.reading import CHUNK_BYTES
from bdh.data.sources import training_source
from tests.data.conftest import documents_of, write_text

TEXTS = ["first words", "second, with a comma", "third; fourth", 'so "he" said', "two\nlines\r\n\r\nof it", "a\tb|c"]


def texts_of(path, **settings):
    """The texts of a file, read in both ways."""
    config = DataConfig(source=str(path), **settings)
    return [part.utf8.decode() for part in training_source(config).open()]


def error_of(path, corpus_of, **settings):
    """The error that both ways of preparing raise."""
    found = []
    for streaming in (False, True):
        with pytest.raises(ValueError, match=re.escape(str(path))) as raised:
            corpus_of(path, streaming=streaming, **settings)
        found.append(str(raised.value))
    assert found[0] == found[1]
    return found[0]


def table(delimiter, rows, line_end="\n"):
    def quoted(field):
        return '"' + field.replace('"', '""') + '"' if set(field) & {delimiter, '"', "\n", "\r"} else field

    return "".join(delimiter.join(map(quoted, row)) + line_end for row in rows)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("text_column", [None, "text"])
def test_a_trailing_comma_in_all_rows_does_not_shift_the_columns(tmp_path, corpus_of, text_column, streaming):
    """The first column was taken for an index, and the labels trained on."""
    path = write_text(tmp_path / "t.csv", "id,text,label\n1,some words,0,\n2,other words,1,\n3,last words,0,\n")
    settings = {"text_column": text_column, "streaming": streaming}
    assert texts_of(path, **settings) == ["some words", "other words", "last words"]
    corpus = corpus_of(path, special_tokens=False, **settings)
    held_out = bytes(corpus.validation_tokens()).decode()
    assert held_out == "last words"


def test_a_trailing_comma_may_also_be_in_the_header(tmp_path, corpus_of):
    path = write_text(tmp_path / "t.csv", "id,text,\n1,some words,\n2,other words,\n")
    assert texts_of(path) == texts_of(path, text_column="text") == ["some words", "other words"]


@pytest.mark.parametrize(
    "text", ["id,text\n1,a b,\n2,c d\n3,e f,\n", "id,text\n1,a b\n2,c d,\n", "id,text,\n1,a b,\n2,c d\n"]
)
def test_a_trailing_comma_in_some_rows_is_refused(tmp_path, corpus_of, text):
    """Whether it is the end of the text or of the row cannot be told."""
    path = write_text(tmp_path / "t.csv", text)
    assert "line 3: the row has" in error_of(path, corpus_of)


def test_an_empty_last_column_leaves_no_row_out(tmp_path, corpus_of):
    """Each row was left out as one without text: `words` was the index."""
    path = write_text(tmp_path / "t.csv", "text,label\nsome words,\nother words,\n")
    assert documents_of(corpus_of(path)) == ["some words", "other words"]
    path = write_text(tmp_path / "u.csv", "id,text\n1,some words,\n2,other words,\n")
    assert documents_of(corpus_of(path)) == ["some words", "other words"]


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_without_text_are_counted_and_reported(tmp_path, corpus_of, caplog, streaming):
    path = write_text(tmp_path / "t.csv", 'id,text\n1,some words\n2,\n3,""\n\n4,other words\n')
    assert corpus_of(path, streaming=streaming).facts["skipped"] == {"rows without text": 2}
    assert "left out rows without text (2)" in caplog.text
    assert texts_of(path) == ["some words", "other words"]


@pytest.mark.parametrize(("suffix", "delimiter"), [
    *((suffix, delimiter) for suffix in (".csv", ".csv.gz") for delimiter in ",;\t|"),
    (".tsv", "\t"),
    (".tsv.zst", "\t"),
])  # fmt: skip
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_the_delimiter_is_found(tmp_path, corpus_of, delimiter, suffix, line_end):
    """Such a table was one column, which was trained on: texts, numbers and delimiters."""
    rows = [["id", "text", "score"], *([str(i), text, "5"] for i, text in enumerate(TEXTS))]
    path = write_text(tmp_path / f"t{suffix}", table(delimiter, rows, line_end))
    assert texts_of(path) == texts_of(path, text_column="text") == TEXTS
    corpus_of(path)


@pytest.mark.parametrize("seed", range(20))
def test_random_tables_come_back_as_they_were_written(tmp_path, seed):
    chosen = random.Random(seed)
    delimiter = chosen.choice(",;\t|")
    pieces = ["word", "two words", ",", ";", "|", "\t", '"', "'", "\n", "\r\n", "é", " ", "1,5", ""]
    texts = ["".join(chosen.choices(pieces, k=chosen.randrange(30))) for _ in range(chosen.randrange(1, 300))]
    names = [f"c{i}" for i in range(chosen.randrange(1, 5))]
    names.insert(chosen.randrange(len(names) + 1), "text")
    rows = [[text if name == "text" else str(chosen.random()) for name in names] for text in texts]
    path = write_text(tmp_path / "t.csv", table(delimiter, [names, *rows]))
    # Between tabs, a row over lines that each have as many tabs as a row may be as many rows.
    settings = {"csv_quoting": True} if delimiter == "\t" else {}
    assert texts_of(path, text_column="text", **settings) == [text for text in texts if text]


def test_a_tsv_file_is_never_split_at_commas(tmp_path):
    path = write_text(tmp_path / "t.tsv", "text\nhello, world\nfoo, bar\n")
    assert texts_of(path) == ["hello, world", "foo, bar"]


def test_a_delimiter_that_cannot_be_found_is_asked_for(tmp_path, corpus_of):
    path = write_text(tmp_path / "t.csv", "a,b;c\nfoo,bar;baz\nx y,z;w v\n")
    assert "set data.csv_delimiter, as the fields may be separated by ',' or ';'" in error_of(path, corpus_of)
    assert texts_of(path, csv_delimiter=";", text_column="c") == ["baz", "w v"]
    assert texts_of(path, text_column="b;c") == ["bar;baz", "z;w v"]


@pytest.mark.parametrize(("given", "delimiter"), [(":", ":"), ("tab", "\t"), ("\t", "\t")])
def test_a_delimiter_may_be_stated(tmp_path, given, delimiter):
    path = write_text(tmp_path / "t.csv", table(delimiter, [["id", "text"], ["1", "a, b; c"], ["2", "x:y"]]))
    assert texts_of(path, csv_delimiter=given) == ["a, b; c", "x:y"]


@pytest.mark.parametrize(("text", "line", "number"), [
    ("id,text\n1,Hello, world\n2,fine\n", 2, "3 fields"),
    ("text\nno comma\nHello, world\n", 3, "2 fields"),
    ('id,text\n1,"two\nlines, quoted"\n\n3,one, more\n', 5, "3 fields"),
    ("id,text,label\n1,one\n", 2, "2 fields"),
    ("id,text\n1,fine\nof it\n", 3, "1 field"),
])  # fmt: skip
def test_another_number_of_fields_is_refused_with_file_and_line(tmp_path, corpus_of, text, line, number):
    """The text was cut off at the comma, or moved into another column."""
    path = write_text(tmp_path / "t.csv", text)
    message = error_of(path, corpus_of, text_column="text")
    assert f"{path}, line {line}: the row has {number}, but" in message
    assert ("A field that holds ',' must be in quotes" in message) == (", " in text)
    assert ("A field that holds a line end must be in quotes" in message) == (", " not in text)
    assert ("where lines are texts as they are, set data.csv_delimiter=tab" in message) == text.startswith("text")
    assert "data.csv_bad_rows=skip leaves such rows out" in message


def test_a_column_of_texts_with_commas_is_read_with_the_setting_that_the_error_names(tmp_path):
    path = write_text(tmp_path / "t.csv", "text\nno comma\nHello, world\n")
    assert texts_of(path, csv_delimiter="tab") == ["no comma", "Hello, world"]


def test_blank_lines_and_the_end_mark_of_dos_are_no_rows(tmp_path):
    """They were rows with too few fields, of spaces or 0x1A."""
    path = write_text(tmp_path / "t.csv", "id,text\r\n1,one two\r\n   \r\n \t \r\n2,three\r\n\x1a")
    assert texts_of(path) == ["one two", "three"]
    path = write_text(tmp_path / "u.csv", 'text\n"one\n\n   \ntwo"\n   \n\x1a\nthree\x1a')
    assert texts_of(path) == ["one\n\n   \ntwo", "\x1a", "three"]


@pytest.mark.parametrize("text", ["", "\n\n", "   \n", "id,text\n", "id,text\n1,\n2,\n", "id,text\n\n", "text\n"])
@pytest.mark.parametrize("text_column", [None, "text"])
def test_a_table_without_text_is_said_to_have_none(tmp_path, corpus_of, text, text_column):
    path = write_text(tmp_path / "t.csv", text)
    assert "holds no text: left out" in error_of(path, corpus_of, text_column=text_column)


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_with_another_number_of_fields_may_be_left_out_and_are_counted(tmp_path, corpus_of, caplog, streaming):
    path = write_text(tmp_path / "t.csv", "id,text\n1,one two\n2,three, four\n3\n4,five\n")
    settings = {"csv_bad_rows": "skip", "streaming": streaming}
    assert texts_of(path, **settings) == ["one two", "five"]
    kind = "rows with another number of fields than the header"
    assert corpus_of(path, **settings).facts["skipped"] == {kind: 2}
    assert f"left out {kind} (2)" in caplog.text


def test_what_a_stream_leaves_out_is_reported_after_its_first_pass(tmp_path, corpus_of, caplog):
    """Only what was left out before the first step was; and a resumed run counts on."""
    rows = [f"{i},text {i}" + ", more" * (i % 10 == 7) for i in range(100)]
    path = write_text(tmp_path / "t.csv", "id,text\n" + "\n".join(rows) + "\n")
    settings = {
        "csv_bad_rows": "skip",
        "streaming": True,
        "block_size": 8,
        "val_tokens": 10,
        "shuffle_buffer_documents": 5,
    }
    corpus = corpus_of(path, **settings)
    loader = corpus.train_loader(2, seed=1)
    while loader.num_taken < 50:
        loader.next()
    again = corpus.train_loader(2, seed=1)
    again.load_state_dict(loader.state_dict())
    assert "first pass" not in caplog.text
    for _ in range(200):
        again.next()
    assert again.epoch > 1
    assert caplog.text.count("the first pass through the training text: left out rows with another number") == 1
    assert "than the header (10)" in caplog.text


@pytest.mark.parametrize(("text", "told"), [
    ("Hello there\nsecond line\nthird\n", "its first line, 'Hello there', is a header or a row"),
    ("apple\nbanana\ncherry\n", "its first line, 'apple', is a header or a row"),
    ("Hello\nthe second line\nand the third\n", "its first line, 'Hello', is a header or a row"),
    ("Hello,\nthe second line,\nand the third,\n", "its first line, 'Hello,', is a header or a row"),
    ("Hello\n", "its first line, 'Hello', is a header or a row"),
    ("Hello there,1\nsecond line,2\n", "its first line, 'Hello there,1', is a header or a row"),
    ("good,1\nsecond line,2\n", "its first line, 'good,1', is a header or a row"),
    ("one row only\n", "its first line, 'one row only', is a header or a row"),
    ("some words,and more\nother words,and others\n", "its first line, 'some words,and more', is a row"),
])  # fmt: skip
def test_a_first_line_that_may_be_a_row_is_not_lost_in_silence(tmp_path, corpus_of, text, told):
    path = write_text(tmp_path / "t.csv", text)
    message = error_of(path, corpus_of)
    assert str(path) in message
    assert told in message
    assert "data.csv_header=false, which calls the columns 1, 2, ..." in message


def test_the_name_of_a_single_column_may_be_a_usual_one_or_stated(tmp_path):
    path = write_text(tmp_path / "t.csv", "Sentence\nthe second line\nand the third\n")
    assert texts_of(path) == ["the second line", "and the third"]
    path = write_text(tmp_path / "u.csv", "review\nthe second line\nand the third\n")
    assert (
        texts_of(path, text_column="review") == texts_of(path, csv_header=True) == ["the second line", "and the third"]
    )
    assert texts_of(path, csv_header=False) == ["review", "the second line", "and the third"]


def test_a_file_without_the_wanted_name_in_its_first_line_is_refused(tmp_path, corpus_of):
    path = write_text(tmp_path / "t.csv", "1,Hello there\n2,second line\n")
    message = error_of(path, corpus_of, text_column="text")
    assert "data.text_column is 'text', but" in message
    assert "If its first line, '1,Hello there', is a row, set data.csv_header=false" in message


def test_a_file_without_a_header_is_read_from_its_first_row(tmp_path, corpus_of):
    path = write_text(tmp_path / "t.csv", "1,Hello there\n2,second line\n")
    settings = {"csv_header": False}
    assert texts_of(path, **settings) == texts_of(path, text_column="2", **settings) == ["Hello there", "second line"]
    assert documents_of(corpus_of(path, **settings)) == ["Hello there", "second line"]
    assert "has no such column: it has 1, 2" in error_of(path, corpus_of, text_column="text", **settings)


def test_a_header_may_be_stated(tmp_path):
    path = write_text(tmp_path / "t.csv", "My review,n\nvery good,1\n")
    assert texts_of(path, csv_header=True) == texts_of(path, text_column="My review") == ["very good"]


def test_an_index_that_pandas_wrote_has_no_name(tmp_path):
    assert texts_of(write_text(tmp_path / "t.csv", ",text\n0,one two\n1,three\n")) == ["one two", "three"]


def test_two_columns_with_the_wanted_name_are_refused(tmp_path, corpus_of):
    path = write_text(tmp_path / "t.csv", "text,text\na b,c d\n")
    assert "2 columns are named 'text': must be only one" in error_of(path, corpus_of, text_column="text")


@pytest.mark.parametrize(("text", "told"), [
    ('id,text\n1,fine\n2,"open\n3,and on\n', "line 3: a quote is opened in the row that begins here, and never closed"),
    ('id,text\n1,fine\n2,"he said "hi" there"\n', "line 3: text follows the closing quote"),
    ('id,text\n1,"open\n2,"closed"\n', "line 3: text follows the closing quote"),
])  # fmt: skip
def test_quotes_that_are_not_closed_or_doubled_are_refused(tmp_path, corpus_of, text, told):
    """The rest of the file was one text, or a text lost its quotes."""
    path = write_text(tmp_path / "t.csv", text)
    message = error_of(path, corpus_of, csv_bad_rows="skip")
    assert f"{path}, {told}" in message
    assert "data.csv_quoting=false" in message


def test_quotes_may_be_characters_like_any_other(tmp_path):
    path = write_text(tmp_path / "t.csv", 'id,text\n1,"open\n2,5" disk\n3,"all"\n')
    assert texts_of(path, csv_quoting=False) == ['"open', '5" disk', '"all"']
    rows = "".join(f'{i}\t"Well," said {i}\n{i}\tno quotes\n' for i in range(50))
    path = write_text(tmp_path / "t.tsv", "id\ttext\n" + rows)
    assert texts_of(path)[:2] == ['"Well," said 0', "no quotes"]


def test_one_stray_quote_does_not_turn_quoting_off(tmp_path, corpus_of):
    rows = "".join(f'{i}\t"text {i}"\n' for i in range(50)) + '50\t"he said "hi" there"\n'
    path = write_text(tmp_path / "t.tsv", "id\ttext\n" + rows)
    assert "line 52: text follows the closing quote" in error_of(path, corpus_of)


LONE_QUOTES = '{0}\t"To be, or not to be:\n{1}\tthat is the question"\n{2}\tsaid he\n{3}\tand went\n'
LONE_TEXTS = ['"To be, or not to be:', 'that is the question"', "said he", "and went"]


@pytest.mark.parametrize("name", ["t.tsv", "t.csv"])
@pytest.mark.parametrize("ids", ["1234", "abcd"])
@pytest.mark.parametrize("num_before", [0, 1, 200, 8000])
def test_a_lone_quote_between_tabs_does_not_join_rows(tmp_path, corpus_of, num_before, ids, name):
    """The rows up to the next closing quote were one text."""
    plain = [f"the plain row {i}" for i in range(num_before)]
    rows = "".join(f"{i}\t{text}\n" for i, text in enumerate(plain))
    path = write_text(tmp_path / name, "id\ttext\n" + rows + LONE_QUOTES.format(*ids))
    message = error_of(path, corpus_of, text_column="text", csv_bad_rows="skip")
    assert "it is unclear whether" in message
    assert "data.csv_quoting=true if" in message
    assert "data.csv_quoting=false if" in message
    assert texts_of(path, text_column="text", csv_quoting=False) == [*plain, *LONE_TEXTS]
    joined = f"{LONE_TEXTS[0][1:]}\n{ids[1]}\t{LONE_TEXTS[1][:-1]}"
    assert texts_of(path, text_column="text", csv_quoting=True) == [*plain, joined, *LONE_TEXTS[2:]]


def test_a_lone_quote_in_a_single_column_between_tabs_does_not_join_rows(tmp_path, corpus_of):
    path = write_text(tmp_path / "t.tsv", 'text\n"To be, or not to be:\nthat is the question"\nsaid he\n')
    assert "data.csv_quoting=true" in error_of(path, corpus_of)
    assert texts_of(path, csv_quoting=False)[:2] == LONE_TEXTS[:2]


@pytest.mark.parametrize("delimiter", [",", ";", "|"])
def test_a_lone_quote_between_other_delimiters_does_not_join_rows(tmp_path, corpus_of, delimiter):
    lines = ["id,text", "1,fine", '2,"To be or not to be:', '3,that is the question"', "4,said he"]
    path = write_text(tmp_path / "t.csv", "\n".join(lines).replace(",", delimiter))
    assert f"{path}, line 3: it is unclear whether the 2 lines from" in error_of(path, corpus_of)
    assert texts_of(path, csv_quoting=False)[1] == '"To be or not to be:'
    assert texts_of(path, csv_quoting=True)[1] == f"To be or not to be:\n3{delimiter}that is the question"


def test_texts_over_lines_with_delimiters_are_not_taken_for_rows(tmp_path):
    texts = ["the first\nand more, of it", "a, b\nc, d", "one\ntwo,three", "3\n4, 5"]
    path = write_text(
        tmp_path / "t.csv", table(",", [["id", "text"], *([str(i), text] for i, text in enumerate(texts))])
    )
    assert texts_of(path, text_column="text") == texts
    texts = ["over\nlines", "with a\ttab", "all\n\nof it"]
    path = write_text(
        tmp_path / "t.tsv", table("\t", [["id", "text"], *([str(i), text] for i, text in enumerate(texts))])
    )
    assert texts_of(path, text_column="text") == texts


@pytest.mark.parametrize(("suffix", "delimiter"), [(".csv", ","), (".csv", ";"), (".tsv", "\t")])
def test_quotes_may_be_written_with_a_backslash(tmp_path, suffix, delimiter):
    """As Spark writes them: it was an error, or the field ended there."""
    lines = [
        "id,text",
        r'1,"so \"he, not I\" said"',
        r'2,"C:\new, \\server"',
        r"3,C:\temp",
        r'4,"ends in \\"',
        '5,"a ""b"""',
    ]
    path = write_text(tmp_path / f"t{suffix}", "\n".join(lines).replace(",", delimiter))
    texts = ['so "he, not I" said', r"C:\new, \\server", r"C:\temp", "ends in \\", 'a "b"']
    assert texts_of(path, text_column="text") == [text.replace(",", delimiter) for text in texts]


def test_backslashes_before_quotes_are_read_also_where_rows_do_not_fit(tmp_path, corpus_of):
    path = write_text(tmp_path / "t.csv", 'id,text\n1,"so \\"he\\" said"\n2,bad, row\n')
    assert texts_of(path, csv_bad_rows="skip") == ['so "he" said']
    assert "line 3: the row has 3 fields" in error_of(path, corpus_of)


def test_a_backslash_before_a_line_end_is_refused_where_it_may_be_part_of_neither(tmp_path, corpus_of):
    """MySQL writes one before each line end in a text, Spark does not."""
    path = write_text(tmp_path / "t.csv", 'id,text\n1,"so \\"he\\" said"\n2,"two\\\nlines"\n')
    assert "line 3: a line in quotes ends with a backslash" in error_of(path, corpus_of)
    path = write_text(tmp_path / "u.csv", 'id,text\n1,"so ""he"" said"\n2,"two\\\nlines"\n')
    assert texts_of(path) == ['so "he" said', "two\\\nlines"]


def test_backslashes_before_quotes_are_kept_where_quotes_are_doubled(tmp_path, corpus_of):
    rows = [["id", "text"], ["1", 'so \\"he\\" said'], ["2", "ends, in \\"], ["3", 'C:\\"']]
    path = write_text(tmp_path / "t.csv", table(",", rows))
    assert texts_of(path) == [text for _, text in rows[1:]]
    path = write_text(tmp_path / "u.csv", 'id,text\n1,"one"two\n2,"so \\"he\\" said"\n')
    assert "line 2: text follows the closing quote" in error_of(path, corpus_of)
    path = write_text(tmp_path / "v.csv", "id,text\n" + "1,fine words\n" * 20_000 + '2,"so \\"he\\" said"\n')
    assert 'The row has quotes written as \\"' in error_of(path, corpus_of)


def test_the_first_line_for_excel_says_the_delimiter(tmp_path):
    """It was taken for the header."""
    for line in ("sep=;", "SEP=;", '"sep=;"', "\ufeffsep=;"):
        path = write_text(tmp_path / "t.csv", f"{line}\r\ntext;price\r\nwords, more;1,5\r\nand more, too;2,5\r\n")
        assert texts_of(path, text_column="text") == ["words, more", "and more, too"]
        assert texts_of(path, text_column="1", csv_header=False)[0] == "text"
    path = write_text(tmp_path / "u.csv", "sep=,\r\ntext\r\nsome words\r\n")
    assert texts_of(path) == ["some words"]


def test_after_the_first_line_for_excel_lines_are_counted_from_the_beginning(tmp_path, corpus_of):
    path = write_text(tmp_path / "t.csv", "sep=;\nid;text\n1;fine\n2;one;more\n")
    assert f"{path}, line 4: the row has 3 fields" in error_of(path, corpus_of)


@pytest.mark.parametrize("text_column", [None, "text"])
@pytest.mark.parametrize(("suffix", "delimiter"), [*((".csv", each) for each in ",;|\t"), (".tsv", "\t")])
def test_the_delimiter_is_found_where_the_first_row_is_long(tmp_path, delimiter, suffix, text_column):
    """Without a whole row in the first 128 KiB the file was one column."""
    rows = [["id", "text"], ["1", "a line of words\n" * 20_000], ["2", "some words"]]
    path = write_text(tmp_path / f"t{suffix}", table(delimiter, rows))
    assert "".join(texts_of(path, text_column=text_column)) == rows[1][1] + rows[2][1]


def test_where_the_first_row_never_ends_the_delimiter_is_asked_for(tmp_path, corpus_of):
    path = write_text(tmp_path / "t.csv", 'id;text\n1;"open and on\n' + "more\n" * 30_000)
    assert "If its fields are separated by ';', set data.csv_delimiter" in error_of(path, corpus_of)
    assert "and never closed" in error_of(path, corpus_of, csv_delimiter=";")


def test_spaces_are_kept_but_before_quotes(tmp_path):
    """One quoted field after a space took the leading spaces of all texts."""
    path = write_text(tmp_path / "t.csv", 'id,text,n\n1,  indented, 1\n2, "a, ""b""",2\n3,"  x, y", 3\n4,  ,4\n')
    assert texts_of(path, text_column="text") == ["  indented", 'a, "b"', "  x, y", "  "]
    path = write_text(tmp_path / "u.csv", 'id, text\n1,  x = 1\n2, "two\n, "\n')
    assert texts_of(path) == ["  x = 1", "two\n, "]


@pytest.mark.parametrize("delimiter", [",", ";"])
def test_a_column_of_lines_that_end_in_a_delimiter_keeps_it(tmp_path, corpus_of, delimiter):
    """The commas at the end of verses were lost."""
    lines = ["Tyger Tyger burning bright,", "In the forests of the night,", "What immortal hand or eye,"]
    lines = [line.replace(",", delimiter) for line in lines]
    path = write_text(tmp_path / "t.csv", "\n".join(["text", *lines]) + "\n")
    if delimiter == ",":
        assert "set data.csv_delimiter=tab if it is, or data.csv_delimiter=',' if" in error_of(path, corpus_of)
    assert texts_of(path, csv_delimiter="tab") == lines
    assert texts_of(path, csv_delimiter=delimiter) == [line[:-1] for line in lines]
    path = write_text(tmp_path / "u.csv", 'text\n"one, two",\n"three",\n')
    assert texts_of(path) == ["one, two", "three"]


@pytest.mark.parametrize("delimiter", [",", ";"])
def test_the_first_row_alone_does_not_say_how_long_rows_are(tmp_path, delimiter):
    """With one comma too many there, all others were left out."""
    lines = ["id,text", "1,too long,", "2,some words", "3,other words"]
    path = write_text(tmp_path / "t.csv", "\n".join(lines).replace(",", delimiter))
    assert texts_of(path, csv_bad_rows="skip") == ["some words", "other words"]
    path = write_text(tmp_path / "u.csv", "\n".join(lines[1:]).replace(",", delimiter))
    settings = {"csv_header": False, "csv_bad_rows": "skip"}
    assert texts_of(path, **settings) == texts_of(path, text_column="2", **settings) == ["some words", "other words"]


def test_spaces_after_delimiters_are_no_part_of_quoted_fields(tmp_path):
    """The quotes were part of the text, and commas between them ended it."""
    path = write_text(tmp_path / "t.csv", 'id, text\n1, "a, b"\n2, "c d"\n')
    assert texts_of(path) == texts_of(path, text_column="text") == ["a, b", "c d"]
    path = write_text(tmp_path / "u.csv", "id\ttext\n1\t    indented\n2\tflush\n")
    assert texts_of(path) == ["    indented", "flush"]


def test_long_fields_are_read_whole(tmp_path):
    """The csv module refuses fields above 128 KiB unless told otherwise."""
    long = 'a line, with a "quote"\n' * 60_000
    path = write_text(tmp_path / "t.csv", table(",", [["id", "text"], ["1", long], ["2", "short"]]))
    parts = texts_of(path, text_column="text")
    assert len(parts) > 2
    assert all(len(part) <= CHUNK_BYTES for part in parts)
    assert "".join(parts) == long + "short"


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz"])
def test_reading_continues_after_any_row(tmp_path, suffix):
    rows = [["id", "text"], *([str(i), f"text {i}\nof é {'long ' * (i * 9000)}"] for i in range(8))]
    write_text(tmp_path / f"t{suffix}", "\ufeff" + table(";", rows, "\r\n"))
    source = training_source(DataConfig(source=str(tmp_path)))
    expected = list(source.open())
    reader = source.open()
    parts = iter(reader)
    for position in range(len(expected) + 1):
        assert list(source.open(state=reader.state())) == expected[position:]
        next(parts, None)


def test_a_row_that_is_refused_is_the_next_one_when_reading_continues(tmp_path):
    """A mended file is read on without a loss; and its lines are counted from the beginning."""
    path = write_text(tmp_path / "t.csv", 'id,text\n1,"one\ntwo"\n2,three\n3,bad, row\n')
    source = training_source(DataConfig(source=str(path)))
    reader = source.open()
    parts = iter(reader)
    assert [next(parts).utf8, next(parts).utf8] == [b"one\ntwo", b"three"]
    for _ in range(3):
        with pytest.raises(ValueError, match=r"t\.csv, line 5: the row has 3 fields"):
            next(parts)
        state = reader.state()
        reader = source.open(state=state)
        parts = iter(reader)
    write_text(path, 'id,text\n1,"one\ntwo"\n2,three\n3,"good, row"\n')
    assert [part.utf8 for part in source.open(state=state)] == [b"good, row"]


@pytest.mark.parametrize("streaming", [False, True])
def test_the_column_the_rows_and_the_beginning_are_shown(tmp_path, corpus_of, caplog, streaming):
    long = "many words " * 20
    path = write_text(tmp_path / "t.csv", table(";", [["id", "text"], ["1", ""], ["2", long], ["3", "more"]]))
    shown = (
        f"{path}: the text is column 'text' (2 of 2, separated by ';'); 3 rows, the first text begins {long[:60]!r}\n"
    )
    for _ in range(2):  # also where the tokens are in the cache
        caplog.clear()
        corpus_of(path, streaming=streaming)
        assert caplog.text.count(shown) == 1
    caplog.clear()
    list(training_texts(DataConfig(source=str(path), streaming=streaming)))
    assert caplog.text.count(shown) == 1


def test_of_many_tables_the_columns_are_shown(tmp_path, corpus_of, caplog):
    for number in range(9):
        write_text(tmp_path / f"{number}.csv", f"id,{'text' if number else 'body'}\n1,some words\n")
    write_text(tmp_path / "9.csv", "id,content\n1,some words\n")
    corpus_of(tmp_path)
    assert caplog.text.count("1 row, the first text begins 'some words'") == 3
    assert "7 further tables: the text is column 'text' in 6, 'content' in 1" in caplog.text


def test_other_settings_are_other_tokens(tmp_path, corpus_of):
    path = write_text(tmp_path / "t.csv", "a|b,text\nc|d,x y\nfoo|e,z\n")
    comma = corpus_of(path, csv_delimiter=",", text_column="text")
    pipe = corpus_of(path, csv_delimiter="|", text_column="a")
    assert (documents_of(comma), documents_of(pipe)) == (["x y", "z"], ["c", "foo"])
    other = corpus_of(path, csv_delimiter="|", csv_header=False, text_column="1")
    assert documents_of(other) == ["a", "c", "foo"]
    assert documents_of(corpus_of(path, csv_delimiter="|", text_column="a")) == ["c", "foo"]


def test_a_mix_states_it_for_each_source(tmp_path):
    for name, delimiter in (("a.csv", ":"), ("b.csv", "/")):
        write_text(tmp_path / name, table(delimiter, [["1", f"text of {name}"], ["2", "more"]]))
    mix = [
        {"source": str(tmp_path / "a.csv"), "csv_delimiter": ":", "csv_header": False},
        {"source": str(tmp_path / "b.csv"), "csv_delimiter": "/", "csv_header": False, "text_column": "2"},
    ]
    assert list(training_texts(DataConfig(mix=mix))) == ["text of a.csv", "text of b.csv"]


def test_an_unknown_row_format_of_the_hub_is_not_taken_silently(tmp_path):
    (tmp_path / "data").mkdir()
    write_text(tmp_path / "data" / "train-00000-of-00001.jsonl", '{"text": "a"}\n')
    with pytest.raises(ValueError, match=re.escape("data.csv_delimiter is ';', but")):
        training_source(DataConfig(source=str(tmp_path), csv_delimiter=";"))
