"""Which model this is: a number of its function, so that what one model remembers is not given to another."""

import hashlib
import json
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bdh.model.checksum import checksum
from bdh.model.modeling import BDHForCausalLM
from bdh.model.private_api import version_of
from bdh.model.weights import adapters_in_effect


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


def fingerprint(model: BDHForCausalLM) -> str:
    """SHA-256, in hex, of what defines a model's function: sizes, constants and weights.

    It does not depend on where the model was loaded from, nor on its device. See :func:`identity`.
    """
    return identity(model).fingerprint


def identity(model: BDHForCausalLM) -> Identity:
    """Of a model as it is now.

    The weights' SHA-256 is computed once for each model, and again when a checksum tells that they have changed.
    """
    weights = dict(sorted(model.state_dict(keep_vars=True).items()))
    now = (*((name, t.dtype, tuple(t.shape), t.device.type) for name, t in weights.items()), checksum(weights.values()))
    known = _known.get(model)
    if known is None or known[0] != now:
        known = (now, _digest(weights))
        _known[model] = known
    return Identity(_configuration(model), known[1])


# For each model that lives what its weights were, and their digest.
_known: "weakref.WeakKeyDictionary[BDHForCausalLM, tuple[Any, str]]" = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class WeightsMark:
    """Tells whether a model still has the weights that it had, much faster than its fingerprint."""

    content: tuple[Any, ...]
    """Equal for equal weights, with the same adapters in effect."""
    versions: tuple[int, ...]
    """Autograd's counters: other ones where weights were changed and changed back."""


def weights_mark(model: BDHForCausalLM) -> WeightsMark:
    """Of a model as it is now; reads all of its weights."""
    weights = list(model.state_dict(keep_vars=True).values())
    return WeightsMark(
        (checksum(weights), adapters_in_effect(model)),
        tuple(version_of(weight) for weight in weights),
    )


def _configuration(model: BDHForCausalLM) -> dict[str, Any]:
    """Numbers in one form each: 65536 and 65536.0 are the same base, and a decay can be written in several ways."""
    config = model.config
    half_lives = config.half_lives
    return {
        "vocab_size": config.vocab_size,
        "n_embd": config.n_embd,
        "n_head": config.n_head,
        "n_layer": config.n_layer,
        "neurons_per_head": config.neurons_per_head,
        "rope_theta": float(config.rope_theta),
        "layer_norm_eps": float(config.layer_norm_eps),
        "half_lives": None if half_lives is None else [str(float(life)) for life in half_lives],  # JSON has no inf
    }


def _digest(weights: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in weights.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        content = tensor.detach().cpu().contiguous().flatten()
        digest.update(content.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def model_name(model: BDHForCausalLM) -> str:
    """What people call the model: its hub id or folder's name; empty for one that was never stored."""
    return Path(model.config.name_or_path or "").name
