"""Advances the states of sequences, several at once: by one token where a text is continued, by many where a prompt is read."""

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
"""The strongest neurons that may be asked for, of each layer step."""
MAX_TOKENS: dict[BackendName, int] = {"cpu": 128, "eager": 512}
"""Tokens in one call of a backend: what it works in grows with it, and the gain has ended before."""
LONG_CALL = 1 << 30
"""Tokens by neurons by width from which each layer step is a call of the kernels, so that progress is seen every few tens of
milliseconds."""


@dataclass
class LayerActivity:
    """Which neurons fired while a token was read, in one layer step."""

    fired: float
    """The share of all neurons that fired."""
    neurons: list[int]
    """The strongest of those that did, from 0 to H*N - 1, head by head; the strongest first."""
    values: list[float]
    """Their activations x."""

    @classmethod
    def of(cls, x: np.ndarray, num_strongest: int) -> "LayerActivity":
        """Of a token's activations x (H*N,)."""
        num_fired = int(np.count_nonzero(x > 0))
        num_others = len(x) - min(num_strongest, num_fired)
        strongest = np.argpartition(x, min(num_others, len(x) - 1))[num_others:]
        strongest = strongest[np.lexsort((strongest, -x[strongest]))]
        return cls(num_fired / len(x), strongest.tolist(), [float(value) for value in x[strongest]])


