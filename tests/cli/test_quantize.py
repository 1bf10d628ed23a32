import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bdh.cli.main import main
from bdh.model.network import Network

KEPT = {"generation_config.json", "tokenizer.json", "tokenizer_config.json", "bdh_auto.py"}


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("the cat sat on the mat and ate some fish. " * 200)
    return path


def report(capsys) -> dict:
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("weights", ["int8", "int4", "mixed"])
def test_an_export_becomes_a_folder_that_everything_reads(model_folder, text, tmp_path, capsys, weights):
    out = tmp_path / "out"
    argv = ["quantize", str(model_folder), str(out), "--weights", weights, "--data.source", str(text), "--json", "true"]
    assert main([*argv, "--held_out_tokens", "200", "--block_size", "40"]) == 0
    facts = report(capsys)
    assert facts == json.loads((out / "quantization.json").read_text())
    assert {path.name for path in out.iterdir()} == {
        "config.json",
        "model.safetensors",
        "quantization.json",
        "README.md",
    } | KEPT
    same = KEPT - {"tokenizer_config.json"}  # to which transformers adds how it was read
    assert all((out / name).read_bytes() == (model_folder / name).read_bytes() for name in same)
    for when, folder in (("before", model_folder), ("after", out)):
        size = (folder / "model.safetensors").stat().st_size
        assert facts["bytes"][when] < size < facts["bytes"][when] + 1500
    assert [each["module"] for each in facts["matrices"]] == ["encoder", "encoder_v.0", "encoder_v.1", "decoder"]
    assert facts["text"]["tokens"] == 200
    assert facts["text"]["before"]["perplexity"] == pytest.approx(facts["text"]["after"]["perplexity"], rel=0.1)
    assert main(["generate", str(out), "--prompt", "the", "--max_new_tokens", "5"]) == 0
    assert capsys.readouterr().out.startswith("the")
    eval_argv = ["eval", str(out), "--data.source", str(text), "--block_size", "40", "--json", "true"]
    assert main(eval_argv) == 0
    assert report(capsys)["perplexity"] == pytest.approx(facts["text"]["after"]["perplexity"], rel=0.1)


def test_the_report_and_the_card_say_the_same(model_folder, text, tmp_path, capsys):
    out = tmp_path / "out"
    argv = ["quantize", str(model_folder), str(out), "--weights", "int4", "--embeddings", "true"]
    assert main([*argv, "--data.source", str(text), "--block_size", "40"]) == 0
    printed, card = capsys.readouterr().out, (out / "README.md").read_text()
    facts = json.loads((out / "quantization.json").read_text())
    perplexity = f"{facts['text']['after']['perplexity']:.4f}"
    divergence = f"{facts['text']['kl']:.2e} nats (KL)"
    for shown in (printed, card):
        assert perplexity in shown
        assert divergence in shown
        assert re.search(r"encoder_v\.1\W+int4\W+[\d.]+%\W+[\d.]+%", shown)
        assert re.search(r"lm_head\W+int8", shown)
    assert "in int4\n" in card
    assert "Embedding and head are in 8 bits too." in card


