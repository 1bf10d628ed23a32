"""Computes the neurons of a block with the kernels of :mod:`bdh.ops.cpu.train_kernels`."""

import threading
from functools import cache

import numpy as np
import torch

from bdh.ops.backends import LayerWeights
from bdh.ops.blocks.block import Block, Fired, Neurons, zeros_like
from bdh.ops.cpu import train_kernels as kernels
from bdh.ops.cpu.runtime import calm, compiled, crowding, most_threads, run_by_threads
from bdh.ops.cpu.vector import LANES

DENSE_Y = 0.45
"""The fraction of x that fires above which y is computed by a dense product, for all neurons and tokens."""
DENSE_GRADIENT = 0.4
"""The fraction of x that fires above which the gradients through x are computed by dense products."""
_FIRE_BYTES = 1024 * 1024  # of x, in a group of neurons
# Rows whose length is a multiple of this map to the same few sets of a cache, and the matrix products of attention take
# a third longer. Such rows are therefore made longer by a vector.
_ALIASED = 256
_scratch = threading.local()
"""The arrays of a block by name, which are kept from call to call: allocating fresh pages takes longer than much of the
computation. A thread computes one layer step at a time."""
_NOTHING = torch.zeros(1, 1, dtype=torch.float32, device="cpu")


@cache
def compile_kernels() -> None:
    """Runs all kernels once, so that they are compiled or loaded from the disk. Compilation is announced."""

    def run() -> None:
        x, narrow, table, weight, partial_sums = (
            np.ones(shape, np.float32) for shape in ((2, LANES), (LANES, 1), (1, 1), (2, 1), (1, LANES, 1))
        )
        turns = table, table, np.array([0, 1]), np.zeros(1, np.int64)
        counts = np.empty(1, np.int64)
        keys = np.zeros(2, np.int64), np.zeros(LANES, np.int32), 0, np.float32(1)
        gated, grad_q = np.zeros_like(x), np.ones((1, 2, 1), np.float32)
        run_by_threads(1, kernels.rotate, x, x.copy(), *turns, 0, True, counts)
        grads = True, narrow, weight.copy(), weight.copy(), gated
        run_by_threads(1, kernels.gated_mlp, x, x, False, narrow, weight, weight, *grads, partial_sums, *keys)
        run_by_threads(1, kernels.fire_backward, x, grad_q, gated, *turns, narrow, weight, weight.copy(), partial_sums)
        run_by_threads(1, kernels.turn_back, 1, x, grad_q, gated, *turns)

    compiled("training", run)


