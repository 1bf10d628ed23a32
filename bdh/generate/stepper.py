"""Feeds tokens to sequences: what the engine, the command line and the benchmarks build on.

A :class:`SequenceState` is all that a model remembers of one sequence; a :class:`Stepper` advances several of them at
once, by one token where a sequence is being continued and by many where a prompt is read.
"""

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from bdh.generate.activity import PassActivity, activity_of
from bdh.generate.residuals import Residuals
from bdh.model.kernels import kernel_obstacle
from bdh.model.modeling import BDHForCausalLM
from bdh.model.state import SynapticState
from bdh.ops.attention import sum_dtype
from bdh.ops.backends import Storage, Work, choose_backend
from bdh.ops.eager import layer_norm
from bdh.ops.rope import rotate, rotation_table
from bdh.validation import Faults

_log = logging.getLogger(__name__)
WantedLogits = Literal["none", "last", "all"]


class SequenceState:
    """What a model remembers of one sequence. Its size is the same at any length of text.

    Attributes:
        kind: what the tensors mean; states of one kind and model can be copied into each other.
        tensors: everything that the state consists of, but for the position, by name.
        position: tokens read so far. Exact.
        is_torn: whether its memory is being written, or was when an exception came. Nobody knows then what the tensors
            hold: such a state is never read, only cleared or overwritten.
    """

    def __init__(self, kind: str, tensors: dict[str, torch.Tensor], position: int = 0):
        self.kind = kind
        self.tensors = tensors
        self.position = position
        self.is_torn = False

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def clone(self) -> "SequenceState":
        """A copy that shares no memory with this one: a fork of the sequence.

        Raises:
            RuntimeError: an exception has left it half-written.
        """
        self.check_whole()
        return SequenceState(self.kind, {name: t.clone() for name, t in self.tensors.items()}, self.position)

    def copy_(self, other: "SequenceState") -> None:
        """Makes this the state of ``other``, in the memory that it has.

        Raises:
            ValueError: ``other`` is of another kind or shape.
            RuntimeError: an exception has left ``other`` half-written.
        """
        other.check_whole()
        if self.pattern != other.pattern:
            raise ValueError(f"a state {other.pattern} cannot become one {self.pattern}")
        self.is_torn = True
        for name, tensor in self.tensors.items():
            tensor.copy_(other.tensors[name])
        self.position = other.position
        self.is_torn = False

    def clear(self) -> None:
        """Forgets everything: the state before the first token."""
        self.is_torn = True
        for tensor in self.tensors.values():
            tensor.zero_()
        self.position = 0
        self.is_torn = False

    def check_whole(self) -> None:
        """
        Raises:
            RuntimeError: an exception has left it half-written.
        """
        if self.is_torn:
            raise RuntimeError("an exception has left the state half-written: it can only be cleared or overwritten")

    @property
    def pattern(self) -> tuple[str, dict[str, tuple[torch.dtype, tuple[int, ...]]]]:
        """Its kind, and the dtypes and shapes of its tensors: equal for states that can be copied into each other."""
        return self.kind, {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in self.tensors.items()}