class Residuals:
    """Sums up v after the last layer step over the tokens of one sequence, while they are read: in float64, one token after the
    other, for the same bits however the tokens are cut."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self.last: np.ndarray | None = None
        """v of the last token, float32 (D,)."""
        self._sum: np.ndarray | None = None

    def add(self, v: torch.Tensor | np.ndarray) -> None:
        """The next tokens, (T, D)."""
        values = v.detach().float().cpu().numpy() if isinstance(v, torch.Tensor) else v
        before = np.zeros_like(values[:1], np.float64) if self._sum is None else self._sum[None]
        self._sum = np.cumsum(np.concatenate([before, values]), axis=0, dtype=np.float64)[-1]
        self.last = np.array(values[-1], np.float32)
        self.num_tokens += len(values)

    @property
    def mean(self) -> np.ndarray:
        """Float32, (D,).

        Raises:
            ValueError: nothing has been read.
        """
        if self._sum is None:
            raise ValueError("no token has been read: there is no mean residual of none")
        return (self._sum / self.num_tokens).astype(np.float32)


@dataclass
class StepInput:
    """Tokens that one sequence reads in a step. After an exception the same one may be given again, unless its state is
    torn: it continues with the tokens that have not been read."""

    state: SynapticState
    """Of one sequence; advanced in place."""
    tokens: Sequence[int]
    """At least one."""
    logits: WantedLogits = "last"
    """Of which tokens the logits of the next one are wanted."""
    record_activations: int | None = None
    """How many of the strongest neurons of each layer step are wanted of the last token; None for no activity."""
    residuals: Residuals | None = None
    """Takes v after the last layer step of all its tokens."""
    activity: list[LayerActivity] | None = None
    """A result: of each layer step, where it was asked for."""
    num_read: int = 0
    """A result: how many of the tokens the state has read."""
    error: Exception | None = None
    """A result: what went wrong with this sequence alone, in a step that others have come through."""
    found: list[torch.Tensor] = field(default_factory=list)
    """Logits (T, V) of the pieces that have been read."""

    @property
    def is_done(self) -> bool:
        return self.num_read == len(self.tokens)

    def record(self, x: np.ndarray) -> None:
        """Notes a layer step, x (H*N,) of the last token."""
        assert self.record_activations is not None
        self.activity = [*(self.activity or ()), LayerActivity.of(x, self.record_activations)]

    def commit(self, count: int, logits: torch.Tensor | None, v: torch.Tensor | np.ndarray) -> None:
        """Its state, whose memory is whole again, has read so many more tokens; ``v`` is (count, D) after the last layer step."""
        if self.residuals is not None:
            self.residuals.add(v)
        self.state.positions.add_(count)
        self.state.num_columns += count
        self.num_read += count
        if logits is not None and len(logits):
            self.found.append(logits)
        self.state.is_torn = False

    def result(self) -> torch.Tensor | None:
        """The logits that are wanted: (V,) of the last token, (T, V) of all of them, or None."""
        if self.logits == "none":
            return None
        return torch.cat(self.found) if self.logits == "all" else self.found[-1][-1]


class _Call:
    """What goes into a call of a backend: the next tokens of some sequences, those of one after those of another."""

    def __init__(self, taken: Sequence[tuple[StepInput, int]]):
        self.taken = taken  # with the number of their tokens
        self.tokens: list[int] = []
        self.positions: list[int] = []
        self.starts = [0]  # where the tokens of each input begin, and the end of the last
        self.wanted: list[range] = []  # the tokens of each input after which it wants logits
        self.recorded: list[tuple[StepInput, int]] = []  # who wants the activity of the last token, and its place
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
    """Advances the states of sequences of one model, by the fastest backend for it and its device.

    With the kernels of :mod:`bdh.ops.cpu` logits and states have the same bits however tokens are given; with torch's
    operations they agree up to rounding, and have the bits of the whole where texts are cut at multiples of ``chunk_size``.

    Args:
        path: one of :data:`bdh.ops.STEP_PATHS`; "auto" takes the kernels where they run.
        weights: the format of the kernels' copies of the weights (:data:`bdh.ops.WeightFormat`); "float32" for the model's
            own, which may be quantized.
        state: "float32"; or half the memory and traffic of the states: "int16", whose logits stay close to those of float32 and
            which takes 64 bytes more for each neuron, or "bfloat16", which drifts from them. None takes what a quantized model recommends where that runs, and else float32.
        window: attend to the last so many tokens only (:mod:`bdh.ops.eager`); None for all of the text.

    Raises:
        ValueError: a value that is none of these, or the kernels, or what only they do, where they do not run.

    Attributes:
        backend: "cpu" or "eager".
        weight_format: of the weights that are read: that of the copies, or the model's own where it is quantized.
        state_format: of the states.
        last_progress: ``time.monotonic()`` when a step last came to an end of some of its work. For other threads, which
            tell by it a long step from one that hangs.
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
            if own not in WEIGHT_FORMATS:  # no value of the setting
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
        self._half_lives: torch.Tensor | None = None  # (H,), for the eager backend
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
        if self._copies != "float32":  # what the model has read by other weights is another state
            self._kind += f", weights {self._copies}"
        self._shapes: Shapes = {"sums": (dtype, (H, N, D))}
        if state == "int16":
            from bdh.ops.cpu.recurrence import code_shapes

            self._shapes = code_shapes(H, N, D)
        if window is not None:
            self._kind, self._shapes = f"window:{window}", ring_shapes(window, H, N, D, model.dtype)
        self._is_reading = False  # whether the last call of the kernels had more than a token of some sequence
        self.last_progress = time.monotonic()

    @property
    def description(self) -> str:
        """Which code runs, and why: a line for people."""
        window = None if self.window is None else f"a window of {counted(self.window, 'token')}"
        if self.backend == "eager":
            weights = "" if self.weight_format == "float32" else f"weights {self.weight_format}, "
            return f"torch on {self.model.device}, {weights}{window or 'dense recurrent steps'} ({self._reason})"
        threads = f"sparse kernels on the cpu, {counted(torch.get_num_threads(), 'thread')}"
        return f"{threads}, weights {self.weight_format}, {window or f'state {self.state_format}'} ({self._reason})"

    @property
    def state_bytes(self) -> int:
        """Bytes of one sequence's state."""
        L = self.model.config.n_layer
        return L * sum(math.prod(shape) * dtype.itemsize for dtype, shape in self._shapes.values())

    @property
    def pattern(self) -> Pattern:
        """That of its states."""
        L = self.model.config.n_layer
        return self._kind, {name: (dtype, (L, *shape)) for name, (dtype, shape) in self._shapes.items()}

    @torch.inference_mode(False)  # a state is kept for later steps, which may come outside of it
    def new_state(self, batch_size: int = 1) -> SynapticState:
        """The state of sequences before their first token; positions are on the CPU, where they are asked for."""
        L, device = self.model.config.n_layer, self.model.device
        return SynapticState.empty(
            self._kind, self._shapes, L, batch_size=batch_size, device=device, positions_device="cpu"
        )

    def mark_progress(self) -> None:
        """Some work of a step has ended: a layer step, a piece of a prompt, a sequence."""
        self.last_progress = time.monotonic()

    def advance(self, inputs: Sequence[StepInput]) -> list[torch.Tensor | None]:
        """Reads the tokens of all inputs, and returns the logits that each wants.

        The sequences do not see each other, and no state may be given twice in one step.

        After an exception each state is as it was, or has read :attr:`StepInput.num_read` tokens, or is marked as torn.

        Returns:
            For each input float32 logits on the CPU: (V,) of its last token, (T, V) of all of them, or None.

        Raises:
            ValueError: no tokens, or ids outside of the vocabulary; all states are left as they were.
            RuntimeError: a state is torn; the others are left as they were.
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
        """Reads all tokens that have not been read, of inputs that :meth:`advance` has checked.

        What can fail comes before the first byte of a state is written. From then until it is committed the state is
        marked as torn, so that after an exception it is known what has moved and what has not.
        """
        run = {"cpu": self._by_cpu, "eager": self._by_eager}[self.backend]
        while unread := [each for each in inputs if not each.is_done and each.error is None]:
            run(self._next_call(unread))

    def advance_isolating_faults(self, inputs: Sequence[StepInput], *, is_first: bool = True) -> None:
        """As :meth:`advance`, but what cannot be read has an error then; all else is read, whatever goes wrong beside it.

        After an exception those whose states are untouched are tried again: together where it has ended others, else in
        halves, until those that cannot be read are alone.
        """
        if not inputs:
            return
        try:
            self.advance(inputs)
        except Exception as error:
            if is_first:  # what follows from it is not worth as much of the log
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
        """Of up to ``MAX_TOKENS`` tokens."""
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
        """Notes a layer step of inputs that want it of the token at the place given with them."""
        self.mark_progress()
        for each, place in recorded:
            try:
                each.record(x_of(place))
            except Exception as error:  # the others are read
                each.error = error

    def _by_cpu(self, call: _Call) -> None:
        """All memory that a call needs is taken before a state is written."""
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
        """Whether a sequence reads the first of a prompt, as far as the states and the call before tell."""
        was_reading, self._is_reading = self._is_reading, any(count > 1 for _, count in call.taken)
        return (self._is_reading and not was_reading) or any(each.state.position == 0 for each, _ in call.taken)

    def _by_eager(self, call: _Call) -> None:
        """Single tokens and pieces of prompts share their products with the weights."""
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
    """States of running sequences, made when they are first needed, and used again; ``capacity`` of them fit."""

    def __init__(self, advancer: Advancer, max_bytes: int):
        self._advancer, self.max_bytes = advancer, max_bytes
        self.capacity = max_bytes // advancer.state_bytes
        self._free: list[SynapticState] = []

    def take(self, *, copy_of: SynapticState | None = None) -> SynapticState:
        """A state, empty or a copy. The engine asks for no more than there is capacity for."""
        state = self._free.pop() if self._free else self._advancer.new_state()
        if copy_of is not None:
            state.copy_(copy_of)
        elif state.position or state.is_torn:
            state.clear()
        return state

    def give_back(self, state: SynapticState) -> None:
        """A state that is needed no more; one whose content is unknown is dropped."""
        if not state.is_torn:
            self._free.append(state)
