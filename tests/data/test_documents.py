"""Blocks that do not see across the end of a document: what batches say of it, mapped and streaming."""

import pytest
import torch

from bdh.data.batches import Batch, starts_after
from tests.data.conftest import write_table

EOS = 258
TEXTS = [{"text": f"document {i} of {'x' * (i % 13)}"} for i in range(200)]


@pytest.fixture
def source(tmp_path):
    return write_table(tmp_path / "t.jsonl", TEXTS)


def test_a_document_starts_after_each_end_and_its_first_token_is_not_predicted():
    tokens = torch.tensor([[EOS, 1, 2, EOS, EOS, 3], [1, 2, 3, 4, 5, EOS]])
    batch = Batch.of_documents(tokens, starts_after(tokens, EOS))
    assert batch.starts.tolist() == [[False, True, False, False, True], [False] * 5]
    assert batch.targets.tolist() == [[-100, 2, EOS, -100, -100], [2, 3, 4, 5, EOS]]
    assert batch.num_targets == 7


def test_a_batch_without_an_end_is_a_plain_one():
    batch = Batch.of_documents(torch.ones(2, 5, dtype=torch.int64), torch.zeros(2, 5, dtype=torch.bool))
    assert batch.starts is None
    assert batch.is_target is None


@pytest.mark.parametrize("streaming", [False, True])
def test_the_rows_are_those_of_the_stream_with_their_starts(source, corpus_of, streaming):
    settings = {"block_size": 50, "streaming": streaming}
    plain = corpus_of(source, **settings).train_loader(8, seed=3)
    apart = corpus_of(source, pack="documents", **settings).train_loader(8, seed=3)
    for _ in range(20):
        expected, batch = plain.next(), apart.next()
        assert expected.starts is None
        assert torch.equal(batch.tokens, expected.tokens)
        # Streaming knows of the row before, so there a row may begin with a start.
        assert torch.equal(batch.starts[:, 1:], batch.tokens[:, :-2] == EOS)
        assert torch.equal(batch.is_target, batch.tokens[:, :-1] != EOS)


def test_parts_of_long_documents_are_apart_where_they_are_shuffled(tmp_path, corpus_of):
    """They have no <eos> between them, but what stands before such a part is another one."""
    write_table(tmp_path / "t.jsonl", [{"text": f"{letter} of a long text\n" * 30_000} for letter in "abcdef"])
    corpus = corpus_of(tmp_path, block_size=4096, pack="documents", streaming=True, val_fraction=0.1)
    loader = corpus.train_loader(64, seed=1)
    batches = [loader.next() for _ in range(8)]
    starts = sum(int(batch.starts.sum()) for batch in batches if batch.starts is not None)
    # 8 * 64 * 4096 bytes of parts of at most 256 KiB.
    assert starts >= 8


@pytest.mark.parametrize("carry_state", [False, True])
def test_a_streaming_loader_resumes_with_its_starts(source, corpus_of, carry_state):
    corpus = corpus_of(source, block_size=50, pack="documents", streaming=True, shuffle_buffer_documents=7)
    loader = corpus.train_loader(8, seed=3, carry_state=carry_state)
    for _ in range(30):
        state = loader.state_dict()
        expected = loader.next()
        again = corpus.train_loader(8, seed=3, carry_state=carry_state)
        again.load_state_dict(state)
        batch = again.next()
        assert torch.equal(batch.tokens, expected.tokens)
        assert torch.equal(batch.starts, expected.starts)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_tokenizer_without_an_end_of_documents_is_refused(source, corpus_of, streaming):
    with pytest.raises(ValueError, match=r"data\.pack is 'documents', but the tokenizer has no <eos>"):
        corpus_of(source, pack="documents", streaming=streaming, special_tokens=False)
