"""The private names of PyTorch and transformers that bdh.model.private_api uses are there, and mean what it takes them for."""

import inspect

import pytest
import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode

from bdh.model import private_api
from bdh.model.private_api import checkpointing_of, has_hooks, register_pytree, torch_func_is_active, version_of


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


class Pair:
    def __init__(self, first, second):
        self.first, self.second = first, second


def test_objects_of_a_registered_class_are_taken_apart_by_torch_export():
    register_pytree(
        Pair, lambda pair: ({"first": pair.first, "second": pair.second}, []), lambda leaves, _: Pair(*leaves)
    )

    class Sum(nn.Module):
        def forward(self, pair):
            return pair.first + pair.second

    pair = Pair(torch.ones(2), torch.ones(2))
    program = torch.export.export(Sum(), (pair,))
    assert torch.equal(program.module()(pair), torch.full((2,), 2.0))


def test_transformers_says_how_activations_are_recomputed(make_model):
    model = make_model()
    chosen = checkpointing_of(model)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    assert checkpointing_of(model) is not chosen
    assert checkpointing_of(model).keywords == {"use_reentrant": True}


def test_generate_asks_for_its_cache_by_the_methods_that_are_overridden():
    of_state = {name for name, value in vars(private_api.StateForGeneration).items() if callable(value)} | {
        "_supports_default_dynamic_cache"
    }
    private = {name for name in of_state if name.startswith("_") and not name.startswith("__")}
    assert private == {
        "_supports_default_dynamic_cache",
        "_prepare_cache_for_generation",
        "_expand_inputs_for_generation",
    }
    source = inspect.getsource(GenerationMixin)
    for name in private:
        assert f".{name}(" in source
    arguments = ["generation_config", "model_kwargs", "generation_mode", "batch_size"]
    assert list(inspect.signature(GenerationMixin._prepare_cache_for_generation).parameters)[1:5] == arguments
    arguments = ["expand_size", "is_encoder_decoder", "input_ids", "model_kwargs"]
    assert list(inspect.signature(GenerationMixin._expand_inputs_for_generation).parameters)[1:5] == arguments
    assert GenerationMode.ASSISTED_GENERATION.value == "assisted_generation"
    assert {"_no_split_modules", "_keys_to_ignore_on_load_unexpected"} <= set(dir(PreTrainedModel))
