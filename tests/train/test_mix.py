"""Training on several sources at once."""

import json

import pytest

from bdh.cli.main import main

from .conftest import losses
from .test_run import assert_same_run


@pytest.fixture
def mix(tmp_path, text_file):
    """As on the command line: words, and a streamed table of digits in one of its two columns."""
    rows = [{"id": f"r{i}", "body": f"{i} and {i + 1} are neighbours. " * 3} for i in range(300)]
    table = tmp_path / "numbers.jsonl"
    table.write_text("\n".join(map(json.dumps, rows)))
    return f"[{{source: {text_file}, weight: 3}}, {{source: {table}, text_column: body, weight: 1, streaming: true}}]"


@pytest.fixture
def train_mix(train, mix):
    return lambda folder, *more, **overrides: train(
        folder, *more, **{"data.source": "pydoc", "data.mix": mix, **overrides}
    )


def test_a_mixed_run_resumes_bit_equal(train_mix, tmp_path):
    straight, halves = tmp_path / "straight", tmp_path / "halves"
    assert train_mix(straight) == 0
    assert train_mix(halves, **{"train.stop_at_step": 5}) == 0
    assert main(["train", "--run_dir", str(halves), "--resume"]) == 0
    assert_same_run(straight, halves)


def test_the_loss_of_each_source_is_recorded_and_the_banner_names_them(train_mix, tmp_path, capsys):
    assert train_mix(tmp_path / "run") == 0
    shown = capsys.readouterr().err
    assert "75.0% text.txt, 25.0% numbers.jsonl" in shown
    assert "text.txt: loss" in shown
    whole, *of_each = (losses(tmp_path / "run", f"val/{name}loss")[-1] for name in ("", "text.txt/", "numbers.jsonl/"))
    assert whole == pytest.approx(0.75 * of_each[0] + 0.25 * of_each[1])
    assert of_each[0] != of_each[1]
    assert "25.0% numbers.jsonl" in (tmp_path / "run" / "model" / "README.md").read_text()


def test_a_resume_with_another_mix_is_refused_by_name(train_mix, mix, tmp_path, capsys):
    assert train_mix(tmp_path / "run", **{"train.stop_at_step": 3}) == 0
    capsys.readouterr()
    other = mix.replace("weight: 3", "weight: 2")
    assert main(["train", "--run_dir", str(tmp_path / "run"), "--resume", "--data.mix", other]) == 2
    assert "data.mix: [{" in capsys.readouterr().err


def test_bad_weights_stop_before_anything_is_written(train_mix, mix, tmp_path, capsys):
    assert train_mix(tmp_path / "run", **{"data.mix": mix.replace("weight: 3", "weight: -3")}) == 2
    assert "data.mix is [-3, 1]: must be finite, non-negative weights" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
