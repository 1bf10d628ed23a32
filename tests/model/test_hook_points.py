"""Hooks on ``model.hook_points`` see what a layer step computes, and what they return is computed with."""

from functools import partial

import pytest
import torch

from bdh.generate.advance import Advancer, StepInput
from bdh.model.forward import plan_for
from bdh.model.hook_points import watching
from bdh.model.weights import kernel_obstacle, layer_functions
from bdh.ops.eager import HOOK_POINTS


def test_they_hold_nothing_and_are_called_by_nobody(model, tokens, monkeypatch):
    """Where no hook is attached."""
    monkeypatch.setattr(torch.nn.Identity, "forward", lambda *_: pytest.fail("a hook point was called"))
    assert list(model.hook_points.state_dict()) == list(model.hook_points.parameters()) == []
    assert layer_functions(model, model.dtype).points == {}
    model(tokens, labels=tokens).loss.backward()
    with torch.no_grad():
        model(tokens)
    Advancer(model, path="torch").advance([StepInput(model.new_state(), [1, 2])])


def test_each_is_called_once_a_layer_step_in_the_order_of_the_equations(model, tokens):
    B, T, H, N, D = *tokens.shape, 3, 48, 24
    wide, narrow = (B, T, H * N), (B, T, D)
    shapes = {"x": wide, "q": (B, H, T, N), "a": (B, H, T, D), "y": wide, "z": wide, "v": narrow}
    seen = []
    with torch.no_grad(), watching(model, {name: partial(lambda n, v: seen.append((n, v)), name) for name in shapes}):
        last = model(tokens, output_hidden_states=True).hidden_states
    assert [name for name, _ in seen] == list(HOOK_POINTS) * model.config.n_layer
    assert all(value.shape == shapes[name] for name, value in seen)
    assert all(torch.equal(a, b) for a, b in zip([v for name, v in seen if name == "v"], last[1:], strict=True))
    of_first = dict(seen[:6])
    assert torch.equal(of_first["z"], of_first["x"] * of_first["y"])


@pytest.mark.parametrize("name", HOOK_POINTS)
def test_what_a_hook_returns_is_computed_with(model, tokens, name):
    with torch.no_grad():
        before = model(tokens).logits
        handle = getattr(model.hook_points, name).register_forward_hook(
            lambda point, inputs, value: value * torch.linspace(0, 2, value.shape[-1])
        )
        changed = model(tokens).logits
        handle.remove()
        assert (changed - before).abs().max() > 0.01
        assert torch.equal(model(tokens).logits, before)


def test_a_neuron_that_is_ablated_at_z_has_no_row_of_the_decoder(model, tokens):
    def ablate(point, inputs, z):
        return z.index_fill(-1, torch.tensor([5, 77]), 0)

    with torch.no_grad():
        handle = model.hook_points.z.register_forward_hook(ablate)
        by_hook = model(tokens).logits
        handle.remove()
        model.decoder.weight[:, [5, 77]] = 0
        assert torch.equal(model(tokens).logits, by_hook)


def test_gradients_flow_through_what_a_hook_sees(model, tokens):
    seen = []
    model.hook_points.y.register_forward_hook(lambda point, inputs, y: seen.append(y))
    model.train()
    loss = model(tokens, labels=tokens).loss
    of_last = torch.autograd.grad(loss, seen[-1], retain_graph=True)[0]
    assert of_last.abs().max() > 0
    loss.backward()
    assert model.encoder.weight.grad.abs().max() > 0


@pytest.mark.parametrize("name", HOOK_POINTS)
def test_the_plan_is_the_eager_backend_where_a_hook_is_attached(model, name):
    assert plan_for(model, 2, 21, "auto").backend != "eager"
    with watching(model, {name: lambda value: None}):
        assert plan_for(model, 2, 21, "auto").backend == "eager"
        assert kernel_obstacle(model) == f"hooks are attached to hook_points.{name}"
    assert kernel_obstacle(model) is None


def test_a_point_whose_forward_is_replaced_is_called_too(model, tokens):
    """As nnsight does it, since its version 0.8."""
    calls, forward = [], model.hook_points.x.forward
    model.hook_points.x.forward = lambda value: calls.append(value) or forward(value)
    assert plan_for(model, 2, 21, "auto").backend == "eager"
    with torch.no_grad():
        model(tokens)
    assert len(calls) == model.config.n_layer


def test_generation_calls_them_and_follows_what_they_return(model):
    def greedy():
        return model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=6, do_sample=False)[0].tolist()

    before, calls = greedy(), []

    def silence(point, inputs, z):
        calls.append(z.shape[1])
        return torch.zeros_like(z)

    handle = model.hook_points.z.register_forward_hook(silence)
    assert greedy() != before
    assert calls == [3] * 3 + [1] * 15  # the prompt and 5 tokens in 3 layer steps each
    advancer = Advancer(model)
    assert "hooks are attached to hook_points.z" in advancer.description
    step = StepInput(advancer.new_state(), [1, 2, 3], record_activations=1)
    advancer.advance([step])
    assert len(step.activity) == len(calls[18:]) == 3
    handle.remove()
    assert greedy() == before


def test_the_engine_reports_what_a_hook_made_of_x(model):
    advancer = Advancer(model, path="torch")
    with watching(model, {}):
        model.hook_points.x.register_forward_hook(lambda point, inputs, x: torch.zeros_like(x))
        step = StepInput(advancer.new_state(), [1, 2], record_activations=2)
        advancer.advance([step])
    assert [each.fired for each in step.activity] == [0, 0, 0]


def test_kernels_that_are_running_refuse_a_model_with_new_hooks(model):
    advancer = Advancer(model, path="kernels")
    advancer.advance([StepInput(advancer.new_state(), [1, 2])])
    with (
        watching(model, {"x": lambda value: None}),
        pytest.raises(ValueError, match=r"can no longer run this model: hooks are attached to hook_points.x"),
    ):
        advancer.advance([StepInput(advancer.new_state(), [1, 2])])


def test_hooks_are_removed_when_something_raises(model, tokens):
    def fail(value):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), watching(model, {"x": lambda value: None, "v": fail}):
        model(tokens)
    assert kernel_obstacle(model) is None


def test_a_compiled_graph_has_no_nodes_of_them_and_calls_hooks_that_were_attached_before(model, tokens):
    """To attach one later takes torch.compiler.reset(): torch's graphs do not look for new hooks."""

    def compiled_logits():
        graphs = []

        def backend(graph, inputs):
            graphs.append(graph)
            return graph.forward

        torch.compiler.reset()
        with torch.no_grad():
            logits = torch.compile(model, backend=backend)(tokens, use_cache=False).logits
        return logits, sum(len(graph.graph.nodes) for graph in graphs)

    before, num_nodes = compiled_logits()
    with torch.no_grad():
        torch.testing.assert_close(before, model(tokens).logits, rtol=0, atol=1e-5)
    handle = model.hook_points.z.register_forward_hook(lambda point, inputs, z: z + 1)
    changed, more_nodes = compiled_logits()
    handle.remove()
    with_one_node = num_nodes + model.config.n_layer
    assert more_nodes == with_one_node
    assert (changed - before).abs().max() > 0.01
    again, same_nodes = compiled_logits()
    assert torch.equal(again, before)
    assert same_nodes == num_nodes
