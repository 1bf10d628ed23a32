"""Quantization: rounds the weights of a model to 8 or 4 bits, and measures the effect."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bdh.model.quantizer import BDHQuantizationConfig
    from bdh.quantize.report import Comparison, MatrixError, compare, matrix_errors
    from bdh.quantize.rounding import quantize

__all__ = ["BDHQuantizationConfig", "Comparison", "MatrixError", "compare", "matrix_errors", "quantize"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        module = {"BDHQuantizationConfig": "bdh.model.quantizer", "quantize": "bdh.quantize.rounding"}.get(name)
        return getattr(importlib.import_module(module or "bdh.quantize.report"), name)
    raise AttributeError(f"module 'bdh.quantize' has no attribute {name!r}")