class KernelNeurons(Neurons):
    """Neurons in float32 on a CPU. y and all gradients are only computed where x fires, unless it fires often."""

    def __init__(self, weights: LayerWeights, *, with_gradients: bool, keep_wide: bool = False):
        self._weights = LayerWeights(
            weights.encoder.detach().contiguous(),
            tuple(weight.detach().contiguous() for weight in weights.encoder_v),
            weights.decoder.detach().contiguous(),
        )
        self._gradients = zeros_like(weights, torch.float32) if with_gradients else None
        compile_kernels()
        self._parts = most_threads()
        calm.set(crowding.busy_cores(self._parts, leaves_cores=False) > 0)
        self._keep_wide = keep_wide
        self._wide: dict[str, torch.Tensor] = _scratch.__dict__
        self._firing = 0

    def fire(self, block: Block, v: torch.Tensor) -> Fired:
        G, C, D = v.shape
        x, q = self._memory("x", block, v, fresh=self._keep_wide), self._memory("q", block, v)
        values, weights = v.reshape(-1, D).t(), self._weights.encoder[block.neurons]
        turns = _turns(block)
        # In groups of whole pairs, so that their products are still in the cache when they are rotated.
        some = max(2, _FIRE_BYTES // (4 * x.shape[1]) // 2 * 2)
        self._firing = 0
        for first in range(0, len(x), some):
            part = slice(first, min(len(x), first + some))
            torch.mm(weights[part], values, out=x[part, : G * C])
            self._rotate(turns, x[part], q[part], first // 2, cut=True)
        return _fired(x, q, G, C)

    def rotated(self, block: Block, x: torch.Tensor) -> Fired:
        G, C = x.shape[1:]
        wide, q = _whole(x), self._memory("q", block, x[0, :, :, None])
        self._firing = 0
        self._rotate(_turns(block), wide, q, 0, cut=False)
        return _fired(wide, q, G, C)

    def gated_mlp(self, block: Block, x: torch.Tensor, a: torch.Tensor, out: torch.Tensor) -> None:
        nothing = _NOTHING.numpy()
        self._run_gated_mlp(block, x, a, out, (False, nothing, nothing, nothing, nothing))

    def gated_mlp_backward(
        self, block: Block, x: torch.Tensor, a: torch.Tensor, grad_out: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert self._gradients is not None
        gated, grad_a = self._memory("gated", block, a), torch.zeros_like(a)
        of_weights = self._gradients.encoder_v[block.head].numpy(), self._gradients.decoder[block.neurons].numpy()
        self._run_gated_mlp(block, x, a, grad_a, (True, _rows(grad_out).numpy(), *of_weights, gated.numpy()))
        return grad_a, gated

    def _run_gated_mlp(
        self, block: Block, x: torch.Tensor, a: torch.Tensor, total: torch.Tensor, grads: tuple[object, ...]
    ) -> None:
        """Adds the sums of the kernel to ``total`` (G, C, D)."""
        wide, rows, encoder_v = _whole(x), _rows(a), self._weights.encoder_v[block.head]
        y, has_y = _NOTHING, self._firing > DENSE_Y * wide.shape[0] * len(rows)
        if has_y:
            y = self._memory("y", block, a)
            torch.mm(encoder_v, rows.t(), out=y[:, : len(rows)])
        partial_sums = self._sums("sums", a)
        # Not ``.numpy()`` for weights: it fixes the size of their storage, which FSDP empties between forward passes.
        weights = np.from_dlpack(encoder_v), np.from_dlpack(self._weights.decoder[block.neurons])
        x_y_a = wide.numpy(), y.numpy(), has_y, rows.numpy()
        keys = _keys(block, wide)
        run_by_threads(self._parts, kernels.gated_mlp, *x_y_a, *weights, *grads, partial_sums.numpy(), *keys)
        _add(total, partial_sums)

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
        wide, grad_q = _whole(x), grad_q.permute(1, 0, 2).contiguous()
        values, weights = _rows(v), self._weights.encoder[block.neurons]
        grad_weights = self._gradients.encoder[block.neurons]
        grads = wide.numpy(), grad_q.numpy(), gated.numpy()
        if self._firing > DENSE_GRADIENT * x.numel():
            run_by_threads(self._parts, kernels.turn_back, self._parts, *grads, *_turns(block))
            grad_x = gated[:, : len(values)]
            grad_weights.addmm_(grad_x, values)
            grad_v += (grad_x.t() @ weights).view(grad_v.shape)
            return
        partial_sums = self._sums("sums", v)
        of_weights = np.from_dlpack(weights), grad_weights.numpy()
        run_by_threads(
            self._parts,
            kernels.fire_backward,
            *grads,
            *_turns(block),
            values.numpy(),
            *of_weights,
            partial_sums.numpy(),
        )
        _add(grad_v, partial_sums)

    def _rotate(
        self, turns: tuple[object, ...], x: torch.Tensor, q: torch.Tensor, first_pair: int, *, cut: bool
    ) -> None:
        """Computes q = rope(x) for some neurons, and counts those that fire.

        Args:
            turns: the result of :func:`_turns`.
            x: the activations of the neurons.
            q: where to write the result.
            first_pair: the index of the first pair of these neurons in the head.
            cut: whether to set negative x to 0.
        """
        counts = np.empty(self._parts, np.int64)
        run_by_threads(self._parts, kernels.rotate, x.numpy(), q.numpy(), *turns, first_pair, cut, counts)
        self._firing += int(counts.sum())

    def _memory(self, name: str, block: Block, like: torch.Tensor, *, fresh: bool = False) -> torch.Tensor:
        """Returns memory (N, M or more) that is reused. Columns beyond the tokens of ``like`` (G, C, D) are 0."""
        N, columns = block.neurons.stop - block.neurons.start, like.shape[0] * like.shape[1]
        M = _whole_lanes(columns)
        if M % _ALIASED == 0:
            M += LANES
        wide = None if fresh else self._wide.get(name)
        if wide is None or wide.shape != (N, M):
            wide = torch.empty(N, M, dtype=torch.float32, device="cpu")
            if not fresh:
                self._wide[name] = wide
        wide[:, columns:] = 0
        return wide

    def _sums(self, name: str, like: torch.Tensor) -> torch.Tensor:
        shape = (self._parts, _whole_lanes(like.shape[0] * like.shape[1]), like.shape[-1])
        partial_sums = self._wide.get(name)
        if partial_sums is None or partial_sums.shape != shape:
            partial_sums = self._wide[name] = torch.empty(shape, dtype=torch.float32, device="cpu")
        return partial_sums


def _fired(x: torch.Tensor, q: torch.Tensor, G: int, C: int) -> Fired:
    return Fired(x[:, : G * C].unflatten(1, (G, C)), q[:, : G * C].unflatten(1, (G, C)))


def _keys(block: Block, x: torch.Tensor) -> tuple[object, ...]:
    """Returns what dropout needs: the keys of neurons and of tokens, the threshold, and the scale."""
    N, M = x.shape
    dropout = block.dropout
    if dropout is None:
        return np.zeros(N, np.int64), np.zeros(M, np.int32), 0, np.float32(1)
    keys = torch.zeros(M, dtype=torch.int64, device="cpu")
    keys[: dropout.token_keys.numel()] = dropout.token_keys.flatten()
    return dropout.neuron_keys.numpy(), keys.to(torch.int32).numpy(), dropout.threshold, np.float32(dropout.scale)


def _whole_lanes(columns: int) -> int:
    return -(-columns // LANES) * LANES


def _whole(x: torch.Tensor) -> torch.Tensor:
    """Returns (N, G, C) together with what lies between its rows: (N, M)."""
    return x.as_strided((x.shape[0], x.stride(0)), (x.stride(0), 1))


def _rows(values: torch.Tensor) -> torch.Tensor:
    """Returns (G, C, D) as (G * C, D), contiguous in memory for the kernels."""
    return values.reshape(-1, values.shape[-1]).contiguous()


def _turns(block: Block) -> tuple[object, ...]:
    """Returns the rotation tables, and the places of the block's tokens in them."""
    rotation = block.rotation
    starts, places = rotation.runs(block.sequences, block.tokens)
    return rotation.cos.numpy(), rotation.sin.numpy(), starts.numpy(), places.numpy()


def _add(total: torch.Tensor, partial_sums: torch.Tensor) -> None:
    G, C, D = total.shape
    for part in partial_sums:
        total += part[: G * C].view(G, C, D)
