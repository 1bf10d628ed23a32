"""What PyYAML drops or misreads without a word is a fault, with the lines where it is."""

import re
from pathlib import Path
from unittest.mock import ANY

import pytest
import yaml

from bdh.text_files import WRONG, YamlDocument, dump_yaml, parse_yaml, read_yaml
from bdh.validation import Faults

ROOT = Path(__file__).parent.parent


def read(text: str):
    faults = Faults()
    document = parse_yaml(text, faults, origin="a.yaml")
    return document, faults.found


def test_every_name_that_stands_twice_is_reported_with_all_its_lines():
    """The first section of two was dropped, with all its settings."""
    text = "train:\n  steps: 1\nmodel: {}\ntrain:\n  steps: 2\n  rate: 1\n  rate: 2\n  rate: 3\n"
    assert read(text)[1] == [
        "train is given twice: give it once (a.yaml, lines 1 and 4)",
        "train.steps is given twice: give it once (a.yaml, lines 2 and 5)",
        "train.rate is given 3 times: give it once (a.yaml, lines 6, 7 and 8)",
    ]


@pytest.mark.parametrize(
    ("text", "name", "lines"),
    [
        ("a: 1\n'a': 2\n", "a", "lines 1 and 2"),
        ("a: {b: 1, b: 2}\n", "a.b", "line 1"),
        ("a:\n- c\n- {b: 1,\n   b: 2}\n", "a[1].b", "lines 3 and 4"),
        ("a:\n  1: x\n  0x1: y\n", "a.0x1", "lines 2 and 3"),
        ("a:\n  <<: {b: 1}\n  <<: {c: 1}\n", "a.<<", "lines 2 and 3"),
    ],
)
def test_a_name_stands_twice_at_any_depth_and_however_it_is_written(text, name, lines):
    assert read(text)[1] == [f"{name} is given twice: give it once (a.yaml, {lines})"]


@pytest.mark.parametrize(
    ("text", "name", "line"),
    [
        ("a: 1\nb:\nc: 2\n", "b", 2),
        ("a:\n  b:\n  # c: 1\n", "a.b", 2),
        ("a: {b}\n", "a.b", 1),
        ("a:\n- 1\n-\n", "a[1]", 3),
        ("a:\n- {b: 1}\n- {b: , c: 2}\n", "a[1].b", 3),
        ("a: &x\nb: *x\n", "a", 1),
        ("? a\n", "a", 1),
    ],
)
def test_a_name_without_a_value_is_not_null(text, name, line):
    document, found = read(text)
    assert found == [
        f"{name} has no value: give it one, or null where that is allowed, or leave it out (a.yaml, line {line})"
    ]
    assert "None" not in str(document.tree)


@pytest.mark.parametrize("text", ["a: null\n", "a: ~\n", "a: ''\n", "a: !!str\n", "a: []\n", "a: {}\n", "a: |\n"])
def test_what_is_written_as_empty_is_a_value(text):
    document, found = read(text)
    assert (document.tree, found) == (yaml.safe_load(text), [])


@pytest.mark.parametrize(
    ("scalar", "reason"),
    [
        ("010", "octal"),
        ("-010", "octal"),
        ("08", "octal"),
        ("00_1", "octal"),
        ("1:30", "base 60"),
        ("1:30:00", "base 60"),
        ("-1:30.5", "base 60"),
        ("None", "reads as text: write null"),
        ("1__0", "between two digits"),
        ("1_", "between two digits"),
        ("0x_", "between two digits"),
        ("9" * 5000, "a number of 5000 characters"),
    ],
)
@pytest.mark.parametrize("form", ["a: {}", "a: [{}]", "a: {{b: {}}}", "b: 1\na: {}"])
def test_a_number_that_yaml_reads_as_another_is_a_fault(form, scalar, reason):
    """010 was 8, and 10 as a flag; 1:30 was 90."""
    document, (found,) = read(form.format(scalar))
    assert found.startswith("a")
    assert reason in found
    assert f"(a.yaml, line {1 + form.count(chr(10))})" in found
    assert document.tree["a"] in (WRONG, [WRONG], {"b": WRONG})


