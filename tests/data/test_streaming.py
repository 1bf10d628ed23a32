"""Streaming: endless, shuffled anew each pass, exact when resumed, flat in memory, nothing on disk."""

import io
import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from bdh.data import DataConfig, training_texts, validation_texts
from bdh.data.batches import Batch, join_states
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


def documents(batches):
    """The documents that each sequence reads from the start of the training on, one after the other, by sequence."""
    found = []
    for number in range(len(batches[0].tokens)):
        tokens = [batches[0].tokens[number, 0].item()]
        tokens += [token for batch in batches for token in batch.tokens[number, 1:].tolist()]
        ends = [-1] + [position for position, token in enumerate(tokens) if token == EOS]
        found.append([bytes(tokens[a + 1 : b]).decode() for a, b in pairwise(ends)])
    return found


def texts(loader, num_steps):
    """All documents that so many steps read to their ends."""
    return [text for each in documents([loader.next() for _ in range(num_steps)]) for text in each]


def test_a_sequence_begins_with_the_last_target_of_the_one_before_so_that_each_token_is_predicted_once(
    folder, corpus_of
):
    loader = corpus_of(folder, block_size=8, **SETTINGS).train_loader(6, seed=1)
    one, two = loader.next().tokens, loader.next().tokens
    assert one.shape == (6, 9)
    assert one.dtype == torch.int64
    assert two[:, 0].tolist() == one[:, -1].tolist()


def test_each_pass_gives_every_training_document_once_in_another_order(folder, corpus_of):
    loader = corpus_of(folder, block_size=4, **SETTINGS).train_loader(10, seed=1)
    # A document and its end are 4 tokens: 9 steps of 10 sequences are the 90 training documents.
    by_lane = documents([loader.next() for _ in range(9 * 3)])
    expected = {f"{i:03}" for i in range(100) if i % 10 != 9}
    passes = [[text for lane in by_lane for text in lane[9 * n : 9 * n + 9]] for n in range(3)]
    assert all(set(one) == expected for one in passes)
    assert len({tuple(one) for one in passes}) == 3
    assert passes[0] != sorted(passes[0])


def test_of_a_large_batch_several_sequences_read_one_text(folder, corpus_of):
    loader = corpus_of(folder, block_size=3, **SETTINGS).train_loader(2 * 64, seed=1)
    tokens = loader.next().tokens
    assert tokens[1::2, 0].tolist() == tokens[::2, -1].tolist()
    assert (tokens[2::2, 0] != tokens[1:-1:2, -1]).any()


def test_every_tenth_document_is_held_out_and_never_trained_on(folder, corpus_of):
    corpus = corpus_of(folder, block_size=4, **SETTINGS)
    held_out = bytes(token for token in corpus.validation_tokens().tolist() if token != EOS).decode()
    assert held_out == "".join(f"{i:03}" for i in range(9, 100, 10))
    assert corpus.facts["val_tokens"] == 40
    assert corpus.val_bytes_per_token == 3 / 4
    assert corpus.validation_windows(3).shape == (3, 5)
    trained = texts(corpus.train_loader(10, seed=1), 30)
    assert len(trained) > 100
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


