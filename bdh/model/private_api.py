"""What this package uses of PyTorch and transformers that has no public name, each with the reason why.

Checked with torch 2.9 to 2.13 and transformers 5.23. ``tests/model/test_private_api.py`` fails where one of them changes.
Of transformers it names only what its own models set as well: ``_no_split_modules`` and
``_keys_to_ignore_on_load_unexpected`` stay with their classes.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import GetAttrKey, register_pytree_node
from torch.utils.checkpoint import checkpoint


def torch_func_is_active() -> bool:
    """Whether a transform of ``torch.func`` is active, under which the backends with gradients of their own do not work."""
    return torch._C._are_functorch_transforms_active()


def has_hooks(module: nn.Module) -> bool:
    """Whether a module calls anything beside its ``forward``. PyTorch registers hooks, but does not list them."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, kind) for kind in kinds)


def version_of(tensor: torch.Tensor) -> int:
    """Autograd's count of the changes to a tensor; -1 for one made in inference mode, which has none."""
    return -1 if tensor.is_inference() else tensor._version


def register_pytree(
    cls: type,
    flatten: Callable[[Any], tuple[dict[str, Any], list[str]]],
    unflatten: Callable[[Iterable[Any], list[str]], Any],
) -> None:
    """Lets ``torch.export``, and so ONNX, take objects of a class as an input and output, as it does lists and dicts.

    PyTorch's own public way, ``torch.export.register_dataclass``, is for dataclasses, which FSDP copies where a state is to
    be advanced in place.

    Args:
        flatten: what an object holds, by name, and whatever else ``unflatten`` needs to make it again.
    """

    def flatten_values(instance: Any) -> tuple[list[Any], list[str]]:
        leaves, context = flatten(instance)
        return list(leaves.values()), context

    def flatten_with_keys(instance: Any) -> tuple[list[Any], list[str]]:
        leaves, context = flatten(instance)
        return [(GetAttrKey(name), leaf) for name, leaf in leaves.items()], context

    register_pytree_node(
        cls,
        flatten_values,
        unflatten,
        serialized_type_name=f"bdh.{cls.__name__}",
        flatten_with_keys_fn=flatten_with_keys,
    )


def checkpointing_of(model: Any) -> Callable[..., Any]:
    """How a model recomputes activations: as the caller of transformers' ``gradient_checkpointing_enable`` said."""
    return getattr(model, "_gradient_checkpointing_func", partial(checkpoint, use_reentrant=False))


class StateForGeneration:
    """Gives transformers' ``generate`` a state where it would make a cache of keys and values.

    A mixin, which stands before ``GenerationMixin``. transformers asks for the cache by these methods alone.
    """

    new_state: Any

    @staticmethod
    def check_state(state: object) -> None:
        """Raises ``TypeError`` for a cache of another kind of model."""
        raise NotImplementedError

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """Tells `generate` to make no cache of keys and values: ``forward`` makes the state."""
        return False

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, batch_size: int, *sizes: Any
    ) -> Any:
        """Makes a state where `generate` wants one beforehand: to take tokens back, and for a prompt read in chunks.

        Raises:
            TypeError: the cache that is given is that of another kind of model.
            ValueError: a text is to be continued from a state, with tokens proposed by an assistant.
        """
        given = model_kwargs.get("past_key_values")
        is_assisted = generation_mode.value == "assisted_generation"
        if given is not None:
            self.check_state(given)
            if is_assisted and given.num_columns:  # transformers reads the whole text on any cache then, silently
                raise ValueError(
                    f"past_key_values has read {given.num_columns} columns: must be left out with assistant_model and "
                    "prompt_lookup_num_tokens, with which transformers reads the whole text anew"
                )
        prepare: Any = super()._prepare_cache_for_generation  # type: ignore[misc]
        prepare(generation_config, model_kwargs, generation_mode, batch_size, *sizes)
        takes_back = generation_config.is_assistant or is_assisted
        if given is not None or generation_config.use_cache is False:
            return
        if takes_back or generation_config.prefill_chunk_size is not None:
            sequences = batch_size * max(generation_config.num_beams, generation_config.num_return_sequences)
            state = model_kwargs["past_key_values"] = self.new_state(sequences)
            if takes_back:
                state.activate_past_recording()

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Any = None, **model_kwargs: Any
    ) -> tuple[Any, dict[str, Any]]:
        """Repeats each sequence for its beams or continuations: those of the state too, into a copy of it."""
        state = model_kwargs.get("past_key_values")
        given = input_ids if input_ids is not None else model_kwargs.get("inputs_embeds")
        if expand_size > 1 and state is not None and given is not None and state.batch_size == given.shape[0]:
            rows = torch.arange(state.batch_size).repeat_interleave(expand_size)
            model_kwargs["past_key_values"] = state.filter(rows)
        expand: Any = super()._expand_inputs_for_generation  # type: ignore[misc]
        return expand(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
