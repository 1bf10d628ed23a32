"""A model's weights: as the matrices that E, Ev and Dec multiply with, and as the sparse kernels want them.

Kernels read copies of some weights, so whether these have changed has to be known. ``Tensor._version`` does not tell all of it:
fused optimizers, ``tensor.data``, NumPy, and other processes that share the memory write without moving it. Checksums of
the content do.

Three things that PyTorch has no public name for are asked for here: hooks, versions, and ``torch.func``'s transforms. Checked with torch
2.9 to 2.13; ``tests/model/test_private_names.py`` fails where they change.
"""

import ctypes
import threading
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import linear
from torch.optim.optimizer import register_optimizer_step_post_hook
from xxhash import xxh3_128, xxh3_128_digest

from bdh.model.fake_quantized import FakeQuantizedLinear
from bdh.model.network import ModelParts
from bdh.model.quantization import quantizing_library
from bdh.model.quantized import QuantizedEmbedding, QuantizedLinear
from bdh.ops import WEIGHT_FORMATS, WeightFormat
from bdh.ops.backends import CPU, LayerWeights
from bdh.ops.eager import Layer, Linear
from bdh.ops.formats import Rows, layer_formats

if TYPE_CHECKING:  # numba, which is imported where the kernels run
    from bdh.ops.cpu.recurrence import Recurrence

WORDS_AT_ONCE = 1 << 22  # on an accelerator; 32 MiB of their products
_MAX_PIECES = 128
PIECE_BYTES = 1 << 18
"""Copied weights are compared with the model's one piece a token, so that it costs under 1 % of the token: as few pieces
as leave each at most so large, but no more than ``_MAX_PIECES``."""


# Modules as matrices.


def layer_modules(model: Any) -> list[nn.Module]:
    """E, the heads of Ev, and Dec."""
    return [model.encoder, *model.encoder_v, model.decoder]


def layer_weights(model: Any, dtype: torch.dtype) -> LayerWeights:
    """The matrices of the layer, with adapters folded in; gradients flow to what they are made of.

    Only where :func:`product_obstacle` has found none.
    """
    encoder, *encoder_v, decoder = (_product_weight(module).to(dtype) for module in layer_modules(model))
    return LayerWeights(encoder, tuple(encoder_v), decoder.t().contiguous())


def checked_layer_weights(model: Any, dtype: torch.dtype) -> LayerWeights:
    """:func:`layer_weights`, for who asks what the weights say.

    Raises:
        ValueError: the layer is more than these matrices.
    """
    if (obstacle := product_obstacle(layer_modules(model))) is not None:
        raise ValueError(f"the weights alone do not say what the layer computes: {obstacle}")
    with torch.no_grad():
        return layer_weights(model, dtype)


def layer_functions(model: Any, dtype: torch.dtype) -> Layer:
    """E, the heads of Ev, and Dec as functions, for several layer steps: weights are rounded or dequantized once for all of them."""
    functions = [_function(module, dtype) for module in layer_modules(model)]
    return Layer(functions[0], functions[1:-1], functions[-1], hooked_points(model))


def _function(module: Any, dtype: torch.dtype) -> Linear:
    if type(module) not in (QuantizedLinear, FakeQuantizedLinear):
        return module
    if weights_obstacle([module], may_round=True) is not None:
        return module
    if isinstance(module, FakeQuantizedLinear):
        return partial(linear, weight=module.product_weight())
    return partial(linear, weight=module.weight.to(dtype))


