"""The plain modules against the transformers class that wrote them. (Faults of folders: tests/cli/test_generate.py.)"""

import json
import re
from dataclasses import fields

import pytest
import torch

from bdh import BDHConfig, BDHForCausalLM
from bdh.model.network import ModelConfig, ModelParts, Network


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_folder_gives_what_transformers_reads(make_model, tmp_path, dtype):
    model = make_model(decay=[3.0, None, 8.0], train_block_size=32, rope_theta=500).to(dtype)
    model.generation_config.eos_token_id = [3, 5]
    for shard_size in ("50GB", "4KB"):
        folder = tmp_path / shard_size
        model.save_pretrained(folder, max_shard_size=shard_size)
        assert (folder / "model.safetensors").exists() == (shard_size == "50GB")
        network, again = Network.load(folder), BDHForCausalLM.from_pretrained(folder)
        assert isinstance(network, ModelParts)
        assert isinstance(again, ModelParts)
        assert not network.training
        assert (network.dtype, network.device) == (dtype, torch.device("cpu"))
        assert network.generation_config.eos_token_id == again.generation_config.eos_token_id == [3, 5]
        expected = again.state_dict()
        found = network.state_dict()
        assert list(found) == list(expected)
        for name, weight in found.items():
            torch.testing.assert_close(weight, expected[name], rtol=0, atol=0)
        for each in fields(ModelConfig):
            assert getattr(network.config, each.name) == getattr(again.config, each.name, None), each.name
        for name in ("neurons_per_head", "half_lives", "state_bytes_per_sequence"):
            assert getattr(network.config, name) == getattr(again.config, name)


def test_weights_keep_their_type_unless_the_configuration_names_one(make_model, tmp_path):
    make_model().to(torch.bfloat16).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    facts = json.loads(path.read_text())
    del facts["dtype"]
    path.write_text(json.dumps(facts))
    assert Network.load(tmp_path).dtype == torch.bfloat16
    path.write_text(json.dumps(facts | {"torch_dtype": "float64"}))
    assert Network.load(tmp_path).dtype == torch.float64


def test_weights_of_pytorch_are_read_too(model, tmp_path):
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    network = Network.load(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), model.parameters(), strict=True))


def test_the_model_outlives_its_files(model, tmp_path):
    """Mapped weights would change, or end the process, with the file."""
    model.save_pretrained(tmp_path)
    network = Network.load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert torch.equal(network.lm_head.weight, model.lm_head.weight)


def test_the_defaults_are_those_of_the_transformers_class():
    ours, theirs = ModelConfig(), BDHConfig()
    assert {f.name: getattr(ours, f.name) for f in fields(ours)} == {
        f.name: getattr(theirs, f.name, None)
        for f in fields(ours)  # which has no quantization_config until it needs one
    }


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"n_embd": 24, "hidden_size": 32}, "hidden_size is 32 and n_embd is 24: they are the same"),
        ({"n_embd": 24, "n_layers": 2}, "n_layers is unknown: did you mean n_layer?"),
        ({"n_embd": 24, "n_head": 7}, "% 7 = "),
        ({"n_embd": 24, "decay": -1}, "decay is -1"),
    ],
)
def test_both_classes_refuse_the_same_configurations(facts, message):
    for make in (ModelConfig.from_facts, lambda facts: BDHConfig(**facts)):
        with pytest.raises(ValueError, match=re.escape(message)):
            make(facts)


def test_names_of_transformers_are_understood():
    config = ModelConfig.from_facts(
        {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "sep_token_id": 1, "id2label": {}}
    )
    assert (config.n_embd, config.n_layer, config.n_head) == (24, 2, 3)
