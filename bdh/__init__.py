"""BDH: train, understand and serve Dragon Hatchling language models.

Importing this package is cheap: its names load what they need when they are first used.
"""

from typing import TYPE_CHECKING, Any

from bdh import autoregister

if TYPE_CHECKING:
    from bdh.model import BDHConfig, BDHForCausalLM, BDHForSequenceClassification, BDHModel, SynapticState

    BDH = BDHForCausalLM

__version__ = "0.1.0"
__all__ = [
    "BDH",
    "BDHConfig",
    "BDHForCausalLM",
    "BDHForSequenceClassification",
    "BDHModel",
    "SynapticState",
    "__version__",
]

_IN_MODEL = {"BDH": "BDHForCausalLM", **{name: name for name in __all__[1:-1]}}

autoregister.install()


def __getattr__(name: str) -> Any:
    if name in _IN_MODEL:
        from bdh import model

        return getattr(model, _IN_MODEL[name])
    raise AttributeError(f"module 'bdh' has no attribute {name!r}")
