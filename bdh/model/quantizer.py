"""BDH's weight formats as the quantization method "bdh" of transformers.

``from_pretrained`` finds the quantizer by ``quantization_config``, in ``config.json`` or among its arguments, and calls
the hooks that ``HfQuantizer`` declares (``transformers/quantizers/base.py``, checked with transformers 5.24).
"""

from typing import Any

import torch
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from bdh.model.quantization import (
    QUANT_METHOD,
    Quantization,
    check_packed,
    dequantize,
    empty_quantized,
    quantized_module,
)


@register_quantization_config(QUANT_METHOD)
class BDHQuantizationConfig(Quantization, QuantizationConfigMixin):  # type: ignore[misc]  # a plain name as quant_method
    """Selects BDH's quantization in ``from_pretrained``, which then rounds the weights as it loads them.

    Example:
        ``from_pretrained(MODEL, quantization_config=BDHQuantizationConfig("int8"))``

    A model that is already quantized keeps its own configuration.

    Args:
        weights: "int8", "int4", or "mixed": the encoder in int8, encoder_v and decoder in int4.
        embeddings: whether to quantize the embedding and the head to int8 as well.
        method: how weights are rounded. While loading only "rtn", to the nearest, is possible;
            :func:`bdh.quantize.quantize` takes the others, which need text.
        state: the format of generation states that is recommended for this model; None for no recommendation.
        group_size: the number of weights that share a scale in int4.
        quant_method: must be "bdh".

    Raises:
        ValueError: a value is not allowed.
    """

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        config = cls.from_facts(config_dict)
        return (config, kwargs) if return_unused_kwargs else config


@register_quantizer(QUANT_METHOD)
class BDHQuantizer(HfQuantizer):
    """Loads, rounds and saves weights in BDH's formats for transformers."""

    quantization_config: BDHQuantizationConfig

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if not self.pre_quantized and self.quantization_config.method != "rtn":
            raise ValueError(
                f"method is {self.quantization_config.method!r}: must be 'rtn' to quantize while loading; for methods "
                "that need calibration text, use bdh.quantize.quantize"
            )

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Returns no new dtype for integer tensors, so that a file that does not hold packed codes is noticed."""
        return super().get_new_dtype(converter, param, dtype) if dtype is not None and dtype.is_floating_point else None

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        formats = self._formats_in(model)
        if self.pre_quantized:
            for name, weight_format in formats.items():
                weight = model.get_submodule(name).weight
                how = {"dtype": weight.dtype, "device": weight.device}
                model.set_submodule(name, empty_quantized(name, weight.shape, weight_format, **how))

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.pre_quantized:
            check_packed(model, model.config.name_or_path)
        else:
            for name, weight_format in self._formats_in(model).items():
                model.set_submodule(name, quantized_module(name, model.get_submodule(name), weight_format))
        return model

    def _formats_in(self, model: Any) -> dict[str, Any]:
        """Returns the formats of the modules that the model has: a model without a head has no ``lm_head``."""
        if model.config.model_type != "bdh":
            raise ValueError(f"quantization_config of bdh is for BDH models, not for {model.config.model_type}")
        formats = self.quantization_config.formats(model.config.n_head)
        return {name: each for name, each in formats.items() if hasattr(model, name.partition(".")[0])}

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        dequantize(model, getattr(torch, dtype) if isinstance(dtype, str) else dtype or model.dtype)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def set_quantized(model: Any, config: BDHQuantizationConfig) -> None:
    """Marks a model whose modules have been replaced as quantized for transformers, as if it had been loaded so."""
    model.is_quantized, model.quantization_method = True, QUANT_METHOD
    model.hf_quantizer = BDHQuantizer(config, pre_quantized=True)
    model.config.quantization_config = config
