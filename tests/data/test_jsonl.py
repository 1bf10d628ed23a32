"""JSON rows: only the wanted field counts, whatever the file's size, and a fault has its file and its line."""

import gzip
import json
import re
from itertools import islice

import pytest
import zstandard

from bdh.data.json_files import json_rows
from tests.data.conftest import documents_of, write_table, write_text

LARGE = 11_000_000  # bytes; readers of tables look at 10 MB at a time
FILLER = "words " * 100


def rows_beyond(num_bytes, *others):
    """Rows of filler, so many that the others stand after ``num_bytes``."""
    return [{"text": f"{i} {FILLER}", "meta": None} for i in range(num_bytes // 640)] + list(others)


def written(path, lines):
    return write_text(path, "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))


def a_pass(corpus):
    """The bytes that a pass through a streaming corpus trains on, and the first of the next pass."""
    loader, found = corpus.train_loader(4_000, seed=1), b""
    while loader.epoch < 1:
        found += bytes(loader.next().tokens[:, 1:].flatten().clamp(max=255).tolist())
    return found


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("suffix", "num_bytes"),
    [*((suffix, 0) for suffix in (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json")), (".jsonl", LARGE), (".json", LARGE)],
)
def test_other_columns_change_their_types_come_and_go(tmp_path, corpus_of, suffix, num_bytes, streaming):
    """A file of more than 10 MB could not be read, and a streaming run ended in the middle of the training."""
    others = [
        {"text": "one", "meta": "a string"},
        {"text": "two", "meta": {"nested": [1]}, "new": 3},
        {"text": "three", "meta": 4.5, "new": [{"a": None}]},
        {"new": "four", "text": "four"},
        {"text": "five", "new": {"text": 1}, "long": 10**40},
    ]
    rows = rows_beyond(num_bytes, *others)
    path = (write_table if suffix == ".json" else written)(tmp_path / f"t{suffix}", rows)
    if streaming:
        found = a_pass(corpus_of(path, streaming=True, text_column="text", block_size=4, val_tokens=1))
        assert all(text in found for text in (b"two", b"four"))
    else:
        corpus = corpus_of(path, text_column="text")
        assert documents_of(corpus) == [row["text"] for row in rows]


BAD_ROWS = [
    ({"text": 5}, r"column 'text' holds 5 \(int\): it must be text"),
    ({"text": ["a"]}, r"column 'text' holds \['a'\] \(list\)"),
    ({"text": {"a": 1}}, r"column 'text' holds {'a': 1} \(dict\)"),
    ({"text": False}, r"column 'text' holds False \(bool\)"),
    ('{"text": "a', "is not JSON: Unterminated string"),
    ("[1, 2]", r"is \[1, 2\]: must be an object"),
    ({"text": "\ud800"}, "half of a surrogate pair"),
]


@pytest.mark.parametrize(("row", "fault", "num_bytes", "streaming"), [
    *((*bad, 0, streaming) for bad in BAD_ROWS for streaming in (False, True)),
    (*BAD_ROWS[0], LARGE, False),
    (*BAD_ROWS[4], LARGE, False),
])  # fmt: skip
def test_a_fault_has_the_same_line_in_a_small_and_a_large_file(tmp_path, corpus_of, row, fault, num_bytes, streaming):
    """A large file was given as a whole, or the row was counted where the reader had left off."""
    rows = rows_beyond(num_bytes, {"text": "one"}, "", {"text": None}, row, {"text": "two"})
    path = written(tmp_path / "t.jsonl", rows)
    with pytest.raises(ValueError, match=fault) as caught:
        a_pass(corpus_of(path, streaming=streaming, text_column="text", val_tokens=1, block_size=8))
    assert str(caught.value).startswith(f"{path}, line {len(rows) - 1}")


@pytest.mark.parametrize("compress", [bytes, gzip.compress, zstandard.compress])
def test_bytes_that_are_not_utf8_have_their_line(tmp_path, corpus_of, compress):
    before = b'{"text": "one"}\n\n{"text": "'
    suffix = {bytes: "", gzip.compress: ".gz", zstandard.compress: ".zst"}[compress]
    path = tmp_path / f"t.jsonl{suffix}"
    path.write_bytes(compress(before + b'a\xff"}\n'))
    with pytest.raises(
        ValueError, match=rf"{re.escape(str(path))} is not UTF-8: byte {len(before) + 1} is 0xFF, in line 3"
    ):
        corpus_of(path)


@pytest.mark.parametrize("num_bytes", [0, LARGE])
@pytest.mark.parametrize("streaming", [False, True])
def test_rows_without_text_are_counted(tmp_path, corpus_of, caplog, num_bytes, streaming):
    lacking = [{"text": None}, {"text": ""}, {"id": 3}, {}]
    path = written(tmp_path / "t.jsonl", [*lacking, *rows_beyond(num_bytes), {"text": "one"}, {"text": "two"}])
    corpus = corpus_of(path, text_column="text", streaming=streaming)
    assert corpus.facts["skipped"] == {"rows without text": 4}
    assert "left out rows without text (4)" in caplog.text


def test_a_column_that_first_comes_late_is_found(tmp_path, corpus_of):
    """It was looked for in the first rows alone; without the setting there was no column of strings."""
    path = written(tmp_path / "t.jsonl", [{"n": i} for i in range(500)] + [{"text": "one"}, {"text": "two"}])
    for column in (None, "text"):
        corpus = corpus_of(path, text_column=column)
        assert documents_of(corpus) == ["one", "two"]
        assert corpus.facts["skipped"] == {"rows without text": 500}


def test_a_column_of_nothing_gives_no_text_and_is_no_fault(tmp_path, corpus_of):
    written(tmp_path / "a.jsonl", [{"id": 1, "text": None}] * 3)
    written(tmp_path / "b.jsonl", [{"id": 1, "text": "one"}, {"id": 2, "text": "two"}])
    corpus = corpus_of(tmp_path)
    assert documents_of(corpus) == ["one", "two"]
    assert corpus.facts["skipped"] == {"rows without text": 3}


@pytest.mark.parametrize(("name", "text"), [
    ("t.json", '[\n  {"text": "one"},\n  {"text":\n"two", "n": [1]}\n]\n'),
    ("t.json", '[{"text": "one"}, {"text": "two"}]'),
    ("t.json", '["one", "two"]'),
    ("t.jsonl", '[{"text": "one"},\n{"text": "two"}]'),
    ("t.json", '{"text": "one"}\n{"text": "two"}\n'),
    ("t.json", '{\n"text": "one"\n}\n{\n"text": "two"\n}\n'),
    ("t.jsonl", '{\n"text": "one"\n}\n{\n"text": "two"\n}\n'),
    ("t.jsonl", '\ufeff{"text": "one"}\r\n\r\n{"text": "two"}'),
    ("t.json", '\ufeff [{"text": "one"}, {"text": "two"}]'),
])  # fmt: skip
def test_forms_of_json(tmp_path, corpus_of, name, text):
    assert documents_of(corpus_of(write_text(tmp_path / name, text))) == ["one", "two"]


@pytest.mark.parametrize(("text", "fault"), [
    ('[\n{"text": "one"},\n{"text": 2}]', "row 2, line 3: column 'text' holds 2"),
    ('[\n{"text": "one"},\n{"text": x}]', "line 3, column 10 is not JSON: Expecting value"),
    ('[\n{"text": "one"}\n{"text": "two"}]', "line 3, column 1 is not JSON: Expecting ',' or ']'"),
    ('[\n{"text": "one"}\n', "line 3, column 1 is not JSON: Expecting ',' or ']'"),
    ('[\n{"text": "one"}\n]\n]', "line 4, column 1 is not JSON: Extra data"),
    ('[\n{"text": "one"},\n5]', "row 2, line 3 is 5: must be an object"),
])  # fmt: skip
def test_a_fault_in_an_array_has_its_line(tmp_path, corpus_of, text, fault):
    path = write_text(tmp_path / "t.json", text)
    with pytest.raises(ValueError, match=fault) as caught:
        corpus_of(path)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize("value", ["9" * 5000, "[" * 900 + "]" * 900, '"\\ud800"', "NaN", '{"a": 1, "a": "b"}'])
def test_other_fields_may_hold_what_python_or_arrow_cannot(tmp_path, corpus_of, value):
    path = written(tmp_path / "t.jsonl", [{"text": "one"}, f'{{"text": "two", "n": {value}}}'])
    assert documents_of(corpus_of(path, text_column="text")) == ["one", "two"]


def test_nesting_without_end_is_a_fault_with_its_line(tmp_path, corpus_of):
    path = written(tmp_path / "t.jsonl", [{"text": "one"}, f'{{"text": "two", "n": {"[" * 100_000}}}'])
    with pytest.raises(ValueError, match=r"t\.jsonl, line 2 is not JSON.*nested too deeply"):
        corpus_of(path)


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("form", ["lines", "array"])
def test_reading_continues_after_any_row(tmp_path, form, suffix):
    rows = [{"text": f"row {i}" * i, "é": "ü"} for i in range(20)]
    name = {"lines": "t.jsonl", "array": "t.json"}[form] + suffix
    path = write_table(tmp_path / name, rows)
    for number, row in enumerate(list(json_rows(path, "strict"))):
        assert [after.value for after in json_rows(path, "strict", row.after)] == rows[number + 1 :]


def test_a_long_line_is_read_in_time_that_grows_with_it(tmp_path):
    """Each chunk was appended to all before it."""
    path = written(tmp_path / "t.jsonl", [{"text": "x" * 20_000_000}, {"text": "y"}])
    texts = [len(row.value["text"]) for row in islice(json_rows(path, "strict"), 2)]
    assert texts == [20_000_000, 1]


@pytest.mark.parametrize("form", ["lines", "array", "over lines"])
@pytest.mark.parametrize("row", [
    '{"text": "first", "text": "second"}',
    '{"text": null, "n": {"text": 1}, "text" : "second"}',
    '{"text": "same", "text": "same"}',
])  # fmt: skip
def test_a_field_that_is_given_twice_is_a_fault(tmp_path, corpus_of, form, row):
    """The second one was trained on without a word."""
    before, after = '{"text": "one \\"text\\": 1"}', '{"text": "two"}'
    name, text, line = {
        "lines": ("t.jsonl", f"{before}\n{row}\n{after}\n", "line 2"),
        "array": ("t.json", f"[{before},\n\n{row}, {after}]", "row 2, line 3"),
        "over lines": ("t.json", f"{{\n{before[1:]}\n{row}\n", "row 2, line 3"),
    }[form]
    path = write_text(tmp_path / name, text)
    for column in (None, "text"):
        with pytest.raises(ValueError, match=r"column 'text' is given twice: give it once") as caught:
            corpus_of(path, text_column=column)
        assert str(caught.value).startswith(f"{path}, {line}: ")


@pytest.mark.parametrize("column", ["text", 'a "b" \\ ü'])
def test_a_field_is_given_once_where_its_name_stands_elsewhere_too(tmp_path, corpus_of, column):
    rows = [
        {column: "one", "type": column, "other": column},
        {column: "two", "meta": {column: "three"}, "list": [{column: 1}, {column: 2}]},
        {column: f'"{column}": 1, "{column}": 2'},
        {"meta": {column: 1}, "other": column},
    ]
    for name in ("t.jsonl", "t.json"):
        path = write_text(tmp_path / name, "\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
        assert documents_of(corpus_of(path, text_column=column)) == [row[column] for row in rows[:3]]


def test_a_field_whose_name_needs_escapes_is_given_once(tmp_path, corpus_of):
    path = write_text(tmp_path / "t.jsonl", r'{"a\"\u00fc": "one", "a\"ü": "two"}')
    with pytest.raises(ValueError, match=r"t.jsonl, line 1: column 'a\"ü' is given twice"):
        corpus_of(path, text_column='a"ü')


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("first", "later", "field"), [
    ({"title": "a title", "text": None}, {"title": "b", "text": "words"}, "text"),
    ({"title": "a title"}, {"title": "b", "text": "words"}, "text"),
    ({"title": "a title", "id": 1}, {"title": "b", "id": "b1"}, "id"),
])  # fmt: skip
def test_a_guessed_field_is_no_guess_when_another_holds_text_later(tmp_path, corpus_of, first, later, field, streaming):
    """A file whose first 100 rows have no text was trained on its titles, without a word."""
    path = written(tmp_path / "t.jsonl", [first] * 120 + [later] * 2)
    message = (
        f"{path}, line 121: set data.text_column, as column '{field}' holds a string too: 'title' was guessed from the "
        "first rows, where it did not"
    )
    settings = {"streaming": True, "val_tokens": 1, "block_size": 8} if streaming else {}
    with pytest.raises(ValueError, match=r"\S") as caught:
        a_pass(corpus_of(path, **settings))
    assert str(caught.value).startswith(message)
    chosen = a_pass(corpus_of(path, text_column="title", **settings)) if streaming else None
    assert chosen is None or b"a title" in chosen
    if not streaming:
        assert documents_of(corpus_of(path, text_column="title")) == ["a title"] * 120 + ["b"] * 2


def test_fields_that_held_strings_beside_others_when_it_was_guessed_stay_known(tmp_path, corpus_of):
    rows = [{"text": "one", "id": "a"}, {"text": "two", "id": 1}] * 60 + [{"text": "three", "id": "b"}]
    path = written(tmp_path / "t.jsonl", rows)
    assert documents_of(corpus_of(path)) == [row["text"] for row in rows]
