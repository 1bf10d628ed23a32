"""`~` and `$VARIABLE` in the paths of files and flags."""

import os
import re
from dataclasses import dataclass, field
from typing import Any

import pytest

from bdh.cli import bench, chat, commands, eval, generate
from bdh.cli.settings import leaves_of, parse_settings
from bdh.data.config import DataConfig
from bdh.serve.config import ServeSettings
from bdh.train.config import RunSettings
from bdh.validation import PathText, Settings, expanded_path, holds_paths

ALL_SETTINGS = [
    RunSettings,
    ServeSettings,
    commands.AverageSettings,
    bench.BenchSettings,
    chat.ChatSettings,
    commands.ConvertSettings,
    eval.EvalSettings,
    commands.ExportSettings,
    generate.GenerateSettings,
    commands.PlotSettings,
    commands.RunsSettings,
    commands.TokenizerTrainSettings,
]


@dataclass
class Errand(Settings):
    out: PathText | None = None
    """Folder to write."""
    others: list[PathText] = field(default_factory=list)
    """More of them."""
    note: str = ""
    """Text."""
    data: DataConfig = field(default_factory=DataConfig)


def parse(*argv: str) -> Any:
    return parse_settings(Errand, argv, prog="bdh errand", description="Go.", check_available=False)


@pytest.fixture(autouse=True)
def home(monkeypatch):
    monkeypatch.setenv("HOME", "/users/ada")
    monkeypatch.setenv("RUNS", "/big/runs")
    monkeypatch.delenv("NOWHERE", raising=False)


def test_paths_of_flags_are_expanded_and_texts_are_not():
    settings = parse("--out=~/a", "--others", "$RUNS/b", "--others", "${RUNS}/c", "--note", "~ $RUNS")
    assert settings.out == "/users/ada/a"
    assert settings.others == ["/big/runs/b", "/big/runs/c"]
    assert settings.note == "~ $RUNS"


def test_paths_of_files_are_expanded_those_of_sources_and_of_mixes_too(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("out: ~/a\ndata:\n  source: ~/a.txt,$RUNS/b.txt\n  val_source: ['$RUNS/c.txt', ~/d.txt]\n")
    settings = parse("--config", str(file))
    assert settings.out == "/users/ada/a"
    assert settings.data.source == "/users/ada/a.txt,/big/runs/b.txt"
    assert settings.data.val_source == ["/big/runs/c.txt", "/users/ada/d.txt"]
    settings = parse("--data.mix", "[{source: ~/a.txt, weight: 2, text_column: $t}, {source: $RUNS/b.txt}]")
    assert settings.data.mix == [
        {"source": "/users/ada/a.txt", "weight": 2, "text_column": "$t"},
        {"source": "/big/runs/b.txt"},
    ]


def test_the_configuration_file_itself_may_be_named_with_a_variable(tmp_path, monkeypatch):
    (tmp_path / "a.yaml").write_text("note: hello\n")
    monkeypatch.setenv("RUNS", str(tmp_path))
    assert parse("--config", "$RUNS/a.yaml").note == "hello"


def test_a_variable_that_is_not_set_is_a_fault_with_its_name_and_place(tmp_path):
    with pytest.raises(ValueError, match=r"^out is '\$NOWHERE/a': the environment variable NOWHERE is not set$"):
        parse("--out", "$NOWHERE/a")
    file = tmp_path / "a.yaml"
    file.write_text("note: a\ndata:\n  source: ${NOWHERE}/a.txt\n")
    with pytest.raises(ValueError, match=r"data.source is .*NOWHERE is not set \(.*a.yaml, line 3\)"):
        parse("--config", str(file))


def test_what_exists_under_a_name_with_a_dollar_is_meant(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("$RUNS.txt", "~"):
        (tmp_path / name).write_text("a")
        assert expanded_path(name) == name
    assert os.path.exists(expanded_path("$RUNS.txt"))


def test_several_names_are_expanded_one_by_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pri$ce.txt").write_text("a")
    assert expanded_path("pri$ce.txt,$RUNS/b, ~/c") == "pri$ce.txt,/big/runs/b, /users/ada/c"


@pytest.mark.parametrize("text", ["$5.txt", "a$", "a$-b", "${5}", "*$.txt", " ", ""])
def test_a_dollar_without_the_name_of_a_variable_is_a_dollar(text):
    assert expanded_path(text) == text


def test_a_variable_may_hold_a_dollar(monkeypatch):
    monkeypatch.setenv("RUNS", "/odd/$PLACE")
    assert expanded_path("$RUNS/a") == "/odd/$PLACE/a"


@pytest.mark.parametrize("settings_class", ALL_SETTINGS, ids=lambda each: each.__name__)
def test_every_setting_that_names_a_file_or_a_folder_is_a_path(settings_class):
    leaves = list(leaves_of(settings_class))
    assert any(holds_paths(leaf.type) for leaf in leaves)
    named = {leaf.name for leaf in leaves if re.search(r"\b([Ff]iles?|[Ff]olders?|hub id)\b", leaf.help)}
    # Their help mentions files, but they are none: columns, flags and numbers.
    not_text = {leaf.name for leaf in leaves if not leaf.takes_text}
    mentions = {"data.csv_delimiter", "data.format", "data.mix", "monitor.run_name"}
    assert {leaf.name for leaf in leaves if holds_paths(leaf.type)} >= named - not_text - mentions


@pytest.mark.parametrize("argv", [["--out", ""], ["--out="], ["--others", ""]])
def test_an_empty_path_is_refused(argv):
    """`--run_dir "$RUN"` with a variable that is not set trained in another folder, one named by the time."""
    with pytest.raises(ValueError, match=r"^(out|others) is '': must not be empty$"):
        parse_settings(Errand, argv, prog="x", description="x")
