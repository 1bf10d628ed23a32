"""The token stream on disk: what is in it, how it is split, and that it is whole or not there."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bdh.data import DataConfig, prepare_corpus
from bdh.tokenizer import byte_tokenizer, encode_texts, train_tokenizer
from tests.data.conftest import documents_of, write_table, write_text

WORDS = "".join(f"Sentence number {i}, of some words.\n" for i in range(300))


@pytest.mark.parametrize("length", [11, 100, 1_115_394])
def test_single_text_is_cut_where_python_would_cut_it(tmp_path, corpus_of, length):
    data = (WORDS * 130).encode()[:length]
    (tmp_path / "t.txt").write_bytes(data)
    corpus = corpus_of(tmp_path / "t.txt", special_tokens=False)
    assert bytes(corpus.train_tokens()) == data[: int(0.9 * len(data))]
    assert bytes(corpus.validation_tokens()) == data[int(0.9 * len(data)) :]


@pytest.mark.parametrize("kind", ["byte", "bpe"])
@pytest.mark.parametrize("text", ["🙂" * 50, "é" * 150_000])
def test_cut_never_parts_a_character(tmp_path, corpus_of, kind, text):
    write_text(tmp_path / "t.txt", text)
    tokenizer = byte_tokenizer() if kind == "byte" else train_tokenizer([WORDS], "bpe", 300)
    for fraction in (0.1, 0.33, 0.5, 0.51):
        corpus = corpus_of(tmp_path / "t.txt", tokenizer=tokenizer, val_fraction=fraction)
        train = tokenizer.decode(corpus.train_tokens().tolist())
        validation = tokenizer.decode(corpus.validation_tokens().tolist(), skip_special_tokens=True)
        assert train + validation == text
        assert abs(len(validation.encode()) - fraction * len(text.encode())) <= 4


def test_text_before_the_cut_does_not_end_and_text_after_it_does(tmp_path, corpus_of):
    corpus = corpus_of(write_text(tmp_path / "t.txt", "0123456789"), val_fraction=0.5)
    assert corpus.train_tokens().tolist() == list(b"01234")
    assert corpus.validation_tokens().tolist() == [*b"56789", 258]


def test_last_documents_are_held_out_and_each_ends_with_eos(tmp_path, corpus_of):
    path = write_table(tmp_path / "t.jsonl", [{"text": f"row {i:02}"} for i in range(20)])
    corpus = corpus_of(path, val_fraction=0.2)
    assert documents_of(corpus) == [f"row {i:02}" for i in range(20)]
    assert bytes(corpus.validation_tokens().astype(np.uint8)[:6]) == b"row 16"
    assert corpus.facts["val_documents"] == 4
    assert corpus.val_bytes_per_token == 6 / 7


def test_two_documents_give_one_to_each_part(tmp_path, corpus_of):
    write_text(tmp_path / "a.txt", "train")
    write_text(tmp_path / "b.txt", "validate")
    for fraction in (0.01, 0.99):
        corpus = corpus_of(tmp_path, special_tokens=False, val_fraction=fraction)
        assert bytes(corpus.validation_tokens()) == b"validate"


def test_validation_files_are_never_trained_on(tmp_path, corpus_of):
    for name in "abc":
        write_text(tmp_path / f"{name}.txt", f"text {name}")
    corpus = corpus_of(tmp_path, val_source=str(tmp_path / "b.txt"), special_tokens=False)
    assert bytes(corpus.train_tokens()) == b"text atext c"
    assert bytes(corpus.validation_tokens()) == b"text b"
    assert corpus.facts["skipped"] == {"files of data.val_source": 1}
    with pytest.raises(ValueError, match="nothing is left to train on"):
        corpus_of(tmp_path, val_source=str(tmp_path))


def test_missing_validation_file_is_named(tmp_path, corpus_of):
    path = write_text(tmp_path / "a.txt", "text")
    for name in ("b.txt", "b", "pydoc"):
        with pytest.raises(FileNotFoundError, match=f"'{name}'.*there is no such file"):
            corpus_of(path, val_source=name)


def test_spelled_out_special_token_is_text(tmp_path, corpus_of):
    write_table(tmp_path / "t.jsonl", [{"text": "a<eos>b"}, {"text": "<pad>"}])
    assert documents_of(corpus_of(tmp_path)) == ["a<eos>b", "<pad>"]


@pytest.mark.parametrize("kind", ["bpe", "unigram", "wordpiece"])
def test_stream_holds_what_the_tokenizer_gives_document_by_document(tmp_path, corpus_of, kind):
    tokenizer = train_tokenizer([WORDS], kind, 300)
    texts = [f"Document {i} with some words." for i in range(10)]
    path = write_table(tmp_path / "t.jsonl", [{"text": text} for text in texts])
    corpus = corpus_of(path, tokenizer=tokenizer)
    expected = [token for ids in encode_texts(tokenizer, texts) for token in [*ids.tolist(), tokenizer.eos_token_id]]
    assert [*corpus.train_tokens().tolist(), *corpus.validation_tokens().tolist()] == expected


@pytest.mark.parametrize(("special_tokens", "dtype"), [(False, "uint8"), (True, "uint16")])
def test_smallest_integers_that_fit_are_stored(tmp_path, corpus_of, special_tokens, dtype):
    corpus = corpus_of(write_text(tmp_path / "t.txt", WORDS), special_tokens=special_tokens)
    assert corpus.facts["dtype"] == dtype
    assert corpus.train_tokens().dtype == dtype


def test_second_time_comes_from_the_cache_and_is_the_same(tmp_path, corpus_of):
    path = write_text(tmp_path / "t.txt", WORDS)
    first, second = corpus_of(path), corpus_of(path, block_size=64)
    assert not first.facts["was_cached"]
    assert second.facts["was_cached"]
    assert second.fingerprint == first.fingerprint
    assert np.array_equal(second.train_tokens(), first.train_tokens())
    json.dumps(first.facts)


def test_other_text_tokenizer_or_split_is_another_entry(tmp_path, corpus_of):
    path = write_text(tmp_path / "t.txt", WORDS)
    corpora = [
        corpus_of(path),
        corpus_of(path, special_tokens=False),
        corpus_of(path, val_fraction=0.2),
        corpus_of(path, tokenizer=train_tokenizer([WORDS], "bpe", 300)),
        corpus_of(path, tokenizer=train_tokenizer([WORDS], "bpe", 310)),
        corpus_of(path, val_source=str(write_text(tmp_path / "v.txt", "other words"))),
    ]
    write_text(path, WORDS.replace("Sentence", "Utterance"))
    corpora.append(corpus_of(path))
    assert not any(corpus.facts["was_cached"] for corpus in corpora)
    assert len({corpus.fingerprint for corpus in corpora}) == len(corpora)


def test_fingerprint_is_that_of_the_text_wherever_it_lies(tmp_path, corpus_of):
    corpora = [corpus_of(write_text(tmp_path / name / "t.txt", WORDS)) for name in ("here", "there")]
    assert corpora[0].fingerprint == corpora[1].fingerprint


def test_settings_of_padding_do_not_change_the_tokens(tmp_path, corpus_of):
    path = write_text(tmp_path / "t.txt", WORDS)
    tokenizer = train_tokenizer([WORDS], "bpe", 300)
    before = corpus_of(path, tokenizer=tokenizer)
    tokenizer(["a", "b c"], padding=True, truncation=True, max_length=2)  # leaves both switched on in the backend
    after = corpus_of(path, tokenizer=tokenizer)
    assert after.facts["was_cached"]
    assert after.fingerprint == before.fingerprint


@pytest.mark.parametrize(("text", "block_size", "message"), [
    ("0123456789", 9, "training part has 9 tokens.*block_size 9 needs 10"),
    ("0123456789", 5, "validation part has 1 token, but.*block_size 5 needs 6"),
    ("x", 1, "training part has 1 token, but.*needs 2"),
])  # fmt: skip
def test_too_short_a_text_is_refused_and_nothing_written(tmp_path, corpus_of, cache, text, block_size, message):
    path = write_text(tmp_path / "t.txt", text)
    with pytest.raises(ValueError, match=message):
        corpus_of(path, block_size=block_size, special_tokens=False)
    assert published(cache) == []
    with pytest.raises(ValueError, match=f"block_size {block_size} needs {block_size + 1}"):
        corpus_of(path, block_size=block_size, special_tokens=False, streaming=True)
    assert published(cache) == []


def test_too_large_a_block_leaves_a_cached_text_alone(tmp_path, corpus_of, cache):
    path = write_text(tmp_path / "t.txt", WORDS)
    corpus_of(path)
    entries = published(cache)
    with pytest.raises(ValueError, match="needs 1000001"):
        corpus_of(path, block_size=1_000_000)
    assert published(cache) == entries != []


def test_fault_in_the_last_file_leaves_nothing_behind(tmp_path, corpus_of, cache):
    write_text(tmp_path / "a.txt", WORDS * 100)
    (tmp_path / "b.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"b\.txt is not UTF-8"):
        corpus_of(tmp_path)
    assert published(cache) == []


def test_entry_that_is_not_whole_is_reported_and_built_again(tmp_path, corpus_of, caplog):
    path = write_text(tmp_path / "t.txt", WORDS)
    first = corpus_of(path)
    folder = Path(first.facts["cache"])
    expected = first.train_tokens().tolist()
    for name, data in (("tokens.bin", b"short"), ("meta.json", b"{}"), ("meta.json", b"no json")):
        del first
        (folder / name).write_bytes(data)
        caplog.clear()
        first = corpus_of(path)
        assert "built again" in caplog.text
        assert first.train_tokens().tolist() == expected
        assert not first.facts["was_cached"]


def test_left_over_of_a_killed_process_is_removed(tmp_path, corpus_of, cache):
    path = write_text(tmp_path / "t.txt", WORDS)
    folder = Path(corpus_of(path).facts["cache"])
    (folder / "meta.json").unlink()
    left_over = folder.parent / f".{folder.name}.tmp"
    left_over.mkdir()
    (left_over / "tokens.bin").write_bytes(b"half of it")
    assert corpus_of(path).facts["train_tokens"] > 0
    assert published(cache) == [folder.name]


def test_entry_that_a_killed_process_was_replacing_is_found(tmp_path, corpus_of, cache):
    path = write_text(tmp_path / "t.txt", WORDS)
    folder = Path(corpus_of(path).facts["cache"])
    folder.rename(folder.parent / f".{folder.name}.old")
    assert corpus_of(path).facts["was_cached"]
    assert published(cache) == [folder.name]


@pytest.mark.slow
def test_killed_builder_does_not_keep_others_waiting(tmp_path, cache):
    path = write_text(tmp_path / "t.txt", WORDS * 100)
    code = f"""
