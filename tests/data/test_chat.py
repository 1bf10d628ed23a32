"""Conversations as training rows: what counts, where each starts, what is refused and with which line."""

import gzip
import json
from itertools import pairwise

import pytest
import torch

from bdh.data import DataConfig
from bdh.data.chat import holds_chat
from bdh.data.prepare import training_texts, validation_texts
from bdh.tokenizer import byte_tokenizer, train_tokenizer, with_chat_template

USER, ASSISTANT, END = 257, 258, 259


def talk(*contents):
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]}


def written(path, rows):
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.fixture
def chat_of(corpus_of):
    def prepare(source, block_size=16, **settings):
        tokenizer = settings.pop("tokenizer", None) or with_chat_template(byte_tokenizer(), None, needs_one=True)
        return corpus_of(source, block_size=block_size, tokenizer=tokenizer, **settings)

    return prepare


@pytest.fixture
def numbers(tmp_path):
    """40 conversations, of which the last 4 are held out: 'NN' is answered with its double."""
    return written(tmp_path / "chat.jsonl", [talk(f"{i:02}", f"{2 * i}") for i in range(40)])


def test_a_batch_is_that_worked_out_by_hand(tmp_path, chat_of):
    rows = [talk("a", "BC", "d", "E"), talk("f", "G")]
    corpus = chat_of(written(tmp_path / "c.jsonl", rows), block_size=14, val_fraction=0.5)
    batch = corpus.train_loader(1, seed=1).next()
    tokens = [USER, 97, END, ASSISTANT, 66, 67, END, USER, 100, END, ASSISTANT, 69, END, 0, 0]
    counts = [0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 1, 1, 0, 0]
    assert batch.tokens.tolist() == [tokens]
    assert batch.is_target.int().tolist() == [counts]
    assert batch.starts.int().tolist() == [[1] + 13 * [0]]
    assert batch.num_targets == 5
    assert batch.targets[batch.targets != -100].tolist() == [66, 67, END, 69, END]
    (part,) = corpus.validation_parts(8)
    assert part.batch.tokens.tolist() == [[USER, 102, END, ASSISTANT, 71, END]]
    assert part.batch.is_target.int().tolist() == [[0, 0, 0, 1, 1]]
    assert part.bytes_per_token == 1 / 2


def conversations_in(batch):
    """The tokens of each conversation of a batch, by its marks of starts."""
    for tokens, starts in zip(batch.tokens.tolist(), batch.starts.tolist(), strict=True):
        places = [place for place, is_start in enumerate(starts) if is_start]
        yield from (tuple(tokens[a:b]) for a, b in pairwise([*places, len(tokens)]))


def test_each_pass_gives_every_conversation_once_in_rows_of_several(numbers, chat_of):
    corpus = chat_of(numbers)
    loader = corpus.train_loader(corpus.facts["rows"], seed=1)
    passes = [loader.next() for _ in range(3)]
    expected = {(USER, *f"{i:02}".encode(), END, ASSISTANT, *f"{2 * i}".encode(), END) for i in range(36)}
    assert corpus.facts["rows"] < 36 / 1.8
    for batch in passes:
        found = [tuple(token for token in each if token) for each in conversations_in(batch)]
        assert sorted(found) == sorted(expected)
    assert not torch.equal(passes[0].tokens, passes[1].tokens)


def test_padding_and_questions_do_not_count(numbers, chat_of):
    batch = chat_of(numbers).train_loader(12, seed=1).next()
    counted = batch.tokens[:, 1:][batch.is_target]
    assert 0 not in counted
    assert set(counted.tolist()) <= {*b"0123456789", END}
    ends, answers = (batch.tokens == END).sum(), (batch.tokens == ASSISTANT).sum()
    assert (counted == END).sum() == answers == ends / 2


