"""Quantized models: the ``quantization_config`` of ``config.json``, and replacing modules by quantized ones."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import chain
from typing import Any, Self, get_args

import torch
from torch import nn

from bdh.model.quantized import QuantizedEmbedding, QuantizedLinear
from bdh.ops import STATE_FORMATS, QuantizedFormat, QuantizedWeights, RoundingMethod, StateFormat
from bdh.ops.formats import GROUP, Codes, layer_formats, pack, rounded

QUANT_METHOD = "bdh"
"""The ``quant_method`` of BDH's formats in ``quantization_config``."""
_MODULES = (QuantizedLinear, QuantizedEmbedding)


@dataclass
class Quantization:
    """The formats of a model's weights: ``quantization_config`` in ``config.json``.

    Raises:
        ValueError: a value is not allowed.
    """

    weights: QuantizedWeights = "int8"
    """int8, int4, or mixed: E in int8, Ev and Dec in int4."""
    embeddings: bool = False
    """Whether the embedding and the head are in int8 as well."""
    method: RoundingMethod = "rtn"
    """How the weights were rounded; rtn is to the nearest."""
    state: StateFormat | None = None
    """The format of generation states that is recommended for this model; None for no recommendation."""
    group_size: int = GROUP
    """The number of weights that share a scale in int4."""
    quant_method: str = QUANT_METHOD

    def __post_init__(self) -> None:
        allowed: dict[str, tuple[Any, ...]] = {
            "weights": get_args(QuantizedWeights),
            "embeddings": (False, True),
            "method": get_args(RoundingMethod),
            "state": (None, *STATE_FORMATS),
            "group_size": (GROUP,),
            "quant_method": (QUANT_METHOD,),
        }
        faults = [
            f"{name} is {value!r}: must be {' or '.join(map(str, values))}"
            for name, values in allowed.items()
            if (value := getattr(self, name)) not in values
        ]
        if faults:
            raise ValueError(f"quantization_config: {'; '.join(faults)}")

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> Self:
        """Returns the object for a ``quantization_config``. Raises ``ValueError`` for a wrong value or unknown name."""
        if unknown := sorted(set(facts) - {each.name for each in fields(cls)}):
            raise ValueError(f"quantization_config has the unknown {', '.join(unknown)}")
        return cls(**facts)

    def formats(self, num_heads: int) -> dict[str, QuantizedFormat]:
        """Returns the format of each quantized module of a language model, by the module's name."""
        encoder, encoder_v, decoder, _ = layer_formats(self.weights)
        formats = {"encoder": encoder, **{f"encoder_v.{head}": encoder_v for head in range(num_heads)}}
        formats |= {"decoder": decoder} | ({"embed": "int8", "lm_head": "int8"} if self.embeddings else {})
        return formats  # type: ignore[return-value]  # none of these is a plain format


def is_ours(facts: Any) -> bool:
    """Whether a ``quantization_config`` describes BDH's formats, and not another library's."""
    return isinstance(facts, Mapping) and facts.get("quant_method") == QUANT_METHOD


def check_quantization(facts: Any, wrong: str) -> None:
    """Raises ``ValueError``, beginning with ``wrong``, if a ``quantization_config`` of BDH is invalid."""
    try:
        if is_ours(facts):
            Quantization.from_facts(facts)
    except ValueError as error:
        raise ValueError(f"{wrong}: {error}") from error


def recommended_state(config: Any) -> StateFormat | None:
    """Returns the state format that a model's configuration, transformers' or ours, recommends, or None."""
    facts = getattr(config, "quantization_config", None)
    if isinstance(facts, Quantization):
        return facts.state
    return Quantization.from_facts(facts).state if facts is not None and is_ours(facts) else None


def quantized_formats(model: nn.Module) -> dict[str, QuantizedFormat]:
    """Returns the format of each module of a model that is quantized in BDH's formats, by the module's name."""
    return {name: module.weight_format for name, module in model.named_modules() if isinstance(module, _MODULES)}


def quantizing_library(module: nn.Module) -> str | None:
    """Returns the other library that quantized a linear module; None for a plain module or one in BDH's formats."""
    types = (type(module), type(getattr(module, "weight", None)))
    names = {each.__module__.partition(".")[0] for each in types}
    return next((name for name in ("torchao", "bitsandbytes") if name in names), None)


