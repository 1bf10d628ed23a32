"""The neurons of one head over one block of tokens: everything that is wide, forwards and backwards.

What is wide stands neuron by neuron, (N, G, C) for C tokens of each of G sequences, so that the matrix products are flat
ones and a neuron's weights are read once for all tokens. :class:`TorchNeurons` serves any device and dtype; on a GPU its
element-wise parts are compiled into one kernel each. :class:`bdh.ops.cpu.layer.KernelNeurons` touches only what fires.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch

from bdh.ops.attention import sum_dtype
from bdh.ops.backends import compiles_parts
from bdh.ops.blocks.dropout import Dropout, kept
from bdh.ops.blocks.rotation import Rotation


class LayerWeights(NamedTuple):
    """One row for each neuron, in the dtype that is computed in."""

    encoder: torch.Tensor  # (H * N, D)
    encoder_v: tuple[torch.Tensor, ...]  # H of (N, D)
    decoder: torch.Tensor  # (H * N, D): transposed


@dataclass(frozen=True)
class Block:
    """One head, some sequences, some tokens."""

    head: int
    neurons: slice
    """Of the head, among those of all heads."""
    rows: slice
    columns: slice
    rotation: Rotation
    """Of all sequences and tokens."""
    dropout: Dropout | None
    """Keys of this block's neurons and tokens, (N,) and (G, C)."""

    def turns(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine of this block, (N/2, 1 or G, C)."""
        return self.rotation.of_block(self.rows, self.columns)


class Fired(NamedTuple):
    x: torch.Tensor  # (N, G, C)
    q: torch.Tensor  # (N, G, C)


class Neurons(Protocol):
    """Computes blocks with the weights of one pass, and gathers their gradients."""

    def fire(self, block: Block, v: torch.Tensor) -> Fired:
        """x and its rotation q from v (G, C, D)."""

    def rotated(self, block: Block, x: torch.Tensor) -> Fired:
        """The same from x, where it was kept."""

    def respond(self, block: Block, x: torch.Tensor, a: torch.Tensor, out: torch.Tensor) -> None:
        """Adds the decoder's product with dropout(x * relu(Ev a)) to ``out`` (G, C, D), in the dtype of sums."""

    def respond_backward(
        self, block: Block, x: torch.Tensor, a: torch.Tensor, grad_out: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradients of a (G, C, D), in the dtype of sums, and of x as far as it gates y."""

    def fire_backward(
        self,
        block: Block,
        x: torch.Tensor,
        v: torch.Tensor,
        grad_q: torch.Tensor,
        gated: torch.Tensor,
        grad_v: torch.Tensor,
    ) -> None:
        """Adds to ``grad_v`` (G, C, D) what comes through x: by its rotation and, ``gated``, as the gate of y."""

    def gradients(self) -> LayerWeights:
        """Those of the weights, of all blocks so far, in the dtype of sums."""


class TorchNeurons:
    """By torch's dense operations."""

    def __init__(self, weights: LayerWeights, *, with_gradients: bool):
        self._weights = weights
        self._is_compiled = compiles_parts(weights.encoder.device)
        wide = sum_dtype(weights.encoder.dtype)
        self._gradients = zeros_like(weights, wide) if with_gradients else None

    def fire(self, block: Block, v: torch.Tensor) -> Fired:
        before = self._weights.encoder[block.neurons] @ v.flatten(0, 1).t()  # (N, G * C)
        return Fired(*self._run(_rotated, before.unflatten(1, v.shape[:2]), *block.turns()))

    def rotated(self, block: Block, x: torch.Tensor) -> Fired:
        return Fired(x, self._run(_turned, x, *block.turns()))

    def respond(self, block: Block, x: torch.Tensor, a: torch.Tensor, out: torch.Tensor) -> None:
        z = self._run(_gated, x, self._recalled(block, a), *_mask_of(block))
        product = z.flatten(1).t() @ self._weights.decoder[block.neurons]
        out += product.view(out.shape)

    def respond_backward(
        self, block: Block, x: torch.Tensor, a: torch.Tensor, grad_out: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert self._gradients is not None
        decoder = self._weights.decoder[block.neurons]
        grads = grad_out.flatten(0, 1)  # (G * C, D)
        grad_z = (decoder @ grads.t()).view(x.shape)
        z, grad_y, gated = self._run(_gated_backward, x, self._recalled(block, a), grad_z, *_mask_of(block))
        self._gradients.decoder[block.neurons] += z.flatten(1) @ grads
        self._gradients.encoder_v[block.head].add_(grad_y.flatten(1) @ a.flatten(0, 1))
        grad_a = grad_y.flatten(1).t() @ self._weights.encoder_v[block.head]
        return grad_a.view(a.shape).to(sum_dtype(a.dtype)), gated

    def fire_backward(
        self,
        block: Block,
        x: torch.Tensor,
        v: torch.Tensor,
        grad_q: torch.Tensor,
        gated: torch.Tensor,
        grad_v: torch.Tensor,
    ) -> None:
        assert self._gradients is not None
        grad_x = self._run(_rotated_backward, x, grad_q, gated, *block.turns()).flatten(1)
        self._gradients.encoder[block.neurons] += grad_x @ v.flatten(0, 1)
        grad_v += (grad_x.t() @ self._weights.encoder[block.neurons]).view(v.shape)

    def gradients(self) -> LayerWeights:
        assert self._gradients is not None
        return self._gradients

    def _recalled(self, block: Block, a: torch.Tensor) -> torch.Tensor:
        """Ev a, (N, G, C): y before its ReLU."""
        return (self._weights.encoder_v[block.head] @ a.flatten(0, 1).t()).unflatten(1, a.shape[:2])

    def _run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return (_compiled(function) if self._is_compiled else function)(*arguments)


def zeros_like(weights: LayerWeights, dtype: torch.dtype) -> LayerWeights:
    def zeros(weight: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(weight, dtype=dtype, memory_format=torch.contiguous_format)

    encoder_v = tuple(zeros(weight) for weight in weights.encoder_v)
    return LayerWeights(zeros(weights.encoder), encoder_v, zeros(weights.decoder))


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    # Sizes of 1 are compiled for themselves, and a few other things are: sequences and tokens of a block, also of the last
    # one, documents, dropout or none, dtypes. The usual limit of 8 would end in what is not compiled at all.
    more: dict[str, Any] = {}
    if "recompile_limit" in inspect.signature(torch.compile).parameters:  # PyTorch 2.13 has it, 2.9 does not
        more["recompile_limit"] = 64
    return torch.compile(function, dynamic=True, **more)


def _mask_of(block: Block) -> tuple[Any, ...]:
    dropout = block.dropout
    return (None, None, None) if dropout is None else (dropout.rate, dropout.neuron_keys, dropout.token_keys)


def _rotated(before: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x, and q = rope(x), from x before its ReLU (N, G, C); cos and sin are (N/2, 1 or G, C)."""
    x = before.relu()
    return x, _turned(x, cos, sin)


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """rope(x)."""
    a, b = _pairs(x)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=1).flatten(0, 1).to(x.dtype)


def _rotated_backward(
    x: torch.Tensor, grad_q: torch.Tensor, gated: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """The gradient before the ReLU: turned back, with what came by the gate, where x fires."""
    a, b = _pairs(grad_q)
    turned = torch.stack([a * cos + b * sin, b * cos - a * sin], dim=1).flatten(0, 1)
    return torch.where(x > 0, turned + gated, 0.0).to(x.dtype)


def _pairs(wide: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    pairs = wide.to(sum_dtype(wide.dtype)).unflatten(0, (-1, 2))
    return pairs[:, 0], pairs[:, 1]


def _gated(
    x: torch.Tensor,
    recalled: torch.Tensor,
    rate: float | None,
    neuron_keys: torch.Tensor | None,
    token_keys: torch.Tensor | None,
) -> torch.Tensor:
    """z = dropout(x * y)."""
    z = x * recalled.relu()
    if rate is None or neuron_keys is None or token_keys is None:
        return z
    dropout = Dropout(rate, neuron_keys, token_keys)
    return torch.where(kept(dropout, neuron_keys, token_keys), z * dropout.scale, 0.0)


def _gated_backward(
    x: torch.Tensor,
    recalled: torch.Tensor,
    grad_z: torch.Tensor,
    rate: float | None,
    neuron_keys: torch.Tensor | None,
    token_keys: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """z, and the gradients of y before its ReLU and of x as y's gate."""
    y = recalled.relu()
    if rate is not None and neuron_keys is not None and token_keys is not None:
        dropout = Dropout(rate, neuron_keys, token_keys)
        scale = kept(dropout, neuron_keys, token_keys).to(x.dtype) * dropout.scale
        grad_z, y_kept = grad_z * scale, y * scale
    else:
        y_kept = y
    return x * y_kept, torch.where(y > 0, grad_z * x, 0.0), grad_z * y
