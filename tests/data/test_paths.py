"""Folders and patterns: every file once, and none that the program itself wrote."""

import os
import socket
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest

from bdh.data.files import files_below, files_matching
from bdh.data.reading import Skipped
from tests.data.conftest import documents_of, write_table, write_text


@contextmanager
def as_somebody():
    """An ordinary user, whom the rights of files hold back, where the tests run as root."""
    uid = os.geteuid()
    if uid == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(uid)


def write_run(folder, *, text="a sample of the model"):
    """What `bdh train` writes, as far as it could be taken for text."""
    write_text(folder / "config.yaml", "train: {max_steps: 3}\n")
    write_table(folder / "metrics.jsonl", [{"step": 1, "state": text}])
    write_table(folder / "samples.jsonl", [{"text": text}])
    for name in ("checkpoints/step-1/training.json", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"):
        write_text(folder / name, "{}")
    write_model(folder / "model")
    return folder


def write_model(folder):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        write_text(folder / name, "{}")
    write_text(folder / "README.md", "# A model card")
    return folder


def test_linked_folders_are_read_once_and_loops_end(tmp_path, corpus_of):
    """A link to a folder above it was a loop for globs, which gave its files forty times; folders left links out."""
    texts, other = tmp_path / "texts", tmp_path / "other"
    write_text(texts / "a.txt", "text a")
    write_text(texts / "sub" / "b.txt", "text b")
    write_text(other / "c.txt", "text c")
    (texts / "sub" / "up").symlink_to(texts)
    (texts / "elsewhere").symlink_to(other)
    (texts / "elsewhere-too").symlink_to(other)
    for source in (texts, f"{texts}/**/*.txt", f"{texts}/**"):
        assert documents_of(corpus_of(source)) == ["text a", "text c", "text b"]


def test_two_loops_do_not_multiply(tmp_path):
    """Each link of a loop doubled what a glob went through, forty levels deep."""
    write_text(tmp_path / "d" / "a.txt", "a")
    for name in ("one", "two", "three"):
        (tmp_path / "d" / name).symlink_to(tmp_path)
    assert files_matching(f"{tmp_path}/**/*.txt", Skipped()) == [tmp_path / "d" / "a.txt"]


def test_a_file_that_is_found_twice_is_read_once(tmp_path, corpus_of, caplog):
    """Read twice, what is held out of it was trained on too."""
    write_text(tmp_path / "a.txt", "text a")
    write_text(tmp_path / "b.txt", "text b")
    (tmp_path / "link.txt").symlink_to(tmp_path / "a.txt")
    os.link(tmp_path / "b.txt", tmp_path / "same.txt")
    for source in (tmp_path, [str(tmp_path), f"{tmp_path}/a.txt"], [f"{tmp_path}/a.txt", str(tmp_path)]):
        corpus = corpus_of(source)
        assert documents_of(corpus) == ["text a", "text b"]
        assert corpus.facts["skipped"]["texts that were found already"] >= 2
    assert "texts that were found already" in caplog.text
    corpus = corpus_of(f"{tmp_path}/a.txt,{tmp_path}/b.txt", val_source=f"{tmp_path}/same.txt,{tmp_path}/b.txt")
    assert documents_of(corpus) == ["text a", "text b"]
    assert corpus.facts["val_documents"] == 1


def test_a_built_in_text_that_is_named_twice_is_read_once(corpus_of):
    assert corpus_of("pydoc,pydoc").facts["train_bytes"] == corpus_of("pydoc").facts["train_bytes"]


def test_broken_links_are_left_out_and_counted(tmp_path, corpus_of, caplog):
    write_text(tmp_path / "a.txt", "text a")
    write_text(tmp_path / "b.txt", "text b")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "round.txt").symlink_to("round.txt")
    corpus = corpus_of(tmp_path)
    assert documents_of(corpus) == ["text a", "text b"]
    assert corpus.facts["skipped"] == {"broken links": 2}
    assert "left out broken links (2)" in caplog.text
    with pytest.raises(FileNotFoundError, match=r"gone\.txt' is a broken link: there is no .*nowhere"):
        corpus_of(tmp_path / "gone.txt")


def test_pipes_and_sockets_are_not_waited_for(tmp_path, corpus_of):
    """A pipe in a folder let the run wait for ever."""
    write_text(tmp_path / "a.txt", "text a")
    write_text(tmp_path / "b.txt", "text b")
    os.mkfifo(tmp_path / "pipe.txt")
    with socket.socket(socket.AF_UNIX) as unix, tempfile.TemporaryDirectory() as short:
        unix.bind(f"{short}/s.txt")
        (tmp_path / "socket.txt").symlink_to(f"{short}/s.txt")
        corpus = corpus_of(tmp_path)
        assert documents_of(corpus) == ["text a", "text b"]
        assert corpus.facts["skipped"] == {"pipes, sockets and devices": 2}
    for name in (tmp_path / "pipe.txt", "/dev/null"):
        with pytest.raises(ValueError, match=rf"'{name}' is a pipe, a socket or a device.*write it to a file"):
            corpus_of(name)


