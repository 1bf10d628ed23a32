from pathlib import Path

import pytest
import torch

from bdh import BDHConfig, BDHForCausalLM
from bdh.tokenizer import byte_tokenizer
from bdh.train.export import export_model


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    """An exported model of random weights, with the byte tokenizer, and no token that ends a text."""
    torch.manual_seed(7)
    config = BDHConfig(n_embd=16, n_layer=2, n_head=2, mlp_internal_dim_multiplier=8, initializer_range=0.3)
    folder = tmp_path_factory.mktemp("models") / "model"
    export_model(BDHForCausalLM(config), byte_tokenizer(), folder, "# A model\n", pad_and_eos=False)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BDH_CACHE", str(tmp_path / "cache"))