def check_not_quantized(model: nn.Module, name: str, reason: str, *, allow_ours: bool = False) -> None:
    """Raises ``ValueError`` if weights of a model are quantized.

    Args:
        model: the model.
        name: the model's name, for the message.
        reason: the end of the message.
        allow_ours: accept BDH's formats. Use it if :attr:`QuantizedLinear.weight` suffices; the modules of other
            libraries have no such attribute.
    """
    if not allow_ours and (formats := quantized_formats(model)):
        raise ValueError(f"{name} has weights in {' and '.join(sorted(set(formats.values())))}: {reason}")
    if (library := next(filter(None, map(quantizing_library, model.modules())), None)) is not None:
        raise ValueError(f"{name} has weights that {library} has quantized: {reason}")


def keep_as_saved(model: nn.Module) -> None:
    """Prevents bitsandbytes from repacking its 4-bit weights, which would corrupt them when they are saved.

    On processors with AVX-512 bfloat16, bitsandbytes 0.50 repacks the weights when they are first used. A call of
    ``state_dict`` unpacks them again, in memory too, but wrongly if a row has several blocks, as in the decoder.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]  # a plain attribute


def num_quantized_weights(model: nn.Module, *, embeddings: bool = True) -> int:
    """Returns the number of quantized weights of a model, whatever the number of bytes that each takes."""
    sizes = []
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            sizes.append(module.in_features * module.out_features)
        elif isinstance(module, QuantizedEmbedding) and embeddings:
            sizes.append(module.num_embeddings * module.embedding_dim)
    return sum(sizes)


def plain_tensor(model: nn.Module) -> torch.Tensor:
    """Returns a model's first floating-point tensor, from which to take its device and dtype."""
    return next(each for each in chain(model.parameters(), model.buffers()) if each.is_floating_point())


def neuron_rows(name: str, weight: torch.Tensor) -> torch.Tensor:
    """Returns a module's weight with one row for each scale: transposed for the decoder, whose inputs are neurons."""
    return weight.t() if name == "decoder" else weight


def quantized_module(
    name: str, module: nn.Module, weight_format: QuantizedFormat, codes: Codes | None = None
) -> nn.Module:
    """Returns the quantized replacement of a plain module.

    Args:
        name: the module's name in the model.
        module: the plain module.
        weight_format: the format.
        codes: the rounded weights; by default the weights are rounded to the nearest.

    Raises:
        ValueError: a weight is infinite or NaN; the message contains the module's name.
    """
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    try:
        codes = codes or rounded(neuron_rows(name, weight), weight_format)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    quantized = empty_quantized(name, weight.shape, weight_format, dtype=weight.dtype, device=weight.device)
    quantized.packed = pack(codes, weight_format).to(weight.device)
    return quantized


def empty_quantized(
    name: str,
    shape: Sequence[int],
    weight_format: QuantizedFormat,
    *,
    dtype: torch.dtype,
    device: torch.device | str | None,
) -> QuantizedLinear | QuantizedEmbedding:
    """Returns the quantized replacement of the module of this name, whose weights are still to be loaded.

    Args:
        name: the module's name in the model.
        shape: that of the plain weight.
        weight_format: the format.
        dtype: the dtype of the embedding's output.
        device: the device of the packed weights.
    """
    num_outputs, num_inputs = shape
    if name == "embed":
        return QuantizedEmbedding(num_outputs, num_inputs, weight_format, dtype=dtype, device=device)
    return QuantizedLinear(num_inputs, num_outputs, weight_format, by_input=name == "decoder", device=device)


def check_packed(model: nn.Module, name: str) -> None:
    """Raises ``ValueError`` if loaded quantized weights are missing or damaged; ``name`` is the model's name."""
    for place, module in model.named_modules():
        if not isinstance(module, _MODULES):
            continue
        fault = ""
        if module.packed.dtype != torch.uint8:
            fault = f"{place}.packed is {str(module.packed.dtype).removeprefix('torch.')}, not uint8"
        elif not (finite := module.codes.scales.isfinite().all(1)).all():
            fault = (
                f"{place}.packed is missing, or its row {int((~finite).nonzero()[0])} has a scale that is not finite"
            )
        if fault:
            raise ValueError(f"the weights of {name} are damaged or not complete: {fault}")


def dequantize(model: nn.Module, dtype: torch.dtype) -> None:
    """Replaces the quantized modules of a model by plain ones with the same weights, in ``dtype``."""
    for name, module in list(model.named_modules()):
        if not isinstance(module, _MODULES):
            continue
        weight = module.weight.to(dtype).contiguous()
        plain: nn.Module
        if isinstance(module, QuantizedEmbedding):
            plain = nn.Embedding.from_pretrained(weight, freeze=False)
        else:
            plain = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
            plain.weight = nn.Parameter(weight)
        model.set_submodule(name, plain.train(module.training))