@dataclass
class Feed:
    """Tokens that one sequence reads in a step. After an exception the same one may be given again, unless its state is
    torn: it goes on with the tokens that have not been read."""

    state: SequenceState
    """Advanced in place."""
    tokens: Sequence[int]
    """At least one."""
    logits: WantedLogits = "last"
    """Of which tokens the logits of the next one are wanted."""
    watch: int | None = None
    """How many of the strongest neurons of each pass are wanted of the last token; None for no activity."""
    residuals: Residuals | None = None
    """Takes v after the last layer step of all its tokens."""
    activity: list[PassActivity] | None = None
    """A result: of each pass, where it was watched and this stepper could."""
    num_read: int = 0
    """A result: how many of the tokens the state has read."""
    error: Exception | None = None
    """A result: what went wrong with this sequence alone, in a step that others have come through."""
    found: list[torch.Tensor] = field(default_factory=list)
    """Logits (T, V) of the pieces that have been read."""

    @property
    def is_done(self) -> bool:
        return self.num_read == len(self.tokens)

    def is_last(self, count: int) -> bool:
        """Whether the next ``count`` tokens are the last ones."""
        return self.num_read + count == len(self.tokens)

    def num_wanted(self, count: int) -> int:
        """Of how many of the next ``count`` tokens, the last ones of them, logits are wanted."""
        return {"all": count, "last": int(self.is_last(count)), "none": 0}[self.logits]

    def commit(
        self, count: int, logits: torch.Tensor | None = None, v: torch.Tensor | np.ndarray | None = None
    ) -> None:
        """Its state, whose memory is whole again, has read so many more tokens.

        Args:
            logits: those that are wanted.
            v: (count, D) after the last layer step.
        """
        if self.residuals is not None and v is not None:
            self.residuals.add(v)
        self.state.position += count
        self.num_read += count
        if logits is not None:
            self.found.append(logits)
        self.state.is_torn = False

    def result(self) -> torch.Tensor | None:
        """The logits that are wanted: (V,) of the last token, (T, V) of all of them, or None."""
        if self.logits == "none":
            return None
        return torch.cat(self.found) if self.logits == "all" else self.found[-1][-1]

    def look(self, x: np.ndarray) -> None:
        """Takes down a pass from x (H*N,) of the last token."""
        if self.watch is not None:
            self.activity = [*(self.activity or ()), activity_of(x, self.watch)]


class Stepper(ABC):
    """Advances the states of sequences of one model.

    Attributes:
        last_progress: ``time.monotonic()`` when a step last came to an end of a part of its work. For other threads, which
            tell by it a long step from one that hangs.
    """

    def __init__(self, model: BDHForCausalLM):
        self.model = model
        self.last_progress = time.monotonic()

    def mark_progress(self) -> None:
        """A part of a step has ended: a layer step, a piece of a prompt, a sequence."""
        self.last_progress = time.monotonic()

    @property
    @abstractmethod
    def path(self) -> str:
        """Which code runs, and why: a line for people."""

    @abstractmethod
    def new_state(self) -> SequenceState:
        """The state of a sequence before its first token."""

    @property
    @abstractmethod
    def state_bytes(self) -> int:
        """Bytes of one sequence's state."""

    @cached_property
    def pattern(self) -> tuple[str, dict[str, tuple[torch.dtype, tuple[int, ...]]]]:
        """That of its states."""
        return self.new_state().pattern

    @abstractmethod
    def _step(self, feeds: Sequence[Feed]) -> None:
        """Reads all tokens that have not been read.

        What can fail comes before the first byte of a state is written. From then until :meth:`Feed.commit` the state
        is marked as torn, so that what moved, and what did not, can be told from each other after an exception.
        """

    def step(self, feeds: Sequence[Feed]) -> list[torch.Tensor | None]:
        """Reads the tokens of all feeds, and returns the logits that each wants.

        The sequences do not see each other, and no state may be fed twice in one step.

        After an exception each state is as it was, or has read :attr:`Feed.num_read` tokens, or is marked as torn.

        Returns:
            For each feed float32 logits on the CPU: (V,) of its last token, (T, V) of all of them, or None.

        Raises:
            ValueError: no tokens, or ids outside of the vocabulary; all states are left as they were.
            RuntimeError: a state is torn; the others are left as they were.
        """
        V = self.model.config.vocab_size
        for feed in feeds:
            if not len(feed.tokens):
                raise ValueError("a sequence was fed no tokens: it needs at least one in a step")
            lowest, highest = min(feed.tokens), max(feed.tokens)
            if lowest < 0 or highest >= V:
                wrong = lowest if lowest < 0 else highest
                raise ValueError(f"token id {wrong} is not in the vocabulary: must be within 0 to {V - 1}")
            feed.state.check_whole()
        unread = [feed for feed in feeds if not feed.is_done]
        for feed in unread:
            feed.activity = feed.error = None
        with torch.no_grad():
            self._step(unread)
        for feed in feeds:
            if feed.error is not None:
                raise feed.error
        return [feed.result() for feed in feeds]

    def step_all_that_can_be(self, feeds: Sequence[Feed], *, is_first: bool = True) -> None:
        """As :meth:`step`, but what cannot be read has an error then; all else is read, whatever goes wrong beside it.

        After an exception those whose states are untouched are fed again: together where it has ended others, else in
        halves, until those that cannot be read are alone.
        """
        if not feeds:
            return
        try:
            self.step(feeds)
        except Exception as error:
            if is_first:  # what follows from it is not worth as much of the log
                _log.exception("a step of %d sequences has failed", len(feeds))
            for feed in feeds:
                if feed.state.is_torn and feed.error is None:
                    feed.error = error
            unread = [feed for feed in feeds if feed.error is None and not feed.is_done]
            if unread and len(feeds) == 1:
                feeds[0].error = error
                return
            cut = len(unread) if len(unread) < len(feeds) else len(unread) // 2
            self.step_all_that_can_be(unread[:cut], is_first=False)
            self.step_all_that_can_be(unread[cut:], is_first=False)


