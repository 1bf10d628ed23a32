"""The CPU's ``advance``: reads the tokens of many sequences with the kernels, and updates the states in place."""

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from bdh.ops import StateFormat, WeightFormat
from bdh.ops.attention import turns_per_token
from bdh.ops.cpu import code_steps, kernels, window
from bdh.ops.cpu.runtime import compiled, run_by_threads, team_for
from bdh.ops.cpu.state_codes import CODE_BYTES, HEAD_BYTES, WINDOW, rounding_table, row_numbers
from bdh.ops.eager import ring_shapes
from bdh.ops.formats import MatrixFormat, Rows, layer_formats

_STATE_FORMATS: dict[torch.dtype, StateFormat] = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
}
OnLayerStep = Callable[[np.ndarray], None]
Tensors = Mapping[str, Sequence[torch.Tensor]]
"""The state of a sequence: by name, a contiguous tensor on the CPU for each layer step. The names are ``sums``, (H, N,
D), or those of :func:`code_shapes`, or those of a :class:`bdh.ops.eager.Ring`. Dimensions of size 1 may precede the
shapes."""

_RESCALED_BITS = 32
_MOST_BITS = 60  # most bits lost per token: float32 has 24, so more makes no difference


@dataclass
class KernelWeights:
    """The weights of a model, with a row for each neuron.

    Weights that already have the format and layout are not copied. In a float32 model, these are all but the decoder.
    """

    embed: torch.Tensor  # (V, D), float32
    encoder: Rows  # H*N
    encoder_v: list[Rows]  # for each head, N rows; all in one format
    decoder: Rows  # H*N
    lm_head: Rows  # V
    rope_theta: float
    eps: float
    num_layer_steps: int

    @classmethod
    def of(
        cls,
        weights: Sequence[torch.Tensor | Rows],
        *,
        rope_theta: float,
        eps: float,
        num_layer_steps: int,
        weight_format: WeightFormat = "float32",
    ) -> "KernelWeights":
        """Converts the weights of a model.

        Args:
            weights: the weights in the order of :attr:`tensors`: either rows, which are used as they are, or matrices
                in the layout of ``nn.Linear``, in which Dec is (D, H*N).
            rope_theta: the base of the rotary frequencies.
            eps: the epsilon of the layer norms.
            num_layer_steps: L.
            weight_format: the format of the rows.

        Raises:
            ValueError: the format is quantized, and a weight is infinite or NaN.
        """
        embed, encoder, *encoder_v, decoder, lm_head = weights
        formats = layer_formats(weight_format)
        if not isinstance(decoder, Rows):
            decoder = decoder.t()
        return cls(
            embed.detach().float().contiguous(),  # type: ignore[union-attr]  # its rows are looked up, not multiplied
            _rows(encoder, formats.encoder, "encoder"),
            [_rows(each, formats.encoder_v, f"encoder_v.{head}") for head, each in enumerate(encoder_v)],
            _rows(decoder, formats.decoder, "decoder"),
            _rows(lm_head, formats.lm_head, "lm_head"),
            float(rope_theta),
            eps,
            num_layer_steps,
        )

    @property
    def tensors(self) -> list[torch.Tensor]:
        matrices = (self.encoder, *self.encoder_v, self.decoder, self.lm_head)
        return [self.embed, *(each.tensor for each in matrices)]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """L, H, N and D."""
        return self.num_layer_steps, len(self.encoder_v), self.encoder_v[0].tensor.shape[0], self.embed.shape[1]


def _rows(weight: torch.Tensor | Rows, format: MatrixFormat, name: str) -> Rows:
    return weight if isinstance(weight, Rows) else Rows.of(weight.detach(), format, name)


class TokenRows(NamedTuple):
    """The tokens that a call reads: those of each sequence in order, one sequence after the other."""

    tokens: np.ndarray
    """int64 (R,), token ids."""
    positions: np.ndarray
    """int64 (R,), absolute positions."""
    starts: np.ndarray
    """int64 (sequences + 1,): the rows of sequence s are ``starts[s]`` to ``starts[s + 1]``."""


