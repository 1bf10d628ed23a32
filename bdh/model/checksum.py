"""Checksums of weights: whether memory still holds what it held, whoever wrote to it.

``Tensor._version`` does not tell: fused optimizers, ``tensor.data``, NumPy, and other processes that share the memory
write without moving it.
"""

import ctypes
from collections.abc import Iterable
from functools import cache

import numpy as np
import torch
from xxhash import xxh3_128, xxh3_128_digest

_WORDS_AT_ONCE = 1 << 22  # on an accelerator; 32 MiB of their products


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
            digest.update(_sums(content).cpu().numpy().data)
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


def _sums(content: torch.Tensor) -> torch.Tensor:
    """64 bits for each ``_WORDS_AT_ONCE`` words of bytes (n,), computed where these are.

    A sum of the words times odd random numbers, modulo 2^64: a single word that changes always changes it.
    """
    padding = -content.numel() % 4
    words = (torch.nn.functional.pad(content, (0, padding)) if padding else content).view(torch.int32)
    factors = _factors(_WORDS_AT_ONCE, content.device)
    sums = [(part * factors[: part.numel()]).sum() for part in words.split(_WORDS_AT_ONCE)]
    return torch.stack(sums) if sums else words.long()


@cache
def _factors(count: int, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator).to(device) | 1
