"""Which model this is, so that what one model remembers is not given to another."""

import hashlib
import json
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bdh.model.weights import checksum, plain_parts


@dataclass(frozen=True)
class Identity:
    """What makes a model the one that it is."""

    configuration: dict[str, Any]
    """Those fields of its configuration that define its function, in JSON's types."""
    weights: str
    """SHA-256 of the weights: names, types, shapes and bytes. In hex."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of both, in hex."""
        content = json.dumps([self.configuration, self.weights], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def difference(self, other: "Identity") -> str:
        """How ``other`` differs, for a person; empty where it does not."""
        theirs = other.configuration
        fields = [
            f"{name} is {theirs.get(name)} there and {value} here"
            for name, value in self.configuration.items()
            if theirs.get(name) != value
        ]
        if fields:
            return "another configuration: " + ", ".join(fields)
        return "" if self.weights == other.weights else "the same configuration with other weights"


# For each model that lives what its weights were, and their digest.
_known: "weakref.WeakKeyDictionary[Any, tuple[Any, str]]" = weakref.WeakKeyDictionary()


def fingerprint(model: Any) -> str:
    """SHA-256, in hex, of what defines a model's function: sizes, constants and weights.

    It does not depend on where the model was loaded from, nor on its device. See :func:`identity`.
    """
    return identity(model).fingerprint


def identity(model: Any) -> Identity:
    """Of a model as it is now.

    The weights' SHA-256 is computed once for each model, and again when a checksum tells that they have changed.
    """
    weights = dict(sorted(model.state_dict(keep_vars=True).items()))
    now = (*((name, t.dtype, tuple(t.shape), t.device.type) for name, t in weights.items()), checksum(weights.values()))
    known = _known.get(model)
    if known is None or known[0] != now:
        known = _known[model] = (now, digest_of(weights))
    config = model.config
    configuration = {
        name: getattr(config, name) for name in ("vocab_size", "n_embd", "n_head", "n_layer", "neurons_per_head")
    }
    # In one form each: 65536 and 65536.0 are the same base, a decay can be written in several ways; JSON has no inf.
    configuration |= {name: float(getattr(config, name)) for name in ("rope_theta", "layer_norm_eps")}
    lives = config.half_lives
    configuration["half_lives"] = None if lives is None else [str(float(life)) for life in lives]
    return Identity(configuration, known[1])


def digest_of(weights: dict[str, torch.Tensor]) -> str:
    """SHA-256 of weights: names, types, shapes and bytes. In hex."""
    digest = hashlib.sha256()
    for name, tensor in weights.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        for part in plain_parts(tensor):
            content = part.detach().cpu().contiguous().flatten()
            digest.update(content.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def model_name(model: Any) -> str:
    """What people call the model: its hub id or folder's name; empty for one that was never stored."""
    return Path(model.config.name_or_path or "").name
