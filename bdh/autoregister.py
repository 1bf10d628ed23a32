"""Makes ``AutoModelForCausalLM`` know BDH after ``import bdh``, without loading PyTorch for it.

Registering needs the model class, and so PyTorch and transformers: seconds that neither ``bdh --help`` nor a
program that never loads a model should pay. So the registration waits until transformers' auto classes are
themselves imported.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

_AUTO_CLASSES = "transformers.models.auto.modeling_auto"


def install() -> None:
    """Registers now if the auto classes are loaded already, else as soon as they are."""
    if _AUTO_CLASSES in sys.modules:
        importlib.import_module("bdh.model")
    elif not any(isinstance(finder, _AutoClassesFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AutoClassesFinder())


class _AutoClassesFinder(importlib.abc.MetaPathFinder):
    """Lets Python find the auto classes as ever, and adds a step behind their loading."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _AUTO_CLASSES:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
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
        if "bdh.model" not in sys.modules:  # else bdh.model is what is importing transformers, and registers
            importlib.import_module("bdh.model")
