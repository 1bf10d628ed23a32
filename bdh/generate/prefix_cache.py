"""The prefix cache: a tree of token prefixes with states, so that common prefixes of prompts are read only once."""

import logging
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from bdh.generate.sequence import error_text
from bdh.model.state import SynapticState
from bdh.model.weights import WeightsMark

_logger = logging.getLogger(__name__)
_LONG_PROMPT_TOKENS = 256
_FROM_THE_END = (32, 256)
_WORTH_A_STATE_TOKENS = 64  # reading fewer tokens after another state again costs less than storing one more state
_TOKEN_BYTES = array("i").itemsize
# The approximate size of a node's Python objects. Without it, many short prompts would count as nearly nothing.
NODE_BYTES = 512
_MOST_PROMPT_BYTES = 64 << 20


@dataclass(eq=False)
class _Node:
    edge: "array[int]"  # the tokens between the parent and this node; empty only for the root
    parent: "_Node | None" = None
    children: dict[int, "_Node"] = field(default_factory=dict)  # by the first token of their edges
    state: SynapticState | None = None  # the state after the tokens from the root to this node, if stored
    logits: torch.Tensor | None = None
    is_prompt: bool = False  # whether a remembered prompt ends at this node

    @property
    def tensor_bytes(self) -> int:
        return sum(each.nbytes for each in (self.state, self.logits) if each is not None)

    @property
    def path_bytes(self) -> int:
        return len(self.edge) * _TOKEN_BYTES + NODE_BYTES


