"""Mixes: every row of one source, drawn by weight from (seed, step, row) alone; resumable, shareable, all named."""

import json
import math
from collections import Counter

import pytest
import torch

from bdh.data import DataConfig
from bdh.data.batches import join_states
from bdh.data.prepare import apportion, training_texts, validation_texts
from bdh.validation import Faults, collect_faults
from tests.data.conftest import write_table, write_text


@pytest.fixture
def entries(tmp_path):
    """Texts of one letter each: a file of a's, a table of b's in a column `body`, a streamed table of c's."""
    write_text(tmp_path / "a.txt", "a" * 500)
    write_table(tmp_path / "b.jsonl", [{"id": "x", "body": "b" * 20} for _ in range(40)])
    write_table(tmp_path / "c.jsonl", [{"text": "c" * 20} for _ in range(40)])
    return [
        {"source": str(tmp_path / "a.txt"), "weight": 5},
        {"source": str(tmp_path / "b.jsonl"), "weight": 3, "text_column": "body"},
        {"source": str(tmp_path / "c.jsonl"), "weight": 2, "streaming": True},
    ]


@pytest.fixture
def mixed(entries, corpus_of):
    return lambda mix=None, **more: corpus_of("pydoc", mix=mix or entries, block_size=8, special_tokens=False, **more)


def letters(rows):
    """The letter of each row, which holds no other."""
    for row in rows:
        assert len(set(row.tolist())) == 1
    return "".join(chr(row[0]) for row in rows.tolist())


def test_rows_come_from_each_source_by_its_weight(mixed):
    loader = mixed().train_loader(100, seed=1)
    found = Counter("".join(letters(loader.next().tokens) for _ in range(60)))
    for letter, share in (("a", 0.5), ("b", 0.3), ("c", 0.2)):
        deviation = math.sqrt(share * (1 - share) / 6000)
        assert found[letter] / 6000 == pytest.approx(share, abs=4 * deviation)


def test_the_source_of_a_row_depends_on_seed_step_and_row_alone(mixed):
    corpus = mixed()
    first = corpus.train_loader(6, seed=1)
    drawn = [letters(first.next().tokens) for _ in range(5)]
    # Of a larger batch the first rows are the same, and a loader need not have been at the steps before.
    larger = corpus.train_loader(9, seed=1)
    assert ["abc"[n] for n in larger.sources_of(4)[:6]] == list(drawn[4])
    assert drawn != [letters(corpus.train_loader(6, seed=2).next().tokens) for _ in range(5)]
    assert len(set(drawn)) > 1


def test_it_resumes_bit_equal(mixed):
    loader = mixed().train_loader(6, seed=1)
    for _ in range(7):
        loader.next()
    state = loader.state_dict()
    expected = [loader.next().tokens for _ in range(20)]
    again = mixed().train_loader(6, seed=1)
    again.load_state_dict(state)
    assert all(torch.equal(again.next().tokens, rows) for rows in expected)


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_together_get_the_rows_of_one_and_share_a_state(mixed, world_size):
    corpus = mixed()
    alone = corpus.train_loader(6, seed=1)
    shared = [corpus.train_loader(6, 1, rank, world_size) for rank in range(world_size)]
    for _ in range(10):
        assert torch.equal(alone.next().tokens, torch.cat([loader.next().tokens for loader in shared]))
    assert {repr(loader.state_dict()) for loader in shared} == {repr(alone.state_dict())}


@pytest.mark.parametrize("repeats", [1, 2])
def test_a_run_of_several_processes_resumes_bit_equal(mixed, repeats):
    """The weights of the sources were joined over the processes as their shares of a stream are, so that none could resume."""
    shared = [mixed().train_loader(6, 1, rank, 2) for rank in range(2)]
    for _ in range(7):
        for loader in shared:
            loader.next()
    state = join_states([loader.state_dict() for loader in shared])
    state["shares"] *= repeats  # as in the checkpoints of that version
    expected = [torch.cat([loader.next().tokens for loader in shared]) for _ in range(20)]
    again = mixed().train_loader(6, seed=1)
    again.load_state_dict(state)
    assert all(torch.equal(again.next().tokens, rows) for rows in expected)


def test_two_sources_of_one_text_do_not_go_through_it_in_step(tmp_path, corpus_of):
    path = str(write_text(tmp_path / "t.txt", "".join(f"{i:04} " for i in range(2000))))
    corpus = corpus_of("pydoc", mix=[{"source": path}, {"source": path}], block_size=8)
    loader = corpus.train_loader(40, seed=1)
    numbers = loader.sources_of(0)
    rows = loader.next().tokens
    of_each = [{tuple(row) for row, n in zip(rows.tolist(), numbers, strict=True) if n == which} for which in (0, 1)]
    assert of_each[0].isdisjoint(of_each[1])
    assert [each["label"] for each in corpus.facts["mix"]] == ["1:t.txt", "2:t.txt"]


