"""Small corpora, and a token cache of each test's own."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """The token cache, empty."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("BDH_CACHE", str(folder))
    return folder


@pytest.fixture
def corpus_of():
    """Prepares a corpus, byte by byte, with <eos> after each document unless it is given a tokenizer without."""

    # Not at the top: pytest may import this file before it has heard that there is no network.
    from bdh.data import DataConfig, prepare_corpus
    from bdh.tokenizer import byte_tokenizer

    def prepare(source, *, block_size=1, special_tokens=True, tokenizer=None, **settings):
        tokenizer = tokenizer or byte_tokenizer(special_tokens)
        config = DataConfig(source=source if isinstance(source, list) else str(source), **settings)
        return prepare_corpus(config, tokenizer, block_size)

    return prepare


def documents_of(corpus):
    """The documents of both parts, decoded."""
    tokens = [*corpus.train_tokens().tolist(), *corpus.validation_tokens().tolist()]
    documents, document = [], bytearray()
    for token in tokens:
        if token == 258:  # <eos>
            documents.append(document.decode())
            document = bytearray()
        else:
            document.append(token)
    assert not document, "the last document has no end"
    return documents


def write_table(path, rows):
    """Writes rows in the format that the file's name says."""
    name = path.name
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
        return path
    if ".jsonl" in name:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    elif ".json" in name:
        text = json.dumps(rows, ensure_ascii=False)
    else:
        assert ".csv" in name
        text = (
            "\n".join([",".join(rows[0]), *(",".join(f'"{value}"' for value in row.values()) for row in rows)]) + "\n"
        )
    return write_text(path, text)


def write_text(path, text):
    """Writes text, compressed if the file's name says so."""
    data = text.encode()
    if path.suffix == ".gz":
        data = gzip.compress(data)
    elif path.suffix == ".zst":
        data = zstandard.compress(data)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path
