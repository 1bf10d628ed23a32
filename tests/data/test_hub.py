"""Data sets in the hub's layout, from local folders; and a hub that cannot be reached."""

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bdh.data import DataConfig, training_texts, validation_texts
from bdh.data.tables import HubSet
from tests.data.conftest import documents_of, write_table, write_text

TRAIN = [f"train {i}" for i in range(10)]
TEST = [f"test {i}" for i in range(3)]
README = """---
license: mit
configs:
- config_name: plain
  default: true
  data_files:
  - {split: train, path: data/plain-train.jsonl}
  - {split: test, path: data/plain-test.jsonl}
- config_name: other
  data_files:
  - {split: train, path: data/other.jsonl}
---
# A data set
"""


@pytest.fixture
def with_card(tmp_path):
    """A folder whose README.md says which file is what."""
    write_text(tmp_path / "README.md", README)
    for name, texts in (("train", TRAIN), ("test", TEST)):
        write_table(tmp_path / "data" / f"plain-{name}.jsonl", [{"n": 1, "body": text} for text in texts])
    write_table(tmp_path / "data" / "other.jsonl", [{"body": f"other {i}"} for i in range(4)])
    return tmp_path


@pytest.fixture(autouse=True)
def _no_folder_yet(tmp_path):
    (tmp_path / "data").mkdir()


@pytest.mark.parametrize("streaming", [False, True])
def test_split_and_validation_split_are_taken_as_the_card_says(with_card, streaming):
    config = DataConfig(source=str(with_card), val_split="test", streaming=streaming)
    assert list(training_texts(config)) == TRAIN
    assert list(validation_texts(config)) == TEST


def test_configuration_is_taken_by_name(with_card, corpus_of):
    assert documents_of(corpus_of(with_card, name="other")) == [f"other {i}" for i in range(4)]


def test_default_configuration_of_a_folder_with_a_card(with_card, corpus_of):
    assert documents_of(corpus_of(with_card)) == TRAIN
    assert documents_of(corpus_of(with_card, split="test")) == TEST


def test_shards_named_after_splits_need_no_card(tmp_path, corpus_of):
    for number in range(2):
        rows = [{"text": text} for text in TRAIN[5 * number : 5 * number + 5]]
        write_table(tmp_path / "data" / f"train-0000{number}-of-00002.parquet", rows)
    write_table(tmp_path / "data" / "test-00000-of-00001.parquet", [{"text": text} for text in TEST])
    assert documents_of(corpus_of(tmp_path)) == TRAIN
    corpus = corpus_of(tmp_path, val_split="test")
    assert corpus.facts["val_documents"] == 3
    assert documents_of(corpus) == TRAIN + TEST


def test_folder_that_datasets_saved_opens(tmp_path, corpus_of):
    rows = datasets.Dataset.from_dict({"text": TRAIN})
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=rows, test=datasets.Dataset.from_dict({"text": TEST})).save_to_disk(tmp_path / "two")
    assert documents_of(corpus_of(tmp_path / "one")) == TRAIN
    assert documents_of(corpus_of(tmp_path / "two", val_split="test")) == TRAIN + TEST
    with pytest.raises(ValueError, match="no split 'dev': it has train, test"):
        corpus_of(tmp_path / "two", split="dev")


def test_what_datasets_saved_is_told_from_what_was_there_before(tmp_path):
    """By a name of datasets that is not public: without it the tokens of the old text were taken for the new one's."""

    def saved(texts):
        datasets.Dataset.from_dict({"text": texts}).save_to_disk(tmp_path / "one")
        return HubSet(str(tmp_path / "one"), "train", DataConfig(source=str(tmp_path / "one"))).identity

    first, second = saved(TRAIN), saved(TEST)
    assert None not in (first, second)
    assert first != second
    assert HubSet(str(tmp_path / "one"), "train", DataConfig(source=str(tmp_path / "one"))).identity == second


def test_readme_of_a_plain_folder_is_a_document(tmp_path, corpus_of):
    write_text(tmp_path / "README.md", "---\ntitle: x\n---\n# text\n")
    write_text(tmp_path / "a.txt", "another text")
    assert len(documents_of(corpus_of(tmp_path))) == 2


def test_changed_file_of_a_data_set_is_seen(with_card, corpus_of):
    before = corpus_of(with_card)
    write_table(with_card / "data" / "plain-train.jsonl", [{"n": 1, "body": text} for text in [*TRAIN, "more"]])
    after = corpus_of(with_card)
    assert documents_of(after) == [*TRAIN, "more"]
    assert after.fingerprint != before.fingerprint


def test_unknown_split_and_configuration_name_those_there_are(with_card, corpus_of):
    with pytest.raises(ValueError, match=r"data\.split 'dev'.*train.*test"):
        corpus_of(with_card, split="dev")
    with pytest.raises(ValueError, match=r"data\.name 'third'.*plain.*other"):
        corpus_of(with_card, name="third")