def has_hooks(module: nn.Module) -> bool:
    """Whether a module calls anything beside its ``forward``. PyTorch registers hooks, but does not list them."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def hooked_points(model: Any) -> dict[str, nn.Module]:
    """The ``hook_points`` of a model to which hooks are attached, or whose forward is replaced, as nnsight does it; by their names."""
    points = model.hook_points.named_children()
    return {name: point for name, point in points if has_hooks(point) or "forward" in point.__dict__}


def hook_points_obstacle(model: Any) -> str | None:
    """Why a layer step has to be computed value by value; None where nothing is attached to its values."""
    hooked = hooked_points(model)
    return f"hooks are attached to hook_points.{next(iter(hooked))}" if hooked else None


def torch_func_is_active() -> bool:
    """Whether a transform of ``torch.func`` is active, under which the backends with gradients of their own do not work."""
    return torch._C._are_functorch_transforms_active()


def weights_obstacle(modules: Sequence[nn.Module], *, may_round: bool = False) -> str | None:
    """Why the modules cannot be computed by their weights alone; None where they are plain ``nn.Linear``, or
    :class:`bdh.model.quantized.QuantizedLinear`.

    Args:
        may_round: whether they may be computed by what :class:`FakeQuantizedLinear` makes of its weight too.
    """
    for module in modules:
        if type(module) is FakeQuantizedLinear and not may_round:
            return "the weights of a layer are rounded while it is computed"
        is_quantized = type(module) is QuantizedLinear
        if (library := quantizing_library(module)) is not None:
            return f"a layer is quantized by {library}, which the kernels cannot read: int8 and int4 of bdh quantize are faster"
        # One with a parametrization has a class of its own.
        if type(module) not in (nn.Linear, FakeQuantizedLinear) and not is_quantized:
            return f"a layer is {type(module).__module__}.{type(module).__name__}, not a plain nn.Linear"
        if not is_quantized and module.bias is not None:
            return "a layer has a bias"
        if has_hooks(module):
            return "a layer has hooks"
        if "forward" in module.__dict__:  # as accelerate does it
            return "the forward of a layer has been replaced"
        if is_quantized:
            if module.packed.is_meta:
                return "a weight is on meta"
            continue
        weight = module.weight
        if type(weight) is not nn.Parameter:
            return f"a weight is {type(weight).__name__}, not a plain nn.Parameter"
        if type(weight.data) is not torch.Tensor:
            return f"a weight is {type(weight.data).__name__}, not a plain tensor"
        if weight.is_meta:
            return "a weight is on meta"
    return None


ADAPTERS_HAVE_DROPOUT = "adapters have dropout"


def product_obstacle(modules: Sequence[nn.Module]) -> str | None:
    """Why the modules are no products with the matrices of :func:`layer_weights`; None where they are."""
    found = (
        _adapters_obstacle(each) if _has_adapters(each) else weights_obstacle([each], may_round=True)
        for each in modules
    )
    return next((obstacle for obstacle in found if obstacle is not None), None)


def _product_weight(module: Any) -> torch.Tensor:
    """The matrix (out, in) that a module multiplies with: its weight, rounded or plus the product of each adapter's factors."""
    if isinstance(module, FakeQuantizedLinear):
        return module.product_weight()
    if not _has_adapters(module):
        return module.weight
    weight: torch.Tensor = module.base_layer.weight
    for name in _active(module):
        # As the merged weights of an export are; peft's own order of the products keeps one of (tokens, r) instead.
        weight = weight + module.get_delta_weight(name).to(weight.dtype)
    return weight


def _has_adapters(module: Any) -> bool:
    """Whether it is a linear layer with LoRA of ``peft``, which need not be installed."""
    return type(module).__name__ == "Linear" and type(module).__module__ == "peft.tuners.lora.layer"


def _adapters_obstacle(module: Any) -> str | None:
    if has_hooks(module) or "forward" in module.__dict__:
        return "a layer with adapters has hooks"
    if module.merged and module.disable_adapters:
        return "adapters are merged, and disabled"
    for name in _active(module):
        if name in module.lora_variant:
            return "adapters are of another kind than LoRA"
        if module.training and getattr(module.lora_dropout[name], "p", 0) > 0:
            return ADAPTERS_HAVE_DROPOUT
        if (obstacle := weights_obstacle([module.lora_A[name], module.lora_B[name]])) is not None:
            return f"an adapter is not two plain products: {obstacle}"
    return weights_obstacle([module.base_layer])


def _active(module: Any) -> list[str]:
    """The adapters that add to the weight now."""
    if module.merged or module.disable_adapters:
        return []
    return [name for name in module.active_adapters if name in module.lora_A]


# Whether weights have changed.


@dataclass(frozen=True)
class WeightsMark:
    """Tells whether a model still has the weights that it had, much faster than its fingerprint."""

    content: tuple[Any, ...]
    """Equal for equal weights, with the same adapters in effect."""
    versions: tuple[int, ...]
    """Autograd's counters: other ones where weights were changed and changed back."""


def weights_mark(model: Any) -> WeightsMark:
    """Of a model as it is now; reads all of its weights."""
    weights = list(model.state_dict(keep_vars=True).values())
    adapters = tuple(
        (name, tuple(_active(module)), tuple(module.merged_adapters), tuple(sorted(module.scaling.items())))
        for name, module in model.named_modules()
        if _has_adapters(module)
    )
    return WeightsMark((checksum(weights), adapters), tuple(version_of(weight) for weight in weights))


