"""The sequences of the next step are made ready while a step runs, whatever they are read from."""

import threading

import pytest
import torch

from bdh.data.batches import Batch, Batches, DataStopped
from tests.data.conftest import write_table, write_text

KINDS = {
    "windows": {},
    "documents": {"pack": "documents"},
    "stream": {"streaming": True},
    "stream of documents": {"streaming": True, "pack": "documents"},
    "continued": {"carry_state": True},
    "continued stream": {"streaming": True, "carry_state": True},
    "mix": {"mix": True},
}


@pytest.fixture
def loaders(tmp_path, corpus_of):
    """Loaders of one kind, each at the beginning of the same text."""

    def make(kind, count=1):
        settings = dict(KINDS[kind])
        carry_state = settings.pop("carry_state", False)
        table = write_table(tmp_path / "a.jsonl", [{"text": f"text {i}"} for i in range(400)])
        if settings.pop("mix", False):
            other = write_text(tmp_path / "b.txt", "other words " * 40)
            settings["mix"] = [{"source": str(table), "streaming": True, "text_column": "text"}, {"source": str(other)}]
            table = "pydoc"
        else:
            settings["text_column"] = "text"
        corpus = corpus_of(table, block_size=5, val_tokens=1, **settings)
        return [corpus.train_loader(6, seed=1, carry_state=carry_state) for _ in range(count)]

    return make


def alone(value, **keywords):
    return [value]


def equal(one, other):
    pairs = [(getattr(one, name), getattr(other, name)) for name in ("tokens", "is_target", "starts")]
    return all((a is None and b is None) or torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("kind", KINDS)
def test_all_of_it_is_done_beside_the_step(loaders, monkeypatch, kind):
    """Sequences of a stream were packed, and all were pinned, between two steps."""
    loader, expected = loaders(kind, 2)
    made, pinned = set(), []
    original = Batch.__init__

    def noted(self, *arguments, **keywords):
        made.add(threading.current_thread().name)
        original(self, *arguments, **keywords)

    def pin(self):
        pinned.append(threading.current_thread().name)
        return self

    wanted = [expected.next() for _ in range(4)]
    monkeypatch.setattr(Batch, "__init__", noted)
    monkeypatch.setattr(Batch, "pinned", pin)  # there is no such memory without a GPU
    batches = Batches(loader, alone, num_processes=1, are_alike=False, pin_memory=True)
    with batches.prepared_ahead():
        found = [batches.next() for _ in range(4)]
    assert made == set(pinned) == {"batches"}
    assert all(equal(batch, other) for (batch, _), other in zip(found, wanted, strict=True))
    assert [number for _, number in found] == [batch.num_targets for batch in wanted]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_prepared_has_not_been_taken(loaders, kind):
    loader, twin, third = loaders(kind, 3)
    for _ in range(3):
        assert equal(loader.next(), twin.next())
    prepared = loader.prepare()
    assert equal(loader.prepare(), prepared)
    third.load_state_dict(loader.state_dict())
    following = [loader.next() for _ in range(3)]
    assert equal(following[0], prepared)
    assert all(equal(batch, third.next()) for batch in following)
    loader.prepare()
    loader.load_state_dict(twin.state_dict())
    assert all(equal(loader.next(), batch) for batch in following)


def test_targets_of_all_processes_are_counted(loaders):
    (loader,) = loaders("stream of documents")

    def gather(value, *, beside_training):
        assert beside_training
        return [value, (None, 7)]

    batch, num_targets = Batches(loader, gather, num_processes=2, are_alike=False, pin_memory=False).next()
    assert num_targets == batch.num_targets + 7 < 2 * 30

    def refuse(value, **keywords):
        raise AssertionError("the processes have nothing to agree on")

    (loader,) = loaders("windows")
    assert Batches(loader, refuse, num_processes=2, are_alike=True, pin_memory=False).next()[1] == 2 * 30


def test_a_fault_of_another_process_takes_nothing(loaders):
    loader, twin = loaders("stream", 2)
    others = [("b.jsonl, line 3: no text", 0), (None, 30)]

    def gather(value, **keywords):
        return [value, others[0]]

    batches = Batches(loader, gather, num_processes=2, are_alike=False, pin_memory=False)
    with pytest.raises(DataStopped, match=r"b\.jsonl, line 3"):
        batches.next()
    del others[0]
    assert equal(batches.next()[0], twin.next())


def test_documents_are_without_padding():
    tokens = torch.arange(1, 22).view(3, 7)
    batch = Batch(tokens)
    assert [each.tolist() for each in batch.documents()] == [row[:-1] for row in tokens.tolist()]
    is_target = torch.tensor([[0, 1, 1, 0, 0, 1], [0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]], dtype=torch.bool)
    starts = torch.zeros(3, 6, dtype=torch.bool)
    starts[:, 0] = starts[0, 4] = True
    batch = Batch(tokens, is_target, starts)
    assert [each.tolist() for each in batch.documents()] == [[1, 2, 3], [5, 6], [8, 9]]
