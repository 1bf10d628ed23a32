"""LoRA: only the adapters train, whatever else works with a run works with them, and peft reads what is exported."""

import importlib.util
import json

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from bdh.cli.main import main
from bdh.extras import install_command
from bdh.train.checkpoint import Checkpointer
from bdh.train.models import load_model
from bdh.train.setup import open_run

from .conftest import losses, weights
from .test_chat import chat_file  # noqa: F401 (a fixture)
from .test_run import assert_same_run

peft = pytest.importorskip("peft")
LORA = {"train.lora.r": 3, "train.lora.alpha": 6, "train.lora.dropout": 0.1}


@pytest.fixture
def base(train, tmp_path):
    """The export of a finished run."""
    assert train(tmp_path / "base") == 0
    return tmp_path / "base" / "model"


@pytest.fixture
def adapt(train, base, tmp_path):
    """Trains adapters on another text."""
    other = tmp_path / "other.txt"
    other.write_text("the fish ate the mat and some dog " * 300)

    def run(folder, *more, **overrides):
        return train(folder, *more, **{"data.source": other, "train.init_from": base, **LORA, **overrides})

    return run


def logits_of(model):
    tokens = torch.randint(256, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.eval()(tokens, use_cache=False).logits


def test_only_adapters_change_and_the_base_stays_to_the_bit(adapt, base, tmp_path, capsys):
    assert adapt(tmp_path / "run") == 0
    assert "unchanged; 1,344 trained: adapters of rank 3 in encoder, encoder_v, decoder" in capsys.readouterr().err
    before = load_file(base / "model.safetensors")
    checkpoint = Checkpointer(tmp_path / "run").load()
    stored = checkpoint.tensors("weights")
    adapters = {name: weight for name, weight in stored.items() if ".lora_" in name}
    assert len(adapters) == 2 * (1 + 2 + 1)  # two factors in encoder, in both heads of encoder_v, and in decoder
    assert all(weight.abs().sum() > 0 for weight in adapters.values())
    frozen = {name.replace(".base_layer", ""): w for name, w in stored.items() if name not in adapters}
    assert frozen.keys() == before.keys()
    assert all(torch.equal(frozen[name], weight) for name, weight in before.items())
    assert losses(tmp_path / "run", "val/loss")[-1] < losses(tmp_path / "run", "val/loss")[0]
    in_optimizer = {
        name.removesuffix(".exp_avg") for name in checkpoint.tensors("optimizer") if name.endswith("exp_avg")
    }
    assert in_optimizer == adapters.keys()


@pytest.mark.parametrize(
    "overrides",
    [{}, {"train.recompute": "pass"}, {"train.ema_decay": 0.9}, {"train.gradient_accumulation_steps": 2}],
    ids=lambda o: next(iter(o), "default"),
)
def test_resume_is_bit_equal(adapt, tmp_path, overrides):
    straight, halves = tmp_path / "straight", tmp_path / "halves"
    assert adapt(straight, **overrides) == 0
    assert adapt(halves, **overrides, **{"train.stop_at_step": 5}) == 0
    assert main(["train", "--run_dir", str(halves), "--resume"]) == 0
    assert_same_run(straight, halves)
    assert losses(straight, "val_ema/loss") == losses(halves, "val_ema/loss")


def test_the_merged_export_computes_what_was_trained(adapt, tmp_path):
    run = tmp_path / "run"
    assert adapt(run) == 0
    with_adapters = resumed(run)
    merged, _ = load_model(str(run / "model"))
    assert not any("lora" in name for name in merged.state_dict())
    torch.testing.assert_close(logits_of(merged), logits_of(with_adapters), atol=1e-5, rtol=0)
    assert "adapters (LoRA) of rank 3, alpha 6" in (run / "model" / "README.md").read_text()


def resumed(folder):
    from bdh.cli.settings import parse_settings
    from bdh.cli.train import settings_to_resume
    from bdh.train.config import RunSettings

    argv = ["--run_dir", str(folder), "--resume"]
    settings = parse_settings(RunSettings, argv, prog="p", description="d", base=settings_to_resume(argv))
    return open_run(settings).model


def test_peft_reads_the_folder_of_adapters(adapt, base, tmp_path, capsys):
    run, folder = tmp_path / "run", tmp_path / "adapters"
    assert adapt(run) == 0
    assert main(["export", str(run), str(folder), "--merge", "false"]) == 0
    assert not (folder / "model.safetensors").exists()
    from bdh import BDHForCausalLM

    loaded = peft.PeftModel.from_pretrained(BDHForCausalLM.from_pretrained(base), str(folder))
    merged, _ = load_model(str(run / "model"))
    torch.testing.assert_close(logits_of(loaded), logits_of(merged), atol=1e-5, rtol=0)
    assert not torch.allclose(logits_of(loaded), logits_of(load_model(str(base))[0]), atol=1e-3)
    assert yaml.safe_load((folder / "README.md").read_text().split("---")[1])["base_model"] == str(base)
    # And so do our commands.
    capsys.readouterr()
    texts = []
    for name in (folder, run / "model"):
        assert main(["generate", str(name), "--prompt", "the ", "--seed", "1", "--max_new_tokens", "8"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert main(["eval", str(folder), "--data.source", str(tmp_path / "other.txt"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] < 5.5


def test_a_run_can_export_its_adapters_by_itself_and_merge_them_later(adapt, tmp_path):
    run = tmp_path / "run"
    assert adapt(run, **{"train.lora.merge": "false"}) == 0
    assert (run / "model" / "adapter_model.safetensors").exists()
    assert main(["export", str(run), str(tmp_path / "merged"), "--merge", "true"]) == 0
    a, b = load_model(str(run / "model"))[0], load_model(str(tmp_path / "merged"))[0]
    torch.testing.assert_close(logits_of(a), logits_of(b), atol=1e-5, rtol=0)


def test_the_moving_average_of_the_adapters_is_exported_too(adapt, tmp_path):
    run = tmp_path / "run"
    assert adapt(run, **{"train.ema_decay": 0.9}) == 0
    assert main(["export", str(run), str(tmp_path / "ema"), "--ema"]) == 0
    last, average = weights(run), load_file(tmp_path / "ema" / "model.safetensors")
    assert torch.equal(last["embed.weight"], average["embed.weight"])
    assert not torch.equal(last["encoder.weight"], average["encoder.weight"])
    stored = Checkpointer(run).load().tensors("ema")
    assert all(".lora_" in name for name in stored)


def test_further_training_starts_from_the_merged_weights_of_a_run_with_adapters(adapt, train, tmp_path):
    assert adapt(tmp_path / "run") == 0
    quiet = {"train.max_steps": 1, "train.warmup_steps": 1, "train.learning_rate": 1e-9, "train.weight_decay": 0.0}
    assert train(tmp_path / "next", **{"train.init_from": tmp_path / "run"}, **quiet) == 0
    for name, weight in weights(tmp_path / "run").items():
        torch.testing.assert_close(weights(tmp_path / "next")[name], weight, atol=2e-9, rtol=1e-6)


def test_some_layers_only(adapt, tmp_path):
    assert adapt(tmp_path / "run", **{"train.lora.target_modules": "decoder", "train.sample_every_steps": 0}) == 0
    adapters = [name for name in Checkpointer(tmp_path / "run").load().tensors("weights") if ".lora_" in name]
    assert {name.split(".")[0] for name in adapters} == {"decoder"}


def test_tokens_that_the_base_does_not_know_need_the_embeddings(adapt, base, chat_file, tmp_path, capsys):  # noqa: F811
    chat = {"data.source": chat_file, "train.sample_every_steps": 0}
    assert adapt(tmp_path / "run", **chat) == 2
    assert "set train.lora.embeddings=true" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert adapt(tmp_path / "run", **chat, **{"train.lora.embeddings": "true"}) == 0
    before, after = load_file(base / "model.safetensors"), weights(tmp_path / "run")
    assert after["lm_head.weight"].shape == (260, 16)
    assert not torch.equal(after["lm_head.weight"][:256], before["lm_head.weight"])
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--merge", "false"]) == 2
    assert "must be True, since the run trained embed and lm_head too" in capsys.readouterr().err


def test_settings_that_do_not_go_together_are_faults(train, base, tmp_path, capsys):
    wrong = {
        "train.lora.r": 2,
        "train.lora.alpha": 0,
        "train.lora.dropout": 1,
        "train.lora.target_modules": "lm_head",
        "train.lora.embeddings": "true",
        "train.lora.merge": "false",
        "train.optimizer": "muon",
    }
    assert train(tmp_path / "run", **wrong) == 2
    shown = capsys.readouterr().err
    for fault in (
        "train.init_from is None: must be the model that the adapters of train.lora are for",
        "train.optimizer is 'muon': must be adamw with train.lora",
        "train.lora.alpha is 0: must be above 0",
        "train.lora.dropout is 1: must be at least 0 and below 1",
        "train.lora.target_modules is ['lm_head']: must be some of encoder, encoder_v, decoder",
        "train.lora.merge is False: must be true with embeddings",
    ):
        assert fault in shown
    assert not (tmp_path / "run").exists()


def test_a_resume_with_other_adapters_is_refused_by_name(adapt, tmp_path, capsys):
    assert adapt(tmp_path / "run", **{"train.stop_at_step": 3}) == 0
    capsys.readouterr()
    resume = ["train", "--run_dir", str(tmp_path / "run"), "--resume"]
    assert main([*resume, "--train.lora.r", "4"]) == 2
    assert "train.lora.r: 3 in the run, 4 now" in capsys.readouterr().err
    assert main([*resume, "--train.lora.merge", "false"]) == 0


def test_a_missing_package_is_named_before_anything_is_written(adapt, tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else find(name))
    assert adapt(tmp_path / "run") == 2
    assert f"LoRA needs the package peft: {install_command('finetune')}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_adapters_whose_base_is_gone_or_unnamed_are_refused(adapt, base, tmp_path, capsys):
    assert adapt(tmp_path / "run", **{"train.lora.merge": "false"}) == 0
    base.rename(tmp_path / "elsewhere")
    capsys.readouterr()
    assert main(["generate", str(tmp_path / "run" / "model"), "--prompt", "a"]) == 2
    assert f"there is no folder {base}" in capsys.readouterr().err
    (tmp_path / "run" / "model" / "adapter_config.json").write_text("{}")
    assert main(["generate", str(tmp_path / "run" / "model"), "--prompt", "a"]) == 2
    assert "does not say which model the adapters belong to" in capsys.readouterr().err


def test_merge_false_without_adapters_is_refused(base, tmp_path, capsys):
    assert main(["export", str(base.parent), str(tmp_path / "out"), "--merge", "false"]) == 2
    assert "has no adapters" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def keep_one(folder):
    weights = load_file(folder / "adapter_model.safetensors")
    save_file(dict([next(iter(weights.items()))]), folder / "adapter_model.safetensors", {"format": "pt"})


def cut_targets(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["decoder"]}))


def other_rank(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"r": 5}))


def no_module(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["nothing"]}))


def no_type(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    del config["peft_type"]
    (folder / "adapter_config.json").write_text(json.dumps(config))


def remove_weights(folder):
    (folder / "adapter_model.safetensors").unlink()


def truncate(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (keep_one, "lacks base_model.model."),
        (cut_targets, "adapter_config.json does not name: base_model.model.encoder"),
        (other_rank, "do not fit"),
        (no_module, "do not fit"),
        (no_type, "adapter_config.json"),
        (remove_weights, "adapter_model.safetensors is missing"),
        (truncate, "adapter_model.safetensors is cut off or damaged"),
    ],
)
def test_adapters_that_are_not_complete_are_refused(adapt, tmp_path, capsys, damage, message):
    """Those that were left were merged, the others ignored, without a word."""
    assert adapt(tmp_path / "run", **{"train.lora.merge": "false"}) == 0
    damage(tmp_path / "run" / "model")
    capsys.readouterr()
    assert main(["export", str(tmp_path / "run" / "model"), str(tmp_path / "out")]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert str(tmp_path / "run" / "model") in shown
    assert "unexpected" not in shown
    assert not (tmp_path / "out").exists()