def test_damaged_data_set_is_named(with_card, corpus_of):
    write_text(with_card / "data" / "other.jsonl", "no json at all")
    with pytest.raises(ValueError, match=r"other\.jsonl, line 1 is not JSON"):
        corpus_of(with_card, name="other")


def test_a_damaged_folder_of_save_to_disk_is_named(tmp_path, corpus_of):
    """It ended with an unexpected KeyError."""
    (tmp_path / "state.json").write_text("{}")
    (tmp_path / "dataset_info.json").write_text("{}")
    with pytest.raises(ValueError, match=f"{tmp_path} is damaged, or not what save_to_disk"):
        corpus_of(tmp_path)


def test_other_columns_of_a_data_set_may_change_late_in_a_large_file(with_card, corpus_of):
    """datasets took the columns of the first 10 MB for those of all rows."""
    rows = [{"body": f"{i} " + "words " * 100, "n": None} for i in range(17_000)]
    rows += [{"body": "one", "n": "x"}, {"body": "two", "m": [1]}, {"n": {"a": 1}}, {"body": "three", "n": 4}]
    write_table(with_card / "data" / "other.jsonl", rows)
    corpus = corpus_of(with_card, name="other", text_column="body")
    assert documents_of(corpus)[-3:] == ["one", "two", "three"]
    assert corpus.facts["skipped"] == {"rows without text": 1}


def test_an_empty_first_shard_of_a_data_set_is_left_out(tmp_path, corpus_of):
    pq.write_table(pa.schema({"text": pa.null()}).empty_table(), tmp_path / "data" / "train-00000-of-00002.parquet")
    write_table(tmp_path / "data" / "train-00001-of-00002.parquet", [{"text": text} for text in TRAIN])
    corpus = corpus_of(tmp_path)
    assert documents_of(corpus) == TRAIN
    assert corpus.facts["skipped"] == {"empty files": 1}


def test_missing_column_of_a_data_set_names_its_columns(with_card, corpus_of):
    with pytest.raises(ValueError, match=r"'text', but .*plain-train\.jsonl has no such column: it has n, body"):
        corpus_of(with_card, text_column="text")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("source", ["some-organisation/some-set", "some-set", "shakespeare"])
def test_hub_out_of_reach_says_so_and_what_works_offline(source, streaming, corpus_of):
    """The test suite runs with HF_HUB_OFFLINE=1."""
    with pytest.raises(FileNotFoundError, match=r"loaded from the hub.*pydoc and stdlib, local files.*HF_HUB_OFFLINE"):
        corpus_of(source, streaming=streaming)


def test_the_hub_is_named_before_it_is_asked_and_what_may_be_meant_after(monkeypatch, corpus_of, caplog):
    """Without a network it takes a minute until the error."""

    def load_dataset(*_, **__):
        assert "asking the Hugging Face hub for the data set pydocs" in caplog.text
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(FileNotFoundError, match=r"\(no network\)\. Did you mean pydoc\? Without a network"):
        corpus_of("pydocs")


def test_hub_set_stands_alone(tmp_path, corpus_of):
    write_text(tmp_path / "a.txt", "text")
    with pytest.raises(ValueError, match="'organisation/set' is a data set: must be the only source"):
        corpus_of([str(tmp_path / "a.txt"), "organisation/set"])


# A .csv file whose form its data card describes is read by pandas, as those of the hub are.
OF_PANDAS = '---\nconfigs:\n- {config_name: default, data_files: data/t.csv, quotechar: "\'"}\n---\n'


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("card", [OF_PANDAS, "---\nconfigs:\n- {config_name: default, data_files: data/t.csv}\n---\n"])
def test_rows_longer_than_the_header_do_not_shift_the_columns(tmp_path, corpus_of, streaming, card):
    """The first column was taken for an index, and the labels trained on."""
    write_text(tmp_path / "README.md", card)
    path = write_text(tmp_path / "data" / "t.csv", "id,text,label\n1,a b,x,\n2,c d,y,\n")
    settings = {"text_column": "text", "streaming": streaming}
    assert list(training_texts(DataConfig(source=str(tmp_path), **settings))) == ["a b"]
    corpus_of(tmp_path, **settings)
    write_text(path, "id,text,label\n1,a b, c,x\n2,d,y\n")
    with pytest.raises(
        ValueError, match=r"Length of header or names does not match length of data|line 2: the row has 4"
    ):
        corpus_of(tmp_path, **settings)