@pytest.mark.parametrize("scalar", ["'010'", '"1:30"', "'None'", "'1_'", "|\n  010"])
def test_quotes_make_text_of_it(scalar):
    document, found = read(f"a: {scalar}\n")
    assert (document.tree, found) == (yaml.safe_load(f"a: {scalar}\n"), [])


@pytest.mark.parametrize(
    ("scalar", "value"),
    [
        ("0", 0),
        ("-0", 0),
        ("0.5", 0.5),
        ("1_000", 1000),
        ("0x1F", 31),
        ("0b101", 5),
        ("1.0e-3", 0.001),
        ("1e-3", "1e-3"),
        ("0o10", "0o10"),
        ("2024-01-01", "2024-01-01"),
        ("2024-13-45", "2024-13-45"),
        ("127.0.0.1", "127.0.0.1"),
        ("a_b", "a_b"),
        ("none", "none"),
        ("on", True),
    ],
)
def test_the_rest_is_as_yaml_says_and_a_date_is_text(scalar, value):
    document, found = read(f"a: {scalar}\n")
    assert found == []
    assert document.tree == {"a": value}
    assert type(document.tree["a"]) is type(value)


def test_anchors_aliases_and_merge_keys_work():
    text = "a: &x {b: 1, c: 2}\nd:\n  <<: *x\n  c: 3\ne: [*x, {<<: [*x, {f: 4}]}]\n"
    document, found = read(text)
    assert (document.tree, found) == (yaml.safe_load(text), [])
    assert document.tree["d"] == {"b": 1, "c": 3}


def test_a_fault_behind_an_anchor_is_reported_once():
    assert len(read("a: &x {b: 1, c: }\nd: {<<: *x}\ne: [*x, *x]\n")[1]) == 1


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("data: &a\n  mix: [*a]\n", "data contains itself, as data.mix[0]: write out what is meant (a.yaml, line 1)"),
        ("a: 1\nb: &x [*x]\n", "b contains itself, as b[0]: write out what is meant (a.yaml, line 2)"),
        ("a: &x\n  b: *x\n", "a contains itself, as a.b: write out what is meant (a.yaml, lines 1 and 2)"),
        ("&x {a: *x}\n", "the document contains itself, as a: write out what is meant (a.yaml, line 1)"),
        ("a: &x {<<: *x, b: 1}\n", "a contains itself, as a.<<: write out what is meant (a.yaml, line 1)"),
        ("a: &x {<<: [*x, {c: 2}], b: 1}\n", "a contains itself, as a.<<[0]: write out what is meant (a.yaml, line 1)"),
        ("a: &x {b: *x, b: {c: 1}}\n", "a.b is given twice: give it once (a.yaml, line 1)"),
        ("a: 1\n? &x [*x]\n: 1\n", "a name is a list: must be text (a.yaml, line 2)"),
        ("a:\n  ? {b: 1}\n  : 1\n", "a name under a is a mapping: must be text (a.yaml, line 2)"),
    ],
)
def test_a_value_that_contains_itself_is_a_fault(text, fault):
    """Settings ended in a RecursionError."""
    document, found = read(text)
    assert found[0] == fault
    assert repr(document.tree).count("[...]") == repr(document.tree).count("{...}") == 0


def test_aliases_do_not_multiply_without_end():
    """A file of a few lines made lists of a billion values."""
    for one in ("[{}]", "{{<<: [{}]}}"):
        first = "[x]" if one == "[{}]" else "{x: 1}"
        levels = [f"a{i}: &a{i} {one.format(', '.join([f'*a{i - 1}'] * 10))}" for i in range(1, 40)]
        document, found = read("\n".join([f"a0: &a0 {first}", *levels]))
        assert len(found) == 1
        assert re.fullmatch(
            r"a\d\S* repeats too much: aliases may add 10000 values to a file \(a.yaml, line \d\)", found[0]
        )
        assert len(repr(document.tree)) < 10_000_000