class TorchStepper(Stepper):
    """The forms of :mod:`bdh.ops.attention`: on every device and in every precision.

    Prompts go in chunks that start at absolute multiples of the configuration's ``chunk_size``, so that pieces which
    end at such multiples give the bits of the whole; at other places they agree up to rounding. Single tokens
    of several sequences share their matrix products. Activity is there for single tokens only.
    """

    def __init__(self, model: BDHForCausalLM, reason: str = "asked for"):
        super().__init__(model.eval())
        self._reason = reason
        config = model.config
        self._shape = (config.n_layer, config.n_head, config.neurons_per_head, config.n_embd)
        half_lives = config.half_lives
        self._kept = None  # (H, 1, 1): what a head keeps of its state at a token
        if half_lives is not None:
            lives = torch.tensor(half_lives, dtype=sum_dtype(model.dtype), device=model.device)
            self._kept = torch.exp2(-1 / lives)[:, None, None]

    @property
    def path(self) -> str:
        return f"torch on {self.model.device}, dense recurrent steps ({self._reason})"

    def new_state(self) -> SequenceState:
        sums = torch.zeros(self._shape, dtype=sum_dtype(self.model.dtype), device=self.model.device)
        return SequenceState("sums", {"sums": sums})

    @property
    def state_bytes(self) -> int:
        return torch.Size(self._shape).numel() * sum_dtype(self.model.dtype).itemsize

    def _step(self, feeds: Sequence[Feed]) -> None:
        if single := [feed for feed in feeds if len(feed.tokens) == 1]:
            self._continue(single)
        for feed in feeds:
            if len(feed.tokens) > 1:
                self._read(feed)

    def _continue(self, feeds: Sequence[Feed]) -> None:
        """One token for each sequence."""
        model, config = self.model, self.model.config
        H, N, eps = config.n_head, config.neurons_per_head, config.layer_norm_eps
        dtype = model.embed.weight.dtype
        tokens = torch.tensor([feed.tokens[0] for feed in feeds], device=model.device)
        positions = torch.tensor([feed.state.position for feed in feeds], device=model.device)
        table = rotation_table(positions, N, config.rope_theta, dtype)[:, None]  # (B, 1, N/2)
        v = layer_norm(model.embed(tokens), eps)  # (B, D)
        added = []  # to the sums of each pass, once nothing can fail any more: keys (B, H, N) and values (B, D)
        for index in range(config.n_layer):
            self.mark_progress()
            v_in = v.to(dtype)
            x = F.relu(model.encoder(v_in))  # (B, H*N)
            for feed, row in zip(feeds, x, strict=True):
                if feed.watch is not None:
                    feed.look(row.float().cpu().numpy())
            q = rotate(x.unflatten(-1, (H, N)), table).to(sum_dtype(dtype))  # (B, H, N)
            sums = [feed.state.tensors["sums"][index] for feed in feeds]
            a = torch.stack([torch.bmm(q[b, :, None], of_feed)[:, 0] for b, of_feed in enumerate(sums)])
            added.append((q, v_in.to(q.dtype)))
            a = layer_norm(a, eps).to(dtype)  # (B, H, D)
            y = F.relu(torch.cat([head(a[:, h]) for h, head in enumerate(model.encoder_v)], dim=-1))
            v = layer_norm(v + layer_norm(model.decoder(x * y), eps), eps)
        logits = model.lm_head(v.to(dtype)).float().cpu()  # (B, V)
        for b, feed in enumerate(feeds):
            feed.state.is_torn = True
            for sums, (q, values) in zip(feed.state.tensors["sums"], added, strict=True):
                if self._kept is not None:
                    sums.mul_(self._kept)
                sums.baddbmm_(q[b, :, :, None], values[b].expand(H, 1, -1))
            feed.commit(1, None if feed.logits == "none" else logits[b : b + 1], v[b : b + 1])

    def _read(self, feed: Feed) -> None:
        """Many tokens of one sequence."""
        config = self.model.config
        sums = feed.state.tensors["sums"]
        tokens = torch.tensor([list(feed.tokens[feed.num_read :])], device=self.model.device)
        while tokens.shape[1]:
            self.mark_progress()
            size = config.chunk_size - feed.state.position % config.chunk_size
            chunk, tokens = tokens[:, :size], tokens[:, size:]
            positions = torch.tensor([feed.state.position], device=self.model.device)
            state = SynapticState([s[None] for s in sums], positions, feed.state.position)
            output = self.model(
                chunk,
                past_key_values=state,
                logits_to_keep=0 if feed.logits == "all" else 1,
                attention_form="parallel",  # which makes new sums, where the recurrent form writes into these
                output_hidden_states=feed.residuals is not None,
            )
            logits = output.logits[0].float().cpu() if feed.num_wanted(chunk.shape[1]) else None
            feed.state.is_torn = True
            for kept, new in zip(sums, state.sums, strict=True):
                kept.copy_(new[0])
            feed.commit(chunk.shape[1], logits, None if output.hidden_states is None else output.hidden_states[-1][0])


