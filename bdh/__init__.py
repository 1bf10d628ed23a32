"""BDH: train, understand and serve Dragon Hatchling language models.

Importing this package is cheap: each public name imports its module when it is first used. BDH registers itself with
transformers' auto classes when transformers is imported, and makes transformers import torchao only when it is needed.
"""

import importlib
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bdh.model import (
        BDHConfig,
        BDHForCausalLM,
        BDHForSequenceClassification,
        BDHModel,
        BDHQuantizationConfig,
        SynapticState,
    )

    BDH = BDHForCausalLM

__version__ = "0.2.0"
__all__ = [
    "BDH",
    "BDHConfig",
    "BDHForCausalLM",
    "BDHForSequenceClassification",
    "BDHModel",
    "BDHQuantizationConfig",
    "SynapticState",
    "__version__",
]

_IN_MODEL = {"BDH": "BDHForCausalLM", **{name: name for name in __all__[1:-1]}}
# Which of our modules to import after a module of transformers; each registers its classes there. There are two because
# transformers imports configuration_auto before its model classes exist, and our model classes need those.
_REGISTERED_BY = {
    "transformers.models.auto.configuration_auto": "bdh.model.configuration",
    "transformers.models.auto.modeling_auto": "bdh.model.modeling",
}
_ASKS_FOR_TORCHAO = "transformers.quantizers.quantizer_torchao"


def __getattr__(name: str) -> Any:
    if name in _IN_MODEL:
        return getattr(importlib.import_module("bdh.model"), _IN_MODEL[name])
    raise AttributeError(f"module 'bdh' has no attribute {name!r}")


class _TransformersFinder:
    """An import hook that runs :func:`_around` while certain modules of transformers are loaded.

    It finds nothing itself: the other finders locate the module, and only the loader's ``exec_module`` is wrapped.
    """

    def __init__(self) -> None:
        self._being_found: set[str] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in (*_REGISTERED_BY, _ASKS_FOR_TORCHAO) or fullname in self._being_found:
            return None
        self._being_found.add(fullname)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._being_found.remove(fullname)
        if spec is not None and (loader := spec.loader) is not None:

            def exec_module(module: ModuleType) -> None:
                del loader.exec_module  # restores the method of the class
                with _around(fullname):
                    loader.exec_module(module)

            loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


@contextmanager
def _around(fullname: str) -> Iterator[None]:
    if fullname == _ASKS_FOR_TORCHAO:
        from bdh.torchao_later import torchao_put_off

        with torchao_put_off():
            yield
    else:
        yield
        _register(fullname)


def _register(auto_module: str) -> None:
    ours = _REGISTERED_BY[auto_module]
    if ours not in sys.modules:  # otherwise it is the module importing transformers, and registers itself
        importlib.import_module(ours)


for _auto_module in _REGISTERED_BY:
    if _auto_module in sys.modules:
        _register(_auto_module)
sys.meta_path.insert(0, _TransformersFinder())