def test_a_state_of_other_shares_seed_or_kind_is_refused(mixed, entries, corpus_of):
    state = mixed().train_loader(6, seed=1).state_dict()
    with pytest.raises(ValueError, match="seed 1, but now it is 2"):
        mixed().train_loader(6, seed=2).load_state_dict(state)
    with pytest.raises(ValueError, match="shares"):
        mixed([{**entries[0], "weight": 1}, *entries[1:]]).train_loader(6, seed=1).load_state_dict(state)
    with pytest.raises(ValueError, match="'mix', not 'windows'"):
        corpus_of(entries[0]["source"]).train_loader(6, seed=1).load_state_dict(state)


def test_validation_windows_are_shared_by_weight_and_each_has_one(mixed):
    parts = mixed().validation_parts(10)
    assert [part.name for part in parts] == ["a.txt", "b.jsonl", "c.jsonl"]
    assert [letters(part.batch.tokens) for part in parts] == ["aaaaa", "bbb", "cc"]
    assert letters(mixed().validation_windows(10)) == "aaaaabbbcc"
    assert [len(part.batch.tokens) for part in mixed().validation_parts(1)] == [1, 1, 1]


@pytest.mark.parametrize(
    ("number", "shares", "expected"),
    [(10, [0.5, 0.3, 0.2], [5, 3, 2]), (10, [0.34, 0.33, 0.33], [4, 3, 3]), (7, [0.9, 0.05, 0.05], [6, 1, 1])],
)
def test_apportioning_keeps_the_sum_unless_a_source_would_get_nothing(number, shares, expected):
    assert apportion(number, shares) == expected


def test_a_source_of_weight_0_is_left_out(entries, mixed):
    gone = [{**entries[0], "weight": 0, "source": "nowhere.txt"}, *entries[1:]]
    corpus = mixed(gone)
    assert set(letters(corpus.train_loader(50, seed=1).next().tokens)) == {"b", "c"}
    assert [each["share"] for each in corpus.facts["mix"]] == [0.6, 0.4]


def test_facts_and_fingerprint_are_of_all_sources(entries, mixed):
    corpus, without_stream = mixed(), mixed(entries[:2])
    assert corpus.facts["source"] == "50.0% a.txt, 30.0% b.jsonl, 20.0% c.jsonl"
    assert corpus.facts["train_tokens"] is None  # of a stream nobody knows
    assert without_stream.facts["train_tokens"] == 450 + 36 * 20
    json.dumps(corpus.facts)
    heavier = mixed([{**entries[0], "weight": 6}, *entries[1:]])
    with open(entries[1]["source"], "a") as file:
        file.write('{"id": "x", "body": "bbb"}\n')
    assert len({each.fingerprint for each in (corpus, without_stream, heavier, mixed())}) == 4


def test_a_tokenizer_learns_from_every_source_and_never_from_what_is_held_out(entries):
    config = DataConfig(mix=entries)
    assert set("".join(training_texts(config))) == set("".join(validation_texts(config))) == set("abc")
    assert sum(map(len, training_texts(config))) == 450 + 36 * 20 + 36 * 20


def test_a_mix_as_one_text_is_refused(mixed):
    with pytest.raises(ValueError, match="one by one"):
        mixed().train_tokens()


def faults_of(**settings):
    faults = Faults()
    collect_faults(DataConfig(**settings), faults.with_prefix("data"))
    return faults.found


def test_a_mix_with_all_that_it_may_set_has_no_fault():
    entry = {"source": ["a.txt", "b.txt"], "weight": 0.5, "text_column": None, "val_fraction": 0.2, "streaming": True}
    assert faults_of(mix=[entry, {"source": "organisation/set", "name": "en", "split": "train[:10%]"}]) == []


@pytest.mark.parametrize(("mix", "fault"), [
    ([], "data.mix is []: must be a list of at least one source"),
    ([{"weight": 2}], "data.mix[0] is {'weight': 2}: must be a source"),
    ([{"source": "a", "wait": 2}], "data.mix[0].wait is 2: must be left out: an entry has source, weight, name"),
    ([{"source": "a"}, {"source": 3}], "data.mix[1].source is 3: must be text, or a list of texts"),
    ([{"source": "a", "text_column": 3}], "data.mix[0].text_column is 3: must be text, or null"),
    ([{"source": "a", "val_fraction": 2.0}], "data.mix[0].val_fraction is 2.0: must be above 0 and below 1"),
    ([{"source": "a", "weight": -1}], "data.mix is [-1]: must be finite, non-negative weights with a sum above 0"),
    ([{"source": "a", "weight": 0}, {"source": "b", "weight": 0}], "data.mix is [0, 0]: must be finite, non-negative"),
    ([{"source": "a", "weight": float("nan")}, {"source": "b"}], "data.mix is [nan, 1]: must be finite, non-negative"),
    ([{"source": "a", "weight": float("inf")}], "data.mix is [inf]: must be finite, non-negative"),
    ([{"source": "a", "weight": "much"}], "data.mix is ['much']: must be finite, non-negative"),
])  # fmt: skip
def test_a_fault_of_a_mix_names_the_entry_or_the_weights(mix, fault):
    assert [found for found in faults_of(mix=mix) if found.startswith(fault)]


