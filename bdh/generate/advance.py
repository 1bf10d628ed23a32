"""Advances the states of several sequences at once, by single tokens of continuations and by chunks of prompts."""

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch

from bdh.model.network import ModelParts
from bdh.model.quantization import recommended_state
from bdh.model.state import Pattern, Shapes, SynapticState
from bdh.model.weights import kernel_obstacle, layer_functions, quantized_format, recurrence_of
from bdh.ops import STATE_FORMATS, WEIGHT_FORMATS, StateFormat, WeightFormat, eager
from bdh.ops.attention import rotation_table, sum_dtype
from bdh.ops.backends import STATE_DTYPES, BackendName, Work, choose_backend
from bdh.ops.eager import ring_shapes
from bdh.validation import Faults
from bdh.words import counted

_logger = logging.getLogger(__name__)
WantedLogits = Literal["none", "last", "all"]
MOST_NEURONS = 64
"""The most neurons that can be requested for each layer step."""
MAX_TOKENS: dict[BackendName, int] = {"cpu": 128, "eager": 512}
"""The most tokens in one call of a backend. More would take more working memory and run no faster."""
LONG_CALL = 1 << 30
"""If the product of tokens, neurons and width is at least this, each layer step is a separate kernel call, so that
progress is reported every few tens of milliseconds."""


@dataclass
class LayerActivity:
    """The neurons that fired in one layer step while a token was read."""

    fired: float
    """The fraction of all neurons that fired."""
    neurons: list[int]
    """The indices of those with the largest activations, in descending order, from 0 to H*N - 1 head by head."""
    values: list[float]
    """The activations x of these neurons."""

    @classmethod
    def of(cls, x: np.ndarray, num_strongest: int) -> "LayerActivity":
        """Returns the activity for a token's activations x (H*N,)."""
        num_fired = int(np.count_nonzero(x > 0))
        num_others = len(x) - min(num_strongest, num_fired)
        strongest = np.argpartition(x, min(num_others, len(x) - 1))[num_others:]
        strongest = strongest[np.lexsort((strongest, -x[strongest]))]
        return cls(num_fired / len(x), strongest.tolist(), [float(value) for value in x[strongest]])


class Residuals:
    """Accumulates v after the last layer step over the tokens of one sequence while they are read.

    The sum is in float64 and token by token, so that it has the same bits however the tokens are split into calls.
    """

    def __init__(self) -> None:
        self.num_tokens = 0
        self.last: np.ndarray | None = None
        """v of the last token, float32 (D,); None before the first token."""
        self._sum: np.ndarray | None = None

    def add(self, v: torch.Tensor | np.ndarray) -> None:
        """Adds v of the next tokens, (T, D)."""
        values = v.detach().float().cpu().numpy() if isinstance(v, torch.Tensor) else v
        before = np.zeros_like(values[:1], np.float64) if self._sum is None else self._sum[None]
        self._sum = np.cumsum(np.concatenate([before, values]), axis=0, dtype=np.float64)[-1]
        self.last = np.array(values[-1], np.float32)
        self.num_tokens += len(values)

    @property
    def mean(self) -> np.ndarray:
        """Returns the mean over all tokens, float32 (D,).

        Raises:
            ValueError: no token has been read.
        """
        if self._sum is None:
            raise ValueError("no token has been read yet: the mean residual is undefined")
        return (self._sum / self.num_tokens).astype(np.float32)


