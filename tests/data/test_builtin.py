"""The texts that need no network."""

from pydoc_data.topics import topics

from bdh.data.sources import stdlib_files
from tests.data.conftest import documents_of


def test_pydoc_is_one_document_a_topic_in_the_order_of_names(corpus_of):
    assert documents_of(corpus_of("pydoc")) == [topics[name] for name in sorted(topics)]


def test_stdlib_is_the_library_without_tests_and_installed_packages(corpus_of):
    names = [path.as_posix() for path in stdlib_files()]
    assert any(name.endswith("/argparse.py") for name in names)
    assert any(name.endswith("/json/decoder.py") for name in names)
    assert not any("/site-packages/" in name or "/test/" in name or "/tests/" in name for name in names)
    corpus = corpus_of("stdlib")
    skipped = corpus.facts["skipped"]
    assert corpus.facts["documents"] == len(names) - sum(skipped.values())
    assert set(skipped) <= {"files that are not UTF-8", "rows without text", "empty files"}
    assert corpus.facts["train_bytes"] > 4_000_000


def test_several_texts_follow_one_another(tmp_path, corpus_of):
    (tmp_path / "a.txt").write_text("last")
    documents = documents_of(corpus_of(["pydoc", str(tmp_path / "a.txt")]))
    assert documents == [topics[name] for name in sorted(topics)] + ["last"]
