"""Delays the import of torchao until a model needs it.

Two libraries import torchao wherever it is installed, each for a single name that they do not need until a weight is a
tensor of torchao:

- transformers 5.24 imports it with its model classes, for the function that saves such weights
  (``quantizers/quantizer_torchao.py``).
- peft 0.21 imports it with each adapter, for the class of such weights (``tuners/lora/torchao.py``).

Meanwhile, a module of the same name in ``sys.modules`` takes the place of torchao's. It looks up all other names in
torchao itself, so a version of these libraries that needs more of torchao imports it as usual.
"""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any


class _WeightOfTorchao:
    """Replaces torchao's base class of tensors while torchao is not imported. Nothing is an instance of it."""


def _save_weights(*arguments: Any, **others: Any) -> Any:
    name = "torchao.prototype.safetensors.safetensors_support"
    return importlib.import_module(name).flatten_tensor_state_dict(*arguments, **others)


class _Placeholder(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # Python looks these up in every module
            raise AttributeError(name)
        _remove(self)
        return getattr(importlib.import_module(self.__name__), name)


_ASKED_FOR: dict[str, dict[str, Any]] = {
    "torchao.prototype.safetensors.safetensors_support": {"flatten_tensor_state_dict": _save_weights},
    "torchao.utils": {"TorchAOBaseTensor": _WeightOfTorchao},
}


@contextmanager
def torchao_put_off() -> Iterator[None]:
    """A context in which transformers' model classes are imported, and adapters are created, without importing torchao.

    If torchao has already been imported, the context changes nothing.
    """
    placeholders: list[_Placeholder] = []
    if "torchao" not in sys.modules:
        for name, contents in _ASKED_FOR.items():
            placeholder = _Placeholder(name)
            vars(placeholder).update(contents)
            placeholders.append(sys.modules.setdefault(name, placeholder))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for placeholder in placeholders:
            _remove(placeholder)


def _remove(placeholder: ModuleType) -> None:
    if sys.modules.get(placeholder.__name__) is placeholder:
        del sys.modules[placeholder.__name__]