def test_it_resumes_bit_equal_and_processes_share_the_rows(numbers, chat_of):
    corpus = chat_of(numbers)
    alone = corpus.train_loader(6, seed=1)
    shared = [corpus.train_loader(6, 1, rank, 3) for rank in range(3)]
    for step in range(12):  # several passes, the end of one within a batch
        if step == 5:
            again = corpus.train_loader(6, seed=1)
            again.load_state_dict(alone.state_dict())
        batch = alone.next()
        parts = [loader.next() for loader in shared]
        if step >= 5:
            assert torch.equal(again.next().tokens, batch.tokens)
        for name in ("tokens", "is_target", "starts"):
            assert torch.equal(getattr(batch, name), torch.cat([getattr(part, name) for part in parts]))
    assert {repr(loader.state_dict()) for loader in shared} == {repr(alone.state_dict())}
    with pytest.raises(ValueError, match="seed 1, but now it is 2"):
        corpus.train_loader(6, seed=2).load_state_dict(alone.state_dict())


def test_a_conversation_longer_than_a_row_continues_in_another_and_is_announced(tmp_path, chat_of, caplog):
    path = written(tmp_path / "c.jsonl", [talk("a", "B" * 40), talk("c", "D")])
    corpus = chat_of(path, block_size=16, val_fraction=0.5)
    assert "1 of 1 conversations are longer than train.block_size, 16 tokens" in caplog.text
    assert corpus.facts["cut_documents"] == 1
    batch = corpus.train_loader(corpus.facts["rows"], seed=1).next()
    assert batch.num_targets == 41  # 40 letters and the end
    assert batch.starts.sum() == 3


def test_a_conversation_without_an_answer_is_left_out_and_counted(tmp_path, chat_of, caplog):
    rows = [talk("a"), talk("b", "C"), {"messages": [{"role": "system", "content": "d"}]}, talk("e", "F")]
    corpus = chat_of(written(tmp_path / "c.jsonl", rows))
    assert corpus.facts["documents"] == 2
    assert corpus.facts["skipped"] == {"conversations without a message of the assistant": 2}
    assert "left out conversations without a message of the assistant (2)" in caplog.text


GOOD = json.dumps(talk("a", "b"))


@pytest.mark.parametrize(("line", "fault"), [
    ('{"text": "a"}', "has no 'messages', but only 'text': a line must be like"),
    ("[1, 2]", "has no 'messages', but [1, 2]"),
    ("{not json", "is not JSON"),
    ('{"messages": []}', "messages is []: must be a list of at least one message"),
    ('{"messages": "hello"}', "messages is 'hello': must be a list"),
    ('{"messages": ["hello"]}', "message 1: the role is missing in 'hello': must be one of system, user, assistant"),
    ('{"messages": [{"content": "a"}]}', "message 1: the role is None"),
    ('{"messages": [{"role": "user", "content": "a"}, {"role": "bot", "content": "b"}]}', "message 2: the role is 'bot'"),
    ('{"messages": [{"role": ["user"], "content": "a"}]}', "message 1: the role is ['user']"),
    ('{"messages": [{"role": "user", "content": 3}]}', "message 1: the content is 3: must be text"),
    ('{"messages": [{"role": "user"}]}', "message 1: the content is None: must be text"),
    ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "half of a surrogate pair"),
])  # fmt: skip
def test_a_line_that_is_no_conversation_is_named_with_its_file_and_number(tmp_path, chat_of, cache, line, fault):
    path = written(tmp_path / "c.jsonl", [GOOD, "", line, GOOD])
    with pytest.raises(ValueError, match="line 3") as caught:
        chat_of(path, format="chat")
    assert str(caught.value).startswith(f"{path}, line 3")
    assert fault in str(caught.value)
    assert not list(cache.rglob("tokens.bin"))


def test_bytes_that_are_not_utf8_are_named_by_their_place_or_replaced(tmp_path, chat_of):
    path = tmp_path / "c.jsonl"
    path.write_bytes(f"{GOOD}\n".encode() + GOOD.encode().replace(b'"a"', b'"\xe9"') + b"\n")
    with pytest.raises(ValueError, match=rf"c\.jsonl is not UTF-8: byte {path.read_bytes().index(0xE9)} is 0xE9"):
        chat_of(path)
    assert chat_of(path, encoding_errors="replace").facts["documents"] == 2


