"""The moving average of a run's weights, and averages of its checkpoints."""

import json

import pytest
import torch
from safetensors.torch import load_file

from bdh.cli.main import main
from bdh.train.checkpoint import Checkpointer
from bdh.train.models import open_model

from .conftest import losses, weights

EMA = {"train.ema_decay": 0.5}


def test_the_average_is_evaluated_beside_the_weights_and_changes_nothing(train, tmp_path, capsys):
    assert train(tmp_path / "plain") == 0
    assert train(tmp_path / "ema", **EMA) == 0
    assert "; moving average: loss" in capsys.readouterr().err
    plain, ema = weights(tmp_path / "plain"), weights(tmp_path / "ema")
    assert all(torch.equal(ema[name], weight) for name, weight in plain.items())
    assert losses(tmp_path / "plain", "val/loss") == losses(tmp_path / "ema", "val/loss")
    assert len(losses(tmp_path / "ema", "val_ema/loss")) == 3
    assert losses(tmp_path / "plain", "val_ema/loss") == []


def test_the_exported_average_has_the_loss_that_was_logged(train, tmp_path):
    assert train(tmp_path / "run", **EMA, **{"checkpoint.export": "ema"}) == 0
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--ema"]) == 0
    exported = load_file(tmp_path / "run" / "model" / "model.safetensors")
    again = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(again[name], weight) for name, weight in exported.items())
    raw = Checkpointer(tmp_path / "run").load(12).tensors("weights")
    assert not torch.equal(exported["encoder.weight"], raw["encoder.weight"])
    loss = losses(tmp_path / "run", "val_ema/loss")[-1]
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert f"| loss, nats per token | {loss:.4f} |" in card
    assert "moving average with decay 0.5" in card


def test_it_resumes_bit_equal(train, tmp_path):
    assert train(tmp_path / "whole", **EMA) == 0
    assert train(tmp_path / "parts", **EMA, **{"train.stop_at_step": 7}) == 0
    assert main(["train", "--run_dir", str(tmp_path / "parts"), "--resume"]) == 0
    assert losses(tmp_path / "whole", "val_ema/loss") == losses(tmp_path / "parts", "val_ema/loss")
    for run in ("whole", "parts"):
        assert main(["export", str(tmp_path / run), str(tmp_path / f"{run}-ema"), "--ema"]) == 0
    whole, parts = (load_file(tmp_path / f"{run}-ema" / "model.safetensors") for run in ("whole", "parts"))
    assert all(torch.equal(parts[name], weight) for name, weight in whole.items())


def test_a_run_may_begin_an_average_when_it_is_resumed(train, tmp_path):
    assert train(tmp_path / "run", **{"train.stop_at_step": 6}) == 0
    assert main(["train", "--run_dir", str(tmp_path / "run"), "--resume", "--train.ema_decay", "0.5"]) == 0
    assert len(losses(tmp_path / "run", "val_ema/loss")) == 2  # at steps 8 and 12


def test_what_has_no_average_is_refused(train, tmp_path, capsys):
    assert train(tmp_path / "run") == 0
    capsys.readouterr()
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--ema"]) == 2
    assert "has no moving average" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert train(tmp_path / "next", **{"checkpoint.export": "ema", "train.ema_decay": "null"}) == 2
    assert "checkpoint.export is 'ema': must be last, best or none without train.ema_decay" in capsys.readouterr().err
    assert train(tmp_path / "next", **{"train.ema_decay": 1}) == 2
    assert "train.ema_decay is 1: must be above 0 and below 1" in capsys.readouterr().err


