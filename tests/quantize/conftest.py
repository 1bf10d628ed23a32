import pytest
import torch

from bdh import BDHConfig, BDHForCausalLM

SIZES = {"vocab_size": 61, "n_embd": 40, "n_head": 2, "n_layer": 3, "mlp_internal_dim_multiplier": 4}


@pytest.fixture
def model() -> BDHForCausalLM:
    """Of 80 neurons a head; its rows of 40 weights end with a group that is not full."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return BDHForCausalLM(BDHConfig(**SIZES, dropout=0.0, initializer_range=0.3)).eval()


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(61, (3, 21), generator=torch.Generator().manual_seed(7))
