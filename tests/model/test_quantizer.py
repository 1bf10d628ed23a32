"""Our formats in transformers' from_pretrained and save_pretrained, and in Network, which needs no transformers."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from bdh import BDHQuantizationConfig
from bdh.model.fingerprint import fingerprint
from bdh.model.network import Network
from bdh.model.quantization import quantized_formats

CHOICES = [(weights, embeddings) for weights in ("int8", "int4", "mixed") for embeddings in (False, True)]


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


def quantized(folder, weights="int8", embeddings=False):
    config = BDHQuantizationConfig(weights, embeddings=embeddings)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)


@pytest.mark.parametrize(("weights", "embeddings"), CHOICES)
def test_quantized_while_loading_saved_and_loaded_again(folder, tokens, tmp_path, weights, embeddings):
    made = quantized(folder, weights, embeddings)
    assert made.is_quantized
    made.save_pretrained(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    network = Network.load(tmp_path / "out")
    assert quantized_formats(made) == quantized_formats(loaded) == quantized_formats(network)
    assert fingerprint(made) == fingerprint(loaded) == fingerprint(network)
    assert torch.equal(made(tokens).logits, loaded(tokens).logits)
    assert network.dtype == loaded.dtype == torch.float32
    assert network.device == loaded.device
    loaded.save_pretrained(tmp_path / "again")
    first, again = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[key], again[key]) for key in first)


def test_rounding_while_loading_is_that_of_quantize(folder, model):
    from bdh.quantize import quantize

    for weights, embeddings in CHOICES:
        ours = quantize(model, weights, embeddings=embeddings)
        assert fingerprint(ours) == fingerprint(quantized(folder, weights, embeddings))


def test_a_fresh_process_needs_no_other_library(folder, tokens, tmp_path):
    quantized(folder, "mixed").save_pretrained(tmp_path / "out")
    code = f"""
import sys
for name in ("torchao", "bitsandbytes", "peft", "accelerate"):
    sys.modules[name] = None
import bdh
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "out")!r})
print(type(model.encoder).__name__, model.generate(max_new_tokens=3, do_sample=False, eos_token_id=None,
      input_ids=__import__("torch").tensor([[1, 2]])).shape[1])"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["QuantizedLinear", "5"], done.stderr


def test_without_a_head_and_with_another(folder, tokens, tmp_path):
    made = quantized(folder, "int4", embeddings=True)
    made.save_pretrained(tmp_path / "out")
    backbone = AutoModel.from_pretrained(tmp_path / "out")
    assert "lm_head" not in quantized_formats(backbone)
    torch.testing.assert_close(made.lm_head(backbone(tokens).last_hidden_state), made(tokens).logits)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", num_labels=3)
    assert classifier(tokens).logits.shape == (2, 3)
    classifier(tokens, labels=torch.tensor([0, 2])).loss.backward()
    assert classifier.score.weight.grad is not None


def test_in_bfloat16(folder, tokens, tmp_path):
    config = BDHQuantizationConfig("int8", embeddings=True)
    made = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.bfloat16)
    assert made(tokens).logits.dtype == torch.bfloat16
    made.save_pretrained(tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    assert Network.load(tmp_path / "out").dtype == torch.bfloat16


def test_another_model_is_refused(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_embd=4, n_layer=1, n_head=1, vocab_size=5)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="for BDH models, not for gpt2"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=BDHQuantizationConfig())


def test_weights_that_are_not_finite_are_named(model, tmp_path):
    with torch.no_grad():
        model.encoder_v[2].weight[1, 0] = torch.inf
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"encoder_v.2: weight 0 of row 1 .*is inf"):
        quantized(tmp_path)


def damage(out, case):
    path, config = out / "model.safetensors", out / "config.json"
    weights, facts = load_file(path), json.loads(config.read_text())
    if case == "cut off":
        path.write_bytes(path.read_bytes()[:-100])
        return
    if case == "missing":
        del weights["decoder.packed"]
    elif case == "other shape":
        weights["encoder.packed"] = weights["encoder.packed"][:-1].clone()
    elif case == "scales":
        weights["encoder_v.1.packed"][4, -2:] = 255
    elif case == "floats":
        weights["encoder.packed"] = weights["encoder.packed"].float()
    elif case == "plain weights":
        weights = {key.replace("packed", "weight"): torch.zeros(3) for key in weights}
    elif case == "other format":
        facts["quantization_config"]["weights"] = "int4"
    elif case == "unknown format":
        facts["quantization_config"]["weights"] = "int3"
    elif case == "unknown name":
        facts["quantization_config"]["zero_points"] = True
    save_file(weights, path, metadata={"format": "pt"})
    config.write_text(json.dumps(facts))


FAULTS = {
    "cut off": "cut off or damaged",
    "missing": r"decoder\.packed",
    "other shape": r"encoder\.packed is \(143, 26\), not \(144, 26\)",
    "scales": r"encoder_v\.1\.packed is missing, or its row 4 has a scale that is not finite",
    "floats": r"encoder\.packed is float32, not uint8",
    "plain weights": r"encoder\.packed",
    "other format": r"encoder\.packed",
    "unknown format": "config.json of .* is wrong: quantization_config: weights is 'int3': must be int8 or int4 or mixed",
    "unknown name": "config.json of .* is wrong: quantization_config has the unknown zero_points",
}


@pytest.mark.parametrize("case", FAULTS)
def test_damaged_and_foreign_files_are_named(folder, tmp_path, case):
    from bdh.train.models import load_model

    out = tmp_path / "out"
    quantized(folder).save_pretrained(out)
    damage(out, case)
    with pytest.raises(ValueError, match=FAULTS[case]) as caught:
        Network.load(out)
    assert str(out) in str(caught.value)
    with pytest.raises(ValueError, match=r"out|config\.json") as caught:
        load_model(str(out))
    assert str(out) in str(caught.value)