import os, signal
from bdh.data import DataConfig, prepare_corpus, tokenized
from bdh.tokenizer import byte_tokenizer
tokenized.TokenWriter.finish = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
prepare_corpus(DataConfig(source={str(path)!r}), byte_tokenizer(), 8)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    assert not _prepare(str(path))[0]
    assert _prepare(str(path))[0]
    assert [len(name) for name in published(cache)] == [32]  # the entry alone: no lock, no beginning of another


def _prepare(source):
    corpus = prepare_corpus(DataConfig(source=source), byte_tokenizer(), 8)
    return corpus.facts["was_cached"], corpus.fingerprint, int(corpus.train_tokens().sum())


@pytest.mark.slow
def test_processes_at_the_same_time_get_the_same_entry(tmp_path, cache):
    path = write_text(tmp_path / "t.txt", WORDS * 100)
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        results = pool.map(_prepare, [str(path)] * 2, chunksize=1)
    assert len({result[1:] for result in results}) == 1
    assert len(published(cache)) == 1


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="limits the size of files as POSIX systems do")
def test_full_disk_is_said_to_be_full_and_the_beginning_removed(tmp_path, cache):
    path = write_text(tmp_path / "t.txt", WORDS * 100)
    code = f"""
import resource, signal
from bdh.data import DataConfig, prepare_corpus
from bdh.tokenizer import byte_tokenizer
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
prepare_corpus(DataConfig(source={str(path)!r}), byte_tokenizer(), 8)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "the disk is full" in result.stderr
    assert "data.cache_dir" in result.stderr
    assert published(cache) == []


def test_cache_that_cannot_be_a_folder_is_named(tmp_path, corpus_of):
    path = write_text(tmp_path / "t.txt", WORDS)
    with pytest.raises(OSError, match=re.escape(str(path))):
        corpus_of(path, cache_dir=str(path))


def test_cache_dir_of_the_settings_goes_before_the_environment(tmp_path, corpus_of, cache):
    corpus = corpus_of(write_text(tmp_path / "t.txt", WORDS), cache_dir=str(tmp_path / "mine"))
    assert corpus.facts["cache"].startswith(str(tmp_path / "mine"))
    assert published(cache) == []


def test_progress_counts_the_bytes_of_the_text(tmp_path):
    path = write_text(tmp_path / "t.txt", WORDS)
    calls = []
    prepare_corpus(DataConfig(source=str(path)), byte_tokenizer(), 8, progress=lambda *call: calls.append(call))
    assert calls[-1] == ("tokenizing", len(WORDS), len(WORDS))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_processes_together_get_the_rows_of_one(tmp_path, corpus_of, world_size):
    corpus = corpus_of(write_text(tmp_path / "t.txt", WORDS), block_size=16)
    alone = corpus.train_loader(4, seed=7)
    shared = [corpus.train_loader(4, 7, rank, world_size) for rank in range(world_size)]
    for _ in range(5):
        assert torch.equal(alone.next().tokens, torch.cat([loader.next().tokens for loader in shared]))


def test_row_depends_on_seed_step_and_its_number_alone(tmp_path, corpus_of):
    corpus = corpus_of(write_text(tmp_path / "t.txt", WORDS), block_size=16)
    small, large, other = (corpus.train_loader(size, seed) for size, seed in ((2, 7), (8, 7), (8, 8)))
    assert torch.equal(small.next().tokens, large.next().tokens[:2])
    assert not torch.equal(large.next().tokens, other.next().tokens)


def test_rows_are_windows_of_the_training_part(tmp_path, corpus_of):
    corpus = corpus_of(write_text(tmp_path / "t.txt", WORDS), block_size=16)
    rows = corpus.train_loader(64, seed=7).next().tokens
    assert rows.shape == (64, 17)
    assert rows.dtype == torch.int64
    text = bytes(corpus.train_tokens().astype(np.uint8))
    assert all(bytes(row.tolist()) in text for row in rows)


def test_every_window_can_be_drawn(tmp_path, corpus_of):
    corpus = corpus_of(write_text(tmp_path / "t.txt", "0123456789"), block_size=3, val_fraction=0.4)
    rows = corpus.train_loader(500, seed=7).next().tokens
    assert {bytes(row.tolist()) for row in rows} == {b"0123", b"1234", b"2345"}


def test_loader_continues_from_its_state(tmp_path, corpus_of):
    corpus = corpus_of(write_text(tmp_path / "t.txt", WORDS), block_size=16)
    loader = corpus.train_loader(4, seed=7)
    loader.next()
    state = json.loads(json.dumps(loader.state_dict()))
    expected = [loader.next().tokens for _ in range(3)]
    again = corpus.train_loader(4, seed=7)
    again.load_state_dict(state)
    assert all(torch.equal(again.next().tokens, rows) for rows in expected)
    with pytest.raises(ValueError, match="seed 7, but now it is 8"):
        corpus.train_loader(4, seed=8).load_state_dict(state)


@pytest.mark.parametrize(("batch_size", "world_size"), [(4, 3), (1, 2), (0, 1)])
def test_rows_that_cannot_be_shared_are_refused(tmp_path, corpus_of, batch_size, world_size):
    corpus = corpus_of(write_text(tmp_path / "t.txt", WORDS))
    with pytest.raises(ValueError, match=f"{batch_size} sequences?: it must be a multiple of the {world_size}"):
        corpus.train_loader(batch_size, 7, 0, world_size)


def test_validation_windows_are_evenly_spaced_from_the_first_token_to_the_last(tmp_path, corpus_of):
    corpus = corpus_of(write_text(tmp_path / "t.txt", WORDS), block_size=16)
    tokens = corpus.validation_tokens()
    windows = corpus.validation_windows(5)
    assert windows.shape == (5, 17)
    assert windows.dtype == torch.int64
    assert windows[0].tolist() == tokens[:17].tolist()
    assert windows[-1].tolist() == tokens[-17:].tolist()
    assert torch.equal(windows, corpus.validation_windows(5))


@pytest.mark.parametrize(("num_tokens", "expected"), [(9, 1), (16, 1), (17, 2), (25, 3), (80, 9)])
def test_there_are_no_more_validation_windows_than_fit(tmp_path, corpus_of, num_tokens, expected):
    write_text(tmp_path / "t.txt", "t" * 50)
    validation = write_text(tmp_path / "v.txt", "v" * num_tokens)
    corpus = corpus_of(tmp_path / "t.txt", block_size=8, val_source=str(validation), special_tokens=False)
    assert len(corpus.validation_windows(1000)) == expected


def published(cache):
    """Everything in the cache."""
    folder = cache / "tokens"
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []
