"""Rows of tokens through the kernels: the weights as they want them, and the memory to work in."""

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from bdh.ops.cpu import kernels
from bdh.ops.cpu.pieces import new_progress
from bdh.ops.cpu.runtime import Announce, compiled, exclusive, team_for, to_stderr
from bdh.ops.rope import turns_per_token

Storage = Literal["float32", "bfloat16"]
LIKE = {"float32": kernels.FLOAT32, "bfloat16": kernels.BFLOAT16}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Watch = Callable[[int, np.ndarray], None]


def passes_at_once(num_passes: int, watch: Watch | None) -> list[range]:
    """The passes of each call of the kernels: all, unless somebody looks at what is there between two of them."""
    return [range(num_passes)] if watch is None else [range(index, index + 1) for index in range(num_passes)]


@dataclass
class KernelWeights:
    """The weights of a model, neuron by neuron: a row of D numbers for each, contiguous.

    Those that have the dtype and layout already are not copied; of a float32 model that is all but the decoder.
    """

    embed: torch.Tensor  # (V, D), float32
    encoder: torch.Tensor  # (H*N, D)
    encoder_v: list[torch.Tensor]  # H of (N, D)
    decoder: torch.Tensor  # (H*N, D)
    lm_head: torch.Tensor  # (V, D)
    rope_theta: float
    eps: float
    num_passes: int

    @classmethod
    def of(
        cls,
        *,
        embed: torch.Tensor,
        encoder: torch.Tensor,
        encoder_v: Sequence[torch.Tensor],
        decoder: torch.Tensor,
        lm_head: torch.Tensor,
        rope_theta: float,
        eps: float,
        num_passes: int,
        storage: Storage = "float32",
    ) -> "KernelWeights":
        """From weights in the layout of ``nn.Linear``: ``decoder`` is (D, H*N), the others are as above."""

        def stored(weight: torch.Tensor) -> torch.Tensor:
            return weight.detach().to(DTYPES[storage]).contiguous()

        return cls(
            embed=embed.detach().float().contiguous(),
            encoder=stored(encoder),
            encoder_v=[stored(weight) for weight in encoder_v],
            decoder=stored(decoder.detach().t()),
            lm_head=stored(lm_head),
            rope_theta=float(rope_theta),
            eps=eps,
            num_passes=num_passes,
        )

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [self.embed, self.encoder, *self.encoder_v, self.decoder, self.lm_head]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """L, H, N, D."""
        return self.num_passes, len(self.encoder_v), self.encoder_v[0].shape[0], self.encoder.shape[1]


