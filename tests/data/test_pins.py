"""What earlier versions made of data: a run that they started resumes only where the fingerprints and the rows are the same."""

import gzip
import hashlib
import json
from pathlib import Path

import pytest

from bdh.tokenizer import byte_tokenizer, with_chat_template
from tests.data.conftest import write_table, write_text

PINS = json.loads((Path(__file__).parent.parent / "fixtures" / "data_pins.json").read_text())
"""Recorded with version 0.1.0."""
ROWS = [{"n": i, "text": f"document {i} of {'x' * (i % 13)}"} for i in range(60)]
CHAT = [
    {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{2 * i}"}]}
    for i in range(40)
]
CARD = "---\nconfigs:\n- config_name: default\n  data_files:\n  - {split: train, path: t.txt}\n---\n"


def sources(folder):
    """A text of each kind, and settings that change how it is read."""
    text = write_text(folder / "t.txt", "some words and more\n" * 300)
    table = write_table(folder / "t.jsonl", ROWS)
    csv = write_text(folder / "t.csv", "n;text\n" + "".join(f"{i};words {i}\n" for i in range(60)))
    parquet = write_table(folder / "t.parquet", ROWS)
    chat = write_table(folder / "chat.jsonl", CHAT)
    zipped = folder / "z.txt.gz"
    zipped.write_bytes(gzip.compress(b"other words and more\n" * 300, mtime=0))
    hub = write_text(folder / "hub" / "README.md", CARD).parent
    write_text(hub / "t.txt", "a line of words\n" * 60)
    data = write_table(folder / "layout" / "data" / "train-00000-of-00001.jsonl", ROWS).parent.parent
    mix = [{"source": str(text), "weight": 2}, {"source": str(table)}]
    return {
        "text": {"source": text},
        "table": {"source": table, "val_fraction": 0.2},
        "documents": {"source": table, "pack": "documents"},
        "gz": {"source": zipped},
        "array": {"source": write_table(folder / "t.json", ROWS)},
        "csv": {"source": csv},
        "csv-settings": {"source": csv, "csv_delimiter": ";", "csv_header": True, "text_column": "text"},
        "parquet": {"source": parquet},
        "several": {"source": [str(csv), str(text)], "val_source": str(parquet)},
        "hub": {"source": hub},
        "layout": {"source": data},
        "chat": {"source": chat},
        "mix": {"source": "pydoc", "mix": mix},
    }


def facts_of(corpus):
    """Fingerprints, and a hash of the first rows and of where the loader is after them."""
    loader = corpus.train_loader(4, seed=7)
    rows = [loader.next() for _ in range(3)]
    digest = hashlib.sha256()
    for batch in rows:
        for each in (batch.tokens, batch.is_target, batch.starts):
            digest.update(repr(None if each is None else each.tolist()).encode())
    return {
        "fingerprint": corpus.fingerprint,
        "rows": digest.hexdigest(),
        "validation": hashlib.sha256(repr(corpus.validation_windows(5).tolist()).encode()).hexdigest(),
        "state": loader.state_dict(),
    }


@pytest.mark.parametrize("streaming", [False, True])
def test_fingerprints_rows_and_positions_are_those_of_earlier_versions(tmp_path, monkeypatch, corpus_of, streaming):
    # Of streams, the rows are those of test_streaming; parquet files hold the version of pyarrow.
    tokenizer = with_chat_template(byte_tokenizer(True), None, needs_one=True)
    monkeypatch.chdir(tmp_path)
    found = {}
    for name, settings in sources(Path()).items():
        if not streaming:
            found[name] = facts_of(corpus_of(block_size=16, tokenizer=tokenizer, **settings))
        elif name not in ("parquet", "several", "chat", "mix"):
            corpus = corpus_of(block_size=16, tokenizer=tokenizer, streaming=True, **settings)
            validation = hashlib.sha256(repr(corpus.validation_windows(5).tolist()).encode()).hexdigest()
            found[f"{name}, streaming"] = {"fingerprint": corpus.fingerprint, "validation": validation}
    assert found == {name: PINS[name] for name in found}
