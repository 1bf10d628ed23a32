"""Adapters are merged into the weights that they were trained beside, and into no others."""

import json
import os
import shutil
import subprocess
import sys
import threading
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from safetensors.torch import load_file, save_file

from bdh import BDHForCausalLM
from bdh.cli.main import main
from bdh.model.fingerprint import fingerprint
from bdh.train.adapters import read_base
from bdh.train.models import OtherBaseError, load_model

from .conftest import losses, weights
from .test_lora import LORA, logits_of

peft = pytest.importorskip("peft")
ALONE = {"train.lora.merge": "false"}
SHORT = {"train.max_steps": 4, "train.eval_every_steps": 4, "train.sample_every_steps": 0, "checkpoint.every_steps": 2}


@pytest.fixture
def base(train, tmp_path):
    """A finished run; its export is in its folder ``model``."""
    assert train(tmp_path / "base", **SHORT) == 0
    return tmp_path / "base"


@pytest.fixture
def adapt(train, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("the fish ate the mat and some dog " * 300)

    def run(folder, base, *more, **overrides):
        settings = {"data.source": other, "train.init_from": base, **LORA, **SHORT, **overrides}
        return train(folder, *more, **settings)

    return run


def train_on(run, steps=8):
    """Trains a run on, which moves ``latest`` and replaces its export."""
    assert main(["train", "--run_dir", str(run), "--resume", f"--train.max_steps={steps}"]) == 0


def change(weights_file):
    """Makes other weights of a model's, as further training does."""
    tensors = load_file(weights_file)
    save_file({name: tensor * 1.5 for name, tensor in tensors.items()}, weights_file, metadata={"format": "pt"})


def record_of(folder):
    return json.loads((folder / "base_model.json").read_text())


def text_of(model, capsys, *more):
    capsys.readouterr()
    status = main(["generate", str(model), "--prompt", "the ", "--temperature", "0", "--max_new_tokens", "6", *more])
    shown = capsys.readouterr()
    return shown.out if status == 0 else (status, shown.err)


def test_adapters_record_the_export_that_they_were_trained_beside(adapt, base, tmp_path):
    assert adapt(tmp_path / "run", base / "model", **ALONE) == 0
    record = record_of(tmp_path / "run" / "model")
    assert record["fingerprint"] == fingerprint(load_model(str(base / "model"))[0])
    assert (record["folder"], record["relative_folder"]) == (str(base / "model"), "../../base/model")
    assert (record["step"], record["export_step"], record["commit"]) == (None, 4, None)
    assert json.loads((tmp_path / "run/model/adapter_config.json").read_text())["base_model_name_or_path"] == str(
        base / "model"
    )
    assert record["fingerprint"][:12] in (tmp_path / "run" / "model" / "README.md").read_text()


def test_peft_reads_them_without_a_warning_about_unknown_fields(adapt, base, tmp_path):
    assert adapt(tmp_path / "run", base / "model", **ALONE) == 0
    model = BDHForCausalLM.from_pretrained(base / "model")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Unexpected keyword")
        loaded = peft.PeftModel.from_pretrained(model, str(tmp_path / "run" / "model"))
    ours, _ = load_model(str(tmp_path / "run" / "model"))
    torch.testing.assert_close(logits_of(loaded), logits_of(ours), atol=1e-5, rtol=0)


@pytest.mark.slow
def test_a_base_that_was_trained_on_is_refused_by_every_command(adapt, train, base, tmp_path, capsys):
    """The adapters were merged into whatever weights lay where the base had been, without a word."""
    assert adapt(tmp_path / "run", base / "model", **ALONE) == 0
    adapters = str(tmp_path / "run" / "model")
    expected = record_of(tmp_path / "run" / "model")["fingerprint"]
    train_on(base)
    shutil.rmtree(base / "checkpoints" / "step-0000004")
    found = fingerprint(load_model(str(base / "model"))[0])
    for command in (
        ["generate", adapters, "--prompt", "a"],
        ["chat", adapters, "--plain"],
        ["eval", adapters, "--data.source", str(tmp_path / "text.txt")],
        ["export", adapters, str(tmp_path / "out")],
        ["average", adapters, "--out", str(tmp_path / "out")],
        ["convert", adapters, str(tmp_path / "out"), "--to-reference"],
        ["bench", "decode", "--model", adapters, "--quick"],
        ["train", "--train.init_from", adapters, "--run_dir", str(tmp_path / "out"), "--data.source", "pydoc"],
    ):
        capsys.readouterr()
        assert main(command) == 2, command
        shown = capsys.readouterr().err
        for part in (expected[:12], found[:12], str(base / "model"), "other weights", "--base"):
            assert part in shown, command
        assert not (tmp_path / "out").exists()
    # In a process of its own, whose log it configures.
    served = subprocess.run(
        [sys.executable, "-m", "bdh", "serve", adapters, "--port", "0"], capture_output=True, text=True, timeout=120
    )
    assert served.returncode == 1
    assert "other weights" in served.stderr


def test_the_checkpoint_of_a_replaced_export_stands_in_for_it(adapt, base, tmp_path):
    assert adapt(tmp_path / "run", base / "model", **ALONE) == 0
    before = logits_of(load_model(str(tmp_path / "run" / "model"))[0])
    train_on(base)
    assert torch.equal(logits_of(load_model(str(tmp_path / "run" / "model"))[0]), before)


def test_adapters_of_a_run_keep_to_its_checkpoint_when_it_trains_on(adapt, base, tmp_path, capsys):
    """They were merged into the newest checkpoint."""
    assert adapt(tmp_path / "run", base, **ALONE) == 0
    adapters = tmp_path / "run" / "model"
    assert record_of(adapters)["step"] == 4
    before = logits_of(load_model(str(adapters))[0])
    train_on(base)
    assert torch.equal(logits_of(load_model(str(adapters))[0]), before)
    shutil.rmtree(base / "checkpoints" / "step-0000004")
    status, shown = text_of(adapters, capsys)
    assert status == 2
    assert f"{base} (checkpoint of step 4, fingerprint" in shown
    assert f"there is no checkpoint of step 4 in {base / 'checkpoints'}: there are 2, 6, 8" in shown


def test_the_export_of_the_pinned_checkpoint_stands_in_for_it(adapt, base, tmp_path, caplog):
    assert adapt(tmp_path / "run", base, **ALONE) == 0
    before = logits_of(load_model(str(tmp_path / "run" / "model"))[0])
    shutil.rmtree(base / "checkpoints")
    assert torch.equal(logits_of(load_model(str(tmp_path / "run" / "model"))[0]), before)
    assert f"{base / 'model'} has the same weights, and is used instead" in caplog.text


def test_a_base_is_found_from_any_working_folder_and_after_moves(adapt, base, tmp_path, capsys, monkeypatch):
    """A relative name was looked for in the working folder, and elsewhere taken for a name of the hub."""
    monkeypatch.chdir(tmp_path)
    assert adapt(tmp_path / "run", "base/model", **ALONE) == 0
    adapters = tmp_path / "run" / "model"
    expected = text_of(adapters, capsys)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert text_of(adapters, capsys) == expected
    # The adapters alone: by the absolute path. Together with the base: by the relative one.
    shutil.copytree(adapters, tmp_path / "elsewhere" / "adapters")
    assert text_of("adapters", capsys) == expected
    (tmp_path / "moved").mkdir()
    for name in ("run", "base"):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    assert text_of(tmp_path / "moved" / "run" / "model", capsys) == expected
    # Found by neither.
    status, shown = text_of("adapters", capsys)
    assert status == 2
    assert "there is no folder " + str(base / "model") in shown
    assert "--base" in shown
    moved = str(tmp_path / "moved" / "base" / "model")
    assert text_of("adapters", capsys, "--base", moved) == expected
    assert main(["export", "adapters", "merged", "--base", moved]) == 0
    assert text_of("merged", capsys) == expected


def test_another_model_given_as_the_base_is_refused(adapt, train, base, tmp_path, capsys):
    assert adapt(tmp_path / "run", base / "model", **ALONE) == 0
    assert train(tmp_path / "stranger", **SHORT, **{"train.seed": 5}) == 0
    stranger = str(tmp_path / "stranger" / "model")
    status, shown = text_of(tmp_path / "run" / "model", capsys, "--base", stranger)
    assert status == 2
    assert f"{stranger} (export of step 4): the same configuration with other weights" in shown
    status, shown = text_of(base / "model", capsys, "--base", stranger)
    assert (status, "is not a folder of adapters: leave it out" in shown) == (2, True)


def test_adapters_without_a_record_are_loaded_and_announced(adapt, base, tmp_path, caplog, capsys):
    """As earlier versions, and peft itself, write them."""
    assert adapt(tmp_path / "run", base / "model", **ALONE) == 0
    expected = text_of(tmp_path / "run" / "model", capsys)
    (tmp_path / "run" / "model" / "base_model.json").unlink()
    assert "cannot verify that" not in caplog.text
    assert text_of(tmp_path / "run" / "model", capsys) == expected
    assert f"cannot verify that {base / 'model'} has the weights that the adapters of" in caplog.text


def test_a_damaged_record_is_refused(adapt, base, tmp_path, capsys):
    assert adapt(tmp_path / "run", base / "model", **ALONE) == 0
    record = tmp_path / "run" / "model" / "base_model.json"
    record.write_text(record.read_text()[:100])
    status, shown = text_of(tmp_path / "run" / "model", capsys)
    assert (status, "base_model.json is cut off or damaged" in shown) == (2, True)


def forget_base(run):
    """Takes the record out of a run's checkpoints, as those of earlier versions are."""
    from bdh.train.places import file_facts

    for folder in (run / "checkpoints").glob("step-*"):
        training = torch.load(folder / "training.pt", weights_only=True)
        del training["base"]
        torch.save(training, folder / "training.pt")
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["files"]["training.pt"] = file_facts(folder / "training.pt")
        (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_run_of_an_earlier_version_resumes_and_exports(adapt, base, tmp_path, caplog, capsys):
    assert adapt(tmp_path / "run", base / "model", **{"train.stop_at_step": 2}, **ALONE) == 0
    forget_base(tmp_path / "run")
    assert main(["train", "--run_dir", str(tmp_path / "run"), "--resume"]) == 0
    assert record_of(tmp_path / "run" / "model")["folder"] == str(base / "model")
    text_of(tmp_path / "run" / "model", capsys)
    assert "cannot verify that" in caplog.text


def test_a_resumed_run_checks_its_base(adapt, base, tmp_path, caplog, capsys):
    """Nothing looked at the base again, whose adapters the run was to export."""
    assert adapt(tmp_path / "whole", base / "model") == 0
    assert adapt(tmp_path / "run", base / "model", **{"train.stop_at_step": 2}) == 0
    resume = ["train", "--run_dir", str(tmp_path / "run"), "--resume"]
    change(base / "model" / "model.safetensors")
    shutil.rmtree(base / "checkpoints")
    assert main([*resume, "--train.lora.merge", "false"]) == 2
    shown = capsys.readouterr().err
    assert "other weights" in shown
    assert "--train.lora.merge true" in shown
    assert len(losses(tmp_path / "run")) == 2
    shutil.copytree(tmp_path / "run", tmp_path / "run2")
    assert main(resume) == 0
    assert "The run's checkpoints hold its weights too" in caplog.text
    resumed = weights(tmp_path / "run")
    assert all(torch.equal(resumed[name], weight) for name, weight in weights(tmp_path / "whole").items())
    caplog.clear()
    shutil.rmtree(base)
    assert main(["train", "--run_dir", str(tmp_path / "run2"), "--resume", "--train.lora.merge", "false"]) == 0
    assert f"there is no folder {base / 'model'}" in caplog.text


def test_a_merged_export_says_what_it_was_made_of(adapt, base, tmp_path):
    assert adapt(tmp_path / "run", base) == 0
    expected = fingerprint(load_model(str(base))[0])
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())["merged_adapters"]
    assert config["base"] == {"name": str(base), "step": 4, "commit": None, "fingerprint": expected}
    assert (config["run"], config["step"], config["r"], config["alpha"]) == ("run", 4, 3, 6)
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert f"`{base}` (checkpoint of step 4, fingerprint {expected[:12]})" in card
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "adapters"), "--merge", "false"]) == 0
    assert main(["export", str(tmp_path / "adapters"), str(tmp_path / "merged")]) == 0
    for name, weight in weights(tmp_path / "run").items():
        assert torch.equal(load_file(tmp_path / "merged" / "model.safetensors")[name], weight)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())["merged_adapters"]
    assert (config["base"]["fingerprint"], config["adapters"]) == (expected, "adapters")
    assert main(["export", str(tmp_path / "adapters"), str(tmp_path / "more"), "--ema"]) == 2
    assert main(["export", str(base), str(tmp_path / "more"), "--base", str(base)]) == 2


