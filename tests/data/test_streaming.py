"""Streaming: endless, shuffled anew each pass, exact when resumed, flat in memory, nothing on disk."""

import io
import json
import subprocess
import sys
from collections import Counter
from itertools import pairwise

import pytest
import torch

from bdh.data import DataConfig, training_texts, validation_texts
from bdh.tokenizer import train_tokenizer
from tests.data.conftest import write_table, write_text

EOS = 258
SETTINGS = {"streaming": True, "shuffle_buffer_documents": 7, "text_column": "text"}


@pytest.fixture
def folder(tmp_path):
    """100 documents of the form 'NNN', in files of several types."""
    texts = [{"text": f"{i:03}"} for i in range(100)]
    write_table(tmp_path / "a.jsonl", texts[:40])
    write_text(tmp_path / "b.txt", texts[40]["text"])
    write_table(tmp_path / "c.parquet", texts[41:60])
    write_table(tmp_path / "d.csv", texts[60:80])
    write_table(tmp_path / "e.jsonl.gz", texts[80:])
    return tmp_path


def documents(rows, from_the_start=False):
    """The documents in rows that followed one another, without what is cut off at the ends."""
    tokens = [EOS] * from_the_start + [rows[0, 0].item(), *rows[:, 1:].flatten().tolist()]
    ends = [position for position, token in enumerate(tokens) if token == EOS]
    return [bytes(tokens[a + 1 : b]).decode() for a, b in pairwise(ends)]


def test_rows_overlap_by_one_token_so_that_each_is_predicted_once(folder, corpus_of):
    rows = corpus_of(folder, block_size=8, **SETTINGS).train_loader(6, seed=1).next().tokens
    assert rows.shape == (6, 9)
    assert rows.dtype == torch.int64
    assert rows[1:, 0].tolist() == rows[:-1, -1].tolist()


def test_each_pass_gives_every_training_document_once_in_another_order(folder, corpus_of):
    loader = corpus_of(folder, block_size=4, **SETTINGS).train_loader(10, seed=1)
    # A document and its end are 4 tokens: 9 batches of 10 rows are the 90 training documents.
    rows = torch.cat([loader.next().tokens for _ in range(9 * 3)])
    found = documents(rows, from_the_start=True)
    expected = {f"{i:03}" for i in range(100) if i % 10 != 9}
    passes = [found[0:90], found[90:180], found[180:270]]
    assert all(set(one) == expected for one in passes)
    assert len({tuple(one) for one in passes}) == 3
    assert passes[0] != sorted(passes[0])


def test_every_tenth_document_is_held_out_and_never_trained_on(folder, corpus_of):
    corpus = corpus_of(folder, block_size=4, **SETTINGS)
    held_out = bytes(token for token in corpus.validation_tokens().tolist() if token != EOS).decode()
    assert held_out == "".join(f"{i:03}" for i in range(9, 100, 10))
    assert corpus.facts["val_tokens"] == 40
    assert corpus.val_bytes_per_token == 3 / 4
    assert corpus.validation_windows(3).shape == (3, 5)
    loader = corpus.train_loader(10, seed=1)
    trained = Counter(document for _ in range(30) for document in documents(loader.next().tokens))
    assert not any(document.endswith("9") for document in trained)


def test_parts_of_one_long_text_are_held_out_by_the_same_rule(tmp_path, corpus_of):
    text = "".join(f"line {i:07}\n" for i in range(300_000))
    corpus = corpus_of(write_text(tmp_path / "t.txt", text), block_size=64, streaming=True, special_tokens=False)
    held_out = bytes(corpus.validation_tokens()).decode()
    assert held_out in text
    assert 0 < len(held_out) <= 1 << 18
    loader = corpus.train_loader(64, seed=1)
    lines = set(held_out.splitlines()[1:-1])
    for _ in range(50):
        rows = loader.next().tokens
        text_of_rows = bytes([rows[0, 0].item(), *rows[:, 1:].flatten().tolist()]).decode()
        assert lines.isdisjoint(text_of_rows.splitlines()[1:-1])


