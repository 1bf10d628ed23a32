"""Text that cannot be read in the middle of a stream: what had been read is not lost, and continues once it is mended."""

import gzip
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.data.conftest import write_table, write_text

TEXTS = [f"{i} {'x' * (i % 17)}" for i in range(60)]
KINDS = {"plain": {}, "documents": {"pack": "documents"}, "carried": {"carry_state": True}, "mix": {"mix": True}}


def lines(*rows):
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


ROWS = [{"text": text} for text in TEXTS]
BAD_ROWS = [*ROWS[:30], {"text": 5}, *ROWS[31:]]


def jsonl(path, rows):
    write_text(path / "t.jsonl", lines(*rows))


def jsonl_gz(path, rows):
    (path / "t.jsonl.gz").write_bytes(gzip.compress(lines(*rows).encode()))


def array(path, rows):
    write_text(path / "t.json", json.dumps(rows, indent=1))


def bytes_in_a_second_file(path, rows):
    write_text(path / "a.jsonl", lines(*ROWS[:30]))
    whole = lines(*[row["text"] for row in ROWS]).encode()
    (path / "b.txt").write_bytes(whole if rows is ROWS else whole[:10] + b"\xff" + whole[11:])


def parquet_of_another_type(path, rows):
    write_text(path / "a.jsonl", lines(*ROWS[:30]))
    values = [row["text"] for row in ROWS[30:]] if rows is ROWS else list(range(30))
    pq.write_table(pa.table({"text": values}), path / "b.parquet")


def file_that_is_gone(path, rows):
    write_table(path / "a.jsonl", ROWS[:30])
    (path / "b.jsonl").unlink(missing_ok=True)
    if rows is ROWS:
        write_table(path / "b.jsonl", ROWS[30:])


@pytest.fixture
def prepared(corpus_of):
    """A loader over a folder's text, of one of the kinds."""

    def prepare(folder, kind, **more):
        settings = dict(KINDS[kind])
        carries = settings.pop("carry_state", False)
        common = {"streaming": True, "shuffle_buffer_documents": 4, "text_column": "text", "val_tokens": 1}
        if settings.pop("mix", False):
            other = write_text(folder.parent / "other.txt", "other words " * 40)
            mix = [{"source": str(folder), "streaming": True, "text_column": "text"}, {"source": str(other)}]
            corpus = corpus_of("pydoc", mix=mix, block_size=5, shuffle_buffer_documents=4, val_tokens=1)
        else:
            corpus = corpus_of(folder, block_size=5, **common, **settings)
        return corpus, corpus.train_loader(6, seed=1, carry_state=carries)

    return prepare


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("write", "fault", "error"),
    [
        (jsonl, r"t\.jsonl, line 31: column 'text' holds 5", ValueError),
        (jsonl_gz, r"t\.jsonl\.gz, line 31: column 'text' holds 5", ValueError),
        (array, r"t\.json, row 31, line 92: column 'text' holds 5", ValueError),
        (bytes_in_a_second_file, r"b\.txt is not UTF-8: byte 10 is 0xFF", ValueError),
        (parquet_of_another_type, r"b\.parquet, row 1: column 'text' holds 0 \(int\)", ValueError),
        (file_that_is_gone, r"b\.jsonl", FileNotFoundError),
    ],
)
def test_it_continues_bit_equal_once_the_text_is_mended(tmp_path, prepared, write, fault, error, kind):
    """The parts that had been drawn for the step were lost, and so the rows were others."""
    folder = tmp_path / "texts"
    folder.mkdir()
    write(folder, ROWS)
    _, loader = prepared(folder, kind)
    expected = [loader.next() for _ in range(60)]
    corpus, loader = prepared(folder, kind)
    write(folder, BAD_ROWS)  # after the start, which would have refused a file that is not there
    found = []

    def read_on():
        while True:
            found.append(loader.next())

    with pytest.raises(error, match=fault):
        read_on()
    assert 0 < len(found) < 60
    stored = io.BytesIO()
    torch.save(loader.state_dict(), stored)
    with pytest.raises(error, match=fault):
        read_on()  # it is no end of the text
    stored.seek(0)
    state = torch.load(stored, weights_only=True)
    before = None if error is FileNotFoundError else corpus.fingerprint_before(state)

    write(folder, ROWS)
    corpus, again = prepared(folder, kind)
    again.load_state_dict(state)
    if before is not None:
        assert corpus.fingerprint_before(state) == before
    for each in (again, loader):
        batches = found + [each.next() for _ in range(60 - len(found))]
        for batch, wanted in zip(batches, expected, strict=True):
            for name in ("tokens", "is_target", "starts"):
                one, other = getattr(batch, name), getattr(wanted, name)
                assert (one is None and other is None) or torch.equal(one, other)