def make_stepper(
    model: BDHForCausalLM,
    *,
    path: str = "auto",
    weights: Storage = "float32",
    state: Storage = "float32",
    window: int | None = None,
) -> Stepper:
    """The fastest stepper for a model and its device.

    Args:
        path: one of :data:`bdh.ops.backends.STEP_PATHS`; "auto" takes the sparse kernels where they run.
        weights: "float32", or "bfloat16": half the memory and traffic of the kernels' weights.
        state: "float32", or "bfloat16": half the memory and traffic of the states.
        window: attend to the last so many tokens only (:mod:`bdh.ops.window`); None for all of the text.

    Raises:
        ValueError: a value that is none of these, or the kernels, or what only they do, where they do not run.
    """
    faults = Faults()
    for name, value in (("weights", weights), ("state", state)):
        faults.require_one_of(name, value, ("float32", "bfloat16"))
    if window is not None:
        is_length = isinstance(window, int) and not isinstance(window, bool) and window >= 1
        faults.require(is_length, "window", window, "a whole number of tokens, at least 1, or None")
        faults.require(state == "float32", "state", state, "float32 with a window")
    faults.raise_if_any()
    chosen = choose_backend("advance", path, Work(model.device, obstacle=kernel_obstacle(model)))
    if chosen.backend.name == "cpu" and window is not None:
        from bdh.generate.kernel_window import WindowKernelStepper

        return WindowKernelStepper(model, window, weights=weights, reason=chosen.reason)
    if chosen.backend.name == "cpu":
        from bdh.generate.kernel_stepper import KernelStepper

        return KernelStepper(model, weights=weights, state=state, reason=chosen.reason)
    for name, value in (("weights", weights), ("state", state)):
        faults.require(value == "float32", name, value, f"float32 with torch's operations ({chosen.reason})")
    faults.raise_if_any()
    if window is not None:
        from bdh.generate.window import WindowTorchStepper

        return WindowTorchStepper(model, window, chosen.reason)
    return TorchStepper(model, chosen.reason)