class PrefixCache:
    """A cache of states by the tokens that led to them, limited in bytes, which drops the least recently used first.

    It also remembers the tokens of prompts without a state, so that a prefix that two prompts share is found at the
    second one. It is not thread-safe: an engine uses it from the thread that calls ``step``.

    Args:
        max_bytes: the limit on states, logits, tokens, and 512 bytes for each node of the tree.
        max_prompt_bytes: the limit on tokens and nodes. Above it, prompts without a state are forgotten, the oldest
            first. By default a 64th of ``max_bytes``, and at most 64 MiB.

    Attributes:
        hits: the number of lookups that found a prefix.
        misses: the number of lookups that found none.
        tokens_saved: the number of tokens that were not read because of hits.
        evictions: the number of states that were dropped to make place for others.
        rejections: the number of states that were not stored because they exceed ``max_bytes`` alone.
    """

    def __init__(self, max_bytes: int, *, max_prompt_bytes: int | None = None):
        if max_bytes < 0:
            raise ValueError(f"max_bytes is {max_bytes}: must be at least 0")
        if max_prompt_bytes is None:
            max_prompt_bytes = min(max_bytes // 64, _MOST_PROMPT_BYTES)
        if not 0 <= max_prompt_bytes <= max_bytes:
            raise ValueError(
                f"max_prompt_bytes is {max_prompt_bytes}: must be at least 0 and at most max_bytes, {max_bytes}"
            )
        self.max_bytes, self.max_prompt_bytes = max_bytes, max_prompt_bytes
        self.hits = self.misses = self.tokens_saved = self.evictions = self.rejections = 0
        self.clear()

    def clear(self) -> None:
        """Removes all states and prompts. The counters stay."""
        self._root = _Node(array("i"))
        # Both are ordered from the least to the most recently used.
        self._stored: OrderedDict[_Node, None] = OrderedDict()
        self._prompts: OrderedDict[_Node, None] = OrderedDict()
        self._tensor_bytes = self._path_bytes = 0

    @property
    def nbytes(self) -> int:
        """The number of bytes in use; never more than ``max_bytes``."""
        return self._tensor_bytes + self._path_bytes

    @property
    def num_entries(self) -> int:
        """The number of stored states."""
        return len(self._stored)

    def find(self, tokens: Sequence[int]) -> tuple[int, SynapticState | None, torch.Tensor | None]:
        """Finds the longest stored prefix of ``tokens``, which can be all of them.

        Returns:
            The length of the prefix, the state after it, and the logits of the next token if stored; (0, None, None) if
            there is no prefix. The state belongs to the cache: copy it before anything else is stored.
        """
        best, best_depth, depth = None, 0, 0
        for node, is_whole, length in self._descend(array("i", tokens)):
            depth += length
            if is_whole and node.state is not None:
                best, best_depth = node, depth
        if best is None:
            self.misses += 1
            return 0, None, None
        self._stored.move_to_end(best)
        self.hits += 1
        self.tokens_saved += best_depth
        return best_depth, best.state, best.logits

    def put(self, tokens: Sequence[int], state: SynapticState, logits: torch.Tensor | None = None) -> bool:
        """Stores a copy of the state after ``tokens``, replacing an earlier one.

        Returns:
            Whether it was stored. It is not if it exceeds ``max_bytes`` alone.

        Raises:
            ValueError: the state has read another number of tokens, or there are no tokens.
            MemoryError: the state could not be copied. An earlier state for these tokens is dropped; all others stay.
            RuntimeError: as MemoryError.
        """
        if not len(tokens) or state.position != len(tokens):
            raise ValueError(
                f"the state has read {state.position} tokens, but {len(tokens)} are given: "
                "must be the same number, and at least 1"
            )
        logits_bytes = 0 if logits is None else logits.nbytes
        alone = len(tokens) * _TOKEN_BYTES + NODE_BYTES + state.nbytes + logits_bytes
        if alone > self.max_bytes:
            self.rejections += 1
            return False
        node = self._insert(array("i", tokens))
        former = self._drop_state(node)
        self._stored[node] = None
        # Counted before the copy, so that memory never exceeds the limit.
        self._tensor_bytes += state.nbytes + logits_bytes
        try:
            spare = self.evict() or former
            if spare is not None and spare.pattern == state.pattern:
                spare.copy_(state)  # reusing memory is several times as fast as allocating it
            else:
                spare = state.clone()
            node.state, node.logits = spare, None if logits is None else logits.clone()
        except BaseException:  # out of memory
            self._tensor_bytes -= state.nbytes + logits_bytes
            del self._stored[node]
            self._prune(node)
            raise
        return True

    def branch_point(self, tokens: Sequence[int]) -> int:
        """Returns the number of leading tokens that these share with earlier prompts or stored prefixes.

        A state stored there serves both prompts. The tokens are remembered as a further prompt, within
        ``max_prompt_bytes``.
        """
        given = array("i", tokens)
        shared = sum(length for *_, length in self._descend(given))
        num_kept = (self.max_prompt_bytes - NODE_BYTES) // _TOKEN_BYTES
        if given and num_kept > 0:
            end = self._insert(given[:num_kept])
            end.is_prompt = True
            self._prompts[end] = None
            self._prompts.move_to_end(end)
            self.evict()
        return shared

    def _descend(self, tokens: "array[int]") -> Iterator[tuple[_Node, bool, int]]:
        """Yields the nodes on the path of the tokens, without the root.

        Each comes with whether its whole edge matches, and the number of tokens of the edge that match.
        """
        node, depth = self._root, 0
        while depth < len(tokens) and (child := node.children.get(tokens[depth])):
            length = _common_length(child.edge, tokens[depth : depth + len(child.edge)])
            is_whole = length == len(child.edge)
            yield child, is_whole, length
            if not is_whole:
                return
            node, depth = child, depth + length

    def _insert(self, tokens: "array[int]") -> _Node:
        """Returns the node of these tokens, creating it if necessary."""
        node, depth = self._root, 0
        for child, is_whole, length in self._descend(tokens):
            node, depth = child if is_whole else self._split(child, length), depth + length
        if depth < len(tokens):
            child = _Node(tokens[depth:], parent=node)
            node.children[tokens[depth]] = child
            self._path_bytes += child.path_bytes
            node = child
        return node

    def _split(self, node: _Node, length: int) -> _Node:
        """Splits a node's edge after ``length`` tokens, and returns the new node there."""
        parent = node.parent
        assert parent is not None
        middle = _Node(node.edge[:length], parent, {node.edge[length]: node})
        rest = node.edge[length:]  # allocates before anything is changed
        parent.children[node.edge[0]] = middle
        node.edge, node.parent = rest, middle
        self._path_bytes += NODE_BYTES
        return middle

    def evict(self) -> SynapticState | None:
        """Drops the oldest entries until the limits hold, but never the newest state. Returns a dropped state."""
        dropped = None
        while self._path_bytes > self.max_prompt_bytes and self._prompts:
            self._forget_prompt()
        while self.nbytes > self.max_bytes and len(self._stored) > 1:
            oldest = next(iter(self._stored))
            dropped = self._drop_state(oldest)
            self._prune(oldest)
            self.evictions += 1
        while self.nbytes > self.max_bytes and self._prompts:
            self._forget_prompt()
        return dropped

    def _forget_prompt(self) -> None:
        oldest, _ = self._prompts.popitem(last=False)
        oldest.is_prompt = False
        self._prune(oldest)

    def _drop_state(self, node: _Node) -> SynapticState | None:
        if node not in self._stored:
            return None
        self._tensor_bytes -= node.tensor_bytes
        del self._stored[node]
        state, node.state, node.logits = node.state, None, None
        return state

    def _prune(self, node: _Node) -> None:
        """Removes a node that is no longer needed, with the nodes that only led to it."""
        while node.parent is not None and node not in self._stored and not node.is_prompt:
            parent = node.parent
            if len(node.children) > 1:
                return
            if not node.children:
                del parent.children[node.edge[0]]
                self._path_bytes -= node.path_bytes
                node = parent
                continue
            (child,) = node.children.values()
            child.edge, child.parent = node.edge + child.edge, parent
            parent.children[node.edge[0]] = child
            self._path_bytes -= NODE_BYTES
            return


def _common_length(a: "array[int]", b: "array[int]") -> int:
    """Returns the number of equal leading tokens. The first tokens must be equal."""
    length = min(len(a), len(b))
    differ = np.frombuffer(a, np.intc, length) != np.frombuffer(b, np.intc, length)
    return int(differ.argmax()) if differ.any() else length


class PrefixStore:
    """Uses a :class:`PrefixCache` for an engine, and decides after which tokens of a prompt to store a state.

    These places are the point where an earlier prompt diverges, and the end of the prompt. In a long prompt that is
    mostly new, a point shortly before the end is used instead of the end, since the next prompt will probably differ in
    its last tokens. Places near each other, or near the beginning, are avoided.

    Args:
        cache: the cache.
        mark_of_weights: returns the mark of the model's current weights. States read with other weights are dropped.
    """

    def __init__(self, max_bytes: int, mark_of_weights: Callable[[], WeightsMark]):
        self.cache = PrefixCache(max_bytes)
        self.mark_of_weights = mark_of_weights
        self.weights: WeightsMark | None = None  # the weights that read all states in the cache
        # States to store before they are advanced again. They are copied later, so that outputs need not wait for it.
        self.marked: list[tuple[list[int], SynapticState, torch.Tensor | None, WeightsMark | None]] = []
        self.failures = 0  # the number of states that could not be stored or looked up

    def stats(self) -> dict[str, int]:
        """Returns the statistics by their names in ``EngineStats``."""
        return {
            "prefix_cache_bytes": self.cache.nbytes,
            "prefix_cache_hits": self.cache.hits,
            "prefix_cache_tokens": self.cache.tokens_saved,
            "prefix_cache_failures": self.failures,
        }

    def find(self, tokens: Sequence[int]) -> tuple[int, SynapticState | None, torch.Tensor | None]:
        """Finds the longest stored prefix: its length, its state, which must not be advanced, and its logits."""
        try:
            if len(tokens) >= _WORTH_A_STATE_TOKENS:  # no state is stored for fewer tokens
                self._forget_other_weights()
            return self.cache.find(tokens)
        except Exception as error:
            self._note(error, "the beginning of a prompt of %d tokens could not be looked up: %s", len(tokens))
            return 0, None, None

    def places(self, tokens: Sequence[int], num_known: int) -> set[int]:
        """Returns the numbers of tokens after which to store the state of this new prompt."""
        distances = _FROM_THE_END if len(tokens) - num_known >= _LONG_PROMPT_TOKENS else (0,)
        places: list[int] = []
        for place in (self.cache.branch_point(tokens), *(len(tokens) - distance for distance in distances)):
            if (
                place - num_known
                >= _WORTH_A_STATE_TOKENS
                <= min((abs(place - other) for other in places), default=place)
            ):
                places.append(place)
        return set(places)

    def mark(
        self, tokens: list[int], state: SynapticState, logits: torch.Tensor | None, weights: WeightsMark | None
    ) -> None:
        """Marks a state to be stored, which must not be advanced until then, with the weights that read its tokens."""
        self.marked.append((tokens, state, logits, weights))

    def store_marked(self) -> None:
        """Stores the marked states, except for those whose weights have changed meanwhile."""
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
        """Logs and counts a failure, which costs time later but does not affect any text."""
        self.failures += 1
        _logger.warning(message, num_tokens, error_text(error), exc_info=True)

    def _forget_other_weights(self) -> None:
        before, self.weights = self.weights, None
        now = self.mark_of_weights()
        if before is None or before.content != now.content:
            self.cache.clear()
        self.weights = now
