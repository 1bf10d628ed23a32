"""Makes transformers' auto classes know BDH after ``import bdh``, without loading PyTorch for it.

Registering needs our classes, and so transformers and PyTorch: seconds that neither ``bdh --help`` nor a
program that never loads a model should pay. So each registration waits until the auto class that it is for
is itself imported: ``AutoConfig``, and ``AutoModel`` with its relatives. They are two steps, since transformers loads
the first while its model classes, which ours need, are not there yet.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

# A module of transformers, and the one of ours that registers itself there when it is imported.
_REGISTERED_BY = {
    "transformers.models.auto.configuration_auto": "bdh.model.configuration",
    "transformers.models.auto.modeling_auto": "bdh.model.modeling",
}


def install() -> None:
    """Registers with those auto classes that are loaded already; with the others as soon as they are."""
    for auto_module in _REGISTERED_BY:
        if auto_module in sys.modules:
            _register(auto_module)
    if not any(isinstance(finder, _AutoClassesFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AutoClassesFinder())


def _register(auto_module: str) -> None:
    ours = _REGISTERED_BY[auto_module]
    if ours not in sys.modules:  # else it is what is importing transformers, and registers itself
        importlib.import_module(ours)


class _AutoClassesFinder(importlib.abc.MetaPathFinder):
    """Lets Python find the auto classes as ever, and adds a step behind their loading."""

    def __init__(self) -> None:
        self._being_found: set[str] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in _REGISTERED_BY or fullname in self._being_found:
            return None
        self._being_found.add(fullname)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._being_found.remove(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


class _ThenRegister(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader):
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # Gone once used: whoever asks the module for its loader finds the real one.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _register(module.__name__)
