"""A run that starts from another model: its weights, sizes and tokenizer, and nothing of its past."""

import json

import pytest
import torch
import yaml

from bdh import BDHForCausalLM
from bdh.cli.main import main

from .conftest import losses, weights


@pytest.fixture
def fine_tune(text_file, tmp_path, monkeypatch):
    """Runs `bdh train` with `train.init_from`; the model's sizes are not given."""
    monkeypatch.setenv("BDH_CACHE", str(tmp_path / "cache"))

    def run(run_dir, init_from, *more, **overrides) -> int:
        settings = {
            "run_dir": run_dir,
            "train.init_from": init_from,
            "data.source": text_file,
            "train.block_size": 32,
            "train.batch_size": 4,
            "train.max_steps": 6,
            "train.warmup_steps": 1,
            "train.eval_every_steps": 6,
            "train.eval_windows": 4,
            "train.sample_every_steps": 0,
            "checkpoint.every_steps": 3,
            "monitor.log_every_steps": 1,
            "monitor.backends": "console,jsonl",
            **overrides,
        }
        return main(["train", *(f"--{name}={value}" for name, value in settings.items()), *more])

    return run


@pytest.mark.parametrize("source", ["run", "run/model"])
def test_it_starts_with_the_weights_and_sizes_and_a_fresh_schedule(train, fine_tune, tmp_path, capsys, source):
    assert train(tmp_path / "run", **{"model.rope_theta": 1000.0}) == 0
    tiny_step = {"train.max_steps": 1, "train.learning_rate": 1e-9, "train.weight_decay": 0.0}
    assert fine_tune(tmp_path / "next", tmp_path / source, **tiny_step) == 0
    assert f"those of {tmp_path / source}" in capsys.readouterr().err
    first, second = weights(tmp_path / "run"), weights(tmp_path / "next")
    for name, weight in first.items():
        torch.testing.assert_close(second[name], weight, atol=2e-9, rtol=1e-6)  # one step of AdamW moves by lr
    assert losses(tmp_path / "next")[0] < losses(tmp_path / "run")[0] - 1
    stored = yaml.safe_load((tmp_path / "next" / "config.yaml").read_text())
    assert stored["model"]["n_embd"] == 16
    assert stored["model"]["rope_theta"] == 1000.0
    card = (tmp_path / "next" / "model" / "README.md").read_text()
    assert f"`{tmp_path / source}`" in card


def test_it_resumes_bit_equal_and_does_not_start_again(train, fine_tune, tmp_path, capsys):
    assert train(tmp_path / "run") == 0
    assert fine_tune(tmp_path / "whole", tmp_path / "run") == 0
    assert fine_tune(tmp_path / "parts", tmp_path / "run", **{"train.stop_at_step": 3}) == 0
    assert main(["train", "--run_dir", str(tmp_path / "parts"), "--resume"]) == 0
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(parts[name], weight) for name, weight in whole.items())
    capsys.readouterr()
    resume = ["train", "--run_dir", str(tmp_path / "parts"), "--resume", "--train.init_from", "other"]
    assert main(resume) == 2
    assert "train.init_from" in capsys.readouterr().err


def test_a_size_that_is_another_is_refused_with_both(train, fine_tune, tmp_path, capsys):
    assert train(tmp_path / "run") == 0
    capsys.readouterr()
    assert fine_tune(tmp_path / "next", tmp_path / "run", **{"model.n_embd": 32, "model.n_layer": 2}) == 2
    shown = capsys.readouterr().err
    assert f"model.n_embd is 32, but {tmp_path / 'run'} has 16" in shown
    assert "n_layer is" not in shown
    assert not (tmp_path / "next").exists()