@pytest.mark.parametrize("num_levels", [51, 100, 100_000])
@pytest.mark.parametrize("form", ["[]", "- "])
def test_deep_nesting_is_a_fault(tmp_path, num_levels, form):
    """It was a RecursionError, here or where the settings were made."""
    path = tmp_path / "a.yaml"
    path.write_text("[" * num_levels + "]" * num_levels if form == "[]" else form * num_levels + "1")
    faults = Faults()
    if num_levels > 100:
        with pytest.raises(ValueError, match=r"a.yaml is not YAML that can be read: it is nested too deeply$"):
            read_yaml(path, faults)
    else:
        document = read_yaml(path, faults)
        assert faults.found == [f"{'[0]' * 50} is nested too deeply: at most 50 levels ({path}, line 1)"]
        assert repr(document.tree) == f"{'[' * 50}{WRONG!r}{']' * 50}"


def test_deep_nesting_by_aliases_is_a_fault():
    _, found = read("\n".join(["a0: &a0 [1]", *(f"a{i}: &a{i} [*a{i - 1}]" for i in range(1, 2000))]))
    assert found[0] == "a49[0] is nested too deeply: at most 50 levels (a.yaml, line 49)"


def test_the_lines_of_all_names_are_known():
    document, _ = read("a:\n  b: 1\n\n  c:\n  - 2\n  - d: 3\n")
    assert document.lines == {
        "": [1],
        "a": [1],
        "a.b": [2],
        "a.c": [4],
        "a.c[0]": [5],
        "a.c[1]": [6],
        "a.c[1].d": [6],
    }


def test_what_is_written_without_quotes_is_known_where_it_is_no_text():
    assert read("a: no\nb: {c: [0x10, 'no', x], d: !!str 1, e: '1'}\n")[0].written == {"a": "no", "b.c[0]": "0x10"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: 1\n  b: 2: 3\n", r"a.yaml, line 2 is not YAML: mapping values are not allowed here"),
        (b"a: *b\n", r"a.yaml, line 1 is not YAML: found undefined alias 'b'"),
        (b"a: 1\n---\nb: 2\n", r"a.yaml, line 2 is not YAML: but found another document"),
        (b"a: \x00\n", r"a.yaml is not YAML: unacceptable character #x0000: special characters are not allowed"),
        (b"a: !!python/name:os.system\n", r"a.yaml, line 1 is not YAML: could not determine a constructor"),
        (b"a: \xff\n", r"a.yaml is not UTF-8: byte 3 is 0xFF"),
        ("a: 1".encode("utf-16"), r"a.yaml is UTF-16, as its first bytes say"),
        ("a: 1".encode("utf-16-le"), r"a.yaml seems to be UTF-16LE.*must be UTF-8"),
    ],
)
def test_what_is_no_yaml_is_named_in_one_line(tmp_path, content, message):
    path = tmp_path / "a.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_yaml(path, Faults())
    assert "\n" not in str(caught.value)


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: 1\n")
    assert read_yaml(path, Faults()).tree == {"a": 1}


@pytest.mark.parametrize("style", [True, False, None])
@pytest.mark.parametrize(
    "text",
    [
        "None",
        "010",
        "08",
        "-07",
        "0_8",
        "1:30",
        "1_",
        "1e3",
        "null",
        "~",
        "",
        "yes",
        "2024-01-01",
        "# x",
        "a: b",
        "\n\n",
        "<<",
        "=",
    ],
)
def test_what_is_written_is_read_back(text, style):
    """PyYAML writes a run's prompt of None or 08 without quotes."""
    tree = {"a": text, "b": [text, None, 0, 8, 0.1, 1e-7, True], text or "c": {"d": text}}
    assert read(dump_yaml(tree, default_flow_style=style)) == (YamlDocument(tree, ANY, ANY), [])


@pytest.mark.parametrize(
    "path", sorted([*(ROOT / "configs").glob("*.yaml"), ROOT / "deploy" / "serve.yaml"]), ids=lambda path: path.name
)
def test_the_shipped_files_are_read_as_any_reader_of_yaml_does(path):
    faults = Faults()
    assert read_yaml(path, faults).tree == yaml.safe_load(path.read_text(encoding="utf-8"))
    assert faults.found == []


def test_the_product_reads_yaml_by_this_reader_alone():
    """A header in another's README.md is only looked at: `datasets` reads it."""
    elsewhere = {"bdh/data/files.py"}
    reading = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "bdh").rglob("*.py")
        if any(f"yaml.{name}" in path.read_text(encoding="utf-8") for name in ("safe_load", "load", "full_load"))
    }
    assert reading == elsewhere