def test_checkpoints_of_a_run_are_averaged(train, tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "out"
    assert train(run) == 0
    checkpoints = [run / "checkpoints" / f"step-{step:07d}" for step in (6, 12)]
    capsys.readouterr()
    assert main(["average", *map(str, checkpoints), "--out", str(out), "--weights", "[1, 3]"]) == 0
    assert "the average of 2 models" in capsys.readouterr().out
    first, second = (Checkpointer(run).load(step).tensors("weights") for step in (6, 12))
    averaged = load_file(out / "model.safetensors")
    for name, weight in averaged.items():
        torch.testing.assert_close(weight, 0.25 * first[name] + 0.75 * second[name], atol=1e-7, rtol=1e-6)
    assert f"| `{checkpoints[1]}` | 0.75 |" in (out / "README.md").read_text()
    assert main(["generate", str(out), "--prompt", "the", "--max_new_tokens", "3"]) == 0


def test_models_that_began_apart_are_averaged_with_a_warning(train, tmp_path, capsys):
    """What came out was worse than either of them, and nothing was said."""
    runs = [tmp_path / "a", tmp_path / "b"]
    for seed, run in enumerate(runs):
        assert train(run, **{"train.seed": seed, "train.max_steps": 6}) == 0
    capsys.readouterr()
    assert main(["average", *map(str, runs), "--out", str(tmp_path / "out")]) == 0
    warning = capsys.readouterr().err
    assert warning.startswith(f"warning: the weights of {runs[1]} and {runs[0]} have a cosine similarity of ")
    checkpoints = [str(runs[0] / "checkpoints" / f"step-{step:07d}") for step in (3, 6)]
    assert main(["average", *checkpoints, "--out", str(tmp_path / "alike")]) == 0
    assert "warning" not in capsys.readouterr().err


def test_an_average_is_not_taken_for_the_export_of_a_checkpoint(train, tmp_path):
    """Its config.json named the step of the first model, which records of adapters then repeated."""
    run, out = tmp_path / "run", tmp_path / "out"
    assert train(run) == 0
    assert main(["average", str(run / "model"), str(run / "checkpoints" / "step-0000006"), "--out", str(out)]) == 0
    assert "train_data" in json.loads((run / "model" / "config.json").read_text())
    assert "train_data" not in json.loads((out / "config.json").read_text())
    assert open_model(str(out)).place.export_step is None


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--weights", "[1, 2]"], "weights is [1.0, 2.0]: must be one for each of 1 model"),
        (["--weights", "[0]"], "weights is [0.0]: must be 0 or above, with a sum above 0"),
        (["OTHER"], "cannot be averaged: "),
        (["TOKENS"], "have different tokenizers"),
        (["PASSES"], "have different configurations, so they cannot be averaged"),
        (["nowhere/at/all"], "there is no folder nowhere/at/all"),
    ],
)
def test_what_cannot_be_averaged_is_refused_and_nothing_written(train, tmp_path, capsys, more, message):
    made = {
        "OTHER": {"model.n_embd": 32},
        "TOKENS": {"tokenizer.special_tokens": "true"},
        "PASSES": {"model.n_layer": 3},
    }
    assert train(tmp_path / "run", **{"train.max_steps": 2, "train.warmup_steps": 0}) == 0
    for name in more:
        if name in made:
            assert train(tmp_path / name, **{"train.max_steps": 2, "train.warmup_steps": 0}, **made[name]) == 0
    arguments = [str(tmp_path / name) if name in made else name for name in more]
    capsys.readouterr()
    assert main(["average", str(tmp_path / "run"), *arguments, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_models_that_compute_differently_are_not_averaged(train, tmp_path, capsys):
    """Weights of the same shapes were averaged, and the first model's decay was taken for all."""
    short = {"train.max_steps": 2, "train.warmup_steps": 0}
    assert train(tmp_path / "run", **short) == 0
    assert train(tmp_path / "decay", **short, **{"model.decay": 8}) == 0
    capsys.readouterr()
    assert main(["average", str(tmp_path / "run"), str(tmp_path / "decay"), "--out", str(tmp_path / "out")]) == 2
    assert "half_lives is ['8.0', '16.0'], not None" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
