"""Steps through the sparse kernels: the path of the CPU."""

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from bdh.generate.stepper import Feed, SequenceState, Stepper
from bdh.model.kernels import recurrence_of
from bdh.model.modeling import BDHForCausalLM
from bdh.ops.cpu.recurrence import DTYPES, Recurrence, Storage, Watch

MAX_ROWS = 128
"""Tokens in one call of the kernels: what they work in grows with it, and the gain has ended before."""
_LONG_CALL = 1 << 30
"""Rows by neurons by width from which the layer steps are calls of their own, so that each is seen to make progress: one
takes tens of milliseconds then."""
_SETTLING_BITS = 32
_MOST_BITS = 60  # lost at one token: float32 keeps 24, so what is left of what was there has vanished


class KernelStepper(Stepper):
    """The kernels of :mod:`bdh.ops.cpu`: logits and states have the same bits however tokens are fed.

    A head that forgets would have to fade all of its rows at each token. Instead a factor of all its rows fades, which
    follows from the position alone; what is added is divided by it. At absolute multiples of the tokens in which it
    loses 32 binary digits the rows are multiplied by it, and it starts again from 1.
    """

    def __init__(
        self,
        model: BDHForCausalLM,
        *,
        weights: Storage = "float32",
        state: Storage = "float32",
        reason: str = "asked for",
    ):
        super().__init__(model.eval())
        self._weights, self._state, self._reason = weights, state, reason
        self._is_reading = False  # whether the last call of the kernels had more than a token of some sequence
        config = model.config
        self._shape = (config.n_layer, config.n_head, config.neurons_per_head, config.n_embd)
        self._neurons_by_width = math.prod(self._shape[1:])
        self._half_lives: np.ndarray | None = None  # (H,)
        self._settling_tokens: np.ndarray | None = None  # (H,): tokens after which the rows take up their factor
        if config.half_lives is not None:
            self._half_lives = np.maximum(config.half_lives, 1 / _MOST_BITS)
            settling = np.floor(self._half_lives * _SETTLING_BITS)
            # The upper bound is for heads that never forget: no text is as long.
            self._settling_tokens = np.clip(settling, 1, 2.0**62).astype(np.int64)

    @property
    def path(self) -> str:
        return (
            f"sparse kernels on the cpu, {torch.get_num_threads()} threads, weights {self._weights}, "
            f"state {self._state} ({self._reason})"
        )

    @property
    def state_bytes(self) -> int:
        return torch.Size(self._shape).numel() * DTYPES[self._state].itemsize

    def new_state(self) -> SequenceState:
        kind = "sums" if self._state == "float32" else f"sums {self._state}"
        if self._half_lives is not None:
            kind += ", scaled"
        return SequenceState(kind, {"sums": torch.zeros(self._shape, dtype=DTYPES[self._state])})

    def _step(self, feeds: Sequence[Feed]) -> None:
        while unread := [feed for feed in feeds if not feed.is_done and feed.error is None]:
            self._read(self._taken(unread))

    def _taken(self, feeds: Sequence[Feed]) -> list[tuple[Feed, int]]:
        """How many tokens of which feeds go into the next call."""
        taken = []
        room = MAX_ROWS
        for feed in feeds:
            count = min(len(feed.tokens) - feed.num_read, room)
            if self._settling_tokens is not None:
                count = min(count, int((self._settling_tokens - feed.state.position % self._settling_tokens).min()))
            if count:
                taken.append((feed, count))
                room -= count
        return taken

    def _read(self, taken: Sequence[tuple[Feed, int]]) -> None:
        """One call of the kernels. All memory that it takes is taken before a state is written."""
        tokens, positions, starts = [], [], [0]
        wanted: list[range] = []  # the rows of whose v each feed wants the logits
        watched: list[tuple[Feed, int]] = []
        for feed, count in taken:
            first, end = starts[-1], starts[-1] + count
            tokens.append(np.asarray(feed.tokens[feed.num_read : feed.num_read + count], np.int64))
            positions.append(np.arange(feed.state.position, feed.state.position + count))
            starts.append(end)
            wanted.append(range(end - feed.num_wanted(count), end))
            if feed.watch is not None and feed.is_last(count):
                watched.append((feed, end - 1))
        recurrence = self._recurrence(is_prompt=self._begins_prompt(taken))
        logits_of = recurrence.prepare_logits([row for rows in wanted for row in rows])
        settled = [each for feed, count in taken for each in self._settled(feed.state, count)]

        def mark() -> None:
            for feed, _ in taken:
                feed.state.is_torn = True

        def look(index: int, x: np.ndarray) -> None:
            self.mark_progress()
            for feed, row in watched:
                try:
                    feed.look(x[:, row])
                except Exception as error:  # the others go on
                    feed.error = error

        v = self._advance(
            recurrence,
            [feed.state for feed, _ in taken],
            np.concatenate(tokens),
            np.concatenate(positions),
            np.array(starts),
            mark,
            look if watched or starts[-1] * self._neurons_by_width >= _LONG_CALL else None,
        )
        self.mark_progress()
        for rows_of_head, factor in settled:
            rows_of_head.mul_(factor)
        of_feeds = [v[first:end] for first, end in itertools.pairwise(starts)]
        for (feed, count), rows, of_feed in zip(taken, wanted, of_feeds, strict=True):
            if not rows and feed.error is None:
                feed.commit(count, v=of_feed)
        logits, first = logits_of(v), 0
        for (feed, count), rows, of_feed in zip(taken, wanted, of_feeds, strict=True):
            if rows and feed.error is None:
                feed.commit(count, logits[first : first + len(rows)], of_feed)
            first += len(rows)

    def _begins_prompt(self, taken: Sequence[tuple[Feed, int]]) -> bool:
        """Whether a sequence reads the first of a prompt, as far as the states and the call before tell."""
        was_reading, self._is_reading = self._is_reading, any(count > 1 for _, count in taken)
        return (self._is_reading and not was_reading) or any(feed.state.position == 0 for feed, _ in taken)

    def _recurrence(self, *, is_prompt: bool) -> Recurrence:
        return recurrence_of(self.model, self._weights, is_prompt=is_prompt)

    def _advance(
        self,
        recurrence: Recurrence,
        states: Sequence[SequenceState],
        tokens: np.ndarray,
        positions: np.ndarray,
        starts: np.ndarray,
        before_writing: Callable[[], None],
        watch: Watch | None,
    ) -> np.ndarray:
        """v behind the last pass, (R, D), of the rows of these sequences; their tensors are advanced."""
        passes = range(self._shape[0])
        addresses = [[state.tensors["sums"][number].data_ptr() for state in states] for number in passes]
        read_scales = write_scales = None
        if self._half_lives is not None:
            scales = [self._scales(s.position, n) for s, n in zip(states, np.diff(starts), strict=True)]
            read_scales = np.concatenate([each[:-1] for each in scales]).astype(np.float32)
            write_scales = (1 / np.concatenate([each[1:] for each in scales])).astype(np.float32)
        return recurrence.read(
            tokens,
            positions,
            starts,
            np.array(addresses, np.int64),
            DTYPES[self._state],
            read_scales,
            write_scales,
            watch,
            before_writing,
        )

    def _scales(self, position: int, count: int) -> np.ndarray:
        """The factors of the rows (count + 1, H) before each of the next tokens, and behind the last."""
        assert self._half_lives is not None
        assert self._settling_tokens is not None
        first = position % self._settling_tokens  # (H,): tokens since the rows took theirs up
        return np.exp2(-(first + np.arange(count + 1)[:, None]) / self._half_lives)

    def _settled(self, state: SequenceState, count: int) -> list[tuple[torch.Tensor, float]]:
        """The rows of heads that take up their factor behind so many tokens, and that factor."""
        if self._half_lives is None or self._settling_tokens is None:
            return []
        tokens, lives = self._settling_tokens, self._half_lives
        heads = np.flatnonzero((state.position + count) % tokens == 0)
        return [(state.tensors["sums"][:, head], float(2.0 ** -(tokens[head] / lives[head]))) for head in heads]
