"""Settings: every fault at once; and a cheap import."""

import subprocess
import sys

import pytest

from bdh.data import DataConfig
from bdh.validation import Faults, collect_faults


def faults_of(**settings):
    faults = Faults()
    collect_faults(DataConfig(**settings), faults.with_prefix("data"))
    return faults.found


def test_defaults_and_full_settings_have_no_fault():
    assert faults_of() == []
    assert faults_of(source=["a.txt", "b.txt"], val_source="c.txt", streaming=True) == []
    assert faults_of(source="organisation/set", val_split="validation") == []


@pytest.mark.parametrize(("settings", "fault"), [
    ({"source": ""}, "data.source is ''"),
    ({"source": []}, "data.source is []"),
    ({"source": ["a", " "]}, "data.source is ['a', ' ']"),
    ({"val_source": ""}, "data.val_source is ''"),
    ({"encoding_errors": "ignore"}, "data.encoding_errors is 'ignore': must be one of strict, replace"),
    ({"csv_delimiter": ""}, "data.csv_delimiter is '': must be one character, no quote or line end; or tab"),
    ({"csv_delimiter": '"'}, "data.csv_delimiter is '\"': must be one character"),
    ({"csv_delimiter": "\n"}, "data.csv_delimiter is '\\n': must be one character"),
    ({"csv_delimiter": ", "}, "data.csv_delimiter is ', ': must be one character"),
    ({"csv_bad_rows": "drop"}, "data.csv_bad_rows is 'drop': must be one of error, skip"),
    ({"val_fraction": 0.0}, "data.val_fraction is 0.0: must be above 0 and below 1"),
    ({"val_fraction": 1.0}, "data.val_fraction is 1.0"),
    ({"shuffle_buffer_documents": 0}, "data.shuffle_buffer_documents is 0: must be at least 1"),
    ({"val_tokens": 0}, "data.val_tokens is 0: must be at least 1"),
    ({"val_split": "test", "val_source": "a.txt"}, "data.val_split is 'test': must be left out when val_source"),
    ({"val_split": "train"}, "data.val_split is 'train': must be another split"),
])  # fmt: skip
def test_fault_names_field_value_and_what_is_allowed(settings, fault):
    (found,) = faults_of(**settings)
    assert found.startswith(fault)


def test_all_faults_come_together():
    assert len(faults_of(source="", val_fraction=2.0, val_tokens=-1)) == 3


def test_settings_are_imported_without_heavy_libraries():
    """`bdh --help` reads them."""
    code = (
        "import sys, bdh.data, bdh.tokenizer, bdh.data.config, bdh.tokenizer.config\n"
        "print([name for name in ('torch', 'numpy', 'transformers', 'datasets', 'tokenizers') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