@pytest.mark.parametrize("delimiter", [";", "\t", "|"])
def test_another_delimiter_than_a_comma_is_not_text(tmp_path, corpus_of, delimiter):
    """Whole lines were the text, numbers and delimiters among it."""
    lines = [f"id{delimiter}text", *(f"{i}{delimiter}words and more" for i in range(9))]
    write_text(tmp_path / "data" / "t.csv", "\n".join(lines))
    write_text(tmp_path / "README.md", OF_PANDAS)
    with pytest.raises(ValueError, match="seem to be separated by a character other than a comma"):
        corpus_of(tmp_path)
    write_text(tmp_path / "README.md", OF_PANDAS.split(", quotechar")[0] + "}\n---\n")
    assert documents_of(corpus_of(tmp_path)) == ["words and more"] * 9


def test_a_table_with_commas_is_read(tmp_path, corpus_of):
    write_text(tmp_path / "data" / "train-00000-of-00001.csv", 'id,text\n1,"a, b"\n2,c d\n')
    assert documents_of(corpus_of(tmp_path)) == ["a, b", "c d"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("card", [False, True])
def test_validation_files_are_held_out_of_a_folder_in_the_layout(tmp_path, corpus_of, card, streaming):
    """They were trained on: data.val_source counted for folders of other layouts alone."""
    files = [tmp_path / "data" / f"train-0000{number}-of-00002.jsonl" for number in range(2)]
    if card:
        write_text(tmp_path / "README.md", "---\nconfigs:\n- {config_name: default, data_files: 'data/*.jsonl'}\n---\n")
    for number, file in enumerate(files):
        write_table(file, [{"text": text} for text in TRAIN[5 * number : 5 * number + 5]])
    settings = {"val_source": str(files[1]), "streaming": streaming}
    config = DataConfig(source=str(tmp_path), **settings)
    assert (list(training_texts(config)), list(validation_texts(config))) == (TRAIN[:5], TRAIN[5:])
    corpus = corpus_of(tmp_path, **settings)
    assert corpus.facts["skipped"] == {"files of data.val_source": 1}
    with pytest.raises(ValueError, match="nothing is left to train on"):
        corpus_of(tmp_path, val_source=str(tmp_path / "data"))


def test_validation_files_of_a_folder_that_is_read_as_a_whole_are_refused(tmp_path, corpus_of):
    """They were trained on."""
    for number in range(2):
        write_text(tmp_path / "data" / f"train-0000{number}-of-00002.txt", "some words\n" * 9)
    with pytest.raises(ValueError, match=r"read as a whole, so .*train-00001-of-00002\.txt cannot be held out"):
        corpus_of(tmp_path, val_source=str(tmp_path / "data" / "train-00001-of-00002.txt"))


def test_a_file_of_both_splits_is_validated_on_alone(with_card, corpus_of):
    """It was trained on, where the pattern of the one split matched the file of the other."""
    write_text(with_card / "README.md", README.replace("data/plain-train.jsonl", "data/plain-*.jsonl"))
    assert list(training_texts(DataConfig(source=str(with_card), val_split="test"))) == TRAIN


def test_conversations_of_other_splits_are_not_trained_on(tmp_path, corpus_of):
    """All .jsonl files of the folder were."""
    for name in ("train", "test"):
        messages = [{"role": "user", "content": "Say"}, {"role": "assistant", "content": name}]
        write_table(tmp_path / "data" / f"{name}-00000-of-00001.jsonl", [{"messages": messages}] * 4)
    texts = [*training_texts(DataConfig(source=str(tmp_path))), *validation_texts(DataConfig(source=str(tmp_path)))]
    assert set(texts) == {"Say", "train"}


CSV_WORDS = ["hello there", "NA", "null", "None", "007", "1e5", "12345678901234567890", "more words"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("options", ["", ', quotechar: "\'"'])
def test_words_that_pandas_takes_for_nothing_are_text(tmp_path, streaming, options):
    """NA, null and None were rows without text, and 007 a float."""
    write_text(tmp_path / "README.md", f"---\nconfigs:\n- {{config_name: default, data_files: t.csv{options}}}\n---\n")
    write_text(tmp_path / "t.csv", "n,text\n" + "".join(f"1,{word}\n" for word in CSV_WORDS))
    settings = {"text_column": "text", "streaming": streaming, "val_source": None}
    config = DataConfig(source=str(tmp_path), **settings)
    assert sorted([*training_texts(config), *validation_texts(config)]) == sorted(CSV_WORDS)


def test_files_of_the_layout_take_the_settings_for_csv_files(tmp_path, corpus_of):
    write_text(tmp_path / "data" / "train-00000-of-00001.csv", "1:one\n2:two\n")
    corpus = corpus_of(tmp_path, csv_delimiter=":", csv_header=False, text_column="2")
    assert documents_of(corpus) == ["one", "two"]
    write_text(tmp_path / "data" / "train-00000-of-00001.tsv", "n\ttext\n1\tone, 1\n2\ttwo, 2\n")
    (tmp_path / "data" / "train-00000-of-00001.csv").unlink()
    assert documents_of(corpus_of(tmp_path)) == ["one, 1", "two, 2"]
