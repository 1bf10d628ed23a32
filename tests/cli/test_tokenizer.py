import json
import subprocess
import sys

import pytest
from transformers import AutoTokenizer

from bdh.cli.main import main


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    words = [f"word{i % 97} number{i % 89} thing{i % 83}s" for i in range(3000)]
    path.write_text("\n".join(words))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram"])
def test_a_model_trained_with_a_trained_tokenizer_talks_the_same_in_a_new_process(text_file, tmp_path, capsys, kind):
    out, run = tmp_path / "tokenizer", tmp_path / "run"
    argv = [
        "tokenizer",
        "train",
        "--data.source",
        str(text_file),
        "--kind",
        kind,
        "--vocab_size",
        "320",
        "--out",
        str(out),
    ]
    assert main(argv) == 0
    assert "bytes per token on held-out text" in capsys.readouterr().out
    assert len(AutoTokenizer.from_pretrained(out)) <= 320

    flags = {
        "model.n_layer": 2,
        "model.n_embd": 16,
        "model.n_head": 2,
        "model.mlp_internal_dim_multiplier": 8,
        "tokenizer.path": out,
        "data.source": text_file,
        "train.block_size": 16,
        "train.batch_size": 4,
        "train.max_steps": 10,
        "train.warmup_steps": 1,
        "train.sample_every_steps": 0,
        "monitor.backends": "console,jsonl",
        "run_dir": run,
    }
    assert main(["train", *(f"--{name}={value}" for name, value in flags.items())]) == 0
    capsys.readouterr()
    options = ["--prompt", "word1 number1", "--seed", "5", "--max_new_tokens", "15"]
    assert main(["generate", str(run / "model"), *options]) == 0
    here = capsys.readouterr().out
    there = subprocess.run(
        [sys.executable, "-m", "bdh", "generate", str(run), *options], capture_output=True, check=True
    ).stdout
    assert here == there.decode()  # not text=True, which turns a generated CR into a line end
    config = json.loads((run / "model" / "config.json").read_text())
    assert config["vocab_size"] == len(AutoTokenizer.from_pretrained(run / "model"))
    assert config["eos_token_id"] == AutoTokenizer.from_pretrained(run / "model").eos_token_id


def test_an_existing_folder_is_not_overwritten(text_file, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    assert main(["tokenizer", "train", "--data.source", str(text_file), "--out", str(tmp_path / "out")]) == 2
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--kind", "sentencepiece"], "kind is 'sentencepiece': must be one of bpe, wordpiece, unigram"),
        (["--vocab_size", "100"], "vocab_size is 100"),
        (["--data.source", "/nowhere.txt"], "/nowhere.txt"),
    ],
)
def test_bad_input_gets_status_2_and_writes_nothing(text_file, tmp_path, capsys, argv, message):
    common = ["tokenizer", "train", "--data.source", str(text_file), "--out", str(tmp_path / "out")]
    assert main([*common, *argv]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
