"""A model's weights as plain matrices for the backends, the sparse kernels over them, and detection of changed weights.

The kernels copy some weights, so changes to the originals must be detected. ``Tensor._version`` is not enough: fused
optimizers, ``tensor.data``, NumPy, and other processes that share the memory write without incrementing it. Checksums
of the content find such changes.

This module uses private names of PyTorch for three things: hooks, versions, and the transforms of ``torch.func``. They
were checked with torch 2.9 to 2.13; ``tests/model/test_private_names.py`` fails if they change.
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

if TYPE_CHECKING:  # it imports numba, which only the kernels need
    from bdh.ops.cpu.recurrence import Recurrence

WORDS_AT_ONCE = 1 << 22  # on an accelerator; their products take 32 MiB
_MAX_PIECES = 128
PIECE_BYTES = 1 << 18
"""The size of the pieces in which copied weights are compared with the model's, one piece for each token read.

A comparison takes under 1 % of a token's time. Weights of more than ``_MAX_PIECES`` such pieces have larger pieces.
"""


# Modules as matrices.


def layer_modules(model: Any) -> list[nn.Module]:
    """Returns the modules E, each head of Ev, and Dec."""
    return [model.encoder, *model.encoder_v, model.decoder]


def layer_weights(model: Any, dtype: torch.dtype) -> LayerWeights:
    """Returns the matrices of the layer, with adapters merged into them. Gradients flow to the original parameters.

    Only valid if :func:`product_obstacle` returns None.
    """
    encoder, *encoder_v, decoder = (_product_weight(module).to(dtype) for module in layer_modules(model))
    return LayerWeights(encoder, tuple(encoder_v), decoder.t().contiguous())


def checked_layer_weights(model: Any, dtype: torch.dtype) -> LayerWeights:
    """Returns :func:`layer_weights` without gradients, for analyses that read the weights.

    Raises:
        ValueError: the layer computes more than products with these matrices.
    """
    if (obstacle := product_obstacle(layer_modules(model))) is not None:
        raise ValueError(f"the weights alone do not determine what the layer computes: {obstacle}")
    with torch.no_grad():
        return layer_weights(model, dtype)


def layer_functions(model: Any, dtype: torch.dtype) -> Layer:
    """Returns E, the heads of Ev, and Dec as functions. Weights are rounded or dequantized once for all layer steps."""
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
    """Whether a module has hooks. PyTorch has no public function that lists them."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def hooked_points(model: Any) -> dict[str, nn.Module]:
    """Returns the hook points in use, by name: those with hooks, or with a replaced ``forward`` as nnsight does it."""
    points = model.hook_points.named_children()
    return {name: point for name, point in points if has_hooks(point) or "forward" in point.__dict__}


def hook_points_obstacle(model: Any) -> str | None:
    """Returns why a layer step must compute each intermediate value as a tensor; None if no hook point is in use."""
    hooked = hooked_points(model)
    return f"hooks are attached to hook_points.{next(iter(hooked))}" if hooked else None


def torch_func_is_active() -> bool:
    """Whether a transform of ``torch.func`` is active. Backends with their own autograd functions do not support it."""
    return torch._C._are_functorch_transforms_active()


def weights_obstacle(modules: Sequence[nn.Module], *, may_round: bool = False) -> str | None:
    """Returns why the modules cannot be replaced by products with their weights; None if they can.

    They can if all are plain ``nn.Linear`` or :class:`bdh.model.quantized.QuantizedLinear`.

    Args:
        modules: the linear modules.
        may_round: whether to accept :class:`FakeQuantizedLinear` too, whose weight is rounded before it is used.
    """
    for module in modules:
        if type(module) is FakeQuantizedLinear and not may_round:
            return "the weights of a layer are rounded while it is computed"
        is_quantized = type(module) is QuantizedLinear
        if (library := quantizing_library(module)) is not None:
            return f"a layer is quantized by {library}, which the kernels cannot read: int8 and int4 of bdh quantize are faster"
        # A module with a parametrization has a class of its own, so it is found here too.
        if type(module) not in (nn.Linear, FakeQuantizedLinear) and not is_quantized:
            return f"a layer is {type(module).__module__}.{type(module).__name__}, not a plain nn.Linear"
        if not is_quantized and module.bias is not None:
            return "a layer has a bias"
        if has_hooks(module):
            return "a layer has hooks"
        if "forward" in module.__dict__:  # accelerate does this
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
    """Returns why the modules cannot be replaced by products with :func:`layer_weights`; None if they can."""
    found = (
        _adapters_obstacle(each) if _has_adapters(each) else weights_obstacle([each], may_round=True)
        for each in modules
    )
    return next((obstacle for obstacle in found if obstacle is not None), None)


