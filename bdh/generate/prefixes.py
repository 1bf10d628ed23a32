"""Which states an engine puts into its cache of prefixes, and when."""

from collections.abc import Sequence

import torch

from bdh.generate.prefix_cache import PrefixCache
from bdh.generate.stepper import SequenceState

_LONG_PROMPT_TOKENS = 256
_FROM_THE_END = (32, 256)
_WORTH_A_STATE_TOKENS = 64  # with fewer behind a known state, reading them again costs less than copying another one


class PrefixStore:
    """Finds the states of known beginnings, and says where on the way through a prompt a state is worth keeping.

    That is at its end; where an earlier prompt has parted from it, which shows what they have in common; and, of a long
    prompt of which most is new, at a few places before its end, since what follows with the second prompt is likely to
    differ in its last part only. Nowhere is it stored close behind a known one.
    """

    def __init__(self, max_bytes: int):
        self.cache = PrefixCache(max_bytes)

    def find(self, tokens: Sequence[int]) -> tuple[int, SequenceState | None, torch.Tensor | None]:
        """The longest known beginning: its length, its state, which is not to be advanced, and the logits behind it."""
        return self.cache.find(tokens)

    def places(self, tokens: Sequence[int], num_known: int) -> set[int]:
        """The numbers of tokens after which the state of this new prompt is to be stored."""
        shared = self.cache.branch_point(tokens)
        places = {len(tokens), shared}
        if len(tokens) - num_known >= _LONG_PROMPT_TOKENS:
            places |= {len(tokens) - distance for distance in _FROM_THE_END}
        return {place for place in places if place - num_known >= (_WORTH_A_STATE_TOKENS if num_known else 1)}

    def put(self, tokens: Sequence[int], state: SequenceState, logits: torch.Tensor | None) -> None:
        self.cache.put(tokens, state, logits)
