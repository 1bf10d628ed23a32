"""Text files that people write, with and without a byte order mark."""

import codecs
import json

import pytest

from bdh.generate.params import SamplingParams
from bdh.generate.prompts_file import read_jobs
from bdh.serve.config import AuthSettings
from bdh.serve.middleware import ApiKeys
from bdh.serve.text import ChatPrompts
from bdh.text_files import read_text
from bdh.tokenizer import byte_tokenizer, with_chat_template
from bdh.tokenizer.chat import DEFAULT_TEMPLATE

TALK = [{"role": "user", "content": "First of stone, bread?"}]


def marked(path, text):
    path.write_bytes(codecs.BOM_UTF8 + text.encode())
    return path


def test_the_mark_is_left_out_and_lines_end_in_one_way(tmp_path):
    assert read_text(marked(tmp_path / "t", "one\r\ntwo\u2028\ufeff\rthree")) == "one\ntwo\u2028\ufeff\nthree"
    assert read_text(marked(tmp_path / "t", "")) == ""


def test_wrong_bytes_are_counted_from_the_beginning_of_the_file(tmp_path):
    (tmp_path / "t").write_bytes(codecs.BOM_UTF8 + b"abc\xff")
    with pytest.raises(ValueError, match="t is not UTF-8: byte 6 is 0xFF"):
        read_text(tmp_path / "t")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_other_encodings_are_named(tmp_path, encoding):
    (tmp_path / "t").write_text("some text", encoding=encoding)
    with pytest.raises(ValueError, match=f"t is {encoding.upper()}.*must be UTF-8.*iconv -f {encoding.upper()}"):
        read_text(tmp_path / "t")


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize(
    "text", ["some text", "ab", '{"text": "one"}\n' * 100, "Жар-птица, да", "\n\u0391\u03b2\u03b3 \u03b4"]
)
def test_other_encodings_are_recognised_without_a_mark(tmp_path, text, encoding):
    """Its NULs were taken for text."""
    (tmp_path / "t").write_text(text, encoding=encoding, newline="")
    name = encoding.upper().removesuffix("-LE").removesuffix("-BE") + encoding[-2:].upper()
    with pytest.raises(ValueError, match=rf"t seems to be {name}.*must be UTF-8.*iconv -f {name} -t UTF-8"):
        read_text(tmp_path / "t")


@pytest.mark.parametrize(
    "text", ["", "a", "a\0", "\n\n\n\n", "a\tb\tc\td\t", "a\0b", "one\0two\0three\0four", "\ta\nb\rc\td", "Ж", "日本"]
)
def test_utf8_with_control_characters_is_utf8(tmp_path, text):
    (tmp_path / "t").write_bytes(text.encode())
    assert read_text(tmp_path / "t") == text.replace("\r", "\n")


def test_many_nuls_are_no_text(tmp_path):
    (tmp_path / "t").write_bytes(b"\0" * 1000)
    with pytest.raises(ValueError, match="t seems to be UTF-"):
        read_text(tmp_path / "t")


def test_prompts_begin_after_a_mark(tmp_path):
    """The first prompt began with U+FEFF; a .jsonl file was refused as no JSON."""
    assert [job.prompt for job in read_jobs(marked(tmp_path / "t.txt", "one\ntwo"), SamplingParams())] == ["one", "two"]
    path = marked(tmp_path / "t.JSONL", json.dumps({"prompt": "one"}))
    assert [job.prompt for job in read_jobs(path, SamplingParams())] == ["one"]


def test_the_first_key_of_a_file_is_accepted_after_a_mark(tmp_path):
    """It was stored with the mark, and its owner refused."""
    marked(tmp_path / "keys", "a-long-secret\n")
    keys = ApiKeys(AuthSettings(keys_file=str(tmp_path / "keys"), keys_variable="NOTHING_HERE"))
    assert keys.caller("Bearer a-long-secret", "1.2.3.4").name.startswith("key-")


def test_chat_templates_begin_after_a_mark(tmp_path):
    """Each conversation began with U+FEFF."""
    path = str(marked(tmp_path / "t.jinja", DEFAULT_TEMPLATE))
    assert with_chat_template(byte_tokenizer(), path, needs_one=True).chat_template == DEFAULT_TEMPLATE
    (tmp_path / "u.jinja").write_text(DEFAULT_TEMPLATE)
    prompts, expected = (ChatPrompts(byte_tokenizer(), str(tmp_path / name), []) for name in ("t.jinja", "u.jinja"))
    assert prompts.encode(TALK) == expected.encode(TALK)
