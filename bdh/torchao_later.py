"""Puts off the import of torchao until a model needs it.

Two libraries import it wherever it is installed, for one name each, and need none of it until a weight is a tensor of torchao's:

- transformers 5.23 with its model classes, for the function that saves such weights (``quantizers/quantizer_torchao.py``);
- peft 0.21 with each adapter, for the class of such weights (``tuners/lora/torchao.py``).

While they ask, a module with that name stands in ``sys.modules`` in place of torchao's. Its other names are torchao's own: where
another version wants more of it, torchao is imported as ever.
"""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any


class _WeightOfTorchao:
    """Its base class of tensors, while there is none: nothing is an instance."""


def _save_weights(*arguments: Any, **others: Any) -> Any:
    name = "torchao.prototype.safetensors.safetensors_support"
    return importlib.import_module(name).flatten_tensor_state_dict(*arguments, **others)


class _Placeholder(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # which Python asks every module for
            raise AttributeError(name)
        _remove(self)
        return getattr(importlib.import_module(self.__name__), name)


_ASKED_FOR: dict[str, dict[str, Any]] = {
    "torchao.prototype.safetensors.safetensors_support": {"flatten_tensor_state_dict": _save_weights},
    "torchao.utils": {"TorchAOBaseTensor": _WeightOfTorchao},
}


@contextmanager
def torchao_put_off() -> Iterator[None]:
    """Within, transformers' model classes are imported, and adapters are made, without torchao, unless it is imported already."""
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
