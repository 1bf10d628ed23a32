"""Which states an engine puts into its cache of prefixes, and when."""

import logging
from collections.abc import Callable, Sequence

import torch

from bdh.generate.prefix_cache import PrefixCache
from bdh.generate.sequence import told
from bdh.model.fingerprint import WeightsMark
from bdh.model.state import SynapticState

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
        mark_of_weights: of the model as it is. States that other weights have read are forgotten.
    """

    def __init__(self, max_bytes: int, mark_of_weights: Callable[[], WeightsMark]):
        self.cache = PrefixCache(max_bytes)
        self._mark_of_weights = mark_of_weights
        self.weights: WeightsMark | None = None
        """The mark of the weights that have read all of the cache's states."""
        self.marked: list[tuple[list[int], SynapticState, torch.Tensor | None, WeightsMark | None]] = []
        """What is to be stored before anything is fed again: no token waits for the copying."""
        self.failures = 0
        """How often a state could not be stored or looked up."""

    def stats(self) -> dict[str, int]:
        """Its gauge and counters, by their names in ``EngineStats``."""
        return {
            "prefix_cache_bytes": self.cache.nbytes,
            "prefix_cache_hits": self.cache.hits,
            "prefix_cache_tokens": self.cache.tokens_saved,
            "prefix_cache_failures": self.failures,
        }

    def find(self, tokens: Sequence[int]) -> tuple[int, SynapticState | None, torch.Tensor | None]:
        """The longest known beginning: its length, its state, which is not to be advanced, and the logits behind it."""
        try:
            if len(tokens) >= _WORTH_A_STATE_TOKENS:  # none is stored for fewer
                self._forget_other_weights()
            return self.cache.find(tokens)
        except Exception as error:
            self._note(error, "the beginning of a prompt of %d tokens could not be looked up: %s", len(tokens))
            return 0, None, None

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

    def mark(
        self, tokens: list[int], state: SynapticState, logits: torch.Tensor | None, weights: WeightsMark | None
    ) -> None:
        """Notes a state to be stored, which is not to be fed until then.

        Args:
            weights: the mark of those that began to read the tokens.
        """
        self.marked.append((tokens, state, logits, weights))

    def store_marked(self) -> None:
        """Copies the states that were marked, but for those whose weights have changed meanwhile."""
        marked, self.marked = self.marked, []
        for number, (tokens, state, logits, weights) in enumerate(marked):
            try:
                if number == 0:
                    self._forget_other_weights()
                if weights == self.weights:
                    self.cache.put(tokens, state, logits)
            except Exception as error:
                self._note(error, "the beginning of a prompt, %d tokens, could not be stored: %s", len(tokens))

    def _note(self, error: Exception, message: str, num_tokens: int) -> None:
        """Of a failure that costs time later, but no text."""
        self.failures += 1
        _log.warning(message, num_tokens, told(error), exc_info=True)

    def _forget_other_weights(self) -> None:
        before, self.weights = self.weights, None
        now = self._mark_of_weights()
        if before is None or before.content != now.content:
            self.cache.clear()
        self.weights = now
