"""`import bdh` makes transformers' auto classes know the model, and costs nothing."""

import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from bdh import BDHForCausalLM


def test_saved_and_loaded_is_bit_equal(model, tokens, tmp_path):
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is BDHForCausalLM
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    assert torch.equal(model(tokens).logits, loaded(tokens).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_loading_takes_a_dtype(model, tokens, tmp_path, dtype):
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.dtype == dtype
    # bfloat16 keeps 8 bits of each weight and activation; the logits of this model are of size 1 to 5.
    torch.testing.assert_close(loaded(tokens).logits.float(), model(tokens).logits, atol=0.5, rtol=0.1)


@pytest.mark.parametrize(
    "imports",
    [
        "import bdh\nfrom transformers import AutoModelForCausalLM, AutoConfig",
        "from transformers import AutoModelForCausalLM, AutoConfig\nimport bdh",
        "import bdh, transformers\nfrom transformers import Trainer, AutoModelForCausalLM, AutoConfig",
        "from bdh import BDH\nfrom transformers import AutoModelForCausalLM, AutoConfig",
        "from bdh import BDHModel\nfrom transformers import AutoModelForCausalLM, AutoConfig",
    ],
)
def test_the_auto_classes_know_it_whatever_is_imported_first(model, tmp_path, imports):
    model.save_pretrained(tmp_path)
    code = f"""{imports}
print(type(AutoConfig.from_pretrained({str(tmp_path)!r})).__name__)
print(type(AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})).__name__)
from transformers import AutoModel
print(type(AutoModel.from_pretrained({str(tmp_path)!r})).__name__)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["BDHConfig", "BDHForCausalLM", "BDHModel"]


def test_importing_bdh_loads_no_heavy_library():
    code = "import sys, bdh; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_it_can_be_pushed_to_the_hub(model):
    """Not tried, for want of a network: the method is transformers' own."""
    assert callable(model.push_to_hub)


def test_unknown_names_are_attribute_errors():
    import bdh

    with pytest.raises(AttributeError, match="no attribute 'Hatchling'"):
        bdh.Hatchling  # noqa: B018