def test_the_merged_model_is_another_model_than_its_base(adapt, base, tmp_path):
    """States and conversations of the one are not accepted by the other."""
    assert adapt(tmp_path / "run", base, **ALONE) == 0
    from bdh.train.models import open_base

    opened = open_base(read_base(tmp_path / "run" / "model"), tmp_path / "run" / "model")
    before = opened.identity()
    from bdh.model.fingerprint import identity
    from bdh.train.adapters import load_adapters, merge

    assert identity(merge(load_adapters(opened.merged(), tmp_path / "run" / "model"))) != before


def test_adapters_beside_adapters_are_checked_at_both_levels(adapt, base, tmp_path, capsys):
    assert adapt(tmp_path / "first", base / "model", **ALONE) == 0
    assert adapt(tmp_path / "second", tmp_path / "first" / "model", **ALONE) == 0
    second = tmp_path / "second" / "model"
    assert main(["export", str(tmp_path / "second"), str(tmp_path / "merged"), "--merge", "true"]) == 0
    assert text_of(second, capsys) == text_of(tmp_path / "merged", capsys)
    change(tmp_path / "first" / "model" / "adapter_model.safetensors")
    status, shown = text_of(second, capsys)
    assert main(["train", "--run_dir", str(tmp_path / "second"), "--resume", "--train.max_steps", "6"]) == 2
    assert (status, f"{tmp_path / 'first' / 'model'}: the same configuration with other weights" in shown) == (2, True)


