"""A model's weights as the sparse kernels want them, made when they are first needed and again when they change."""

import threading
import weakref
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from bdh.model.fingerprint import Memory, checksum
from bdh.model.network import ModelParts
from bdh.model.private_api import has_hooks, version_of
from bdh.model.weights import layer_modules, weights_obstacle
from bdh.ops import Storage
from bdh.ops.backends import CPU

if TYPE_CHECKING:  # numba, which is imported where the kernels run
    from bdh.ops.cpu.recurrence import Recurrence

_MAX_PIECES = 128
PIECE_BYTES = 1 << 18
"""Copied weights are compared with the model's one piece a token, so that it costs under 1 % of the token: as few pieces
as leave each at most so large, but no more than ``_MAX_PIECES``."""


class _KernelCopies:
    """The kernels over a model's weights, and what tells whether these have changed since they were copied.

    Most weights are read in the model's own memory. Of those that are copied, changes that move autograd's version
    counter are seen at once, and the others by checksums of the model's weights.
    """

    def __init__(self, model: ModelParts, storage: Storage):
        from bdh.ops.cpu.recurrence import KernelWeights, Recurrence

        self._key = _key(model)
        weights = _weights(model)
        # Before they are copied: what another process writes meanwhile is found, too late rather than never.
        checksums = [[checksum([piece]) for piece in _pieces(weight)] for weight in weights]
        config = model.config
        embed, encoder, *encoder_v, decoder, lm_head = weights
        self.recurrence: Recurrence = Recurrence(
            KernelWeights.of(
                embed=embed,
                encoder=encoder,
                encoder_v=encoder_v,
                decoder=decoder,
                lm_head=lm_head,
                rope_theta=config.rope_theta,
                eps=config.layer_norm_eps,
                num_layer_steps=config.n_layer,
                storage=storage,
            )
        )
        # Of each weight that is copied: which it is, its pieces where they can be read without its tensor, checksums.
        self._copied: list[tuple[int, list[Memory] | None, list[bytes]]] = []
        pairs = zip(weights, self.recurrence.weights.tensors, checksums, strict=True)
        for number, (weight, stored, sums) in enumerate(pairs):
            if weight.data_ptr() != stored.data_ptr():
                memory = [Memory(piece) for piece in _pieces(weight)] if weight.is_contiguous() else None
                self._copied.append((number, memory, sums))
        self._num_checks = 0
        self.is_doubtful = False
        """Whether something has happened that may have changed weights."""

    def holds(self, model: ModelParts, *, all_pieces: bool) -> bool:
        """Whether these are the kernels of the model as it is, as far as the pieces tell that are compared."""
        is_doubtful, self.is_doubtful = self.is_doubtful, False
        if self._key != _key(model):  # else the weights are where they were, and so are their pieces
            return False
        self._num_checks += 1
        for number, memory, sums in self._copied:
            chosen = range(len(sums)) if all_pieces or is_doubtful else [self._num_checks % len(sums)]
            if memory is not None:
                found = [memory[i].checksum() for i in chosen]
            else:
                pieces = _pieces(_weights(model)[number])
                found = [checksum([pieces[i]]) for i in chosen]
            if found != [sums[i] for i in chosen]:
                return False
        return True


_kernels: "weakref.WeakKeyDictionary[Any, dict[Storage, _KernelCopies]]" = weakref.WeakKeyDictionary()
_lock = threading.RLock()  # on the dictionary: models may run, and optimizers step, in several threads


def kernel_obstacle(model: ModelParts) -> str | None:
    """What keeps the kernels from running this model, whatever the machine; None where nothing does."""
    if (obstacle := weights_obstacle([*layer_modules(model), model.lm_head])) is not None:
        return obstacle
    if type(model.embed) is not nn.Embedding:
        return f"the embedding is {type(model.embed).__name__}, the kernels take plain nn.Embedding"
    if has_hooks(model.embed):
        return "the embedding has hooks"
    for module in [*layer_modules(model), model.lm_head, model.embed]:
        if module.weight.dtype not in CPU.dtypes["advance"]:
            return f"the weights are {module.weight.dtype}, the kernels take float32 and bfloat16"
    return None


def recurrence_of(model: ModelParts, storage: Storage = "float32", *, is_prompt: bool = False) -> "Recurrence":
    """The kernels over this model's weights, stored as ``storage``. Kept until the weights change.

    A change that autograd's version counter does not see (by a fused optimizer, ``.data``, NumPy, or another process)
    is found

    - at the start of every prompt, whatever it is: all copied weights are read, at the speed of memory;
    - between two tokens of a text, at once where an optimizer has stepped, ``train()`` was called or the change is
      spread over the matrix, as a neuron's ablation in the decoder is. A few rows of a matrix
      of over 256 KiB are found within 128 tokens.

    Args:
        is_prompt: whether what is read now is the first of a prompt.

    Raises:
        ValueError: a layer is no longer its weight alone: it has got hooks, adapters or another module. Looked for at
            the start of a prompt, and where weights have changed.
    """
    with _lock:
        of_model = _kernels.setdefault(model, {})
    kept = of_model.get(storage)
    if kept is not None and not is_prompt and kept.holds(model, all_pieces=False):
        return kept.recurrence
    if (obstacle := kernel_obstacle(model)) is not None:
        raise ValueError(
            f"the kernels can no longer run this model: {obstacle}. Make a new Advancer, engine or generator"
        )
    if kept is None or not is_prompt or not kept.holds(model, all_pieces=True):
        _watch_optimizers()
        kept = of_model[storage] = _KernelCopies(model, storage)
    return kept.recurrence


def recheck_weights(model: Any) -> None:
    """For whoever may have changed weights: all are compared before the kernels read the next token."""
    with _lock:
        for kept in _kernels.get(model, {}).values():
            kept.is_doubtful = True


def forget_kernels(model: Any) -> None:
    """For whoever takes the memory away that weights are in, as sharding does."""
    with _lock:
        _kernels.pop(model, None)


def _weights(model: ModelParts) -> list[torch.Tensor]:
    """In the order of ``KernelWeights.tensors``."""
    return [each.weight for each in (model.embed, model.encoder, *model.encoder_v, model.decoder, model.lm_head)]


def _key(model: ModelParts) -> tuple[Any, ...]:
    """Changes with the memory that weights are in, where autograd counts with what it holds, and with constants."""
    config = model.config
    places = [(w.data_ptr(), w.dtype, w.shape, w.stride(), version_of(w)) for w in _weights(model)]
    return config.rope_theta, config.layer_norm_eps, config.n_layer, *places


def _pieces(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Views of some of its rows each."""
    count = min(-(-weight.nbytes // PIECE_BYTES), _MAX_PIECES, len(weight))
    return weight.detach().tensor_split(max(1, count))


@cache
def _watch_optimizers() -> None:
    """All of this process, from the first time on that kernels are made."""
    register_optimizer_step_post_hook(_recheck_all)


def _recheck_all(*_: Any) -> None:
    with _lock:
        for model in list(_kernels):
            recheck_weights(model)
