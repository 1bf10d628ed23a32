"""The model in blocks is the model as its equations are, whatever it is given; and what does not fit goes the plain way."""

import os
from functools import partial

import pytest
import torch
from torch import nn

from bdh.model.forward import plan_for
from bdh.ops.blocks.plan import LayerOptions
from bdh.ops.cpu.runtime import unavailable_reason

BLOCKS = ["torch", "kernels"] if unavailable_reason() is None else ["torch"]


def losses_and_gradients(model, path, tokens, **inputs):
    model.layer_options = LayerOptions(path=path)
    model.zero_grad()
    state = inputs.pop("state", None)
    output = model(tokens, labels=tokens, cache=state.detach() if state is not None else None, **inputs)
    output.loss.backward()
    sums = output.cache.sums if output.cache is not None else []
    return [output.loss.detach(), output.logits.detach(), *sums, *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("path", BLOCKS)
@pytest.mark.parametrize("decay", [None, 9.0])
@pytest.mark.parametrize("given", ["nothing", "padding", "documents", "both", "state", "state and documents"])
def test_blocks_are_the_plain_layer_steps(make_model, tokens, path, decay, given):
    model = make_model(decay=decay, chunk_size=8, attention_form="chunked").train()
    inputs = {}
    if given in ("padding", "both"):
        inputs["attention_mask"] = torch.ones_like(tokens)
        inputs["attention_mask"][0, :3] = 0
    if "documents" in given or given == "both":
        starts = torch.zeros_like(tokens, dtype=torch.bool)
        starts[0, 4] = starts[1, 7] = True
        inputs["document_starts"] = starts
    if "state" in given:
        with torch.no_grad():
            inputs |= {"state": model(tokens, use_cache=True).cache, "use_cache": True}
    expected = losses_and_gradients(model, "plain", tokens, **inputs)
    found = losses_and_gradients(model, path, tokens, **inputs)
    # float32 sums in another order, through three passes.
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize("path", BLOCKS)
def test_gradients_flow_through_a_state(make_model, tokens, path):
    """Those of a loss after a state reach what was read into it."""
    model = make_model().train()

    def gradients(chosen):
        model.layer_options = LayerOptions(path=chosen)
        model.zero_grad()
        state = model(tokens[:, :7], use_cache=True).cache
        model(tokens[:, 7:], labels=tokens[:, 7:], cache=state, use_cache=True).loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    torch.testing.assert_close(gradients(path), gradients("plain"), rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize("path", BLOCKS)
def test_dropout_follows_the_generator(make_model, tokens, path):
    model = make_model(dropout=0.3).train()
    torch.manual_seed(1)
    first = losses_and_gradients(model, path, tokens)
    other = losses_and_gradients(model, path, tokens)
    torch.manual_seed(1)
    again = losses_and_gradients(model, path, tokens)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    model.eval()
    assert torch.equal(losses_and_gradients(model, path, tokens)[0], losses_and_gradients(model, path, tokens)[0])


def test_the_mask_is_the_same_on_every_path_and_for_every_cut(make_model, tokens):
    model = make_model(dropout=0.3).train()
    found = []
    for options in (
        LayerOptions(path="torch"),
        LayerOptions(path="torch", rows_per_block=1, tokens_per_block=5),
        *(LayerOptions(path=path, recompute="none") for path in BLOCKS),
    ):
        model.layer_options = options
        torch.manual_seed(1)
        found.append(model(tokens, labels=tokens).loss.item())
    assert found == pytest.approx([found[0]] * len(found), rel=1e-5)  # rounding


def test_every_pass_has_a_mask_of_its_own(make_model):
    from bdh.model.forward import draw_seeds

    assert len(set(draw_seeds(6, torch.device("cpu")).tolist())) == 6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_goes_by_torch(make_model, tokens, dtype):
    model = make_model().train()
    exact = losses_and_gradients(model, "plain", tokens)
    model.layer_options = LayerOptions()
    with torch.autocast("cpu", dtype=dtype):
        assert plan_for(model, *tokens.shape, "auto").path == "torch"
        loss = model(tokens, labels=tokens).loss
    assert loss.item() == pytest.approx(exact[0].item(), rel=0.02)


@pytest.mark.parametrize(("change", "reason"), [
    (lambda model: model.encoder.register_forward_hook(lambda *a: None), "hooks"),
    (lambda model: setattr(model, "decoder", nn.Sequential(model.decoder)), "Sequential"),
    (lambda model: nn.utils.parametrizations.weight_norm(model.encoder_v[1]), "ParametrizedLinear"),
    (lambda model: setattr(model, "encoder", nn.Linear(24, 144)), "bias"),
    (lambda model: setattr(model.decoder, "forward", partial(nn.Linear.forward, model.decoder)), "has been replaced"),
])  # fmt: skip
def test_modules_that_do_more_than_multiply_are_called(make_model, tokens, change, reason):
    model = make_model().train()
    change(model)
    plan = plan_for(model, *tokens.shape, "auto")
    assert plan.path == "plain"
    assert reason in plan.reason
    model(tokens, labels=tokens).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_hook_sees_every_pass(make_model, tokens):
    model = make_model().train()
    calls = []
    model.encoder.register_forward_hook(lambda *arguments: calls.append(1))
    model(tokens, labels=tokens)
    assert len(calls) == model.config.n_layer


def test_frozen_weights_get_no_gradient(make_model, tokens):
    model = make_model().train()
    model.encoder.weight.requires_grad_(False)
    model(tokens, labels=tokens).loss.backward()
    assert model.encoder.weight.grad is None
    assert model.decoder.weight.grad is not None


def test_accumulated_gradients_are_those_of_the_whole(make_model, tokens):
    model = make_model().train()
    whole = losses_and_gradients(model, "auto", tokens)[2:]
    model.zero_grad()
    for row in tokens:
        (model(row[None], labels=row[None]).loss / len(tokens)).backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], whole, rtol=1e-3, atol=1e-6)