@pytest.mark.parametrize("num_bytes", [300, 1_100_000, 2_400_000, (10 << 18) - 700])
def test_a_small_stream_of_one_document_is_split_as_without_streaming(tmp_path, corpus_of, num_bytes):
    """Its few parts were all trained on, and the command stopped for want of a validation part; or, of the tenth, a few
    bytes were left to validate on."""
    text = "".join(f"line {i:07}, ä\n" for i in range(1 + num_bytes // 17))
    path = write_text(tmp_path / "t.txt", text)
    plain, stream = (corpus_of(path, block_size=20, streaming=streaming) for streaming in (False, True))
    held_out = plain.validation_tokens().tolist()
    assert stream.validation_tokens().tolist() == held_out[: len(stream.validation_tokens())]
    assert len(held_out) // 2 < stream.facts["val_tokens"] >= num_bytes // 11
    config = DataConfig(source=str(path), streaming=True)
    assert "".join(validation_texts(config)) == bytes(held_out[:-1]).decode()
    train_text = "".join(training_texts(config))
    assert train_text + "".join(validation_texts(config)) == text

    loader = stream.train_loader(1 + num_bytes // 200, seed=1)
    lines, trained = set(train_text.splitlines()), set()
    while loader.epoch < 1:
        rows = loader.next().tokens
        trained |= set(
            bytes([rows[0, 0].item(), *rows[:, 1:].flatten().tolist()]).decode(errors="replace").split("\n")[1:-1]
        )
    whole = {line for line in trained if len(line) == 15}
    assert whole <= lines
    assert len(whole) > len(lines) // 2  # the others are cut by a row or a batch


def test_a_small_stream_of_few_documents_holds_out_the_last(tmp_path, corpus_of):
    path = write_table(tmp_path / "a.jsonl", [{"text": f"document {i}"} for i in range(5)])
    corpus = corpus_of(path, block_size=4, streaming=True, special_tokens=False)
    assert bytes(corpus.validation_tokens().tolist()) == b"document 4"
    rows = corpus.train_loader(30, seed=1).next().tokens
    assert b"4" not in bytes(rows.flatten().tolist())


@pytest.mark.parametrize("num_documents", [1, 4])
def test_a_small_stream_resumes_bit_equal(tmp_path, corpus_of, num_documents):
    for number in range(num_documents):
        write_text(tmp_path / "texts" / f"{number}.txt", "".join(f"{number} {i:07}\n" for i in range(40_000)))
    corpus = corpus_of(tmp_path / "texts", block_size=512, streaming=True, shuffle_buffer_documents=2)
    loader = corpus.train_loader(200, seed=1)
    for _ in range(20):
        state = loader.state_dict()
        expected = loader.next().tokens
        again = corpus_of(tmp_path / "texts", block_size=512, streaming=True, shuffle_buffer_documents=2)
        resumed = again.train_loader(200, seed=1)
        resumed.load_state_dict(state)
        assert torch.equal(resumed.next().tokens, expected)
    assert loader.epoch >= 1


@pytest.mark.parametrize("val_tokens", [1, 10, 16])
def test_no_more_validation_text_is_collected_than_asked_for(folder, corpus_of, val_tokens):
    corpus = corpus_of(folder, block_size=3, val_tokens=val_tokens, **SETTINGS)
    assert corpus.facts["val_tokens"] == max(4, -(-val_tokens // 4) * 4)


def test_validation_files_are_never_trained_on(folder, corpus_of):
    corpus = corpus_of(folder, block_size=3, val_source=str(folder / "b.txt"), **SETTINGS)
    assert corpus.validation_tokens().tolist() == [*b"040", EOS]
    loader = corpus.train_loader(10, seed=1)
    trained = Counter(document for _ in range(300) for document in documents(loader.next().tokens))
    assert set(trained) == {f"{i:03}" for i in range(100) if i != 40}


# A pass is 360 tokens, a batch 20: the third pass begins behind step 36.
@pytest.mark.parametrize("num_steps", [0, 1, 2, 5, 8, 16, 17, 18, 19, 36, 40])
def test_resume_is_bit_equal(folder, corpus_of, num_steps):
    corpus = corpus_of(folder, block_size=5, **SETTINGS)
    loader = corpus.train_loader(4, seed=1)
    for _ in range(num_steps):
        loader.next()
    stored = io.BytesIO()
    torch.save(loader.state_dict(), stored)
    expected = [loader.next().tokens for _ in range(40)]

    stored.seek(0)
    again = corpus_of(folder, block_size=5, **SETTINGS).train_loader(4, seed=1)
    again.load_state_dict(torch.load(stored, weights_only=True))
    assert all(torch.equal(again.next().tokens, rows) for rows in expected)
    assert again.epoch == loader.epoch > 1


def test_resume_is_bit_equal_inside_long_documents(tmp_path, corpus_of):
    """Rows of several parts, and more text than is tokenized at a time."""
    rows = [{"text": f"{letter} some text\n" * 90_000} for letter in "abcdef"]
    write_table(tmp_path / "a.jsonl", rows)
    write_text(tmp_path / "b.txt.gz", "text of b\n" * 90_000)
    tokenizer = train_tokenizer([row["text"][:50] for row in rows], "bpe", 270)
    corpus = corpus_of(tmp_path, block_size=512, tokenizer=tokenizer, streaming=True, shuffle_buffer_documents=3)
    loader = corpus.train_loader(256, seed=1)
    for _ in range(12):
        state = loader.state_dict()
        expected = loader.next().tokens
        again = corpus.train_loader(256, seed=1)
        again.load_state_dict(state)
        assert torch.equal(again.next().tokens, expected)
    assert loader.epoch == 0


def test_state_is_not_changed_by_going_on(folder, corpus_of):
    corpus = corpus_of(folder, block_size=5, **SETTINGS)
    loader = corpus.train_loader(4, seed=1)
    loader.next()
    state = loader.state_dict()
    before = repr(state)
    for _ in range(30):
        loader.next()
    assert repr(state) == before


def test_state_of_another_seed_or_kind_is_refused(folder, corpus_of):
    corpus = corpus_of(folder, block_size=4, **SETTINGS)
    state = corpus.train_loader(4, seed=1).state_dict()
    with pytest.raises(ValueError, match="seed 1, but now it is 2"):
        corpus.train_loader(4, seed=2).load_state_dict(state)
    with pytest.raises(ValueError, match=r"'stream', not 'windows': data\.streaming or train\.carry_state was another"):
        corpus_of(folder, block_size=4, text_column="text").train_loader(4, seed=1).load_state_dict(state)


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_together_get_the_rows_of_one(folder, corpus_of, world_size):
    corpus = corpus_of(folder, block_size=5, **SETTINGS)
    alone = corpus.train_loader(4, seed=1)
    shared = [corpus.train_loader(4, 1, rank, world_size) for rank in range(world_size)]
    for _ in range(40):
        assert torch.equal(alone.next().tokens, torch.cat([loader.next().tokens for loader in shared]))


def test_order_depends_on_the_seed(folder, corpus_of):
    corpus = corpus_of(folder, block_size=5, **SETTINGS)
    assert not torch.equal(corpus.train_loader(9, seed=1).next().tokens, corpus.train_loader(9, seed=2).next().tokens)


def test_nothing_is_written(folder, corpus_of, cache):
    corpus = corpus_of(folder, block_size=5, **SETTINGS)
    for _ in range(20):
        corpus.train_loader(4, seed=1).next()
    assert list(cache.iterdir()) == []
    json.dumps(corpus.facts)


def test_fingerprint_is_that_of_the_text_wherever_it_lies(tmp_path, corpus_of):
    texts = {"here": "text\n" * 300_000, "there": "text\n" * 300_000, "changed": "text\n" * 299_999 + "Text\n"}
    found = {
        name: corpus_of(write_text(tmp_path / name / "t.txt", text), streaming=True, val_fraction=0.5).fingerprint
        for name, text in texts.items()
    }
    assert found["here"] == found["there"] != found["changed"]


def test_training_tokens_are_no_array(folder, corpus_of):
    with pytest.raises(ValueError, match=r"set data\.streaming=false"):
        corpus_of(folder, **SETTINGS).train_tokens()


_MEASURE = """
import resource, sys, torch
from bdh.data import DataConfig, prepare_corpus
from bdh.tokenizer import byte_tokenizer
loader = prepare_corpus(DataConfig(source=sys.argv[1], streaming=True), byte_tokenizer(), 256).train_loader(64, 1)
for _ in range(4):
    loader.next()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
while loader.epoch < 2:
    loader.next()
print(peak, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak in KiB")
@pytest.mark.parametrize("name", ["t.txt", "t.jsonl"])
def test_memory_stays_flat_while_the_source_is_read(tmp_path, name):
    """The buffer is full after a few batches; 48 MB twice over must not add to that what keeping it would."""
    line = "words of a line that is repeated over and over again, to make a large file of it\n"
    if name == "t.txt":
        write_text(tmp_path / name, line * 600_000)
    else:
        write_table(tmp_path / name, [{"text": line * 100}] * 6_000)
    command = [sys.executable, "-c", _MEASURE, str(tmp_path / name)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    early, late = map(int, result.stdout.split())
    assert late - early < 64 * 1024, f"{early} KiB became {late} KiB"