def version_of(tensor: torch.Tensor) -> int:
    """Autograd's count of the changes to a tensor; -1 for one made in inference mode, which has none."""
    return -1 if tensor.is_inference() else tensor._version


def plain_parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensor itself; or what a tensor of torchao, which has no memory of its own, is made of."""
    if not type(tensor).__module__.startswith("torchao."):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]  # as torch.compile asks of every such class
    return [part for name in names for part in plain_parts(getattr(tensor, name))]


def checksum(tensors: Iterable[torch.Tensor]) -> bytes:
    """16 bytes that depend on every bit of the tensors, and on its place, but not on shapes or dtypes.

    Reads memory at about its speed (25 GB/s for one CPU thread). Equal for equal bytes on the same kind of device.
    """
    digest = xxh3_128()
    for tensor in chain.from_iterable(map(plain_parts, tensors)):
        content = tensor.detach().contiguous().flatten().view(torch.uint8)
        if content.device.type == "cpu":
            digest.update(np.from_dlpack(content).data)  # .numpy() would fix the storage's size, which FSDP changes
        elif content.device.type == "meta":
            raise ValueError("a tensor on meta has no content to compute a checksum of")
        else:
            digest.update(word_sums(content).cpu().numpy().data)
    return digest.digest()


def word_sums(content: torch.Tensor) -> torch.Tensor:
    """64 bits for each ``WORDS_AT_ONCE`` words of bytes (n,), computed where these are.

    A sum of the words times odd random numbers, modulo 2^64: a single word that changes always changes it.
    """
    padding = -content.numel() % 4
    words = (nn.functional.pad(content, (0, padding)) if padding else content).view(torch.int32)
    factors = _factors(WORDS_AT_ONCE, content.device)
    sums = [(part * factors[: part.numel()]).sum() for part in words.split(WORDS_AT_ONCE)]
    return torch.stack(sums) if sums else words.long()


@cache
def _factors(count: int, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator).to(device) | 1


# Kernels over them.


class _KernelCopies:
    """The kernels over a model's weights, and what tells whether these have changed since they were copied.

    Most weights are read in the model's own memory. Of those that are copied, checksums find what moves no version counter.
    """

    def __init__(self, model: ModelParts, weight_format: WeightFormat):
        from bdh.ops.cpu.recurrence import KernelWeights, Recurrence

        self._key = _key(model)
        weights, config = stored_weights(model), model.config
        # Before they are copied: what another process writes meanwhile is found, too late rather than never.
        checksums = [[checksum([piece]) for piece in _pieces(weight)] for weight in weights]
        copies = KernelWeights.of(
            _matrices(model),
            rope_theta=config.rope_theta,
            eps=config.layer_norm_eps,
            num_layer_steps=config.n_layer,
            weight_format=weight_format,
        )
        self.recurrence: Recurrence = Recurrence(copies)
        # Of each weight that is copied: which it is, its pieces where they can be read without its tensor (which is not to be
        # kept alive for it), checksums.
        self._copied: list[tuple[int, list[memoryview] | None, list[bytes]]] = []
        pairs = zip(weights, self.recurrence.weights.tensors, checksums, strict=True)
        for number, (weight, stored, sums) in enumerate(pairs):
            if weight.data_ptr() != stored.data_ptr():
                memory = [_memory(piece) for piece in _pieces(weight)] if weight.is_contiguous() else None
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
                found = [xxh3_128_digest(memory[i]) for i in chosen]
            else:
                pieces = _pieces(stored_weights(model)[number])
                found = [checksum([pieces[i]]) for i in chosen]
            if found != [sums[i] for i in chosen]:
                return False
        return True


_kernels: "weakref.WeakKeyDictionary[Any, dict[WeightFormat, _KernelCopies]]" = weakref.WeakKeyDictionary()
_lock = threading.RLock()  # on the dictionary: models may run, and optimizers step, in several threads


def kernel_obstacle(model: ModelParts) -> str | None:
    """What keeps the kernels from running this model, whatever the machine; None where nothing does."""
    obstacle = hook_points_obstacle(model) or weights_obstacle([*layer_modules(model), model.lm_head])
    if obstacle is not None:
        return obstacle
    if type(model.embed) not in (nn.Embedding, QuantizedEmbedding):
        return f"the embedding is {type(model.embed).__name__}, the kernels take plain nn.Embedding"
    if has_hooks(model.embed):
        return "the embedding has hooks"
    for weight in stored_weights(model):
        if weight.is_floating_point() and weight.dtype not in CPU.dtypes["advance"]:
            return f"the weights are {weight.dtype}, the kernels take float32 and bfloat16"
    return None


def recurrence_of(
    model: ModelParts, weight_format: WeightFormat = "float32", *, is_prompt: bool = False
) -> "Recurrence":
    """The kernels over this model's weights, copied where they have not this format. Kept until the weights change.

    A change that autograd's version counter does not see (by a fused optimizer, ``.data``, NumPy, or another process)
    is found

    - at the start of every prompt: all copied weights are read, at the speed of memory;
    - between two tokens of a text, at once where an optimizer has stepped, ``train()`` was called or the change is spread
      over the matrix, as a neuron's ablation in the decoder is; else, in a matrix of over 256 KiB, within 128 tokens.

    Args:
        is_prompt: whether what is read now is the first of a prompt.

    Raises:
        ValueError: a layer is no longer its weight alone: it has got hooks, adapters or another module. Looked for at
            the start of a prompt, and where weights have changed.
    """
    with _lock:
        of_model = _kernels.setdefault(model, {})
    kept = of_model.get(weight_format)
    if kept is not None and not is_prompt and kept.holds(model, all_pieces=False):
        return kept.recurrence
    if (obstacle := kernel_obstacle(model)) is not None:
        raise ValueError(
            f"the kernels can no longer run this model: {obstacle}. Make a new Advancer, engine or generator"
        )
    if kept is None or not is_prompt or not kept.holds(model, all_pieces=True):
        _watch_optimizers()
        kept = of_model[weight_format] = _KernelCopies(model, weight_format)
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


def stored_weights(model: ModelParts) -> list[torch.Tensor]:
    """The memory that they are in, in the order of ``KernelWeights.tensors``."""
    modules = (model.embed, *layer_modules(model), model.lm_head)
    return [each.packed if type(each) in (QuantizedLinear, QuantizedEmbedding) else each.weight for each in modules]


def quantized_format(model: ModelParts) -> str | None:
    """In which of :data:`bdh.ops.WEIGHT_FORMATS` E, Ev and Dec are rounded, or the format of each where it is none of these, or
    the other library in whose format they are; None where they are plain numbers."""
    modules = layer_modules(model)
    if (library := next(filter(None, map(quantizing_library, modules)), None)) is not None:
        return library
    found = [each.weight_format if type(each) is QuantizedLinear else "plain" for each in modules]
    if set(found) == {"plain"}:
        return None
    for weights in WEIGHT_FORMATS:
        encoder, encoder_v, decoder, _ = layer_formats(weights)
        if found == [encoder, *[encoder_v] * len(model.encoder_v), decoder]:
            return weights
    return ", ".join(found)


def _matrices(model: ModelParts) -> list[torch.Tensor | Rows]:
    """The same as ``KernelWeights.of`` takes them."""
    modules = (model.embed, *layer_modules(model), model.lm_head)
    return [Rows(each.packed, each.weight_format) if type(each) is QuantizedLinear else each.weight for each in modules]


def _key(model: ModelParts) -> tuple[Any, ...]:
    """Changes with the memory that weights are in, where autograd counts with what it holds, and with constants."""
    config = vars(model.config)  # whose attributes go through transformers' own lookup, a microsecond each
    places = [(w.data_ptr(), w.dtype, w.shape, w.stride(), version_of(w)) for w in stored_weights(model)]
    return config["rope_theta"], config["layer_norm_eps"], config["n_layer"], *places


def _pieces(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Views of some of its rows each."""
    count = min(-(-weight.nbytes // PIECE_BYTES), _MAX_PIECES, len(weight))
    return weight.detach().tensor_split(max(1, count))


def _memory(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, to be read only while it still has this memory."""
    return memoryview((ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr()))


@cache
def _watch_optimizers() -> None:
    """All of this process, from the first time on that kernels are made."""
    register_optimizer_step_post_hook(_recheck_all)


def _recheck_all(*_: Any) -> None:
    with _lock:
        for model in list(_kernels):
            recheck_weights(model)