@pytest.mark.parametrize("num_bytes", [3000, 1_100_000, (10 << 18) - 700])
def test_a_small_stream_of_one_document_is_split_as_without_streaming(tmp_path, corpus_of, num_bytes):
    """Its few parts were all trained on, and the command stopped for want of a validation part; or, of the tenth, a few
    bytes were left to validate on."""
    text = "".join(f"line {i:07}, ä\n" for i in range(1 + num_bytes // 17))
    path = write_text(tmp_path / "t.txt", text)
    plain, stream = (corpus_of(path, block_size=200, streaming=streaming) for streaming in (False, True))
    held_out = plain.validation_tokens().tolist()
    assert stream.validation_tokens().tolist() == held_out[: len(stream.validation_tokens())]
    assert len(held_out) // 2 < stream.facts["val_tokens"] >= num_bytes // 11
    config = DataConfig(source=str(path), streaming=True)
    assert "".join(validation_texts(config)) == bytes(held_out[:-1]).decode()
    train_text = "".join(training_texts(config))
    assert train_text + "".join(validation_texts(config)) == text

    loader = stream.train_loader(2, seed=1)
    lines, trained = set(train_text.splitlines()), set()
    for _ in range(1 + len(train_text) // 200):
        for tokens in loader.next().tokens:
            trained |= set(bytes(tokens.clamp(max=255).tolist()).decode(errors="replace").split("\n")[1:-1])
    whole = {line for line in trained if len(line) == 15}
    assert whole <= lines
    assert len(whole) > len(lines) // 2  # the others are cut by the end of a sequence


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
    settings = {"block_size": 512, "streaming": True, "shuffle_buffer_documents": 2}
    loader = corpus_of(tmp_path / "texts", **settings).train_loader(200, seed=1)
    again = corpus_of(tmp_path / "texts", **settings)
    for _ in range(20):
        state = loader.state_dict()
        expected = loader.next().tokens
        resumed = again.train_loader(200, seed=1)
        resumed.load_state_dict(state)
        assert torch.equal(resumed.next().tokens, expected)
    assert state["shares"][0]["epoch"] > 1


@pytest.mark.parametrize("val_tokens", [1, 10, 16])
def test_no_more_validation_text_is_collected_than_asked_for(folder, corpus_of, val_tokens):
    corpus = corpus_of(folder, block_size=3, val_tokens=val_tokens, **SETTINGS)
    assert corpus.facts["val_tokens"] == max(4, -(-val_tokens // 4) * 4)


def test_validation_files_are_never_trained_on(folder, corpus_of):
    corpus = corpus_of(folder, block_size=3, val_source=str(folder / "b.txt"), **SETTINGS)
    assert corpus.validation_tokens().tolist() == [*b"040", EOS]
    assert set(texts(corpus.train_loader(10, seed=1), 300)) == {f"{i:03}" for i in range(100) if i != 40}


# A pass is 360 tokens, a batch 20: the third pass begins after step 36.
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


@pytest.mark.slow
def test_resume_is_bit_equal_inside_long_documents(tmp_path, corpus_of):
    """Rows of several parts, and more text than is tokenized at a time."""
    rows = [{"text": f"{letter} some text\n" * 40_000} for letter in "abcdef"]
    write_table(tmp_path / "a.jsonl", rows)
    write_text(tmp_path / "b.txt.gz", "text of b\n" * 60_000)
    tokenizer = train_tokenizer([row["text"][:50] for row in rows], "bpe", 270)
    corpus = corpus_of(tmp_path, block_size=30_000, tokenizer=tokenizer, streaming=True, shuffle_buffer_documents=3)
    loader = corpus.train_loader(4, seed=1)
    for _ in range(8):
        state = loader.state_dict()
        expected = loader.next().tokens
        again = corpus.train_loader(4, seed=1)
        again.load_state_dict(state)
        assert torch.equal(again.next().tokens, expected)


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
    with pytest.raises(ValueError, match=r"'stream', not 'windows': it was saved with another data\.streaming"):
        corpus_of(folder, block_size=4, text_column="text").train_loader(4, seed=1).load_state_dict(state)


def equal(one, other):
    return all(
        (a is None and b is None) or torch.equal(a, b)
        for a, b in ((one.tokens, other.tokens), (one.starts, other.starts), (one.is_target, other.is_target))
    )


@pytest.mark.slow
@pytest.mark.parametrize("carry_state", [False, True])
@pytest.mark.parametrize(("batch_size", "world_size"), [(4, 2), (4, 4), (70, 7)])
def test_processes_share_the_documents_and_together_get_the_batch_of_one(
    folder, corpus_of, batch_size, world_size, carry_state
):
    """Each read and tokenized all of them."""
    corpus = corpus_of(folder, block_size=5, **SETTINGS)
    alone = corpus.train_loader(batch_size, seed=1, carry_state=carry_state)
    shared = [
        corpus.train_loader(batch_size, 1, rank, world_size, carry_state=carry_state) for rank in range(world_size)
    ]
    for _ in range(20):
        assert equal(alone.next(), Batch.stack([loader.next() for loader in shared]))
    assert alone.num_taken > 100
    # Of 64 lanes that 70 sequences share, some are of two processes.
    assert max(loader.num_taken for loader in shared) < 1.3 * alone.num_taken / world_size


@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 1), (4, 2), (2, 4)])
@pytest.mark.parametrize("carry_state", [False, True])
def test_another_number_of_processes_reads_on_bit_equal(folder, corpus_of, before, after, carry_state):
    corpus = corpus_of(folder, block_size=5, **SETTINGS)

    def loaders(world_size):
        return [corpus.train_loader(8, 1, rank, world_size, carry_state=carry_state) for rank in range(world_size)]

    def step(shared):
        return Batch.stack([loader.next() for loader in shared])

    first = loaders(before)
    for _ in range(25):
        step(first)
    first[-1].prepare()  # one process may be further than the others
    stored = io.BytesIO()
    torch.save(join_states([loader.state_dict() for loader in first]), stored)
    stored.seek(0)
    state = torch.load(stored, weights_only=True)
    second = loaders(after)
    for loader in second:
        loader.load_state_dict(state)
    assert all(equal(step(second), step(first)) for _ in range(40))


@pytest.mark.parametrize("kind", ["stream", "continued stream"])
def test_the_position_of_a_version_without_lanes_is_read_on_from(folder, corpus_of, kind):
    """What it had read and not given yet comes first, and nothing twice in its pass."""
    pin = torch.load(
        Path(__file__).parent.parent / "fixtures" / f"{kind.replace(' ', '_')}_state.pt", weights_only=True
    )
    corpus = corpus_of(folder, block_size=4, **SETTINGS)
    carry = kind != "stream"
    loaders = [corpus.train_loader(5, 1, rank, 5, carry_state=carry) for rank in range(5)]
    for loader in loaders:
        loader.load_state_dict(pin["state"])
    found = [text for loader in loaders for text in texts(loader, 60)]
    given, left = set(pin["given"]), {f"{i:03}" for i in range(100) if i % 10 != 9} - set(pin["given"])
    assert len(given) > 20
    assert left <= set(found[:])
    for loader in loaders:
        assert loader.epoch >= 1


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
while loader.epoch < 1:
    loader.next()
print(peak, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak in KiB")
@pytest.mark.parametrize("name", ["t.txt", "t.jsonl"])
def test_memory_stays_flat_while_the_source_is_read(tmp_path, name):
    """The buffer is full after a few batches; 32 MB must not add to that what keeping it would."""
    line = "words of a line that is repeated over and over again, to make a large file of it\n"
    if name == "t.txt":
        write_text(tmp_path / name, line * 400_000)
    else:
        write_table(tmp_path / name, [{"text": line * 100}] * 4_000)
    command = [sys.executable, "-c", _MEASURE, str(tmp_path / name)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    early, late = map(int, result.stdout.split())
    assert late - early < 24 * 1024, f"{early} KiB became {late} KiB"