def table_of_csv(path, rows):
    """A row with one field more than the header, in the place of the one that is no text."""
    fields = [f"{number},{row['text']}{',' * (row['text'] == 5)}" for number, row in enumerate(rows)]
    write_text(path / "t.csv", "\n".join(["n,text", *fields]))


def folder_in_the_hubs_layout(path, rows):
    write_text(path / "data" / "train-00000-of-00001.jsonl", lines(*rows))


def array_in_the_hubs_layout(path, rows):
    write_text(path / "data" / "train-00000-of-00001.json", json.dumps(rows))


@pytest.mark.parametrize(
    "write",
    [
        jsonl,
        jsonl_gz,
        array,
        table_of_csv,
        folder_in_the_hubs_layout,
        array_in_the_hubs_layout,
    ],
)
def test_text_before_the_fault_must_stay_as_it_was(tmp_path, prepared, write):
    """Only files of lines were compared: a change in an array, a parquet file or a folder in the hub's layout was not seen."""
    folder = tmp_path / "texts"
    folder.mkdir()
    write(folder, ROWS)
    corpus, loader = prepared(folder, "plain")
    write(folder, BAD_ROWS)
    with pytest.raises(ValueError, match=r"line 3[12]|row 31"):
        [loader.next() for _ in range(60)]
    state = loader.state_dict()
    before = corpus.fingerprint_before(state)
    for rows in (ROWS, [*ROWS[:30], {"text": "mended"}, *ROWS[31:], {"text": "more"}]):
        write(folder, rows)
        assert prepared(folder, "plain")[0].fingerprint_before(state) == before
    for changed in ([{"text": "0 y"}, *ROWS[1:]], [ROWS[1], ROWS[0], *ROWS[2:]], ROWS[:20]):
        write(folder, changed)
        assert prepared(folder, "plain")[0].fingerprint_before(state) != before


def parquet(path, rows):
    write_table(path / "t.parquet", rows)


def lines_that_datasets_reads(path, rows):
    write_text(path / "data" / "train-00000-of-00001.txt", "".join(f"{row['text']}\n" for row in rows))


@pytest.mark.parametrize("write", [parquet, lines_that_datasets_reads])
def test_rows_before_a_place_must_stay_as_they_were(tmp_path, prepared, write):
    """The names of such files were compared alone."""
    folder = tmp_path / "texts"
    folder.mkdir()
    write(folder, ROWS)
    corpus, loader = prepared(folder, "plain")
    for _ in range(3):
        loader.next()
    state = loader.state_dict()
    before = corpus.fingerprint_before(state)
    write(folder, [*ROWS[:40], {"text": "mended"}])
    assert prepared(folder, "plain")[0].fingerprint_before(state) == before
    for changed in ([{"text": "0 y"}, *ROWS[1:]], [ROWS[1], ROWS[0], *ROWS[2:]], ROWS[:10]):
        write(folder, changed)
        assert prepared(folder, "plain")[0].fingerprint_before(state) != before