class Recurrence:
    """Reads tokens into states, at the price of the neurons that fire.

    Every row of tokens is computed in the same order of operations, whichever others are beside it; so its logits and
    the state behind it have the same bits however texts are cut into pieces, batched, or spread over threads.
    """

    def __init__(self, weights: KernelWeights, *, announce: Announce = to_stderr):
        self.weights = weights
        _, H, N, _ = weights.shape
        self._like = kernels.FLOAT32 if weights.encoder.dtype == torch.float32 else kernels.BFLOAT16
        self._turns = turns_per_token(N, weights.rope_theta).numpy()
        self._encoder_v = np.array([weight.data_ptr() for weight in weights.encoder_v], np.int64)
        self._embed = np.from_dlpack(weights.embed)  # .numpy() would fix the storage's size, which FSDP changes
        self._num_parts = H * kernels.stretches_of(N)
        self._memory = threading.local()  # of each thread its own, so that two may read at once
        self._announce = announce
        self._is_compiled: set[torch.dtype] = set()

    def read(
        self,
        tokens: np.ndarray,
        positions: np.ndarray,
        starts: np.ndarray,
        states: np.ndarray,
        state_dtype: torch.dtype,
        read_scales: np.ndarray | None = None,
        write_scales: np.ndarray | None = None,
        watch: Watch | None = None,
        before_writing: Callable[[], None] | None = None,
    ) -> np.ndarray:
        """v behind the last pass, (R, D) float32, of R rows; the states are advanced.

        The result is memory of this object: it is good until the next call of this thread.

        Args:
            tokens: int64 (R,).
            positions: int64 (R,), absolute.
            starts: int64 (sequences + 1,): the rows of sequence s are ``starts[s]`` to ``starts[s + 1]``.
            states: int64 (L, sequences): the addresses of its sums in each pass, (H, N, D) contiguous.
            state_dtype: float32 or bfloat16.
            read_scales: float32 (R, H), what the sums count when they are read; None for 1.
            write_scales: float32 (R, H), what the rows count when they are added; None for 1.
            watch: is called behind each pass with its number and x (H*N, R), which is memory of this object. The
                bits of the result do not depend on it.
            before_writing: is called when all memory has been taken, just before the first state is written.
        """
        if state_dtype not in self._is_compiled:
            self._is_compiled.add(state_dtype)
            compiled(lambda: self._warm_up(state_dtype), self._announce)
        _, H, N, D = self.weights.shape
        R = len(tokens)
        like_states = kernels.FLOAT32 if state_dtype == torch.float32 else kernels.BFLOAT16
        a, parts = self._array("a", R, H, D), self._array("parts", self._num_parts, R, D)
        x = self._array("x", H * N, R)
        if read_scales is None or write_scales is None:
            read_scales = write_scales = np.ones((R, H), np.float32)

        def of_passes(some: slice) -> tuple[Any, ...]:
            return like_states, states[some], starts, read_scales, write_scales, x, a, parts

        return self._run(kernels.passes, tokens, positions, x, of_passes, watch, before_writing)

    def _run(
        self,
        passes: Callable[[int, tuple[Any, ...]], None],
        tokens: np.ndarray,
        positions: np.ndarray,
        x: np.ndarray,
        of_passes: Callable[[slice], tuple[Any, ...]],
        watch: Watch | None,
        before_writing: Callable[[], None] | None,
    ) -> np.ndarray:
        """v behind the last pass. Arguments as of :meth:`read`, and:

        Args:
            passes: the kernel.
            x: (H*N, R), its memory.
            of_passes: what it takes after the weights, for some of the passes.
        """
        L, _, N, D = self.weights.shape
        R = len(tokens)
        team = team_for(R)
        v, cos, sin = self._array("v", R, D), self._array("cos", N // 2, R), self._array("sin", N // 2, R)
        text = self._embed, tokens, positions, self._turns, v, cos, sin, self.weights.eps
        weights = self._like, self.weights.encoder.data_ptr(), self._encoder_v, self.weights.decoder.data_ptr()
        progress = new_progress(kernels.STAGES * (1 + L), is_crowded=team.is_crowded)
        if before_writing is not None:
            before_writing()
        for some in passes_at_once(L, watch):
            rest = of_passes(slice(some.start, some.stop))
            with exclusive():
                passes(team.threads, (progress[some.start * kernels.STAGES :], *text, some.start, *weights, *rest))
            if watch is not None:
                watch(some.start, x)
        return v

    def logits(self, v: np.ndarray) -> torch.Tensor:
        """float32 (R, V) of rows of v (R, D)."""
        return self.prepare_logits(range(len(v)))(v)

    def prepare_logits(self, rows: Sequence[int]) -> Callable[[np.ndarray], torch.Tensor]:
        """What computes the logits (len(rows), V) of these rows of a v (R, D), and takes no memory any more."""
        weight = self.weights.lm_head
        index = np.array(rows, np.int64)
        chosen = np.empty((len(index), weight.shape[1]), np.float32)
        out = np.empty((weight.shape[0], len(index)), np.float32)
        logits = torch.empty(len(index), weight.shape[0])

        def run(v: np.ndarray) -> torch.Tensor:
            if len(index):
                np.take(v, index, axis=0, out=chosen, mode="clip")  # other modes take memory
                team = team_for(len(index))
                progress = new_progress(1, is_crowded=team.is_crowded)
                num_threads = min(team.threads, kernels.projected_pieces(weight.shape[0]))
                with exclusive():
                    kernels.products(num_threads, (progress, self._like, weight.data_ptr(), chosen, out, False))
                logits.copy_(torch.from_numpy(out).t())
            return logits

        return run

    def _array(self, name: str, *shape: int) -> np.ndarray:
        """Memory of this shape, with anything in it, kept from call to call."""
        size = math.prod(shape)
        memory = vars(self._memory)
        if name not in memory or memory[name].size < size:
            memory[name] = np.empty(size, np.float32)
        return memory[name][:size].reshape(shape)

    def _warm_up(self, state_dtype: torch.dtype) -> None:
        L, H, N, D = self.weights.shape
        sums = torch.zeros(H, N, D, dtype=state_dtype)
        states = np.full((L, 1), sums.data_ptr(), np.int64)
        one = np.zeros(1, np.int64)
        self.logits(self.read(one, one, np.array([0, 1]), states, state_dtype))