@pytest.fixture
def tokenizers(text_file, tmp_path):
    """Two BPE tokenizers of 270 entries and one of 280."""
    other = tmp_path / "other.txt"
    other.write_text("quite another text, with other words in it; " * 300)
    made = {}
    for name, source, size in (("a", text_file, 270), ("b", other, 270), ("large", text_file, 280)):
        made[name] = tmp_path / f"tokenizer-{name}"
        flags = ["--data.source", str(source), "--vocab_size", str(size), "--out", str(made[name])]
        assert main(["tokenizer", "train", *flags]) == 0
    return made


def test_the_tokenizer_is_taken_over(train, fine_tune, tmp_path, tokenizers, caplog):
    assert train(tmp_path / "run", **{"tokenizer.path": tokenizers["a"]}) == 0
    assert fine_tune(tmp_path / "next", tmp_path / "run") == 0
    saved = [json.loads((tmp_path / run / "tokenizer" / "tokenizer.json").read_text()) for run in ("run", "next")]
    assert saved[0] == saved[1]
    assert caplog.records == []


def test_the_folder_of_a_checkpoint_brings_the_tokenizer_of_its_run(train, fine_tune, tmp_path, tokenizers):
    """It was looked for in the folder itself."""
    assert train(tmp_path / "run", **{"tokenizer.path": tokenizers["a"]}) == 0
    assert fine_tune(tmp_path / "next", tmp_path / "run" / "checkpoints" / "step-0000006") == 0
    saved = [json.loads((tmp_path / run / "tokenizer" / "tokenizer.json").read_text()) for run in ("run", "next")]
    assert saved[0] == saved[1]


def test_another_tokenizer_of_the_size_is_warned_of_and_of_another_size_refused(
    train, fine_tune, tmp_path, tokenizers, caplog, capsys
):
    assert train(tmp_path / "run", **{"tokenizer.path": tokenizers["a"]}) == 0
    assert fine_tune(tmp_path / "next", tmp_path / "run", **{"tokenizer.path": tokenizers["b"]}) == 0
    assert "the tokenizer is not the one that" in caplog.text
    capsys.readouterr()
    assert fine_tune(tmp_path / "third", tmp_path / "run", **{"tokenizer.path": tokenizers["large"]}) == 2
    assert "has 280 entries" in capsys.readouterr().err
    assert not (tmp_path / "third").exists()


@pytest.mark.parametrize("source", ["run", "run/model"])
def test_other_data_are_told(train, fine_tune, tmp_path, text_file, caplog, source):
    assert train(tmp_path / "run") == 0
    assert fine_tune(tmp_path / "same", tmp_path / source) == 0
    assert caplog.records == []
    other = tmp_path / "other.txt"
    other.write_text(text_file.read_text()[::-1])
    assert fine_tune(tmp_path / "next", tmp_path / source, **{"data.source": other}) == 0
    assert f"was trained on other data, {text_file}" in caplog.text


def test_a_model_that_is_not_there_is_refused_and_nothing_written(fine_tune, tmp_path, capsys):
    assert fine_tune(tmp_path / "next", tmp_path / "none") == 2
    assert (
        f"train.init_from is {str(tmp_path / 'none')!r}: there is no folder {tmp_path / 'none'}"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "next").exists()


def test_the_decay_of_the_model_is_kept_unless_another_is_chosen(train, tmp_path):
    """Without this a model that was trained with decay went on without."""
    assert train(tmp_path / "first", **{"model.decay": "[4, null]"}) == 0
    assert train(tmp_path / "kept", **{"train.init_from": tmp_path / "first"}) == 0
    assert train(tmp_path / "other", **{"train.init_from": tmp_path / "first", "model.decay": 8}) == 0
    stored = {
        name: yaml.safe_load((tmp_path / name / "config.yaml").read_text())["model"]["decay"]
        for name in ("first", "kept", "other")
    }
    assert stored == {"first": [4.0, None], "kept": [4.0, None], "other": 8.0}
    model = BDHForCausalLM.from_pretrained(tmp_path / "kept" / "model")
    assert model.config.half_lives == [4.0, float("inf")]
