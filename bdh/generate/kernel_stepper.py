"""Steps through the sparse kernels: the path of the CPU."""

from collections.abc import Sequence

import numpy as np
import torch

from bdh.generate.stepper import Feed, SequenceState, Stepper
from bdh.model.kernels import recurrence_of
from bdh.model.modeling import BDHForCausalLM
from bdh.ops.cpu.recurrence import DTYPES, Recurrence, Storage, Watch

MAX_ROWS = 128
"""Tokens in one call of the kernels: what they work in grows with it, and the gain has ended before."""
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

    def _step(self, feeds: Sequence[Feed]) -> list[torch.Tensor | None]:
        read = [0] * len(feeds)  # tokens of each feed
        found: list[list[torch.Tensor]] = [[] for _ in feeds]
        while any(done < len(feed.tokens) for done, feed in zip(read, feeds, strict=True)):
            taken = self._taken(feeds, read)
            self._read(feeds, read, taken, found)
            for index, count in taken.items():
                read[index] += count
        return [self._result(feed, parts) for feed, parts in zip(feeds, found, strict=True)]

    @staticmethod
    def _result(feed: Feed, parts: list[torch.Tensor]) -> torch.Tensor | None:
        if feed.logits == "none":
            return None
        return torch.cat(parts) if feed.logits == "all" else parts[-1][-1]

    def _taken(self, feeds: Sequence[Feed], read: Sequence[int]) -> dict[int, int]:
        """How many tokens of which feeds go into the next call."""
        taken: dict[int, int] = {}
        room = MAX_ROWS
        for index, feed in enumerate(feeds):
            count = min(len(feed.tokens) - read[index], room)
            if self._settling_tokens is not None:
                count = min(count, int((self._settling_tokens - feed.state.position % self._settling_tokens).min()))
            if count:
                taken[index] = count
                room -= count
        return taken

    def _read(
        self, feeds: Sequence[Feed], read: Sequence[int], taken: dict[int, int], found: list[list[torch.Tensor]]
    ) -> None:
        tokens, positions, starts, wanted = [], [], [0], []
        for index, count in taken.items():
            feed = feeds[index]
            tokens.append(np.asarray(feed.tokens[read[index] : read[index] + count], np.int64))
            positions.append(np.arange(feed.state.position, feed.state.position + count))
            starts.append(starts[-1] + count)
            if feed.logits == "all":
                wanted += [(index, row) for row in range(starts[-2], starts[-1])]
            elif feed.logits == "last" and read[index] + count == len(feed.tokens):
                wanted.append((index, starts[-1] - 1))
        states = [feeds[index].state for index in taken]
        recurrence = self._recurrence(is_prompt=self._begins_prompt(states, max(taken.values())))
        watched = [
            (feeds[index], end - 1)
            for (index, count), end in zip(taken.items(), starts[1:], strict=True)
            if feeds[index].watch is not None and read[index] + count == len(feeds[index].tokens)
        ]

        def look(index: int, x: np.ndarray) -> None:
            for feed, row in watched:
                feed.look(x[:, row])

        v = self._advance(
            recurrence,
            states,
            np.concatenate(tokens),
            np.concatenate(positions),
            np.array(starts),
            look if watched else None,
        )
        for state, count in zip(states, taken.values(), strict=True):
            state.position += count
            self._settle(state)
        if wanted:
            logits = recurrence.logits(v[[row for _, row in wanted]])
            for (index, _), row in zip(wanted, logits, strict=True):
                found[index].append(row[None])

    def _begins_prompt(self, states: Sequence[SequenceState], most_tokens: int) -> bool:
        """Whether a sequence reads the first of a prompt, as far as the states and the call before tell."""
        was_reading, self._is_reading = self._is_reading, most_tokens > 1
        return (self._is_reading and not was_reading) or any(state.position == 0 for state in states)

    def _recurrence(self, *, is_prompt: bool) -> Recurrence:
        return recurrence_of(self.model, self._weights, is_prompt=is_prompt)

    def _advance(
        self,
        recurrence: Recurrence,
        states: Sequence[SequenceState],
        tokens: np.ndarray,
        positions: np.ndarray,
        starts: np.ndarray,
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
        )

    def _scales(self, position: int, count: int) -> np.ndarray:
        """The factors of the rows (count + 1, H) before each of the next tokens, and behind the last."""
        assert self._half_lives is not None
        assert self._settling_tokens is not None
        first = position % self._settling_tokens  # (H,): tokens since the rows took theirs up
        return np.exp2(-(first + np.arange(count + 1)[:, None]) / self._half_lives)

    def _settle(self, state: SequenceState) -> None:
        if self._half_lives is None or self._settling_tokens is None:
            return
        for head in np.flatnonzero(state.position % self._settling_tokens == 0):
            state.tensors["sums"][:, head] *= 2.0 ** -(self._settling_tokens[head] / self._half_lives[head])
