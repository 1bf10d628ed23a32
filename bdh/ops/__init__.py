"""The mathematics of the model, on plain tensors; and the words that settings have for it, which are read before torch is loaded."""

from typing import Literal, get_args

ATTENTION_FORMS = ("auto", "parallel", "chunked", "recurrent")
LayerPath = Literal["auto", "plain", "torch", "kernels"]
"""Who computes the layer in training and evaluation; :data:`bdh.ops.backends.BACKENDS` says which backend each means."""
LAYER_PATHS: tuple[str, ...] = get_args(LayerPath)
StepPath = Literal["auto", "kernels", "torch"]
"""Who advances states."""
STEP_PATHS: tuple[str, ...] = get_args(StepPath)
Storage = Literal["float32", "bfloat16"]
"""How ``advance`` keeps its copies of the weights, and the states. What the kernels make of each is in
:data:`bdh.ops.cpu.recurrence.FORMATS`."""
STORAGES: tuple[Storage, ...] = get_args(Storage)
