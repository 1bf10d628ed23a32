"""The mathematics of the model on plain tensors, and the names that settings use for its variants.

Importing this package does not import PyTorch, so that settings can be read first.
"""

from typing import Literal, get_args

ATTENTION_FORMS = ("auto", "parallel", "chunked", "recurrent")
LayerPath = Literal["auto", "plain", "torch", "kernels"]
"""The code that computes the layer in training and evaluation. :data:`bdh.ops.backends.BACKENDS` lists the backends."""
LAYER_PATHS: tuple[str, ...] = get_args(LayerPath)
StepPath = Literal["auto", "kernels", "torch"]
"""The code that advances states in generation."""
STEP_PATHS: tuple[str, ...] = get_args(StepPath)
QuantizedFormat = Literal["int8", "int4"]
"""The quantized formats of one matrix: integers with scales, in the layout of :mod:`bdh.ops.formats`."""
QuantizedWeights = Literal["int8", "int4", "mixed"]
"""The quantized formats of a model; "mixed" is E in int8, Ev and Dec in int4."""
RoundingMethod = Literal["rtn", "gptq"]
"""How weights are quantized: "rtn" rounds to the nearest, "gptq" minimizes the error of the layer's outputs."""
WeightFormat = Literal["float32", "bfloat16", "int8", "int4", "mixed"]
"""The format of weights in ``advance``. "float32" uses the model's own weights; the others are rounded copies, where
"mixed" is E in int8, Ev and Dec in int4."""
WEIGHT_FORMATS: tuple[WeightFormat, ...] = get_args(WeightFormat)
StateFormat = Literal["float32", "bfloat16", "int16"]
"""The format of states in ``advance``. In int16 each row has its own scale, and is written once in 16 tokens
(:mod:`bdh.ops.cpu.state_codes`)."""
STATE_FORMATS: tuple[StateFormat, ...] = get_args(StateFormat)