def test_a_decay_that_the_base_has_not_is_not_lost_with_adapters_alone(adapt, base, tmp_path, capsys):
    """peft merged them into a model without it."""
    decay = {"model.decay": 8}
    assert adapt(tmp_path / "run", base / "model", **decay, **ALONE) == 2
    assert "half_lives is ['8.0', '16.0'], in " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert adapt(tmp_path / "run", base / "model", **decay) == 0
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--merge", "false"]) == 2
    assert "half_lives is ['8.0', '16.0'], in " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def put_on_hub(cache, model, commit):
    """Puts a model into a hub cache, as what ``main`` names now."""
    folder = cache / "models--org--base"
    shutil.copytree(model, folder / "snapshots" / commit)
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / "main").write_text(commit)


def test_adapters_of_a_model_on_the_hub_keep_to_its_commit(adapt, base, tmp_path, capsys, monkeypatch):
    """They were merged into whatever the name stood for when they were loaded."""
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    put_on_hub(cache, base / "model", "a" * 40)
    assert adapt(tmp_path / "run", "org/base", **ALONE) == 0
    adapters = tmp_path / "run" / "model"
    record = record_of(adapters)
    assert (record["name"], record["commit"], record["folder"]) == ("org/base", "a" * 40, None)
    assert json.loads((adapters / "adapter_config.json").read_text())["revision"] == "a" * 40
    expected = text_of(adapters, capsys)
    train_on(base)
    put_on_hub(cache, base / "model", "b" * 40)
    assert text_of(adapters, capsys) == expected
    shutil.rmtree(cache / "models--org--base" / "snapshots" / ("a" * 40))
    status, shown = text_of(adapters, capsys)
    assert status == 2
    assert "org/base (commit aaaaaaaaaaaa, fingerprint " in shown


