import copy

import pytest
import torch

from bdh.data.batches import Batch
from bdh.evaluate.loss import evaluate_text
from bdh.evaluate.probes import measure_activity
from bdh.quantize import compare, matrix_errors, quantize


def test_errors_are_those_of_the_weights(model):
    quantized = quantize(model, "mixed")
    found = {each.module: each for each in matrix_errors(model, quantized)}
    assert list(found) == ["encoder", "encoder_v.0", "encoder_v.1", "decoder"]
    for name, each in found.items():
        before, after = (m.get_submodule(name).weight for m in (model, quantized))
        assert each.relative_error == pytest.approx(((after - before).norm() / before.norm()).item())
    assert found["encoder"].relative_error < 0.01 < found["decoder"].relative_error < 0.1
    assert 1 / 40 <= found["encoder"].saturated < 0.05  # of each row the largest


def test_a_model_beside_itself(model, tokens):
    found = compare(model, copy.deepcopy(model), [Batch(tokens)])
    assert found.before == found.after
    assert (found.kl, found.same_prediction) == (0, 1)
    assert found.still_fire == {"x": [1] * 3, "y": [1] * 3}


def test_the_figures_are_those_that_others_compute(model, tokens):
    quantized = quantize(model, "int4")
    progress = []
    found = compare(model, quantized, [Batch(tokens)], max_batch_size=2, progress=lambda *each: progress.append(each))
    assert progress == [("tokens", 40, 60), ("tokens", 60, 60)]
    assert found.tokens == 60
    for measured, each in ((found.before, model), (found.after, quantized)):
        text = [evaluate_text(each, row.numpy(), bytes_per_token=1, block_size=20).loss for row in tokens]
        assert measured.loss == pytest.approx(sum(text) / 3, rel=1e-5)
        density = measure_activity(each, tokens[:, :-1]).density
        assert measured.density == {kind: pytest.approx(density[kind]) for kind in ("x", "y")}
    p, q = (each(tokens[:, :-1]).logits.double().log_softmax(-1) for each in (model, quantized))
    assert found.kl == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-4)
    assert 0.5 < found.still_fire["x"][0] < 1


def test_models_are_left_as_they_were(model, tokens):
    quantized = quantize(model, "int8").train()
    compare(model, quantized, [Batch(tokens)])
    assert quantized.training
    assert not model.training
    assert not any(module._forward_hooks for each in (model, quantized) for module in each.modules())
    assert torch.is_grad_enabled()


def test_what_does_not_count_and_documents_apart(model, tokens):
    """Batches of other lengths, in which some tokens are no targets, and a document starts."""
    quantized = quantize(model, "int4")
    starts = torch.zeros_like(tokens, dtype=torch.bool)
    starts[:, 9] = True
    apart = compare(model, quantized, [Batch.of_documents(tokens, starts)])
    alone = compare(model, quantized, [Batch(tokens[:, :9]), Batch(tokens[:, 9:])])
    assert apart.tokens == alone.tokens == 3 * (8 + 11)
    for one, other in ((apart.before, alone.before), (apart.after, alone.after)):
        assert one.loss == pytest.approx(other.loss, rel=1e-5)
    assert apart.kl == pytest.approx(alone.kl, rel=1e-4)


def test_only_tokens_that_count_are_measured(model, tokens):
    """A shorter conversation is filled up with padding, whose id is another in a run than in its export."""
    is_target = torch.ones(3, 20, dtype=torch.bool)
    is_target[1, 12:] = is_target[2, 5:] = False
    quantized = quantize(model, "int4")
    found = []
    for pad_id in (0, 17):
        padded = tokens.clone()
        padded[1, 13:] = padded[2, 6:] = pad_id
        found.append(compare(model, quantized, [Batch(padded, is_target)]))
    assert found[0] == found[1]
    alone = compare(model, quantized, [Batch(tokens[:1]), Batch(tokens[1:2, :13]), Batch(tokens[2:, :6])])
    for one, other in ((found[0].before, alone.before), (found[0].after, alone.after)):
        assert one.density == {kind: pytest.approx(shares) for kind, shares in other.density.items()}
    assert found[0].still_fire == {kind: pytest.approx(shares) for kind, shares in alone.still_fire.items()}
