import pytest
import torch

from bdh import BDHConfig, BDHForCausalLM
from bdh.bench.common import half_lives, naive_weights
from bdh.ops import naive

D, H, L = 22, 3, 3
N = 22 * 6 // 3


@pytest.fixture
def make_model():
    """Makes small models of odd sizes, in float64."""

    def make(**fields) -> BDHForCausalLM:
        sizes = {"vocab_size": 61, "n_embd": D, "n_head": H, "n_layer": L, "mlp_internal_dim_multiplier": 6}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            config = BDHConfig(**{**sizes, "dropout": 0.1, "initializer_range": 0.3, "chunk_size": 8, **fields})
            return BDHForCausalLM(config).double()

    return make


@pytest.fixture
def model(make_model):
    return make_model()


@pytest.fixture
def ids():
    return torch.randint(61, (63,), generator=torch.Generator().manual_seed(4))


@pytest.fixture
def computed_plainly():
    """Gives what every layer step computes for tokens (T,), by name, as the equations of bdh.ops.naive are."""

    @torch.no_grad()
    def compute(model, ids):
        weights, positions = naive_weights(model), torch.arange(len(ids))
        v = naive.layer_norm(weights.embed[ids[None]])
        found = {name: [] for name in "xqayz"} | {"v": [v[0]]}
        for _ in range(model.config.n_layer):
            x = torch.relu(v[:, None] @ weights.encoder)
            q = naive.rope(x, positions)
            a, _ = naive.attention_by_state(q, v, half_lives=half_lives(model))
            y = torch.relu(naive.layer_norm(a) @ weights.encoder_v)
            v = naive.layer_step(v, weights, positions, half_lives=half_lives(model))
            for name, value in (("x", x), ("q", q), ("a", a), ("y", y), ("z", x * y), ("v", v)):
                found[name].append(value[0])
        return {name: torch.stack(values) for name, values in found.items()}

    return compute
