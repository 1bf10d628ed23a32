"""Half precision on the torch path: as near to the equations as the plain path in the same precision, and in range."""

import pytest
import torch

from bdh.model import BDHConfig, BDHForCausalLM
from bdh.ops.blocks.plan import LayerOptions


def gradients(model, tokens, dtype, path):
    model.layer_options = LayerOptions(path=path)
    model.zero_grad()
    with torch.autocast("cpu", dtype=dtype, enabled=dtype not in (torch.float32, torch.float64)):
        loss = model(tokens, labels=tokens).loss
    loss.backward()
    return [loss.detach().double(), *(p.grad.double() for p in model.parameters())]


@pytest.mark.parametrize("num_tokens", [40, 100])  # in one block, and in four
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_worse_than_the_plain_path(dtype, num_tokens):
    torch.manual_seed(0)
    form = "chunked" if num_tokens == 100 else "auto"
    config = BDHConfig(
        vocab_size=61, n_embd=24, n_head=2, n_layer=3, mlp_internal_dim_multiplier=8, dropout=0.0,
        attention_form=form, chunk_size=32,
    )  # fmt: skip
    model = BDHForCausalLM(config).train()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(5)  # so that the neurons count for something
    tokens = torch.randint(61, (3, num_tokens))
    exact = gradients(model.double(), tokens, torch.float64, "plain")
    model.float()
    found, plain = (gradients(model, tokens, dtype, path) for path in ("torch", "plain"))
    for a, b, wanted in zip(found, plain, exact, strict=True):
        error, of_plain = ((t - wanted).norm() / wanted.norm() for t in (a, b))
        # Both round each product once; where they round otherwise, chance makes one or the other better. 2^-9 is the
        # rounding of a single bfloat16 number.
        assert error < 2 * of_plain + 2**-9


def test_float16_stays_in_range_where_scores_exceed_it():
    torch.manual_seed(0)
    config = BDHConfig(vocab_size=61, n_embd=24, n_head=2, n_layer=2, mlp_internal_dim_multiplier=32)
    model = BDHForCausalLM(config).train()
    with torch.no_grad():
        model.encoder.weight.mul_(3000)
    tokens = torch.randint(61, (2, 200))
    q = torch.relu(model.encoder(torch.nn.functional.layer_norm(model.embed(tokens), (24,))))
    assert (q @ q.transpose(1, 2)).max() > 65504  # else nothing would be shown
    with torch.autocast("cpu", dtype=torch.float16):
        loss = model(tokens, labels=tokens).loss
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters())
