import pickle

import pytest
import torch

from bdh import BDHForCausalLM
from bdh.model.conversion import load_reference, reference_config

from .conftest import FIXTURES, read_golden


@pytest.fixture
def tiny():
    return read_golden(FIXTURES / "tiny.safetensors")


def test_there_and_back_is_bit_equal(golden):
    back = BDHForCausalLM.from_reference(golden.weights, golden.config).to_reference()
    assert back.keys() == golden.weights.keys()
    assert all(torch.equal(back[name], golden.weights[name]) for name in back)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights, config: {"model": weights, "config": config},
        lambda weights, config: {"model_state_dict": weights, "config": {**config, "block_size": 5}, "step": 3},
        lambda weights, config: {"model": {f"_orig_mod.{k}": v for k, v in weights.items()}, "config": config},
        lambda weights, config: {"model": {f"module._orig_mod.{k}": v for k, v in weights.items()}, "config": config},
        lambda weights, config: {"model": {k: v for k, v in weights.items() if k != "attn.freqs"}, "config": config},
    ],
    ids=["model", "model_state_dict", "compiled", "ddp-compiled", "no-freqs"],
)
def test_the_forms_that_are_published(tiny, tmp_path, wrap):
    torch.save(wrap(tiny.weights, tiny.config), tmp_path / "model.pt")
    model = BDHForCausalLM.from_reference(*load_reference(tmp_path / "model.pt"))
    # The recorded logits and ours are float32 sums in different orders.
    torch.testing.assert_close(model(tiny.input_ids).logits, tiny.logits, atol=1e-5, rtol=0)
    assert reference_config(model.config) == tiny.config


def test_the_block_size_of_a_published_configuration_is_kept(tiny):
    model = BDHForCausalLM.from_reference(tiny.weights, {**tiny.config, "block_size": 512, "learning_rate": 1e-3})
    assert model.config.train_block_size == 512
    assert BDHForCausalLM.from_reference(tiny.weights, tiny.config).config.train_block_size is None


def test_a_bare_state_dict_needs_only_the_number_of_passes(tiny, tmp_path):
    torch.save(tiny.weights, tmp_path / "bare.pt")
    weights, config = load_reference(tmp_path / "bare.pt")
    assert config is None
    with pytest.raises(ValueError, match=r"n_layer, cannot be read from the weights"):
        BDHForCausalLM.from_reference(weights)
    model = BDHForCausalLM.from_reference(weights, {"n_layer": 2})
    torch.testing.assert_close(model(tiny.input_ids).logits, tiny.logits, atol=1e-5, rtol=0)


def test_missing_and_unknown_tensors_are_named(tiny):
    weights = {**tiny.weights, "bias": torch.zeros(3)}
    del weights["decoder"]
    with pytest.raises(ValueError, match=r"lacks \['decoder'\] and has the unknown \['bias'\]"):
        BDHForCausalLM.from_reference(weights, tiny.config)


def test_shapes_that_are_not_the_configurations_are_named(tiny):
    with pytest.raises(ValueError, match=r"embed.weight is \(256, 32\), not \(256, 64\)"):
        BDHForCausalLM.from_reference(tiny.weights, {**tiny.config, "n_embd": 64})


def test_frequencies_of_another_theta_are_refused(tiny):
    weights = {**tiny.weights, "attn.freqs": tiny.weights["attn.freqs"] ** 1.1}
    with pytest.raises(ValueError, match=r"attn.freqs differs from the frequencies of rope_theta = 65536"):
        BDHForCausalLM.from_reference(weights, tiny.config)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_checkpoint_in_half_precision_is_converted_as_it_is(tiny, dtype):
    """Its frequencies are rounded with the rest, and were taken for those of another theta."""
    weights = {name: weight.to(dtype) for name, weight in tiny.weights.items()}
    model = BDHForCausalLM.from_reference(weights, tiny.config)
    assert model.dtype == dtype
    back = model.to_reference()
    assert all(torch.equal(back[name], weights[name]) for name in weights if name != "attn.freqs")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_frequencies_of_another_theta_are_refused_in_half_precision_too(tiny, dtype):
    weights = {name: weight.to(dtype) for name, weight in tiny.weights.items()}
    weights["attn.freqs"] = (tiny.weights["attn.freqs"] * 1.05).to(dtype)
    with pytest.raises(ValueError, match=r"attn.freqs differs from the frequencies of rope_theta = 65536"):
        BDHForCausalLM.from_reference(weights, tiny.config)


def test_a_model_with_decay_is_not_written_in_a_layout_without(tiny):
    model = BDHForCausalLM.from_reference(tiny.weights, {**tiny.config, "decay": 16})
    assert model.config.half_lives[0] == 16
    for convert in (model.to_reference, lambda: reference_config(model.config)):
        with pytest.raises(ValueError, match="decay is 16: the reference code has no decay of the state"):
            convert()


class Trap:
    def __reduce__(self):
        import pathlib

        return pathlib.Path.touch, (pathlib.Path("trap-has-sprung"),)


@pytest.mark.parametrize("as_torch", [True, False])
def test_a_file_that_would_run_code_is_refused_and_runs_none(tiny, tmp_path, monkeypatch, as_torch):
    monkeypatch.chdir(tmp_path)
    content = {"model": tiny.weights, "config": Trap()}
    if as_torch:
        torch.save(content, "trap.pt")
    else:
        with open("trap.pt", "wb") as file:
            pickle.dump({"config": Trap()}, file)
    with pytest.raises(ValueError, match=r"trap\.pt"):
        load_reference("trap.pt")
    assert not (tmp_path / "trap-has-sprung").exists()


@pytest.mark.parametrize("content", [b"no checkpoint", b"\x80\x04K\x01."])
def test_what_pytorch_refuses_is_named_in_one_line(tmp_path, content):
    """PyTorch's page of advice, to load it without a check among it, was printed, and then what its unpickler found."""
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.pt is not a complete PyTorch checkpoint: must be a \.pt file") as caught:
        load_reference(tmp_path / "x.pt")
    for words in ("\n", "weights_only", "npickle", "perator"):
        assert words not in str(caught.value)


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {"model": {"a": 1}}])
def test_what_is_no_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="must be a state dict"):
        load_reference(tmp_path / "x.pt")


def test_a_cut_off_and_a_missing_file_are_named(tiny, tmp_path):
    path = tmp_path / "model.pt"
    torch.save(tiny.weights, path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"model.pt is not a complete PyTorch checkpoint"):
        load_reference(path)
    with pytest.raises(FileNotFoundError, match="there is no checkpoint file"):
        load_reference(tmp_path / "nowhere.pt")