def run_card(folder):
    """Runs the code of a model card."""
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    exec(code.replace('folder = "."', f"folder = {str(folder)!r}"), {})


def test_the_code_of_the_card_verifies_the_base(adapt, base, tmp_path, capsys):
    """It merged the adapters into whatever lay in the base's place."""
    for name, init_from in (("of_export", base / "model"), ("of_run", base)):
        assert adapt(tmp_path / name, init_from, **ALONE) == 0
        capsys.readouterr()
        run_card(tmp_path / name / "model")
        assert capsys.readouterr().out
    shutil.rmtree(base / "checkpoints")
    change(base / "model" / "model.safetensors")
    with pytest.raises(OtherBaseError, match="other weights"):
        run_card(tmp_path / "of_export" / "model")
    with pytest.raises(FileNotFoundError, match="other weights"):
        run_card(tmp_path / "of_run" / "model")


def test_a_copied_run_keeps_the_base_that_was_verified(adapt, base, tmp_path):
    """The first folder in the base's place was recorded, whatever it held."""
    assert adapt(tmp_path / "run", base / "model", **{"train.stop_at_step": 2}, **ALONE) == 0
    shutil.copytree(tmp_path / "run", tmp_path / "elsewhere" / "run")
    shutil.copytree(base / "model", tmp_path / "elsewhere" / "base" / "model")
    change(tmp_path / "elsewhere" / "base" / "model" / "model.safetensors")
    run = tmp_path / "elsewhere" / "run"
    assert main(["export", str(run), str(tmp_path / "early"), "--merge", "false"]) == 0
    assert record_of(tmp_path / "early")["folder"] == str(base / "model")
    assert main(["train", "--run_dir", str(run), "--resume"]) == 0
    record = record_of(run / "model")
    assert (record["folder"], record["relative_folder"]) == (str(base / "model"), "../../../base/model")
    named = json.loads((run / "model" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(base / "model")


def test_a_moved_run_records_where_the_base_is_now(adapt, base, tmp_path):
    assert adapt(tmp_path / "run", base / "model", **ALONE) == 0
    (tmp_path / "moved").mkdir()
    for name in ("run", "base"):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    assert main(["export", str(tmp_path / "moved" / "run"), str(tmp_path / "out"), "--merge", "false"]) == 0
    record = record_of(tmp_path / "out")
    assert (record["folder"], record["relative_folder"]) == (
        str(tmp_path / "moved" / "base" / "model"),
        "../moved/base/model",
    )


def test_adapters_alone_are_not_exported_with_the_name_of_another_model(adapt, base, tmp_path, capsys):
    """What was written named a folder with other weights as the base."""
    assert adapt(tmp_path / "run", base / "model") == 0
    export = ["export", str(tmp_path / "run"), str(tmp_path / "out")]
    train_on(base)
    # The checkpoint of the replaced export has the weights, and is what peft finds.
    assert main([*export, "--merge", "false"]) == 0
    record = record_of(tmp_path / "out")
    assert (record["folder"], record["step"], record["export_step"]) == (str(base), 4, None)
    named = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(base / "checkpoints" / "step-0000004")
    shutil.rmtree(tmp_path / "out")
    shutil.rmtree(named)
    capsys.readouterr()
    assert main([*export, "--merge", "false"]) == 2
    shown = capsys.readouterr().err
    assert "other weights" in shown
    assert "--merge true" in shown
    assert not (tmp_path / "out").exists()
    assert main(export) == 0


def test_a_base_and_adapters_left_half_replaced_are_found(adapt, base, tmp_path, capsys):
    """A process that died while it replaced a folder leaves it as .NAME.old, which was not looked at."""
    shutil.copytree(base / "model", tmp_path / "exported")
    assert adapt(tmp_path / "run", tmp_path / "exported", **ALONE) == 0
    adapters = (tmp_path / "run" / "model").rename(tmp_path / "adapters")
    expected = text_of(adapters, capsys)

    def leave(folder):
        folder.rename(folder.with_name(f".{folder.name}.old"))

    leave(tmp_path / "exported")
    assert text_of(adapters, capsys) == expected
    leave(tmp_path / "exported")
    leave(adapters)
    assert main(["export", str(adapters), str(tmp_path / "merged")]) == 0
    leave(adapters)
    assert read_base(adapters) is not None
    # The export that stands in for a checkpoint.
    assert adapt(tmp_path / "second", base, **ALONE) == 0
    shutil.rmtree(base / "checkpoints")
    leave(base / "model")
    assert main(["export", str(tmp_path / "second" / "model"), str(tmp_path / "more")]) == 0


def test_a_pinned_checkpoint_that_is_gone_is_missing_and_not_another(adapt, base, tmp_path, caplog):
    """A run was refused after its base had trained on, but not after the base had been deleted altogether."""
    assert adapt(tmp_path / "run", base, **{"train.stop_at_step": 2}, **ALONE) == 0
    train_on(base)
    shutil.rmtree(base / "checkpoints" / "step-0000004")
    assert main(["train", "--run_dir", str(tmp_path / "run"), "--resume"]) == 0
    assert "there is no checkpoint of step 4" in caplog.text
    assert "The run's checkpoints hold its weights too" in caplog.text
    assert (record_of(tmp_path / "run" / "model")["folder"], record_of(tmp_path / "run" / "model")["step"]) == (
        str(base),
        4,
    )


@pytest.mark.parametrize(
    ("more", "is_warned"),
    [({"checkpoint.keep_last": 1}, True), ({"checkpoint.keep_last": 1, "checkpoint.keep_every_steps": 2}, False)],
)
def test_a_pinned_checkpoint_that_will_be_removed_is_warned_of(adapt, train, tmp_path, caplog, more, is_warned):
    base = tmp_path / "base"
    assert train(base, **{**SHORT, **more}) == 0
    assert adapt(tmp_path / "run", base, **ALONE) == 0
    assert (f"{base} keeps only the last 1 of its checkpoints" in caplog.text) == is_warned
    caplog.clear()
    assert adapt(tmp_path / "merged", base) == 0
    assert adapt(tmp_path / "exported", base / "model", **ALONE) == 0
    assert "of its checkpoints" not in caplog.text


@pytest.mark.parametrize("key", ["weights", "configuration", "fingerprint", "dtype"])
def test_a_record_that_lacks_something_is_damaged(adapt, base, tmp_path, capsys, key):
    """Without the weights' fingerprint it was taken for one of an earlier version, and nothing was verified."""
    assert adapt(tmp_path / "run", base / "model", **ALONE) == 0
    adapters = tmp_path / "run" / "model"
    record = record_of(adapters)
    del record[key]
    (adapters / "base_model.json").write_text(json.dumps(record))
    status, shown = text_of(adapters, capsys)
    assert (status, f"base_model.json is cut off or damaged: it lacks {key}" in shown) == (2, True)


def test_a_record_whose_fingerprint_is_not_that_of_its_weights_is_damaged(adapt, base, tmp_path, capsys):
    assert adapt(tmp_path / "run", base / "model", **ALONE) == 0
    adapters = tmp_path / "run" / "model"
    (adapters / "base_model.json").write_text(json.dumps(record_of(adapters) | {"weights": "0" * 64}))
    status, shown = text_of(adapters, capsys)
    assert (status, "base_model.json is cut off or damaged" in shown) == (2, True)


@pytest.mark.parametrize("name", ["nofolder", "./nofolder", "/nofolder", "no/such/folder"])
def test_a_name_that_can_only_be_a_folder_is_not_asked_of_the_hub(name):
    """It took half a minute of retries without a network."""
    with pytest.raises(FileNotFoundError, match=f"there is no folder {name}"):
        load_model(name)


@pytest.mark.slow
def test_what_is_looked_up_on_the_hub_is_said(tmp_path):
    asked = []

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self):
            asked.append(self.path)
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()

        do_GET = do_HEAD

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        environment = os.environ | {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
        command = [sys.executable, "-m", "bdh", "generate", "org/none", "--prompt", "a"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
        server.shutdown()
    assert any("org/none" in path for path in asked)
    assert done.returncode == 2
    assert "there is no folder org/none: looking for it on the Hugging Face hub" in done.stderr
