"""Names of tokens."""

import json

from bdh.serve.text import TokenNames
from bdh.tokenizer import load_tokenizer, train_tokenizer


def test_an_id_that_no_token_has_is_nothing(tmp_path):
    """In a vocabulary with gaps, it was called None."""
    train_tokenizer(["some text"] * 9, "bpe", 262).save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"] = {text: i + 5 * (i >= 261) for text, i in content["model"]["vocab"].items()}
    path.write_text(json.dumps(content))
    names = TokenNames(load_tokenizer(tmp_path))
    assert names.bytes_of(263) == b""
    assert names.bytes_of(266) != b""