def test_all_that_is_wrong_with_an_entry_is_reported_together():
    """A name that is no setting hid the next one, and what was wrong with the entry's values."""
    found = faults_of(mix=[{"source": 3, "wait": 2, "colour": "red", "val_fraction": 2.0}, {"wieght": 1}])
    assert [fault.partition(": must be ")[0] for fault in found] == [
        "data.mix[0].wait is 2",
        "data.mix[0].colour is 'red'",
        "data.mix[0].source is 3",
        "data.mix[0].val_fraction is 2.0",
        "data.mix[1].wieght is 1",
        "data.mix[1] is {'wieght': 1}",
    ]


def test_what_names_texts_beside_a_mix_is_refused():
    found = faults_of(mix=[{"source": "a"}], source="b.txt", val_source="c.txt")
    assert [fault.split(" is ")[0] for fault in found] == ["data.source", "data.val_source"]


@pytest.mark.parametrize("streaming", [False, True])
def test_what_one_source_holds_out_is_not_trained_on_in_another(tmp_path, mixed, streaming):
    """Each entry was trained on the files that the others validate on."""
    for letter in "abv":
        write_text(tmp_path / "texts" / f"{letter}.txt", letter * 400)
    a, b, v = (str(tmp_path / "texts" / f"{letter}.txt") for letter in "abv")
    mix = [{"source": a, "val_source": v}, {"source": str(tmp_path / "texts"), "val_source": b}]
    corpus = mixed(mix, streaming=streaming)
    loader = corpus.train_loader(8, seed=1)
    assert set("".join(letters(loader.next().tokens) for _ in range(40))) == {"a"}
    validated = [set(letters(part.batch.tokens)) for part in corpus.validation_parts(8)]
    assert validated == [{"v"}, {"b"}]
    assert set("".join(training_texts(DataConfig(mix=mix, streaming=streaming)))) == {"a"}


@pytest.mark.parametrize("streaming", [False, True])
def test_a_file_of_two_sources_is_refused_where_a_share_of_it_is_held_out(tmp_path, mixed, streaming):
    """The end of the file, which one entry held out, was trained on through the other."""
    path = write_text(tmp_path / "texts" / "n.txt", "x" * 400 + "y" * 400)
    other, val = write_text(tmp_path / "o.txt", "o" * 400), write_text(tmp_path / "v.txt", "v" * 400)
    both = [{"source": str(path), "val_fraction": 0.5}, {"source": str(path.parent), "val_fraction": 0.1}]
    match = rf"data\.mix: 'n\.txt' and 'texts' both read {path}, so the share of it that 'n\.txt' holds out would"
    for text in (mixed, lambda mix, **more: list(training_texts(DataConfig(mix=mix, **more)))):
        with pytest.raises(ValueError, match=match):
            text(both, streaming=streaming)
        with pytest.raises(
            ValueError, match=r"'texts' and 'n\.txt' both read"
        ):  # also where the first holds out none of it
            text([{**both[0], "val_source": str(val)}, both[1]], streaming=streaming)
    with pytest.raises(ValueError, match="'1:pydoc' and '2:pydoc' both read pydoc, so the share"):
        mixed([{"source": "pydoc"}, {"source": "pydoc", "val_fraction": 0.2}], streaming=streaming)
    mixed([{**each, "val_source": str(val)} for each in both], streaming=streaming)
    mixed([both[0], {"source": str(other)}], streaming=streaming)


@pytest.mark.parametrize("suffix", ["jsonl", "txt"])
def test_a_split_that_one_source_validates_on_is_not_trained_on_in_another(tmp_path, mixed, suffix):
    for split in ("train", "test"):
        path = tmp_path / "set" / "data" / f"{split}-00000-of-00001.{suffix}"
        write = write_table if suffix == "jsonl" else lambda path, rows: write_text(path, f"{rows[0]['text']}\n" * 40)
        write(path, [{"text": split * 9}] * 40)
    other = write_text(tmp_path / "o.txt", "o" * 400)
    data_set = {"source": str(tmp_path / "set")}
    with pytest.raises(ValueError, match=r"nothing is left to train on|so what '1:set' holds out would be trained on"):
        mixed([{**data_set, "val_split": "test"}, {**data_set, "split": "test", "val_source": str(other)}])
    mixed([{**data_set, "val_source": str(other)}, {**data_set, "split": "test", "val_source": str(other)}])