@pytest.mark.parametrize("pattern", ["", "/**/*.txt", "/*/*.txt"])
def test_a_folder_that_cannot_be_listed_is_named(corpus_of, pattern):
    """Its texts were left out without a word."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        root.chmod(0o755)
        write_text(root / "b" / "b.txt", "text b")
        closed = root / "closed"
        write_text(closed / "c.txt", "text c")
        closed.chmod(0o000)
        try:
            with as_somebody(), pytest.raises(PermissionError, match="closed"):
                corpus_of(f"{root}{pattern}")
        finally:
            closed.chmod(0o700)


def test_patterns_find_what_glob_finds(tmp_path, monkeypatch):
    import glob

    names = ("a.txt", "b.md", "x/a.txt", "x/.h/a.txt", ".hidden.txt", "x/y/[1].txt", "x/y/z/b.txt", "d.txt/e.txt")
    for name in names:
        write_text(tmp_path / name, name)
    monkeypatch.chdir(tmp_path)
    for pattern in ("*.txt", "**/*.txt", "*/*.txt", "x/**", "**/y/*", "x/?/[[]1].txt", ".*", "x/.h/*.txt", "./*.md",
                    "**/.h/*", "x*/**/b.txt", "**/z/**/*", "x/../*.txt", f"{tmp_path}/x/*"):  # fmt: skip
        expected = sorted({Path(name) for name in glob.glob(pattern, recursive=True) if Path(name).is_file()})
        assert sorted(files_matching(pattern, Skipped())) == expected, pattern


def test_folders_that_match_a_pattern_are_counted(tmp_path, corpus_of):
    write_text(tmp_path / "a.txt", "text a")
    write_text(tmp_path / "b.txt", "text b")
    write_text(tmp_path / "more" / "c.txt", "text c")
    assert corpus_of(f"{tmp_path}/*").facts["skipped"] == {"folders": 1}


def test_names_that_are_no_text_are_read(tmp_path, corpus_of):
    for number, name in enumerate((b"new\nline.txt", b"\xff\xfe.txt", b"a,b [1] {x} %20 ::zip:y.txt")):
        with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:
            file.write(f"text {number}".encode())
    assert sorted(documents_of(corpus_of(tmp_path))) == ["text 0", "text 1", "text 2"]


@pytest.mark.parametrize("pattern", ["", "/**", "/**/*.json*", "/*/*/*.json*"])
def test_runs_and_models_below_a_source_are_left_out_by_name(tmp_path, corpus_of, caplog, pattern):
    """A run trained on its own samples and its log."""
    write_table(tmp_path / "texts" / "x" / "a.jsonl", [{"text": "text a"}, {"text": "text b"}])
    run = write_run(tmp_path / "runs" / "one")
    corpus = corpus_of(f"{tmp_path}{pattern}")
    assert documents_of(corpus) == ["text a", "text b"]
    assert f"files of the run {run} (" in caplog.text


def test_exports_tokenizers_and_token_caches_are_left_out_by_name(tmp_path, corpus_of, caplog):
    write_text(tmp_path / "a.txt", "text a")
    write_text(tmp_path / "b.txt", "text b")
    model = write_model(tmp_path / "exported")
    cache = tmp_path / "cache"
    for _ in range(2):  # the second time, there is a token cache
        corpus = corpus_of(tmp_path, cache_dir=str(cache))
        assert documents_of(corpus) == ["text a", "text b"]
        write_text(tmp_path / "c" / "tokenizer.json", "{}")
        write_text(tmp_path / "c" / "tokenizer_config.json", "{}")
        write_text(tmp_path / "b.txt", "text b")
    assert corpus.facts["skipped"].keys() >= {
        f"files of the model {model}",
        f"files of the tokenizer {tmp_path / 'c'}",
    }
    assert any(name.startswith(f"files of the token cache {cache}") for name in corpus.facts["skipped"])


def test_many_runs_are_not_all_named(tmp_path):
    for number in range(9):
        write_run(tmp_path / f"{number}")
    skipped = Skipped()
    assert files_below(tmp_path, skipped) == []
    assert list(skipped)[2:] == [f"files of the run {tmp_path}/2", "files of 6 further runs, models or caches"]


def test_what_is_named_of_a_run_is_read(tmp_path, corpus_of):
    run = write_run(tmp_path / "runs" / "one", text="first sample")
    write_run(tmp_path / "runs" / "two", text="second sample")
    other = str(write_text(tmp_path / "z.txt", "another"))
    for source in (run / "samples.jsonl", f"{tmp_path}/runs/*/samples.jsonl", f"{tmp_path}/**/samples.jsonl"):
        assert documents_of(corpus_of([str(source), other]))[0] == "first sample"


def test_a_folder_that_is_a_run_itself_is_read_without_what_the_run_wrote(tmp_path, corpus_of):
    write_run(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"no file to read: left out files of the run {tmp_path} "):
        corpus_of(tmp_path)
    write_text(tmp_path / "a.txt", "text a")
    write_text(tmp_path / "texts" / "b.txt", "text b")
    assert documents_of(corpus_of(tmp_path)) == ["text a", "text b"]