@dataclass
class StepInput:
    """The tokens that one sequence reads in a step, what to return for them, and the results.

    After an exception, the same object can be passed again, unless its state is torn. It then continues with the unread
    tokens.
    """

    state: SynapticState
    """The state of one sequence, which is advanced in place."""
    tokens: Sequence[int]
    """At least one token id."""
    logits: WantedLogits = "last"
    """The tokens for which next-token logits are returned."""
    record_activations: int | None = None
    """The number of strongest neurons in each layer step to report for the last token; None to record nothing."""
    residuals: Residuals | None = None
    """Collects v after the last layer step for all tokens."""
    activity: list[LayerActivity] | None = None
    """Result: the activity in each layer step, if requested."""
    num_read: int = 0
    """Result: the number of tokens that the state has read."""
    error: Exception | None = None
    """Result: the exception of this sequence, if it failed alone in a step of several sequences."""
    found: list[torch.Tensor] = field(default_factory=list)
    """The logits (T, V) of the chunks that have been read."""

    @property
    def is_done(self) -> bool:
        return self.num_read == len(self.tokens)

    def record(self, x: np.ndarray) -> None:
        """Records the activations x (H*N,) of the last token in a layer step."""
        assert self.record_activations is not None
        self.activity = [*(self.activity or ()), LayerActivity.of(x, self.record_activations)]

    def commit(self, count: int, logits: torch.Tensor | None, v: torch.Tensor | np.ndarray) -> None:
        """Marks ``count`` more tokens as read and the state as whole; ``v`` is (count, D) after the last layer step."""
        if self.residuals is not None:
            self.residuals.add(v)
        self.state.positions.add_(count)
        self.state.num_columns += count
        self.num_read += count
        if logits is not None and len(logits):
            self.found.append(logits)
        self.state.is_torn = False

    def result(self) -> torch.Tensor | None:
        """Returns the requested logits: (V,) for the last token, (T, V) for all tokens, or None."""
        if self.logits == "none":
            return None
        return torch.cat(self.found) if self.logits == "all" else self.found[-1][-1]


class _Call:
    """The input of one call of a backend: the next tokens of some sequences, concatenated."""

    def __init__(self, taken: Sequence[tuple[StepInput, int]]):
        self.taken = taken  # the inputs, each with its number of tokens in this call
        self.tokens: list[int] = []
        self.positions: list[int] = []
        self.starts = [0]  # the index of each input's first token, and the end of the last input
        self.wanted: list[range] = []  # for each input, the tokens whose logits it requests
        self.recorded: list[tuple[StepInput, int]] = []  # the inputs that record activity, with the token's index
        for each, count in taken:
            first, position, end = each.num_read, each.state.position, self.starts[-1] + count
            self.tokens += each.tokens[first : first + count]
            self.positions += range(position, position + count)
            self.starts.append(end)
            is_last = first + count == len(each.tokens)
            self.wanted.append(range(end - {"all": count, "last": int(is_last), "none": 0}[each.logits], end))
            if is_last and each.record_activations is not None:
                self.recorded.append((each, end - 1))


