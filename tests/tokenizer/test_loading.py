"""Opening tokenizers, and what is said when that fails."""

import pytest

from bdh.tokenizer import TokenizerConfig, byte_tokenizer, load_tokenizer, train_tokenizer
from bdh.validation import Faults
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
    with pytest.raises(ValueError, match=r"notes\.txt': it is no tokenizer\.json"):
        load_tokenizer(path)


@pytest.mark.parametrize("name", ["some-organisation/some-model", "some-model"])
def test_hub_out_of_reach_says_so_and_what_works_offline(name):
    """The test suite runs with HF_HUB_OFFLINE=1."""
    with pytest.raises(FileNotFoundError, match=f"'{name}': .* the hub gave no tokenizer.*byte, a folder.*OFFLINE"):
        load_tokenizer(name)


def test_settings_that_do_not_go_together_are_faults():
    faults = Faults()
    TokenizerConfig().collect_faults(faults)
    TokenizerConfig(special_tokens=True).collect_faults(faults)
    TokenizerConfig(path="folder").collect_faults(faults)
    assert faults.found == []
    TokenizerConfig(path="").collect_faults(faults)
    TokenizerConfig(path="folder", special_tokens=True).collect_faults(faults)
    assert faults.found[0].startswith("path is ''")
    assert faults.found[1].startswith("special_tokens is True: must be false with the tokenizer 'folder'")
