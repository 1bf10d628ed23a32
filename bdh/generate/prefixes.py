"""Which states an engine puts into its cache of prefixes, and when."""

import logging
from collections.abc import Callable, Sequence

import torch

from bdh.generate.prefix_cache import PrefixCache
from bdh.generate.stepper import SequenceState

_log = logging.getLogger(__name__)
_LONG_PROMPT_TOKENS = 256
_FROM_THE_END = (32, 256)
_WORTH_A_STATE_TOKENS = 64  # with fewer behind another state, reading them again costs less than a further copy


class PrefixStore:
    """Finds the states of known beginnings, and says where on the way through a prompt a state is worth keeping.

    That is where an earlier prompt has parted from it, which shows what they have in common; at its end; and, of a long
    prompt of which most is new, at a few places before its end instead, since what follows with the second prompt is
    likely to differ in its last part only. No two are close to each other, or to the beginning.

    Args:
        weights: the checksum of the model's weights as they are. States that other weights have read are forgotten.
    """

    def __init__(self, max_bytes: int, weights: Callable[[], bytes]):
        self.cache = PrefixCache(max_bytes)
        self._checksum = weights
        self.weights = b""
        """The checksum of the weights that have read all of the cache's states."""
        self.marked: list[tuple[list[int], SequenceState, torch.Tensor | None, bytes]] = []
        """What is to be stored before anything is fed again: no token waits for the copying."""
        self.failures = 0
        """States that could not be stored."""

    def find(self, tokens: Sequence[int]) -> tuple[int, SequenceState | None, torch.Tensor | None]:
        """The longest known beginning: its length, its state, which is not to be advanced, and the logits behind it."""
        if len(tokens) >= _WORTH_A_STATE_TOKENS:  # none is stored for fewer
            self._forget_other_weights()
        return self.cache.find(tokens)

    def places(self, tokens: Sequence[int], num_known: int) -> set[int]:
        """The numbers of tokens after which the state of this new prompt is to be stored."""
        candidates = [self.cache.branch_point(tokens)]
        if len(tokens) - num_known >= _LONG_PROMPT_TOKENS:
            candidates += [len(tokens) - distance for distance in _FROM_THE_END]
        else:
            candidates.append(len(tokens))
        places: set[int] = set()
        for place in candidates:
            is_far_on = place - num_known >= _WORTH_A_STATE_TOKENS
            if is_far_on and all(abs(place - other) >= _WORTH_A_STATE_TOKENS for other in places):
                places.add(place)
        return places

    def mark(self, tokens: list[int], state: SequenceState, logits: torch.Tensor | None, weights: bytes) -> None:
        """Notes a state to be stored, which is not to be fed until then.

        Args:
            weights: the checksum of those that began to read the tokens.
        """
        self.marked.append((tokens, state, logits, weights))

    def store_marked(self) -> None:
        """Copies the states that were marked, but those that other weights than the model's of now have read."""
        marked, self.marked = self.marked, []
        for tokens, state, logits, weights in marked:
            try:
                self._forget_other_weights()
                if weights == self.weights:
                    self.cache.put(tokens, state, logits)
            except Exception as error:  # which costs time later, but no text
                self.failures += 1
                _log.warning(
                    "the beginning of a prompt, %d tokens, could not be stored: %s",
                    len(tokens),
                    str(error) or type(error).__name__,
                    exc_info=True,
                )

    def _forget_other_weights(self) -> None:
        weights = self._checksum()
        if weights != self.weights:
            self.cache.clear()
        self.weights = weights