class ScaledSums:
    """How the sums of heads with decay are stored.

    All rows of such a head would have to fade at each token. Instead, a single factor for these rows fades. It depends
    only on the position, and what is added to the rows is divided by it. At absolute multiples of the number of tokens
    in which it loses 32 binary digits, the rows are multiplied by it, and it starts again from 1.

    Args:
        half_lives: (H,), the half-life of each head in tokens; inf for a head without decay.
    """

    def __init__(self, half_lives: Sequence[float]):
        self.half_lives = np.maximum(half_lives, 1 / _MOST_BITS)
        # (H,): the tokens between two rescalings. The upper bound, for heads without decay, exceeds any text's length.
        self._period = np.clip(np.floor(self.half_lives * _RESCALED_BITS), 1, 2.0**62).astype(np.int64)

    def tokens_left(self, position: int) -> int:
        """Returns how many tokens may be read at once from a position, until the rows of a head are multiplied."""
        return int((self._period - position % self._period).min())

    def scales(self, position: int, count: int) -> np.ndarray:
        """Returns the factors of the heads (count + 1, H), before each of the next tokens and after the last."""
        first = position % self._period  # (H,): tokens since the rows were last multiplied
        return np.exp2(-(first + np.arange(count + 1)[:, None]) / self.half_lives)

    def rescaled(self, position: int, sums: Sequence[torch.Tensor]) -> list[tuple[torch.Tensor, float]]:
        """Returns the rows of the heads that are multiplied by their factor at a position, with that factor."""
        heads = np.flatnonzero(position % self._period == 0)
        factors = {head: float(2.0 ** -(self._period[head] / self.half_lives[head])) for head in heads}
        return [(each[..., head, :, :], factor) for head, factor in factors.items() for each in sums]


