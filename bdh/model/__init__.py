"""The model classes, their configuration, their state, and conversion from and to other formats.

Each name imports its module when it is first used, so that importing this package is cheap.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bdh.model.configuration import BDHConfig
    from bdh.model.modeling import BDHForCausalLM, BDHForSequenceClassification, BDHModel
    from bdh.model.quantizer import BDHQuantizationConfig
    from bdh.model.state import SynapticState

__all__ = [
    "BDHConfig",
    "BDHForCausalLM",
    "BDHForSequenceClassification",
    "BDHModel",
    "BDHQuantizationConfig",
    "SynapticState",
]

_MODULE_OF = {
    "BDHConfig": "configuration",
    "BDHForCausalLM": "modeling",
    "BDHForSequenceClassification": "modeling",
    "BDHModel": "modeling",
    "BDHQuantizationConfig": "quantizer",
    "SynapticState": "state",
}


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(importlib.import_module(f"bdh.model.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module 'bdh.model' has no attribute {name!r}")
