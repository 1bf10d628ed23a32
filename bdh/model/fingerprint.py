"""Which model this is, so that what one model remembers is not given to another, and whether its weights have changed.

``Tensor._version`` does not tell of changes: fused optimizers, ``tensor.data``, NumPy, and other processes that share the
memory write without moving it. Checksums of the content do.
"""

import ctypes
import hashlib
import json
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from xxhash import xxh3_128, xxh3_128_digest

from bdh.model.private_api import version_of
from bdh.model.weights import adapters_in_effect

WORDS_AT_ONCE = 1 << 22  # on an accelerator; 32 MiB of their products


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
        known = (now, digest_of(weights))
        _known[model] = known
    return Identity(_configuration(model), known[1])


# For each model that lives what its weights were, and their digest.
_known: "weakref.WeakKeyDictionary[Any, tuple[Any, str]]" = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class WeightsMark:
    """Tells whether a model still has the weights that it had, much faster than its fingerprint."""

    content: tuple[Any, ...]
    """Equal for equal weights, with the same adapters in effect."""
    versions: tuple[int, ...]
    """Autograd's counters: other ones where weights were changed and changed back."""


def weights_mark(model: Any) -> WeightsMark:
    """Of a model as it is now; reads all of its weights."""
    weights = list(model.state_dict(keep_vars=True).values())
    return WeightsMark(
        (checksum(weights), adapters_in_effect(model)),
        tuple(version_of(weight) for weight in weights),
    )


def _configuration(model: Any) -> dict[str, Any]:
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


def digest_of(weights: dict[str, torch.Tensor]) -> str:
    """SHA-256 of weights: names, types, shapes and bytes. In hex."""
    digest = hashlib.sha256()
    for name, tensor in weights.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        content = tensor.detach().cpu().contiguous().flatten()
        digest.update(content.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def model_name(model: Any) -> str:
    """What people call the model: its hub id or folder's name; empty for one that was never stored."""
    return Path(model.config.name_or_path or "").name


def checksum(tensors: Iterable[torch.Tensor]) -> bytes:
    """16 bytes that depend on every bit of the tensors, and on its place.

    Reads memory at about the speed at which it can be read (25 GB/s for one CPU thread). Not for shapes or dtypes: the
    same bytes have the same checksum. Equal for equal bytes on the same kind of device.
    """
    digest = xxh3_128()
    for tensor in tensors:
        content = tensor.detach().contiguous().flatten().view(torch.uint8)
        if content.device.type == "cpu":
            digest.update(np.from_dlpack(content).data)  # .numpy() would fix the storage's size, which FSDP changes
        elif content.device.type == "meta":
            raise ValueError("a tensor on meta has no content to compute a checksum of")
        else:
            digest.update(word_sums(content).cpu().numpy().data)
    return digest.digest()


class Memory:
    """Bytes of a contiguous tensor on the CPU, without keeping it alive.

    Only to be read while the tensor still has this memory, which is for the caller to know.
    """

    def __init__(self, tensor: torch.Tensor):
        self._bytes = (ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())

    def checksum(self) -> bytes:
        """That of :func:`checksum` for the tensor."""
        return xxh3_128_digest(memoryview(self._bytes))


def word_sums(content: torch.Tensor) -> torch.Tensor:
    """64 bits for each ``WORDS_AT_ONCE`` words of bytes (n,), computed where these are.

    A sum of the words times odd random numbers, modulo 2^64: a single word that changes always changes it.
    """
    padding = -content.numel() % 4
    words = (torch.nn.functional.pad(content, (0, padding)) if padding else content).view(torch.int32)
    factors = _factors(WORDS_AT_ONCE, content.device)
    sums = [(part * factors[: part.numel()]).sum() for part in words.split(WORDS_AT_ONCE)]
    return torch.stack(sums) if sums else words.long()


@cache
def _factors(count: int, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator).to(device) | 1