def code_shapes(num_heads: int, neurons_per_head: int, width: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Returns the tensors in a layer step of an int16 state, by name (:mod:`bdh.ops.cpu.code_steps`)."""
    return {
        "rows": (torch.int16, (num_heads, neurons_per_head, row_numbers(width))),
        "values": (torch.float32, (WINDOW, width)),
    }


def ring_fading(window_tokens: int, num_heads: int, half_lives: Sequence[float] | None = None) -> np.ndarray:
    """Returns the weight of a window's token by the number of tokens between it and the reader, float32 (H, W - 1)."""
    lives = np.full(num_heads, np.inf) if half_lives is None else np.asarray(half_lives)
    return np.exp2(-np.arange(window_tokens - 1) / lives[:, None]).astype(np.float32)


class Recurrence:
    """Reads tokens into states, at a cost that depends on the number of neurons that fire.

    Each token is computed in the same order of operations, whatever other tokens a call contains. Its logits and the
    state after it therefore have the same bits, however texts are cut into pieces, batched, or spread over threads.
    """

    def __init__(self, weights: KernelWeights):
        self.weights = weights
        _, H, N, _ = weights.shape
        self._matrices = (  # each preceded by the mark of its format
            *_place(weights.encoder),
            kernels.LIKE[weights.encoder_v[0].format],
            np.array([each.tensor.data_ptr() for each in weights.encoder_v], np.int64),
            *_place(weights.decoder),
        )
        self._turns = turns_per_token(N, weights.rope_theta).numpy()
        self._embed = np.from_dlpack(weights.embed)  # .numpy() would fix the storage's size, which FSDP changes
        self._rounding_table = rounding_table(weights.shape[-1])
        self._head = _place(weights.lm_head)
        self._num_partial_sums = H * kernels.stretches_of(N)
        self._memory = threading.local()  # one per thread, so that several threads can read at the same time
        self._is_compiled: set[Any] = set()

    def advance(
        self,
        rows: TokenRows,
        states: Sequence[Tensors],
        *,
        scaled: ScaledSums | None = None,
        fading: np.ndarray | None = None,
        on_layer_step: OnLayerStep | None = None,
        before_writing: Callable[[], None] | None = None,
    ) -> np.ndarray:
        """Reads tokens, advances the states, and returns v after the last layer step, float32 (R, D).

        The result is work memory of this object, which is valid until the next call of this thread. All memory that is
        needed is allocated before a state is written.

        Args:
            rows: the tokens.
            states: the state of each sequence. All are sums in one format, or all are rings, if ``fading`` is given.
            scaled: how the sums are stored, if heads have decay. The rows of a sequence must end where ``tokens_left``
                of it says, or earlier.
            fading: for rings, the result of :func:`ring_fading`, (H, W - 1).
            on_layer_step: called after each layer step with x (R, H*N), which is work memory of this object. The bits
                of the result do not depend on it.
            before_writing: called just before the first state is written.
        """
        format = "ring" if fading is not None else _format_of(states[0])
        key = format if fading is None else (format, fading.shape[1])
        if key not in self._is_compiled:
            self._is_compiled.add(key)
            kind = {"ring": " in a window", "float32": ""}.get(format, f" with {format} states")
            compiled(f"reading and writing{kind}", lambda: self._warm_up(states[0], fading))
        _, H, N, D = self.weights.shape
        R = len(rows.tokens)
        x, a = self.work_memory("x", H * N, R), self.work_memory("a", H, R, D)
        partial_sums = self.work_memory("partial_sums", self._num_partial_sums, R, D)
        if fading is not None:
            rings = _tables(states, ("keys", "fired", "values"))
            scores = self.work_memory("scores", self._num_partial_sums, R, states[0]["keys"][0].shape[-1])
            if fading.shape[1] == 0:
                a[:] = 0
            return self._run(
                window.window_steps,
                rows,
                x,
                lambda some: (rings[some], fading, rows.starts, x, a, scores, partial_sums),
                on_layer_step,
                before_writing,
            )
        rescaled: list[tuple[torch.Tensor, float]] = []
        if scaled is None:
            read_scales = write_scales = np.ones((R, H), np.float32)
        else:
            starts, counts = rows.positions[rows.starts[:-1]], np.diff(rows.starts)
            scales = [scaled.scales(int(p), int(n)) for p, n in zip(starts, counts, strict=True)]
            read_scales = np.concatenate([each[:-1] for each in scales]).astype(np.float32)
            write_scales = (1 / np.concatenate([each[1:] for each in scales])).astype(np.float32)
            for state, end in zip(states, starts + counts, strict=True):
                rescaled += scaled.rescaled(int(end), _heads(state) if format == "int16" else state["sums"])
        shared = rows.starts, read_scales, write_scales, x, a
        if format == "int16":
            tables = _tables(states, ("rows", "values"))
            table, scores = self._rounding_table, self.work_memory("scores", self._num_partial_sums, R, WINDOW)
            v = self._run(
                code_steps.code_steps,
                rows,
                x,
                lambda some: (tables[some], table, *shared, scores, partial_sums),
                on_layer_step,
                before_writing,
            )
        else:
            like, addresses = kernels.LIKE[format], np.array(_addresses(states, "sums"), np.int64)
            v = self._run(
                kernels.layer_steps,
                rows,
                x,
                lambda some: (like, addresses[some], *shared, partial_sums),
                on_layer_step,
                before_writing,
            )
        for of_head, factor in rescaled:
            of_head.mul_(factor)
        return v

    def _run(
        self,
        kernel: Any,
        rows: TokenRows,
        x: np.ndarray,
        arguments: Callable[[slice], tuple[Any, ...]],
        on_layer_step: OnLayerStep | None,
        before_writing: Callable[[], None] | None,
    ) -> np.ndarray:
        """Runs a kernel, and returns v after the last layer step.

        Args:
            x: (H*N, R), work memory of the kernel.
            arguments: returns the arguments of the kernel after the weights, for some of the layer steps.
        """
        L, _, N, D = self.weights.shape
        R = len(rows.tokens)
        team, v = team_for(R), self.work_memory("v", R, D)
        cos, sin = (self.work_memory(name, N // 2, R) for name in ("cos", "sin"))
        text = self._embed, rows.tokens, rows.positions, self._turns, v, cos, sin, self.weights.eps
        progress = team.new_progress(kernels.STAGES * (1 + L))
        if before_writing is not None:
            before_writing()
        steps_per_call = L if on_layer_step is None else 1
        for first in range(0, L, steps_per_call):
            rest = arguments(slice(first, first + steps_per_call))
            run_by_threads(
                team.threads, kernel, progress[first * kernels.STAGES :], *text, first, *self._matrices, *rest
            )
            if on_layer_step is not None:
                on_layer_step(x.T)
        return v

    def logits(self, v: np.ndarray) -> torch.Tensor:
        """Returns the logits, float32 (R, V), of rows of v (R, D)."""
        return self.prepare_logits(range(len(v)))(v)

    def prepare_logits(self, rows: Sequence[int]) -> Callable[[np.ndarray], torch.Tensor]:
        """Returns a function that computes the logits (len(rows), V) of these rows of v (R, D), in allocated memory."""
        num_words, count = self.weights.lm_head.tensor.shape[0], len(rows)
        index = np.array(rows, np.int64)
        chosen = np.empty((count, self.weights.shape[-1]), np.float32)
        out = np.empty((num_words, count), np.float32)
        logits = torch.from_numpy(out.reshape(1, -1)) if count == 1 else torch.empty(count, num_words)

        def run(v: np.ndarray) -> torch.Tensor:
            if count:
                if count < len(v):
                    v = np.take(v, index, axis=0, out=chosen, mode="clip")  # other modes allocate memory
                team = team_for(count)
                progress = team.new_progress(1)
                num_threads = min(team.threads, kernels.projected_pieces(num_words))
                run_by_threads(num_threads, kernels.products, progress, *self._head, v, out, False)
            if count > 1:
                logits.copy_(torch.from_numpy(out).t())
            return logits

        return run

    def work_memory(self, name: str, *shape: int) -> np.ndarray:
        """Returns uninitialized memory of this shape, which is kept from call to call.

        Memory of torch begins at a cache line. That of numpy does not, which costs a tenth of a prompt's time.
        """
        size = math.prod(shape)
        memory = vars(self._memory)
        if name not in memory or memory[name].size < size:
            memory[name] = torch.empty(size, device="cpu", dtype=torch.float32).numpy()
        return memory[name][:size].reshape(shape)

    def _warm_up(self, state: Tensors, fading: np.ndarray | None) -> None:
        """Reads a token into an empty state of this kind."""
        L, H, N, D = self.weights.shape
        if fading is not None:
            shapes = ring_shapes(fading.shape[1] + 1, H, N, D)
        else:
            shapes = {name: (each[0].dtype, each[0].shape) for name, each in state.items()}
        empty = {name: [torch.zeros(shape, dtype=dtype)] * L for name, (dtype, shape) in shapes.items()}
        one = TokenRows(np.zeros(1, np.int64), np.zeros(1, np.int64), np.array([0, 1]))
        self.logits(self.advance(one, [empty], fading=fading))


def _place(rows: Rows) -> tuple[np.ndarray, int]:
    """Returns what the kernels take of a matrix: the mark of its format, and its address."""
    return kernels.LIKE[rows.format], rows.tensor.data_ptr()


def _format_of(state: Tensors) -> str:
    return "int16" if "rows" in state else _STATE_FORMATS[state["sums"][0].dtype]


def _heads(state: Tensors) -> list[torch.Tensor]:
    """Returns the steps and keys in rows of int16, which fade with the sums that they represent."""
    return [rows[..., : HEAD_BYTES // CODE_BYTES].view(torch.float32) for rows in state["rows"]]


def _tables(states: Sequence[Tensors], names: Sequence[str]) -> np.ndarray:
    """Returns the addresses (L, names, sequences) of the tensors of each layer step."""
    return np.ascontiguousarray(np.array([_addresses(states, name) for name in names], np.int64).transpose(1, 0, 2))


def _addresses(states: Sequence[Tensors], name: str) -> list[list[int]]:
    """Returns the addresses of a tensor in each layer step and sequence."""
    many = [state[name] for state in states]
    return [[tensors[step].data_ptr() for tensors in many] for step in range(len(many[0]))]
