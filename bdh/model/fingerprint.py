"""Fingerprints of models, so that a snapshot is never continued with another model than its own."""

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
    """What identifies a model: the part of its configuration that defines its function, and its weights."""

    configuration: dict[str, Any]
    """The fields of the configuration that define the model's function, as JSON types."""
    weights: str
    """The SHA-256, in hex, of the weights: their names, dtypes, shapes and bytes."""

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of both, in hex."""
        content = json.dumps([self.configuration, self.weights], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def difference(self, other: "Identity") -> str:
        """Returns a readable description of how ``other`` differs, empty if it does not."""
        theirs = other.configuration
        fields = [
            f"{name} is {theirs.get(name)} there and {value} here"
            for name, value in self.configuration.items()
            if theirs.get(name) != value
        ]
        if fields:
            return "another configuration: " + ", ".join(fields)
        return "" if self.weights == other.weights else "the same configuration with other weights"


# For each live model, the state of its weights when they were last hashed, and their digest.
_known: "weakref.WeakKeyDictionary[Any, tuple[Any, str]]" = weakref.WeakKeyDictionary()


def fingerprint(model: Any) -> str:
    """Returns the SHA-256, in hex, of everything that defines a model's function: sizes, constants and weights.

    It depends neither on the path that the model was loaded from nor on its device. See :func:`identity`.
    """
    return identity(model).fingerprint


def identity(model: Any) -> Identity:
    """Returns the identity of a model with its current weights.

    The SHA-256 of the weights is cached for each model, and computed again if a checksum shows that they have changed.
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
    # Normalized: 65536 and 65536.0 are the same base, a decay can be written in several ways, and JSON has no inf.
    configuration |= {name: float(getattr(config, name)) for name in ("rope_theta", "layer_norm_eps")}
    lives = config.half_lives
    configuration["half_lives"] = None if lives is None else [str(float(life)) for life in lives]
    return Identity(configuration, known[1])


def digest_of(weights: dict[str, torch.Tensor]) -> str:
    """Returns the SHA-256, in hex, of weights: their names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in weights.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        for part in plain_parts(tensor):
            content = part.detach().cpu().contiguous().flatten()
            digest.update(content.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def model_name(model: Any) -> str:
    """Returns the last component of the model's hub id or folder; empty for a model that was never saved."""
    return Path(model.config.name_or_path or "").name