def test_without_text_nothing_is_measured_and_that_is_said(model_folder, tmp_path, capsys):
    assert main(["quantize", str(model_folder), str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "Nothing was measured on text: --data.source says on which." in shown
    assert "perplexity" not in shown
    assert Network.load(tmp_path / "out").config.quantization_config["weights"] == "int8"


@pytest.mark.slow
def test_a_run_is_measured_on_its_own_text(tmp_path, text, capsys):
    run = tmp_path / "run"
    sizes = {"n_layer": 1, "n_embd": 16, "n_head": 1, "mlp_internal_dim_multiplier": 4}
    settings = {f"model.{name}": value for name, value in sizes.items()}
    settings |= {"train.max_steps": 2, "train.warmup_steps": 1, "train.block_size": 32}
    settings |= {"data.source": text, "run_dir": run, "monitor.backends": "jsonl"}
    assert main(["train", *(f"--{name}={value}" for name, value in settings.items())]) == 0
    capsys.readouterr()
    assert main(["quantize", str(run), str(run / "int8")]) == 0
    shown = capsys.readouterr()
    assert f"data settings of {run}" in shown.err
    assert "in sequences of 32" in shown.out
    card = (run / "int8" / "README.md").read_text()
    assert "## The model before" in card
    assert "### Training" in card
    assert card.count("from_pretrained(folder)") == 2  # one program
    config = json.loads((run / "int8" / "config.json").read_text())
    assert config["train_data"]["step"] == 2
    assert config["eos_token_id"] is not None  # of an export


def test_gptq_reads_the_training_part(model_folder, text, tmp_path, capsys):
    out = tmp_path / "out"
    argv = [
        "quantize",
        str(model_folder),
        str(out),
        "--weights",
        "int4",
        "--method",
        "gptq",
        "--calibration_tokens",
        "400",
    ]
    assert main([*argv, "--data.source", str(text), "--block_size", "40", "--json", "true"]) == 0
    facts = report(capsys)
    assert facts["method"] == "gptq"
    assert facts["calibration_tokens"] == 400
    assert "rounded (gptq, on 400 tokens of " in (out / "README.md").read_text()
    assert main(["quantize", str(model_folder), str(tmp_path / "rtn"), "--weights", "int4"]) == 0
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "rtn"))
    assert not torch.equal(ours["encoder.packed"], theirs["encoder.packed"])


@pytest.mark.parametrize(
    ("asked", "warning"), [("9999999", "calibration_tokens is 9,999,999, but the training part has only "), (None, "")]
)
def test_no_more_is_read_than_the_text_has(model_folder, text, tmp_path, capsys, caplog, asked, warning):
    text.write_text(text.read_text()[:900])
    argv = ["quantize", str(model_folder), str(tmp_path / "out"), "--weights", "int4", "--method", "gptq"]
    argv += ["--data.source", str(text), "--block_size", "40"]
    assert main([*argv, *(["--calibration_tokens", asked] if asked else [])]) == 0
    shown = capsys.readouterr().out
    number = json.loads((tmp_path / "out" / "quantization.json").read_text())["calibration_tokens"]
    assert 760 <= number <= 850
    assert warning in caplog.text
    assert f"in int4 (gptq, on {number} tokens of {text})" in shown


def test_a_state_is_recommended_in_the_configuration(model_folder, tmp_path, capsys):
    assert main(["quantize", str(model_folder), str(tmp_path / "out"), "--state", "bfloat16"]) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["state"] == "bfloat16"
    assert "States in bfloat16 are recommended." in (tmp_path / "out" / "README.md").read_text()


