"""The private names of PyTorch and transformers that bdh.model uses are there, and mean what it takes them for."""

import inspect

import pytest
import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode

from bdh.model.arguments import StateForGeneration, checkpointing_of
from bdh.model.state import SynapticState
from bdh.model.weights import has_hooks, torch_func_is_active, version_of


def test_a_transform_of_torch_func_is_seen_while_it_runs():
    seen = []

    def function(x):
        seen.append(torch_func_is_active())
        return x.sum()

    function(torch.ones(2))
    torch.func.grad(function)(torch.ones(2))
    torch.func.vmap(function)(torch.ones(2, 2))
    assert seen == [False, True, True]


@pytest.mark.parametrize(
    "register",
    [
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ],
)
def test_every_kind_of_hook_is_seen(register):
    module = nn.Linear(2, 2)
    assert not has_hooks(module)
    handle = getattr(module, register)(lambda *_: None)
    assert has_hooks(module)
    handle.remove()
    assert not has_hooks(module)


def test_changes_to_a_tensor_are_counted():
    tensor = torch.zeros(2)
    before = version_of(tensor)
    tensor.add_(1)
    assert version_of(tensor) == before + 1
    with torch.inference_mode():
        assert version_of(torch.zeros(2)) == -1


def test_a_state_is_taken_apart_and_put_together_by_torch_export():
    class Grown(nn.Module):
        def forward(self, state):
            return SynapticState([sums + 1 for sums in state.sums], state.positions + 1, state.num_columns + 1)

    state = SynapticState.zeros((1, 2, 4, 3), 2)
    grown = torch.export.export(Grown(), (state,)).module()(state)
    assert type(grown) is SynapticState
    assert [sums.sum().item() for sums in grown.sums] == [24, 24]
    assert (grown.positions.item(), grown.num_columns, grown.kind) == (1, 1, "sums")


def test_transformers_says_how_activations_are_recomputed(make_model):
    model = make_model()
    chosen = checkpointing_of(model)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    assert checkpointing_of(model) is not chosen
    assert checkpointing_of(model).keywords == {"use_reentrant": True}


def test_generate_asks_for_its_cache_by_the_methods_that_are_overridden():
    private = {name for name in vars(StateForGeneration) if name.startswith("_") and not name.startswith("__")}
    assert private == {
        "_supports_default_dynamic_cache",
        "_prepare_cache_for_generation",
        "_expand_inputs_for_generation",
        "_prefill",
    }
    source = inspect.getsource(GenerationMixin)
    for name in private:
        assert f".{name}(" in source
    arguments = ["generation_config", "model_kwargs", "generation_mode", "batch_size"]
    assert list(inspect.signature(GenerationMixin._prepare_cache_for_generation).parameters)[1:5] == arguments
    arguments = ["expand_size", "is_encoder_decoder", "input_ids", "model_kwargs"]
    assert list(inspect.signature(GenerationMixin._expand_inputs_for_generation).parameters)[1:5] == arguments
    arguments = ["input_ids", "generation_config", "model_kwargs", "is_first_iteration"]
    assert list(inspect.signature(GenerationMixin._prefill).parameters)[1:] == arguments
    assert GenerationMode.ASSISTED_GENERATION.value == "assisted_generation"
    assert {"_no_split_modules", "_keys_to_ignore_on_load_unexpected"} <= set(dir(PreTrainedModel))