def test_what_is_chat_is_seen_or_set(tmp_path):
    chat = written(tmp_path / "c.jsonl", [GOOD])
    zipped = written(tmp_path / "c.jsonl.gz", ["", GOOD])
    table = written(tmp_path / "t.jsonl", [{"text": "a", "messages": 3}])
    text = written(tmp_path / "t.txt", [GOOD])

    def holds(source, **settings):
        return holds_chat(DataConfig(source=str(source), **settings))

    assert [holds(source) for source in (chat, zipped, table, text, "pydoc", tmp_path / "gone.jsonl")] == [
        True, True, False, False, False, False,
    ]  # fmt: skip
    assert not holds(f"{chat},{text}")
    assert not holds(chat, format="text")
    assert not holds(chat, text_column="messages")
    assert holds(table, format="chat")
    assert holds("pydoc", mix=[{"source": str(text)}, {"source": str(chat)}])


def test_files_of_other_types_are_left_out_and_text_alone_is_refused(tmp_path, chat_of):
    written(tmp_path / "c.jsonl", [GOOD, GOOD])
    (tmp_path / "README.md").write_text("text")
    assert chat_of(tmp_path, format="chat").facts["skipped"] == {"files of other types": 1}
    with pytest.raises(ValueError, match=r"holds no conversations: they are read from \.jsonl files"):
        chat_of(tmp_path / "README.md", format="chat")


def test_another_column_a_validation_file_and_the_cache(tmp_path, chat_of):
    rows = [{"turns": talk("a", letter)["messages"]} for letter in "BCD"]
    path, held_out = written(tmp_path / "c.jsonl", rows), written(tmp_path / "v.jsonl", rows[:1])
    settings = {"format": "chat", "text_column": "turns", "val_source": str(held_out)}
    corpus = chat_of(path, **settings)
    assert (corpus.facts["documents"], corpus.facts["val_documents"]) == (4, 1)
    assert not corpus.facts["was_cached"]
    again = chat_of(path, **settings)
    assert again.facts["was_cached"]
    assert again.fingerprint == corpus.fingerprint != chat_of(path, **settings | {"val_source": None}).fingerprint
    json.dumps(corpus.facts)


def test_another_template_is_another_entry_of_the_cache(numbers, chat_of):
    first = chat_of(numbers)
    tokenizer = with_chat_template(byte_tokenizer(), None, needs_one=True)
    tokenizer.chat_template = tokenizer.chat_template.replace("<|system|>", "")
    assert not chat_of(numbers, tokenizer=tokenizer).facts["was_cached"]
    bpe = with_chat_template(train_tokenizer(["some words"] * 9, "bpe", 270), None, needs_one=True)
    assert chat_of(numbers, tokenizer=bpe).fingerprint != first.fingerprint


def test_too_few_conversations_and_streaming_are_refused(tmp_path, chat_of):
    path = written(tmp_path / "c.jsonl", [GOOD])
    with pytest.raises(ValueError, match="has 1 conversation with an answer: at least one to train on and one to"):
        chat_of(path)
    with pytest.raises(ValueError, match=r"data\.streaming is true, but conversations are tokenized before"):
        chat_of(path, streaming=True)


def test_a_tokenizer_learns_from_the_messages_that_are_trained_on(numbers):
    config = DataConfig(source=str(numbers))
    assert list(training_texts(config))[:4] == ["00", "0", "01", "2"]
    assert list(validation_texts(config)) == ["36", "72", "37", "74", "38", "76", "39", "78"]


def test_windows_for_the_activity_have_the_shape_of_a_row_however_few_there_are(numbers, chat_of):
    assert chat_of(numbers, block_size=16).validation_windows(3).shape == (1, 17)
    assert chat_of(numbers, block_size=6).validation_windows(3).shape == (3, 7)
    assert chat_of(numbers, block_size=500).validation_windows(3).shape == (1, 501)


def test_conversations_and_text_mix(numbers, tmp_path, chat_of):
    (tmp_path / "t.txt").write_text("plain text " * 100)
    corpus = chat_of("pydoc", mix=[{"source": str(numbers)}, {"source": str(tmp_path / "t.txt")}])
    batch = corpus.train_loader(40, seed=1).next()
    is_chat = batch.starts.any(1)
    assert 5 < is_chat.sum() < 35
    assert batch.is_target[~is_chat].all()
    assert not batch.is_target[is_chat].all(1).any()
