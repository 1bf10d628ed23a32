"""The mathematics of the model, on plain tensors; and the words that settings have for it, which are read before torch is loaded."""

from typing import Literal, get_args

ATTENTION_FORMS = ("auto", "parallel", "chunked", "recurrent")
LayerPath = Literal["auto", "plain", "torch", "kernels"]
"""Who computes the layer in training and evaluation; :data:`bdh.ops.backends.BACKENDS` says which backend each means."""
LAYER_PATHS: tuple[str, ...] = get_args(LayerPath)
StepPath = Literal["auto", "kernels", "torch"]
"""Who advances states."""
STEP_PATHS: tuple[str, ...] = get_args(StepPath)
QuantizedFormat = Literal["int8", "int4"]
"""Whole numbers with scales, laid out by :mod:`bdh.ops.formats`."""
QuantizedWeights = Literal["int8", "int4", "mixed"]
"""Those of a model: mixed is E in int8, Ev and Dec in int4."""
RoundingMethod = Literal["rtn", "gptq"]
"""How weights are rounded to them: rtn, to the nearest; gptq, by the error of the layer's outputs."""
WeightFormat = Literal["float32", "bfloat16", "int8", "int4", "mixed"]
"""How ``advance`` keeps its copies of the weights; "float32" stands for the model's own format where it makes none. "mixed" is E
in int8, Ev and Dec in int4."""
WEIGHT_FORMATS: tuple[WeightFormat, ...] = get_args(WeightFormat)
StateFormat = Literal["float32", "bfloat16", "int16"]
"""How it keeps the states; in int16 each row has a step of its own, and is written once in 16 tokens (:mod:`bdh.ops.cpu.state_codes`)."""
STATE_FORMATS: tuple[StateFormat, ...] = get_args(StateFormat)
