import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open

from bdh import BDHConfig, BDHForCausalLM
from bdh.tokenizer import byte_tokenizer

FIXTURES = Path(__file__).parent.parent / "fixtures"


@pytest.fixture
def make_model():
    """Makes small models in evaluation mode whose weights are large enough that outputs differ clearly."""

    def make(seed: int = 0, **fields) -> BDHForCausalLM:
        sizes = {"vocab_size": 61, "n_embd": 24, "n_head": 3, "n_layer": 3, "mlp_internal_dim_multiplier": 6}
        config = BDHConfig(**{**sizes, "dropout": 0.0, "initializer_range": 0.3, "chunk_size": 4, **fields})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return BDHForCausalLM(config).eval()

    return make


@pytest.fixture
def model(make_model):
    return make_model()


@pytest.fixture
def byte_model(make_model):
    """A model of bytes, for text. Its output weights are small, so that sampled bytes are of all kinds."""
    model = make_model(vocab_size=256)
    with torch.no_grad():
        model.lm_head.weight *= 0.5
    return model


@pytest.fixture(scope="session")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def tokens():
    """Token ids (2, 21) for ``model``."""
    return torch.randint(61, (2, 21), generator=torch.Generator().manual_seed(7))


@pytest.fixture(params=["tiny", "odd_shapes"])
def golden(request):
    """What the published reference code computed: config, weights, inputs, logits, gradients, continuations."""
    return read_golden(FIXTURES / f"{request.param}.safetensors")


def read_golden(path: Path) -> SimpleNamespace:
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        config = json.loads(file.metadata()["config"])

    def part(prefix):
        return {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}

    rest = {key: t for key, t in tensors.items() if "." not in key}
    return SimpleNamespace(config=config, weights=part("weights."), grads=part("grads."), **rest)