class Advancer:
    """Advances states of one model with the fastest backend for the model and its device.

    With the kernels of :mod:`bdh.ops.cpu`, logits and states have the same bits however the tokens are split into
    calls. With PyTorch operations they agree up to rounding, and have the same bits if texts are split at multiples of
    ``chunk_size``.

    Args:
        model: a :class:`bdh.BDHForCausalLM` or :class:`bdh.model.network.Network`.
        path: one of :data:`bdh.ops.STEP_PATHS`; "auto" uses the kernels if they are available.
        weights: the format of the kernels' weights (:data:`bdh.ops.WeightFormat`). Other formats than "float32" are
            copies, rounded when the model is loaded; "float32" uses the model's own weights, which may be quantized.
        state: the format of the states. "int16" and "bfloat16" halve their memory and traffic: "int16" stays close to
            the logits of "float32" and takes 64 bytes more for each neuron, "bfloat16" drifts from them. None uses
            the format that a quantized model recommends if it is available, and otherwise "float32".
        window: attend only to this many last tokens (:mod:`bdh.ops.eager`); None for the whole text.

    Raises:
        ValueError: a value is invalid, or needs the kernels where they are not available.

    Attributes:
        backend: "cpu" or "eager".
        weight_format: the format of the weights that are read: that of the copies, or the model's own if quantized.
        state_format: the format of the states.
        last_progress: the ``time.monotonic()`` at which part of a step last completed. Other threads can tell by it
            whether a step takes long or hangs.
    """

    def __init__(
        self,
        model: ModelParts,
        *,
        path: str = "auto",
        weights: WeightFormat = "float32",
        state: StateFormat | None = None,
        window: int | None = None,
    ):
        faults = Faults()
        faults.require_one_of("weights", weights, WEIGHT_FORMATS)
        faults.require_one_of("state", state, (None, *STATE_FORMATS))
        if window is not None:
            is_length = isinstance(window, int) and not isinstance(window, bool) and window >= 1
            faults.require(is_length, "window", window, "a whole number of tokens, at least 1, or None")
            faults.require(state in (None, "float32"), "state", state, "float32 with a window")
        faults.raise_if_any()
        chosen = choose_backend("advance", path, Work(model.device, model.dtype, kernel_obstacle(model)))
        allowed = f"float32 with torch's operations ({chosen.reason})"
        own = quantized_format(model)
        if own is not None:
            allowed_weights = f"{own}, in which the model's weights are stored, or left out"
            if own not in WEIGHT_FORMATS:  # the setting cannot name this format
                allowed_weights = f"left out: the model's weights are stored in another format, {own}"
            faults.require(weights in ("float32", own), "weights", weights, allowed_weights)
        else:
            faults.require(weights in chosen.backend.weights, "weights", weights, allowed)
        if state is None:
            recommended = recommended_state(model.config)
            state = recommended if window is None and recommended in chosen.backend.states else "float32"
        faults.require(state in chosen.backend.states, "state", state, allowed)
        faults.raise_if_any()
        model.eval()
        self.model, self.window, self.backend = model, window, chosen.backend.name
        self._copies: WeightFormat = "float32" if own is not None else weights
        self.weight_format, self.state_format, self._reason = own or weights, state, chosen.reason
        config = model.config
        self._shape = H, N, D = config.n_head, config.neurons_per_head, config.n_embd
        half_lives = config.half_lives
        self._kernel_settings: dict[str, Any] = {}
        self._half_lives: torch.Tensor | None = None  # (H,), only used by the eager backend
        dtype = sum_dtype(model.dtype) if state == "float32" else STATE_DTYPES[state]
        if self.backend == "cpu":
            from bdh.ops.cpu.recurrence import ScaledSums, ring_fading

            if window is not None:
                self._kernel_settings["fading"] = ring_fading(window, H, half_lives)
            elif half_lives is not None:
                self._kernel_settings["scaled"] = ScaledSums(half_lives)
        elif half_lives is not None:
            self._half_lives = torch.tensor(half_lives, dtype=dtype, device=model.device)
        self._kind = {"float32": "sums", "bfloat16": "sums bfloat16", "int16": "rows int16"}[state]
        if "scaled" in self._kernel_settings:
            self._kind += ", scaled"
        if self._copies != "float32":  # states that were read with different weights are of different kinds
            self._kind += f", weights {self._copies}"
        self._shapes: Shapes = {"sums": (dtype, (H, N, D))}
        if state == "int16":
            from bdh.ops.cpu.recurrence import code_shapes

            self._shapes = code_shapes(H, N, D)
        if window is not None:
            self._kind, self._shapes = f"window:{window}", ring_shapes(window, H, N, D, model.dtype)
        self._is_reading = False  # whether the last call of the kernels had several tokens of one sequence
        self.last_progress = time.monotonic()

    @property
    def description(self) -> str:
        """A readable line about the backend in use and why it was chosen."""
        window = None if self.window is None else f"a window of {counted(self.window, 'token')}"
        if self.backend == "eager":
            weights = "" if self.weight_format == "float32" else f"weights {self.weight_format}, "
            return f"torch on {self.model.device}, {weights}{window or 'dense recurrent steps'} ({self._reason})"
        threads = f"sparse kernels on the cpu, {counted(torch.get_num_threads(), 'thread')}"
        return f"{threads}, weights {self.weight_format}, {window or f'state {self.state_format}'} ({self._reason})"

    @property
    def state_bytes(self) -> int:
        """The size of one sequence's state, in bytes."""
        L = self.model.config.n_layer
        return L * sum(math.prod(shape) * dtype.itemsize for dtype, shape in self._shapes.values())

    @property
    def pattern(self) -> Pattern:
        """The pattern of the states; see :attr:`SynapticState.pattern`."""
        L = self.model.config.n_layer
        return self._kind, {name: (dtype, (L, *shape)) for name, (dtype, shape) in self._shapes.items()}

    @torch.inference_mode(False)  # inference tensors could not be used outside of inference mode
    def new_state(self, batch_size: int = 1) -> SynapticState:
        """Returns the state before the first token. Its positions are on the CPU, where the engine reads them."""
        L, device = self.model.config.n_layer, self.model.device
        return SynapticState.empty(
            self._kind, self._shapes, L, batch_size=batch_size, device=device, positions_device="cpu"
        )

    def mark_progress(self) -> None:
        """Updates :attr:`last_progress`: a layer step, a chunk of a prompt or a sequence has completed."""
        self.last_progress = time.monotonic()

    def advance(self, inputs: Sequence[StepInput]) -> list[torch.Tensor | None]:
        """Reads the tokens of all inputs, and returns the requested logits.

        The sequences are independent of each other. The same state must not be given twice in one call.

        After an exception each state is unchanged, has read :attr:`StepInput.num_read` tokens, or is marked as torn.

        Returns:
            For each input, float32 logits on the CPU: (V,) for the last token, (T, V) for all tokens, or None.

        Raises:
            ValueError: an input has no tokens, or ids are outside the vocabulary. All states are unchanged.
            RuntimeError: a state is torn. The other states are unchanged.
        """
        V = self.model.config.vocab_size
        for each in inputs:
            if not len(each.tokens):
                raise ValueError("a sequence was given no tokens: it needs at least one in a step")
            lowest, highest = min(each.tokens), max(each.tokens)
            if lowest < 0 or highest >= V:
                wrong = lowest if lowest < 0 else highest
                raise ValueError(f"token id {wrong} is not in the vocabulary: must be within 0 to {V - 1}")
            each.state.check_whole()
        for each in inputs:
            if not each.is_done:
                each.activity = each.error = None
        with torch.no_grad():
            self.read_all(inputs)
        for each in inputs:
            if each.error is not None:
                raise each.error
        return [each.result() for each in inputs]

    def read_all(self, inputs: Sequence[StepInput]) -> None:
        """Reads the unread tokens of inputs that :meth:`advance` has checked.

        Everything that can fail is done before the first byte of a state is written. From then until it is committed,
        the state is marked as torn, so that an exception never leaves a state of unknown content unmarked.
        """
        run = {"cpu": self._by_cpu, "eager": self._by_eager}[self.backend]
        while unread := [each for each in inputs if not each.is_done and each.error is None]:
            run(self._next_call(unread))

    def advance_isolating_faults(self, inputs: Sequence[StepInput], *, is_first: bool = True) -> None:
        """Reads the tokens of all inputs as :meth:`advance` does, but sets :attr:`StepInput.error` on inputs that fail.

        After an exception the inputs whose states are untouched are tried again: together if the exception ended
        others, and otherwise in halves, until the failing inputs are isolated.
        """
        if not inputs:
            return
        try:
            self.advance(inputs)
        except Exception as error:
            if is_first:  # the retries would only fill the log with the same error
                _logger.exception("a step of %d sequences has failed", len(inputs))
            for each in inputs:
                if each.state.is_torn and each.error is None:
                    each.error = error
            unread = [each for each in inputs if each.error is None and not each.is_done]
            if unread and len(inputs) == 1:
                inputs[0].error = error
                return
            cut = len(unread) if len(unread) < len(inputs) else len(unread) // 2
            self.advance_isolating_faults(unread[:cut], is_first=False)
            self.advance_isolating_faults(unread[cut:], is_first=False)

    def _next_call(self, unread: Sequence[StepInput]) -> _Call:
        """Returns the next call, of up to ``MAX_TOKENS`` tokens."""
        taken, available = [], MAX_TOKENS[self.backend]
        scaled, chunk_size = self._kernel_settings.get("scaled"), self.model.config.chunk_size
        for each in unread:
            count = min(len(each.tokens) - each.num_read, available)
            if scaled is not None:
                count = min(count, scaled.tokens_left(each.state.position))
            elif self.backend == "eager" and self.window is None and count > 1:
                count = min(count, chunk_size - each.state.position % chunk_size)
            taken.append((each, count))
            available -= count
            if not available:
                break
        return _Call(taken)

    def _record(self, recorded: Sequence[tuple[StepInput, int]], x_of: Callable[[int], np.ndarray]) -> None:
        """Records the activity in a layer step for each input, of the token at the index given with it."""
        self.mark_progress()
        for each, place in recorded:
            try:
                each.record(x_of(place))
            except Exception as error:  # the other inputs are still read
                each.error = error

    def _by_cpu(self, call: _Call) -> None:
        """Computes a call with the CPU kernels. All memory that it needs is allocated before a state is written."""
        from bdh.ops.cpu.recurrence import TokenRows

        starts, recorded = call.starts, call.recorded
        recurrence = recurrence_of(self.model, self._copies, is_prompt=self._begins_prompt(call))
        logits_of = recurrence.prepare_logits([place for places in call.wanted for place in places])

        def before_writing() -> None:
            for each, _ in call.taken:
                each.state.is_torn = True

        is_long = starts[-1] * math.prod(self._shape) >= LONG_CALL
        v = recurrence.advance(
            TokenRows(*(np.array(each, np.int64) for each in (call.tokens, call.positions, starts))),
            [each.state.tensors for each, _ in call.taken],
            **self._kernel_settings,
            on_layer_step=(lambda x: self._record(recorded, lambda place: x[place])) if recorded or is_long else None,
            before_writing=before_writing,
        )
        self.mark_progress()
        of_inputs = [v[first:end] for first, end in pairwise(starts)]
        for (each, count), places, of_input in zip(call.taken, call.wanted, of_inputs, strict=True):
            if not places and each.error is None:
                each.commit(count, None, of_input)
        logits, first = logits_of(v), 0
        for (each, count), places, of_input in zip(call.taken, call.wanted, of_inputs, strict=True):
            if places and each.error is None:
                each.commit(count, logits[first : first + len(places)], of_input)
            first += len(places)

    def _begins_prompt(self, call: _Call) -> bool:
        """Whether a sequence starts to read a prompt, judging by the states and the previous call."""
        was_reading, self._is_reading = self._is_reading, any(count > 1 for _, count in call.taken)
        return (self._is_reading and not was_reading) or any(each.state.position == 0 for each, _ in call.taken)

    def _by_eager(self, call: _Call) -> None:
        """Computes a call with PyTorch. Single tokens and chunks of prompts share the products with the weights."""
        model, config = self.model, self.model.config
        dtype, eps, device = model.dtype, config.layer_norm_eps, model.device
        positions = torch.tensor(call.positions, device=device)
        v, writes = eager.advance(
            eager.layer_norm(model.embed(torch.tensor(call.tokens, device=device)), eps),
            layer_functions(model, dtype),
            rotation_table(positions, config.neurons_per_head, config.rope_theta, dtype),
            [eager.Piece(each.state.tensors, each.state.position, count) for each, count in call.taken],
            num_layer_steps=config.n_layer,
            eps=eps,
            dtype=dtype,
            half_lives=self._half_lives,
            on_layer_step=lambda x: self._record(call.recorded, lambda place: x[place].float().cpu().numpy()),
        )
        logits: Sequence[torch.Tensor | None] = [None] * len(call.taken)
        if places := [place for of_input in call.wanted for place in of_input]:
            logits = model.lm_head(v[places].to(dtype)).float().cpu().split([len(of_input) for of_input in call.wanted])
        of_inputs = v.split([count for _, count in call.taken])
        for (each, count), write, of_logits, of_input in zip(call.taken, writes, logits, of_inputs, strict=True):
            if each.error is None:
                each.state.is_torn = True
                write()
                each.commit(count, of_logits, of_input)


class StatePool:
    """A pool of states, which reuses those of ended sequences. ``capacity`` states fit into ``max_bytes``."""

    def __init__(self, advancer: Advancer, max_bytes: int):
        self._advancer, self.max_bytes = advancer, max_bytes
        self.capacity = max_bytes // advancer.state_bytes
        self._free: list[SynapticState] = []

    def take(self, *, copy_of: SynapticState | None = None) -> SynapticState:
        """Returns an empty state, or a copy of another. The engine never takes more than the capacity."""
        state = self._free.pop() if self._free else self._advancer.new_state()
        if copy_of is not None:
            state.copy_(copy_of)
        elif state.position or state.is_torn:
            state.clear()
        return state

    def give_back(self, state: SynapticState) -> None:
        """Takes back a state that is no longer needed. A torn one is dropped."""
        if not state.is_torn:
            self._free.append(state)