def test_blocks_larger_than_the_last_batch_are_cut_to_it(make_model, tokens):
    model = make_model().train()
    expected = losses_and_gradients(model, "auto", tokens[:1])
    model.layer_options = LayerOptions(rows_per_block=2, tokens_per_block=tokens.shape[1] + 5)
    loss = model(tokens[:1], labels=tokens[:1]).loss
    assert loss.item() == pytest.approx(expected[0].item(), rel=1e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_transforms_and_traces_go_the_plain_way(make_model, tokens):
    model = make_model().train()
    embedded = model.embed(tokens).detach()

    def loss(inputs):
        return model(inputs_embeds=inputs, labels=tokens).loss

    expected = torch.autograd.grad(loss(embedded.requires_grad_()), embedded)[0]
    torch.testing.assert_close(torch.func.grad(loss)(embedded.detach()), expected, rtol=1e-3, atol=1e-6)
    model.eval().requires_grad_(False)  # a trace takes the weights for constants
    traced = torch.jit.trace(lambda given: model(given, use_cache=False).logits, tokens, check_trace=False)
    torch.testing.assert_close(traced(tokens), model(tokens, use_cache=False).logits, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["prompt", "evaluation", "training"])
def test_the_plain_forms_compile_as_one_graph(make_model, tokens, case):
    model = make_model().train(case == "training")
    if case != "prompt":
        model.layer_options = LayerOptions(path="plain")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    given = {"use_cache": True} if case == "prompt" else {"labels": tokens}
    with torch.set_grad_enabled(case == "training"):
        torch.testing.assert_close(compiled(tokens, **given).logits, model(tokens, **given).logits)


@pytest.mark.skipif(len(BLOCKS) < 2 or not hasattr(os, "fork"), reason="there are no kernels, or no forks")
def test_a_forked_process_does_without_the_kernels(make_model, tokens):
    """OpenMP ends a process that was forked from one that has used it."""
    model = make_model().train()
    model(tokens, labels=tokens).loss.backward()
    assert plan_for(model, *tokens.shape, "auto").path == "kernels"
    child = os.fork()
    if child == 0:
        plan = plan_for(model, *tokens.shape, "auto")
        os._exit(0 if plan.path == "torch" and "forked" in plan.reason else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert plan_for(model, *tokens.shape, "auto").path == "kernels"


def with_adapters(model, **settings):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["encoder", "encoder_v.0", "decoder"], **settings)
    peft.LoraModel(model, config, "default")
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.1)  # it begins at 0, where an adapter changes nothing
    return model


@pytest.mark.parametrize("path", BLOCKS)
def test_adapters_are_added_to_the_weights(make_model, tokens, path):
    model = with_adapters(make_model()).train()

    def found(chosen):
        model.layer_options = LayerOptions(path=chosen)
        model.zero_grad()
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]

    assert plan_for(model, *tokens.shape, "auto").path != "plain"
    expected = found("plain")
    assert len(expected) == 1 + 2 * 3
    torch.testing.assert_close(found(path), expected, rtol=1e-3, atol=2e-6)
    model.decoder.enable_adapters(False)  # what is switched off adds nothing
    torch.testing.assert_close(found(path)[0], found("plain")[0], rtol=1e-6, atol=1e-6)


def test_adapters_that_do_more_than_multiply_are_called(make_model, tokens):
    model = with_adapters(make_model(), lora_dropout=0.5).train()
    assert plan_for(model, *tokens.shape, "auto").reason == "adapters have dropout"
    assert plan_for(model.eval(), *tokens.shape, "auto").path != "plain"
    model = with_adapters(make_model(), use_dora=True).train()
    assert plan_for(model, *tokens.shape, "auto").reason == "adapters are of another kind than LoRA"
