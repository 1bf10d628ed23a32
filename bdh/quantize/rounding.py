"""Quantizes the weights of a model."""

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from bdh.model.quantization import check_not_quantized, quantized_module
from bdh.model.quantizer import BDHQuantizationConfig, set_quantized
from bdh.model.weights import weights_obstacle
from bdh.ops import QuantizedWeights, RoundingMethod, StateFormat
from bdh.ops.formats import Codes
from bdh.quantize.gptq import gptq_codes
from bdh.quantize.progress import Progress


def quantize(
    model: Any,
    weights: QuantizedWeights = "int8",
    *,
    method: RoundingMethod = "rtn",
    embeddings: bool = False,
    state: StateFormat | None = None,
    sequences: Iterable[torch.Tensor] | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> Any:
    """Returns a copy of a model with quantized weights. The copy shares no memory with the model.

    ``save_pretrained`` and ``from_pretrained`` save and load the quantized model.

    Args:
        model: a :class:`bdh.BDHForCausalLM` or another model class of this package for transformers.
        weights: "int8", "int4", or "mixed": the encoder in int8, encoder_v and decoder in int4.
        method: "rtn" rounds each weight to the nearest; "gptq" minimizes the error of the layer's outputs on
            ``sequences`` (:mod:`bdh.quantize.gptq`).
        embeddings: whether to quantize the embedding and the head to int8 as well.
        state: the format of generation states to recommend for the model; None for no recommendation.
        sequences: for gptq, calibration text that resembles what the model will read: batches of token ids, int64 (B,
            T). Each sequence is read with an empty state.
        progress: called with the stage, the work done and the total work.

    Raises:
        ValueError: the model is already quantized, a module is not a plain ``nn.Linear``, a weight is infinite or NaN,
            or an argument is invalid. Messages contain the name of the module.
    """
    config = BDHQuantizationConfig(weights, embeddings=embeddings, method=method, state=state)
    check_quantizable(model, embeddings=embeddings)
    if method == "rtn":
        return with_codes(model, config, {}, progress)
    if sequences is None:
        raise ValueError(f"method is {method!r}: needs sequences to calibrate on")
    formats = config.formats(model.config.n_head)
    of_layer = {name: each for name, each in formats.items() if name not in ("embed", "lm_head")}
    return with_codes(model, config, gptq_codes(model, sequences, of_layer, progress), progress)


def check_quantizable(model: Any, name: str = "the model", *, embeddings: bool = False) -> None:
    """Raises ``ValueError`` if modules of a model are not plain: quantized, with adapters, or with hooks."""
    check_not_quantized(model, name, "quantize the unquantized model")
    layers = {"encoder": model.encoder, "decoder": model.decoder}
    layers |= {f"encoder_v.{head}": module for head, module in enumerate(model.encoder_v)}
    layers |= {"lm_head": model.lm_head} if embeddings and hasattr(model, "lm_head") else {}
    for place, module in layers.items():
        if (obstacle := weights_obstacle([module], may_round=True)) is not None:
            raise ValueError(f"{place} of {name} cannot be quantized: {obstacle}")


def with_codes(
    model: Any,
    config: BDHQuantizationConfig,
    codes: Mapping[str, Codes],
    progress: Progress = lambda stage, done, total: None,
) -> Any:
    """Returns a quantized copy of a model with the given codes. Modules without codes are rounded to the nearest."""
    formats = {
        name: each for name, each in config.formats(model.config.n_head).items() if hasattr(model, name.split(".")[0])
    }
    replaced = {}
    for number, (name, weight_format) in enumerate(formats.items(), start=1):
        module = model.get_submodule(name)
        replaced[id(module)] = quantized_module(name, module, weight_format, codes.get(name))
        progress("matrices", number, len(formats))
    quantized = copy.deepcopy(model, replaced)  # deepcopy uses the entries of its memo instead of copying the modules
    set_quantized(quantized, config)
    return quantized