def _product_weight(module: Any) -> torch.Tensor:
    """Returns the matrix (out, in) that a module multiplies with: its weight, rounded, or with its adapters merged."""
    if isinstance(module, FakeQuantizedLinear):
        return module.product_weight()
    if not _has_adapters(module):
        return module.weight
    weight: torch.Tensor = module.base_layer.weight
    for name in _active(module):
        # Like the merged weights of an export. peft would multiply with the two factors in turn instead.
        weight = weight + module.get_delta_weight(name).to(weight.dtype)
    return weight


def _has_adapters(module: Any) -> bool:
    """Whether a module is a linear layer with LoRA adapters of ``peft``. Works without ``peft`` installed."""
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
    """Returns the names of the adapters that are currently added to the weight."""
    if module.merged or module.disable_adapters:
        return []
    return [name for name in module.active_adapters if name in module.lora_A]


# Whether weights have changed.


@dataclass(frozen=True)
class WeightsMark:
    """A mark of a model's current weights, to detect changes. Much faster to compute than the fingerprint."""

    content: tuple[Any, ...]
    """Equal if the weights and the active adapters are equal."""
    versions: tuple[int, ...]
    """Autograd's version counters, which differ even if weights were changed and changed back."""


def weights_mark(model: Any) -> WeightsMark:
    """Returns the mark of a model's current weights. Reads all of them."""
    weights = list(model.state_dict(keep_vars=True).values())
    adapters = tuple(
        (name, tuple(_active(module)), tuple(module.merged_adapters), tuple(sorted(module.scaling.items())))
        for name, module in model.named_modules()
        if _has_adapters(module)
    )
    return WeightsMark((checksum(weights), adapters), tuple(version_of(weight) for weight in weights))


def version_of(tensor: torch.Tensor) -> int:
    """Returns autograd's version counter of a tensor, or -1 for an inference tensor, which has none."""
    return -1 if tensor.is_inference() else tensor._version


def plain_parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Returns the plain tensors that hold a tensor's data: itself, or the components of a torchao tensor."""
    if not type(tensor).__module__.startswith("torchao."):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]  # torch.compile requires it of such classes
    return [part for name in names for part in plain_parts(getattr(tensor, name))]


def checksum(tensors: Iterable[torch.Tensor]) -> bytes:
    """Returns a 16-byte checksum of the content of tensors, in order. Shapes and dtypes do not enter.

    Equal bytes give equal checksums on the same kind of device. One CPU thread reads about 25 GB/s, near the speed of
    memory.
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
    """Returns a 64-bit sum for each ``WORDS_AT_ONCE`` 32-bit words of bytes (n,), computed on their device.

    It is the sum of the words times odd random numbers, modulo 2^64, so that changing a single word always changes it.
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
    """The kernels over a model's weights, with the checksums that detect changes to weights that were copied.

    Most weights are read in the model's own memory and need no check.
    """

    def __init__(self, model: ModelParts, weight_format: WeightFormat):
        from bdh.ops.cpu.recurrence import KernelWeights, Recurrence

        self._key = _key(model)
        weights, config = stored_weights(model), model.config
        # Computed before the weights are copied: if another process writes meanwhile, the next check finds it.
        checksums = [[checksum([piece]) for piece in _pieces(weight)] for weight in weights]
        copies = KernelWeights.of(
            _matrices(model),
            rope_theta=config.rope_theta,
            eps=config.layer_norm_eps,
            num_layer_steps=config.n_layer,
            weight_format=weight_format,
        )
        self.recurrence: Recurrence = Recurrence(copies)
        # For each copied weight: its index, its pieces as memory views that do not keep the tensor alive (None if it is
        # not contiguous), and the checksums of the pieces.
        self._copied: list[tuple[int, list[memoryview] | None, list[bytes]]] = []
        pairs = zip(weights, self.recurrence.weights.tensors, checksums, strict=True)
        for number, (weight, stored, sums) in enumerate(pairs):
            if weight.data_ptr() != stored.data_ptr():
                memory = [_memory(piece) for piece in _pieces(weight)] if weight.is_contiguous() else None
                self._copied.append((number, memory, sums))
        self._num_checks = 0
        self.is_doubtful = False
        """Whether something happened that may have changed weights, so that the next check must compare all pieces."""

    def holds(self, model: ModelParts, *, all_pieces: bool) -> bool:
        """Whether the copies match the model's current weights in the pieces that are compared."""
        is_doubtful, self.is_doubtful = self.is_doubtful, False
        if self._key != _key(model):  # if equal, the weights have not moved, so the memory views are still valid
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
_lock = threading.RLock()  # for the dictionary, since several threads can run models and step optimizers


