"""Runs with ``train.quantize``: what is trained, measured, sampled and exported is the quantized model."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from bdh.cli.main import main
from bdh.data import prepare_corpus
from bdh.data.config import DataConfig
from bdh.evaluate.loss import evaluate_parts
from bdh.model import BDHForCausalLM
from bdh.model.fake_quantized import FakeQuantizedLinear
from bdh.model.quantization import quantized_formats
from bdh.quantize import quantize
from bdh.tokenizer import byte_tokenizer
from bdh.train.checkpoint import Checkpointer
from bdh.train.dry_run import forecast
from bdh.train.models import load_model, open_model

from .conftest import losses, samples, weights
from .test_dry_run import estimate_of, opened  # noqa: F401 (a fixture)
from .test_run import assert_same_run

INT4 = {"train.quantize": "int4"}
TOKENS = torch.randint(256, (2, 20), generator=torch.Generator().manual_seed(1))


def logits_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS, use_cache=False).logits


@pytest.mark.parametrize("kind", ["int8", "int4", "mixed"])
def test_the_export_is_the_rounded_model_that_was_measured(train, tmp_path, capsys, kind):
    run = tmp_path / "run"
    assert train(run, **{"train.quantize": kind}) == 0
    said = " ".join(capsys.readouterr().err.split())
    matrices = "E to int8, Ev and Dec to int4" if kind == "mixed" else f"E, Ev and Dec to {kind}"
    assert f"rounding {matrices} in every step, and in evaluations" in said
    exported = AutoModelForCausalLM.from_pretrained(run / "model")
    assert json.loads((run / "model" / "config.json").read_text())["quantization_config"]["weights"] == kind
    assert f"| trained for | {kind} weights" in (run / "model" / "README.md").read_text()
    # The codes are those next to the weights that the optimizer has moved, which the checkpoint keeps.
    latent = open_model(str(run)).merged()
    assert not quantized_formats(latent)
    assert torch.equal(logits_of(exported), logits_of(quantize(latent, kind)))
    assert not torch.equal(logits_of(exported), logits_of(latent))
    for name in (str(run), str(run / "model")):
        assert torch.equal(logits_of(load_model(name, device="cpu")[0]), logits_of(exported))
    corpus = prepare_corpus(DataConfig(source=str(tmp_path / "text.txt")), byte_tokenizer(), 32)
    measured, _ = evaluate_parts(exported, corpus.validation_parts(4))
    assert measured.loss == losses(run, "val/loss")[-1]


def test_samples_are_those_of_the_export(train, tmp_path, capsys):
    run = tmp_path / "run"
    assert train(run, **INT4) == 0
    last = samples(run)[-1]
    capsys.readouterr()
    asked = [
        "--prompt",
        last["prompt"],
        "--max_new_tokens",
        "8",
        "--temperature",
        "0.8",
        "--top_k",
        "50",
        "--seed",
        "1337",
    ]
    for name in (run, run / "model"):
        assert main(["generate", str(name), *asked]) == 0
        assert capsys.readouterr().out.rstrip("\n").endswith(last["text"].rstrip("\n"))


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"train.quantize_from_step": 6},
        {"train.optimizer": "muon", "train.gradient_accumulation_steps": 2},
        {"train.ema_decay": 0.9, "checkpoint.export": "ema"},
        {"train.dtype": "bfloat16", "train.carry_state": True},
        {"train.layer_path": "plain", "train.recompute": "pass"},
    ],
    ids=lambda o: next(iter(o), "default"),
)
def test_resume_is_bit_equal(train, tmp_path, overrides):
    straight, halves = tmp_path / "straight", tmp_path / "halves"
    assert train(straight, **INT4, **overrides) == 0
    assert train(halves, **INT4, **overrides, **{"train.stop_at_step": 5}) == 0
    assert main(["train", "--run_dir", str(halves), "--resume"]) == 0
    assert_same_run(straight, halves)
    assert losses(straight, "val_ema/loss") == losses(halves, "val_ema/loss")
    ours, theirs = (Checkpointer(run).load().tensors("weights") for run in (straight, halves))
    assert all(torch.equal(theirs[name], weight) for name, weight in ours.items())


def test_rounding_begins_at_its_step(train, tmp_path, capsys):
    assert train(tmp_path / "plain") == 0
    capsys.readouterr()
    assert train(tmp_path / "late", **INT4, **{"train.quantize_from_step": 6}) == 0
    assert "E, Ev and Dec to int4 from step 7 on" in " ".join(capsys.readouterr().err.split())
    plain, late = losses(tmp_path / "plain"), losses(tmp_path / "late")
    assert late[:6] == plain[:6]
    assert late[6] != plain[6]
    # What is measured is what would be exported, from the beginning.
    assert losses(tmp_path / "late", "val/loss")[0] != losses(tmp_path / "plain", "val/loss")[0]


def test_weights_are_rounded_once_a_step(train, tmp_path, monkeypatch):
    calls, compute = [], FakeQuantizedLinear.rounded
    monkeypatch.setattr(FakeQuantizedLinear, "rounded", lambda module: calls.append(module) or compute(module))
    few = {"train.max_steps": 3, "train.sample_every_steps": 0, "train.eval_every_steps": 3}
    assert train(tmp_path / "run", **INT4, **few, **{"train.gradient_accumulation_steps": 3}) == 0
    assert len(calls) == (3 + 1) * 4  # E, two heads of Ev and Dec in each step, and in the evaluation


def test_a_model_is_trained_further_for_a_format(train, tmp_path, capsys):
    assert train(tmp_path / "first") == 0
    more = {"train.init_from": tmp_path / "first" / "model", "train.learning_rate": 1e-9, "train.max_steps": 4}
    assert train(tmp_path / "second", **INT4, **more) == 0
    expected = quantize(load_model(str(tmp_path / "first"), device="cpu")[0], "int4")
    exported = BDHForCausalLM.from_pretrained(tmp_path / "second" / "model")
    torch.testing.assert_close(logits_of(exported), logits_of(expected), atol=1e-4, rtol=0)
    # A run is continued with the weights that are not rounded, its export cannot be.
    assert train(tmp_path / "third", **INT4, **(more | {"train.init_from": tmp_path / "second"})) == 0
    capsys.readouterr()
    for rounding in ({}, INT4):
        assert (
            train(tmp_path / "fourth", **rounding, **(more | {"train.init_from": tmp_path / "second" / "model"})) == 2
        )
        assert "train.init_from must be the unquantized model" in capsys.readouterr().err
    assert not (tmp_path / "fourth" / "config.yaml").exists()


def test_the_average_is_rounded_too(train, tmp_path):
    run = tmp_path / "run"
    assert train(run, **INT4, **{"train.ema_decay": 0.5, "checkpoint.export": "ema"}) == 0
    latent = open_model(str(run), ema=True).merged()
    exported = BDHForCausalLM.from_pretrained(run / "model")
    assert torch.equal(logits_of(exported), logits_of(quantize(latent, "int4")))
    assert "encoder.packed" in weights(run)
    assert losses(run, "val_ema/loss") != losses(run, "val/loss")


def test_a_compiled_model_trains_as_others(train, tmp_path):
    pytest.importorskip("torch._inductor")
    few = {"train.max_steps": 4, "train.layer_path": "plain", "model.dropout": 0, "train.sample_every_steps": 0}
    assert train(tmp_path / "plain", **INT4, **few) == 0
    assert train(tmp_path / "compiled", **INT4, **few, **{"train.compile": True}) == 0
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)


def test_the_memory_of_the_rounded_weights_is_counted(opened, capsys):  # noqa: F811
    run = opened(**INT4)
    parts = estimate_of(run).parts
    layer = sum(p.numel() for name, p in run.model.named_parameters() if "embed" not in name and "head" not in name)
    assert parts["rounded weights"] == 4 * layer
    run.close()


def test_a_dry_run_measures_steps_that_round(opened, monkeypatch):  # noqa: F811
    """It measured the first steps, which do not where ``train.quantize_from_step`` says so."""
    calls, compute = [], FakeQuantizedLinear.rounded
    monkeypatch.setattr(FakeQuantizedLinear, "rounded", lambda module: calls.append(module) or compute(module))
    run = opened(**INT4, **{"train.quantize_from_step": 6})
    found = forecast(run)
    assert len(calls) == 4 * (len(found.points) + 1)  # and the step before them
    run.close()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"train.quantize": "int2"}, "train.quantize is 'int2': must be one of int8, int4, mixed, or null"),
        ({**INT4, "train.dtype": "float16"}, "train.dtype is 'float16': must be auto, float64, float32 or bfloat16"),
        ({**INT4, "train.quantize_from_step": 12}, "train.quantize_from_step is 12: must be below max_steps, 12"),
        ({"train.quantize_from_step": 2}, "train.quantize_from_step is 2: must be 0 without train.quantize"),
        ({**INT4, "train.lora.r": 2, "train.init_from": "."}, "train.lora.r is 2: must be 0 with train.quantize"),
        (
            {**INT4, "distributed.strategy": "fsdp", "distributed.param_dtype": "bfloat16"},
            "distributed.param_dtype is 'bfloat16': must be float32 with train.quantize",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(train, tmp_path, capsys, overrides, message):
    assert train(tmp_path / "run", **overrides) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_run_keeps_its_format(train, tmp_path, capsys):
    assert train(tmp_path / "run", **INT4, **{"train.stop_at_step": 3}) == 0
    assert main(["train", "--run_dir", str(tmp_path / "run"), "--resume", "--train.quantize", "int8"]) == 2
    assert "train.quantize: 'int4' in the run, 'int8' now" in " ".join(capsys.readouterr().err.split())