BAD = {
    "no model": "there is no folder",
    "out is taken": "exists already and is not empty",
    "quantized": r"has weights in int8: quantize the unquantized model",
    "infinite": r"encoder_v\.1: weight 0 of row 1 .*is inf",
    "short text": "the validation part has 10 tokens, but one sequence of block_size 40 needs 41",
    "no text": "data.source",
    "weights": "weights is 'int3': must be one of int8, int4, mixed",
    "state": "state is 'int2': must be",
    "method": "method is 'awq': must be",
    "flag": "group_size",
    "gptq without text": "method is 'gptq': needs text to calibrate on, as data.source",
    "gptq on short text": "the training part has 30 tokens, but one sequence of block_size 40 needs 41",
    "no gptq": "calibration_tokens is 99: must be left out with method rtn",
    "cut off": "cut off or damaged",
    "foreign": "is not a BDH model",
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_status_2_and_writes_nothing(model_folder, text, tmp_path, capsys, case):
    model, out, argv = tmp_path / "model", tmp_path / "out", []
    model.mkdir()
    for path in model_folder.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    if case == "no model":
        model = tmp_path / "none"
    elif case == "out is taken":
        out.mkdir()
        (out / "precious").touch()
    elif case == "quantized":
        assert main(["quantize", str(model), str(tmp_path / "first")]) == 0
        model = tmp_path / "first"
    elif case == "infinite":
        weights = load_file(model / "model.safetensors")
        weights["encoder_v.1.weight"][1, 0] = torch.inf
        save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    elif case == "short text":
        text.write_text("a" * 91)
        argv = ["--data.source", str(text), "--block_size", "40"]
    elif case == "no text":
        argv = ["--data.source", str(tmp_path / "none.txt")]
    elif case in ("weights", "state", "method"):
        argv = [f"--{case}", {"weights": "int3", "state": "int2", "method": "awq"}[case]]
    elif case == "gptq without text":
        argv = ["--method", "gptq"]
    elif case == "gptq on short text":
        text.write_text("a" * 30)
        (tmp_path / "long.txt").write_text("a" * 100)
        argv = ["--method", "gptq", "--data.source", str(text), "--data.val_source", str(tmp_path / "long.txt")]
        argv += ["--block_size", "40"]
    elif case == "no gptq":
        argv = ["--calibration_tokens", "99"]
    elif case == "flag":
        argv = ["--group_size", "16"]
    elif case == "cut off":
        content = (model / "model.safetensors").read_bytes()
        (model / "model.safetensors").write_bytes(content[:-50])
    elif case == "foreign":
        (model / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_embd": 4}))
    before = sorted(tmp_path.rglob("*"))
    assert main(["quantize", str(model), str(out), *argv]) == 2
    shown = capsys.readouterr().err
    assert re.search(BAD[case], shown), shown
    cache = tmp_path / "cache"
    assert [path for path in sorted(tmp_path.rglob("*")) if cache not in (path, *path.parents)] == [
        path for path in before if cache not in (path, *path.parents)
    ]


@pytest.fixture(scope="module")
def quantized_folder(model_folder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("quantized") / "int8"
    assert main(["quantize", str(model_folder), str(out)]) == 0
    return out


def test_commands_that_cannot_use_it_say_so(model_folder, quantized_folder, tmp_path, capsys):
    name = str(quantized_folder)
    assert main(["average", str(model_folder), name, "--out", str(tmp_path / "out")]) == 2
    assert f"{name} has weights in int8: average the unquantized models" in capsys.readouterr().err
    argv = ["train", "--train.init_from", name, "--run_dir", str(tmp_path / "run"), "--data.source", "pydoc"]
    assert main(argv) == 2
    assert f"{name} has weights in int8: train.init_from must be the unquantized model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "run").exists()


def test_it_becomes_a_checkpoint_of_the_reference_code(model_folder, quantized_folder, tmp_path):
    from bdh.model import BDHForCausalLM

    assert main(["convert", str(quantized_folder), str(tmp_path / "back.pt"), "--to-reference"]) == 0
    weights = torch.load(tmp_path / "back.pt", weights_only=True)["model"]
    expected = BDHForCausalLM.from_pretrained(quantized_folder).dequantize().to_reference()
    assert all(torch.equal(weights[key], expected[key]) for key in expected)


def test_adapters_are_not_merged_into_it(model_folder, quantized_folder, tmp_path, capsys):
    pytest.importorskip("peft")
    from peft import LoraConfig, get_peft_model

    from bdh.model import BDHForCausalLM

    tuned = get_peft_model(BDHForCausalLM.from_pretrained(model_folder), LoraConfig(target_modules=["encoder"]))
    tuned.save_pretrained(tmp_path / "adapters")
    argv = ["generate", str(tmp_path / "adapters"), "--base", str(quantized_folder), "--prompt", "a"]
    assert main(argv) == 2
    assert (
        "has weights in int8: adapters can only be merged into the weights of the unquantized model"
        in capsys.readouterr().err
    )
    with pytest.raises(ValueError, match="Target module QuantizedLinear"):
        get_peft_model(BDHForCausalLM.from_pretrained(quantized_folder), LoraConfig(target_modules=["encoder"]))


def test_onnx_needs_plain_weights(quantized_folder, tmp_path):
    from bdh.model import BDHForCausalLM
    from bdh.model.conversion import export_onnx

    with pytest.raises(ValueError, match=r"has weights in int8: what model.dequantize\(\) gives"):
        export_onnx(BDHForCausalLM.from_pretrained(quantized_folder), tmp_path / "model.onnx")
