"""A model's weights as the sparse kernels want them, made when they are first needed and again when they change."""

import weakref
from functools import cache
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from bdh.model.checksum import checksum
from bdh.model.linear import has_hooks, layer_modules, weights_obstacle

if TYPE_CHECKING:
    from bdh.model.modeling import BDHForCausalLM
    from bdh.ops.cpu.recurrence import Recurrence, Storage

_NUM_PIECES = 32
"""Copied weights are compared with the model's one piece a token, so that it costs under 1 % of the token."""


class _Kept:
    """The kernels over a model's weights, and what tells whether these have changed since they were copied.

    Most weights are read in the model's own memory. Of those that are copied, changes that move autograd's version
    counter are seen at once, and the others by checksums of the model's weights.
    """

    def __init__(self, model: "BDHForCausalLM", storage: "Storage"):
        from bdh.ops.cpu.recurrence import KernelWeights, Recurrence

        self._key = _key(model)
        weights = _weights(model)
        # Before they are copied: what another process writes meanwhile is found, too late rather than never.
        checksums = [[checksum([piece]) for piece in _pieces(weight)] for weight in weights]
        config = model.config
        embed, lm_head, encoder, decoder, *encoder_v = weights
        self.recurrence: Recurrence = Recurrence(
            KernelWeights.of(
                embed=embed,
                encoder=encoder,
                encoder_v=encoder_v,
                decoder=decoder,
                lm_head=lm_head,
                rope_theta=config.rope_theta,
                eps=config.layer_norm_eps,
                num_passes=config.n_layer,
                storage=storage,
            )
        )
        own = {weight.data_ptr() for weight in self.recurrence.weights.tensors}
        self._copied = [
            (_pieces(weight), sums)
            for weight, sums in zip(weights, checksums, strict=True)
            if weight.data_ptr() not in own
        ]
        self._next_piece = 0
        self.is_doubtful = False
        """Whether something has happened that may have changed weights."""

    def holds(self, model: "BDHForCausalLM", *, all_pieces: bool) -> bool:
        """Whether these are the kernels of the model as it is, as far as the pieces tell that are compared."""
        if self._key != _key(model):
            return False
        numbers = range(_NUM_PIECES) if all_pieces or self.is_doubtful else [self._next_piece]
        self._next_piece = (self._next_piece + 1) % _NUM_PIECES
        self.is_doubtful = False
        return all(checksum([pieces[i]]) == sums[i] for i in numbers for pieces, sums in self._copied)


_made: "weakref.WeakKeyDictionary[BDHForCausalLM, dict[Storage, _Kept]]" = weakref.WeakKeyDictionary()


def kernel_obstacle(model: "BDHForCausalLM") -> str | None:
    """What keeps the kernels from running this model, whatever the machine; None where nothing does."""
    if (obstacle := weights_obstacle([*layer_modules(model), model.lm_head])) is not None:
        return obstacle
    if type(model.embed) is not nn.Embedding:
        return f"the embedding is {type(model.embed).__name__}, the kernels take plain nn.Embedding"
    if has_hooks(model.embed):
        return "the embedding has hooks"
    for module in [*layer_modules(model), model.lm_head, model.embed]:
        if module.weight.dtype not in (torch.float32, torch.bfloat16):
            return f"the weights are {module.weight.dtype}, the kernels take float32 and bfloat16"
    return None


def recurrence_of(model: "BDHForCausalLM", storage: "Storage" = "float32", *, is_prompt: bool = False) -> "Recurrence":
    """The kernels over this model's weights, stored as ``storage``. Kept until the weights change.

    A change that autograd's version counter does not see (by a fused optimizer, ``.data``, NumPy, or another process)
    is found

    - at the start of every prompt, whatever it is: all copied weights are read, at the speed of memory;
    - between two tokens of a text, at once where an optimizer has stepped, ``train()`` was called or the change is
      spread over the matrix, as a neuron's ablation is. A few numbers beside each other are found within 32 tokens.

    Args:
        is_prompt: whether what is read now is the first of a prompt.

    Raises:
        ValueError: a layer is no longer its weight alone: it has got hooks, adapters or another module. Looked for at
            the start of a prompt, and where weights have changed.
    """
    of_model = _made.setdefault(model, {})
    kept = of_model.get(storage)
    if kept is not None and not is_prompt and kept.holds(model, all_pieces=False):
        return kept.recurrence
    if (obstacle := kernel_obstacle(model)) is not None:
        raise ValueError(
            f"the kernels can no longer run this model: {obstacle}. Make a new stepper, engine or generator"
        )
    if kept is None or not kept.holds(model, all_pieces=True):
        _watch_optimizers()
        kept = of_model[storage] = _Kept(model, storage)
    return kept.recurrence


def expect_changes(model: nn.Module) -> None:
    """For whoever may have changed weights: they are compared before the kernels read the next token."""
    for kept in _made.get(cast("BDHForCausalLM", model), {}).values():
        kept.is_doubtful = True


def forget_kernels(model: nn.Module) -> None:
    """For whoever takes the memory away that weights are in, as sharding does."""
    _made.pop(cast("BDHForCausalLM", model), None)


def _weights(model: "BDHForCausalLM") -> list[torch.Tensor]:
    heads = cast("list[nn.Linear]", list(model.encoder_v))
    return [each.weight for each in (model.embed, model.lm_head, model.encoder, model.decoder, *heads)]


def _key(model: "BDHForCausalLM") -> tuple[Any, ...]:
    """Changes with the memory that weights are in, where autograd counts with what it holds, and with constants."""
    config = model.config
    # Tensors made in inference mode have no version.
    places = [(w.data_ptr(), w.dtype, -1 if w.is_inference() else w._version) for w in _weights(model)]
    return config.rope_theta, config.layer_norm_eps, config.n_layer, *places


def _pieces(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Views of some of its rows each; the last ones are empty where there are fewer rows than pieces."""
    return weight.detach().tensor_split(_NUM_PIECES)


@cache
def _watch_optimizers() -> None:
    """All of this process, from the first time on that kernels are made."""
    register_optimizer_step_post_hook(_expect_changes_everywhere)


def _expect_changes_everywhere(*_: Any) -> None:
    for model in list(_made):
        expect_changes(model)
