"""Opening tokenizers, and what is said when that fails."""

import json

import pytest

from bdh.tokenizer import (
    TokenizerConfig,
    byte_tokenizer,
    encode_texts,
    load_tokenizer,
    train_tokenizer,
    with_chat_template,
)
from bdh.tokenizer.plain import vocabulary_size
from bdh.validation import Faults, collect_faults
from tests.tokenizer.conftest import TRAINING_TEXT


def test_byte_is_built_in():
    assert len(load_tokenizer("byte")) == 256
    assert len(load_tokenizer(TokenizerConfig())) == 256
    assert len(load_tokenizer(TokenizerConfig(special_tokens=True))) == 260


@pytest.mark.parametrize("kind", ["byte", "bpe", "wordpiece", "unigram"])
def test_saved_tokenizer_opens(tmp_path, kind):
    tokenizer = byte_tokenizer(True) if kind == "byte" else train_tokenizer([TRAINING_TEXT], kind, 300)
    tokenizer.save_pretrained(tmp_path)
    for name in (tmp_path, str(tmp_path), TokenizerConfig(path=str(tmp_path))):
        assert load_tokenizer(name).get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize("name", ["./missing", "/no/such/folder", "a/b/c", "missing/"])
def test_missing_folder_is_named(name):
    with pytest.raises(FileNotFoundError, match=f"tokenizer.path is '{name}': there is no such folder"):
        load_tokenizer(name)


def test_folder_that_a_killed_process_was_replacing_opens(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path / ".tokenizer.old")
    assert len(load_tokenizer(str(tmp_path / "tokenizer"))) == len(byte_tokenizer())


def test_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"this folder holds no tokenizer\.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("text", ["", "no json", "{}", '{"version": "1.0", "model": null}'])
def test_damaged_tokenizer_is_named(tmp_path, text):
    byte_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match="its tokenizer files cannot be read"):
        load_tokenizer(tmp_path)


def test_code_in_a_folder_is_not_run_and_not_asked_about(tmp_path, monkeypatch):
    """At a terminal transformers asked whether to run it."""
    byte_tokenizer().save_pretrained(tmp_path)
    facts = {"tokenizer_class": "Other", "auto_map": {"AutoTokenizer": [None, "code.Other"]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(facts))
    (tmp_path / "code.py").write_text("raise SystemError('this was run')\nclass Other: pass\n")
    monkeypatch.setattr("builtins.input", lambda _: "y")
    with pytest.raises(ValueError, match=r"files cannot be read: ValueError: The repository .* contains custom code"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("has_config", [True, False])
def test_bare_file_opens_with_its_special_tokens(tmp_path, has_config):
    train_tokenizer([TRAINING_TEXT], "bpe", 300).save_pretrained(tmp_path)
    if not has_config:
        (tmp_path / "tokenizer_config.json").unlink()
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    assert len(tokenizer) == 300
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 2)


def test_file_that_is_no_tokenizer_is_named(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("notes")
    with pytest.raises(ValueError, match=r"notes\.txt': it is not a tokenizer\.json"):
        load_tokenizer(path)


@pytest.mark.parametrize("name", ["some-organisation/some-model", "some-model"])
def test_hub_out_of_reach_says_so_and_what_works_offline(name):
    """The test suite runs with HF_HUB_OFFLINE=1."""
    with pytest.raises(FileNotFoundError, match=f"'{name}': .* the hub gave no tokenizer.*byte, a folder.*OFFLINE"):
        load_tokenizer(name)


def test_settings_that_do_not_go_together_are_faults():
    faults = Faults()
    collect_faults(TokenizerConfig(), faults)
    collect_faults(TokenizerConfig(special_tokens=True), faults)
    collect_faults(TokenizerConfig(path="folder"), faults)
    assert faults.found == []
    collect_faults(TokenizerConfig(path=""), faults)
    collect_faults(TokenizerConfig(path="folder", special_tokens=True), faults)
    assert faults.found[0].startswith("path is ''")
    assert faults.found[1].startswith("special_tokens is True: must be false with the tokenizer 'folder'")


def with_gap(folder, *, first=280, gap=20):
    """A BPE tokenizer whose ids from ``first`` on are ``gap`` higher, as if tokens had been taken out."""
    train_tokenizer([TRAINING_TEXT], "bpe", 300).save_pretrained(folder)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {text: token + gap * (token >= first) for text, token in vocabulary.items()}
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("is_bare", [True, False])
@pytest.mark.parametrize(("gap", "dtype"), [(20, "uint16"), (100_000, "uint32")])
def test_ids_with_gaps_are_read_and_fit_the_vocabulary(tmp_path, gap, dtype, is_bare):
    """The number of tokens was taken for the size of the vocabulary, and ids were beyond the embedding."""
    path = with_gap(tmp_path, gap=gap)
    if is_bare:
        (tmp_path / "tokenizer_config.json").unlink()
    tokenizer = load_tokenizer(path)
    assert len(tokenizer) == 300
    assert vocabulary_size(tokenizer) == 300 + gap
    ids = encode_texts(tokenizer, [TRAINING_TEXT])[0]
    assert ids.dtype == dtype
    assert ids.max() >= 280 + gap
    assert tokenizer.decode(ids) == TRAINING_TEXT


def test_chat_tokens_do_not_take_ids_that_others_have(tmp_path):
    """The library counts tokens to find the next free id, which with gaps another token has."""
    tokenizer = load_tokenizer(with_gap(tmp_path, gap=2))
    with pytest.raises(
        ValueError, match=r"ids have gaps \(300 tokens, ids up to 301\).*needs <\|system\|>, <\|user\|>"
    ):
        with_chat_template(tokenizer, "default", needs_one=True)


def test_an_added_token_whose_id_the_library_would_change_is_named(tmp_path):
    """It was read under another id than the one that its model was trained with."""
    train_tokenizer([TRAINING_TEXT], "bpe", 300).save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"].append({**content["added_tokens"][0], "content": "<extra>", "id": 400})
    path.write_text(json.dumps(content))
    for name in (tmp_path, path):
        with pytest.raises(ValueError, match="'<extra>' has the id 400, but the tokenizers library reads it as 300"):
            load_tokenizer(name)
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="'<extra>' has the id 400"):
        load_tokenizer(path)


def test_two_tokens_with_one_id_are_named(tmp_path):
    train_tokenizer([TRAINING_TEXT], "wordpiece", 300).save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"] |= {"one": 250, "another": 250}
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"its tokens '.*' and '.*' share the id 250"):
        load_tokenizer(tmp_path)