def kernel_obstacle(model: ModelParts) -> str | None:
    """Returns why the kernels cannot run this model on any machine; None if they can."""
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
    """Returns the kernels over this model's weights. Weights in other formats are copied; the result is cached.

    The cache is dropped when the weights change. A change that autograd's version counter misses (by a fused optimizer,
    ``.data``, NumPy, or another process) is detected

    - at the start of every prompt, when all copied weights are read, at the speed of memory;
    - between two tokens of a text: immediately if an optimizer has stepped, ``train()`` was called, or the change is
      spread over the matrix, as a neuron's ablation in the decoder is; otherwise within 128 tokens, for matrices of
      over 256 KiB.

    Args:
        model: the model.
        weight_format: the format of the kernels' weights; "float32" for the model's own.
        is_prompt: whether the tokens to be read are the first of a prompt.

    Raises:
        ValueError: a layer is no longer a plain product, because hooks, adapters or another module were added. Checked
            at the start of a prompt, and when weights have changed.
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
    """Makes the kernels compare all copied weights before the next token. Call it when weights may have changed."""
    with _lock:
        for kept in _kernels.get(model, {}).values():
            kept.is_doubtful = True


def forget_kernels(model: Any) -> None:
    """Drops the cached kernels of a model. Call it when the memory of weights is released, as sharding does."""
    with _lock:
        _kernels.pop(model, None)


def stored_weights(model: ModelParts) -> list[torch.Tensor]:
    """Returns the tensors that store the weights, in the order of ``KernelWeights.tensors``."""
    modules = (model.embed, *layer_modules(model), model.lm_head)
    return [each.packed if type(each) in (QuantizedLinear, QuantizedEmbedding) else each.weight for each in modules]


def quantized_format(model: ModelParts) -> str | None:
    """Returns the format in which E, Ev and Dec are quantized; None if they are not.

    It is one of :data:`bdh.ops.WEIGHT_FORMATS`, the formats of the single matrices if they match none of these, or the
    name of the other library that quantized them.
    """
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
    """Returns the weights as arguments of ``KernelWeights.of``."""
    modules = (model.embed, *layer_modules(model), model.lm_head)
    return [Rows(each.packed, each.weight_format) if type(each) is QuantizedLinear else each.weight for each in modules]


def _key(model: ModelParts) -> tuple[Any, ...]:
    """Returns a key that changes with the weights' memory addresses, autograd's version counters, and the constants."""
    config = vars(model.config)  # avoids the attribute lookup of transformers, which takes a microsecond each
    places = [(w.data_ptr(), w.dtype, w.shape, w.stride(), version_of(w)) for w in stored_weights(model)]
    return config["rope_theta"], config["layer_norm_eps"], config["n_layer"], *places


def _pieces(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Splits a weight into views of consecutive rows."""
    count = min(-(-weight.nbytes // PIECE_BYTES), _MAX_PIECES, len(weight))
    return weight.detach().tensor_split(max(1, count))


def _memory(tensor: torch.Tensor) -> memoryview:
    """Returns the bytes of a contiguous CPU tensor, without keeping it alive. Valid only while it has this memory."""
    return memoryview((ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr()))


@cache
def _watch_optimizers() -> None:
    """Registers a hook for all optimizers of this process, when kernels are first created."""
    register_optimizer_step_post_hook(_recheck_all)


def _recheck_all(*_: Any) -> None:
    with _lock:
        for model in list(_kernels):
            recheck_weights(model)
