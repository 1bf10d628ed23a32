"""Sequences that continue from step to step: each is a text read without a gap, whatever the number of processes."""

import json
from itertools import pairwise

import pytest
import torch

from tests.data.conftest import write_table, write_text

EOS = 258
WORDS = " ".join(f"word{i}" for i in range(400))


@pytest.fixture
def documents(tmp_path):
    return write_table(tmp_path / "t.jsonl", [{"text": f"document {i} of {'x' * (i % 13)}"} for i in range(200)])


def sequences_over(loader, num_steps):
    """The tokens that each sequence reads, (sequences, steps * T), and the starts among them."""
    batches = [loader.next() for _ in range(num_steps)]
    for one, next_one in pairwise(batches):
        assert torch.equal(one.tokens[:, -1], next_one.tokens[:, 0])
    starts = [b.starts if b.starts is not None else torch.zeros_like(b.input_ids, dtype=torch.bool) for b in batches]
    for batch, at in zip(batches, starts, strict=True):
        if batch.is_target is not None:
            assert torch.equal(batch.is_target[:, :-1], ~at[:, 1:])  # a document's first token is not predicted
    return torch.cat([batch.input_ids for batch in batches], 1), torch.cat(starts, 1)


def test_a_mapped_sequence_reads_the_text_in_a_circle_and_starts_anew_at_its_beginning(tmp_path, corpus_of):
    corpus = corpus_of(write_text(tmp_path / "t.txt", WORDS), block_size=16, special_tokens=False)
    text = corpus.train_tokens().tolist()
    tokens, starts = sequences_over(corpus.train_loader(4, seed=7, carry_state=True), 3 * len(text) // 16)
    distances = set()
    for sequence, at in zip(tokens.tolist(), starts.tolist(), strict=True):
        begin = next(i for i in range(len(text)) if (text + text)[i : i + 40] == sequence[:40])
        assert sequence == (text * 5)[begin : begin + len(sequence)]
        assert [i for i, is_start in enumerate(at) if is_start] == [
            i for i in range(len(sequence)) if (begin + i) % len(text) == 0
        ]
        distances.add(begin % (len(text) // 4))
    assert len(distances) <= 2  # four equal parts, but for the tokens that are left over


def test_every_training_token_is_predicted_once_before_a_sequence_comes_where_the_next_one_began(tmp_path, corpus_of):
    text = "".join(f"{i:04}" for i in range(500))
    corpus = corpus_of(write_text(tmp_path / "t.txt", text), block_size=9, special_tokens=False)
    num_tokens = len(corpus.train_tokens())
    assert num_tokens == 1800 == 4 * 9 * 50
    loader = corpus.train_loader(4, seed=7, carry_state=True)
    tokens, _ = sequences_over(loader, 50)
    read = sorted(tokens.flatten().tolist())
    assert read == sorted(corpus.train_tokens().tolist())


def test_a_mapped_document_starts_after_each_end(documents, corpus_of):
    corpus = corpus_of(documents, block_size=10)
    tokens, starts = sequences_over(corpus.train_loader(4, seed=7, carry_state=True), 100)
    assert starts.sum() > 50
    begins = {tuple(corpus.train_tokens()[:8].tolist())}
    for sequence, at in zip(tokens.tolist(), starts.tolist(), strict=True):
        for i in range(1, len(sequence) - 8):
            assert at[i] == (sequence[i - 1] == EOS) or tuple(sequence[i : i + 8]) in begins


def test_a_streaming_sequence_reads_whole_documents_and_no_two_sequences_the_same_one(documents, corpus_of):
    corpus = corpus_of(documents, block_size=10, streaming=True, shuffle_buffer_documents=20)
    loader = corpus.train_loader(4, seed=7, carry_state=True)
    tokens, starts = sequences_over(loader, 80)
    assert loader.epoch == 0
    texts = []
    for sequence, at in zip(tokens, starts, strict=True):
        assert at[0]
        assert torch.equal(at[1:], sequence[:-1] == EOS)
        whole = bytes(token if token != EOS else 10 for token in sequence.tolist()).decode().split("\n")
        texts += whole[:-1]
    assert len(texts) == len(set(texts)) > 100
    assert all(text.startswith("document ") for text in texts)


@pytest.mark.parametrize("world_size", [2, 4])  # of streams: in test_streaming
def test_processes_together_get_the_sequences_of_one_and_store_the_same(documents, corpus_of, world_size):
    corpus = corpus_of(documents, block_size=10)
    alone = corpus.train_loader(4, seed=7, carry_state=True)
    shared = [corpus.train_loader(4, 7, rank, world_size, carry_state=True) for rank in range(world_size)]
    for _ in range(40):
        batch, parts = alone.next(), [loader.next() for loader in shared]
        assert torch.equal(batch.tokens, torch.cat([part.tokens for part in parts]))
        states = {repr(loader.state_dict()) for loader in (alone, *shared)}
        assert len(states) == 1


def test_a_mapped_loader_continues_from_its_state(documents, corpus_of):
    corpus = corpus_of(documents, block_size=10)
    loader = corpus.train_loader(4, seed=7, carry_state=True)
    for _ in range(5):
        loader.next()
    state = json.loads(json.dumps(loader.state_dict()))
    expected = [loader.next().tokens for _ in range(3)]
    again = corpus.train_loader(4, seed=7, carry_state=True)
    again.load_state_dict(state)
    assert all(torch.equal(again.next().tokens, tokens) for tokens in expected)


def test_where_the_sequences_begin_depends_on_the_seed(documents, corpus_of):
    corpus = corpus_of(documents, block_size=10)
    one, other = (corpus.train_loader(4, seed, carry_state=True).next().tokens for seed in (7, 8))
    assert not torch.equal(one, other)


def test_a_text_too_short_for_so_many_sequences_is_refused_with_the_numbers(tmp_path, corpus_of):
    corpus = corpus_of(
        write_text(tmp_path / "t.txt", "0123456789" * 13), block_size=20, special_tokens=False, val_fraction=0.3
    )
    corpus.train_loader(4, seed=7, carry_state=True)
    with pytest.raises(ValueError, match="5 sequences start 18 tokens apart in 91 training tokens: must be more than"):
        corpus.train_loader(5, seed=7, carry_state=True)


@pytest.mark.parametrize("streaming", [False, True])
def test_the_state_of_a_loader_that_does_not_carry_is_refused(documents, corpus_of, streaming):
    corpus = corpus_of(documents, block_size=10, streaming=streaming)
    state = corpus.train_loader(4, seed=7).state_dict()
    with pytest.raises(ValueError, match=r"it was saved with another data\.streaming or train\.carry_state"):
        corpus.train_loader(4, seed=7, carry_state=True).load_state_dict(state)
