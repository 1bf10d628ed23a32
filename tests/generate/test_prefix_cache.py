"""The tree of prefixes: it finds what a plain dictionary would, and counts its bytes to the last one."""

import random
from collections import Counter

import pytest
import torch

from bdh.generate.advance import Advancer, StepInput
from bdh.generate.prefix_cache import NODE_BYTES, PrefixCache
from bdh.model.state import SynapticState

STATE_BYTES, LOGITS_BYTES = 40, 16


def state_of(tokens) -> SynapticState:
    """Of 40 bytes, and telling from which tokens it is."""
    return SynapticState([torch.full((1, 8), float(sum(tokens)))], torch.tensor([len(tokens)]), len(tokens))


def logits_of(tokens) -> torch.Tensor:
    return torch.full((4,), float(len(tokens)))


def alone(tokens) -> int:
    """Bytes of a cache with this entry only."""
    return STATE_BYTES + LOGITS_BYTES + 4 * len(tokens) + NODE_BYTES


class NaiveCache:
    """The same by a dictionary of stored prefixes and a list of prompts: slow and obvious."""

    def __init__(self, max_bytes, max_prompt_bytes):
        self.max_bytes, self.max_prompt_bytes = max_bytes, max_prompt_bytes
        self.stored, self.prompts = {}, []
        self.counts = {"hits": 0, "misses": 0, "tokens_saved": 0, "evictions": 0, "rejections": 0}

    def path_bytes(self):
        ends = {*self.stored, *self.prompts}
        prefixes = {end[:length] for end in ends for length in range(1, len(end) + 1)}
        num_children = Counter(prefix[:-1] for prefix in prefixes)
        forks = {prefix for prefix in prefixes if num_children[prefix] > 1}
        return 4 * len(prefixes) + NODE_BYTES * len(ends | forks)

    def nbytes(self):
        return self.path_bytes() + len(self.stored) * (STATE_BYTES + LOGITS_BYTES)

    def find(self, tokens):
        found = max((p for p in self.stored if tokens[: len(p)] == p), key=len, default=None)
        if found is None:
            self.counts["misses"] += 1
            return 0
        self.stored[found] = self.stored.pop(found)
        self.counts["hits"] += 1
        self.counts["tokens_saved"] += len(found)
        return len(found)

    def put(self, tokens):
        if alone(tokens) > self.max_bytes:
            self.counts["rejections"] += 1
            return
        self.stored.pop(tokens, None)
        self.stored[tokens] = None
        self.make_room()

    def branch_point(self, tokens):
        lengths = (
            next((i for i, (a, b) in enumerate(zip(p, tokens, strict=False)) if a != b), min(len(p), len(tokens)))
            for p in (*self.stored, *self.prompts)
        )
        shared = max(lengths, default=0)
        kept = tokens[: max(0, (self.max_prompt_bytes - NODE_BYTES) // 4)]
        if kept:
            self.prompts = [p for p in self.prompts if p != kept] + [kept]
            self.make_room()
        return shared

    def make_room(self):
        while self.prompts and self.path_bytes() > self.max_prompt_bytes:
            self.prompts.pop(0)
        while len(self.stored) > 1 and self.nbytes() > self.max_bytes:
            self.stored.pop(next(iter(self.stored)))
            self.counts["evictions"] += 1
        while self.prompts and self.nbytes() > self.max_bytes:
            self.prompts.pop(0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("max_bytes", "max_prompt_bytes"), [(1500, 0), (1500, 1500), (4000, 530), (4000, 1300), (9000, 0), (9000, 3000)]
)
def test_random_use_is_that_of_a_dictionary(max_bytes, max_prompt_bytes):
    """Prompts of few different tokens, so that they share prefixes, end inside of each other, and come again."""
    rng = random.Random(max_bytes + max_prompt_bytes)
    cache = PrefixCache(max_bytes, max_prompt_bytes=max_prompt_bytes)
    naive = NaiveCache(max_bytes, max_prompt_bytes)
    for _ in range(600):
        tokens = tuple(rng.choices(range(2), k=rng.choice([1, 2, 3, 4, 5, 8, 100, 300])))
        chosen = rng.random()
        if chosen < 0.4:
            length, state, logits = cache.find(tokens)
            assert length == naive.find(tokens)
            assert (state is None) == (logits is None) == (length == 0)
            if state is not None:
                assert torch.equal(state.sums[0], state_of(tokens[:length]).sums[0])
                assert state.position == length
                assert torch.equal(logits, logits_of(tokens[:length]))
        elif chosen < 0.7:
            rejections = cache.rejections
            assert cache.put(tokens, state_of(tokens), logits_of(tokens)) == (cache.rejections == rejections)
            naive.put(tokens)
        elif chosen < 0.995:
            assert cache.branch_point(tokens) == naive.branch_point(tokens)
        else:
            cache.clear()
            naive.stored, naive.prompts = {}, []
        assert cache.nbytes == naive.nbytes() <= max_bytes
        assert cache.num_entries == len(naive.stored)
        assert {name: getattr(cache, name) for name in naive.counts} == naive.counts
    assert min(naive.counts[name] for name in ("hits", "misses", "evictions")) > 20
    assert (naive.counts["rejections"] > 0) == (max_bytes == 1500)


def test_a_prefix_is_found_and_not_what_only_begins_alike():
    cache = PrefixCache(10**6)
    cache.put([1, 2, 3], state_of([1, 2, 3]), logits_of([1, 2, 3]))
    assert cache.find([1, 2, 3, 4])[0] == 3
    assert cache.find([1, 2, 3])[0] == 3
    assert cache.find([1, 2])[0] == 0
    assert cache.find([1, 2, 4])[0] == 0
    assert cache.find([])[0] == 0
    cache.put([1], state_of([1]))
    assert cache.find([1, 2, 4])[0] == 1
    assert cache.find([1, 2, 4])[2] is None  # stored without logits
    assert (cache.hits, cache.misses, cache.tokens_saved) == (4, 3, 8)


def test_what_is_stored_is_a_copy():
    cache = PrefixCache(10**6)
    state, logits = state_of([7]), logits_of([7])
    cache.put([7], state, logits)
    state.clear()
    logits.zero_()
    _, found, found_logits = cache.find([7])
    assert found.position == 1
    assert found.sums[0].eq(7).all()
    assert found_logits.eq(1).all()


def test_the_least_recently_used_goes_first():
    cache = PrefixCache(2 * alone([1]) + 10, max_prompt_bytes=0)
    for token in (1, 2):
        cache.put([token], state_of([token]), logits_of([token]))
    cache.find([1])
    cache.put([3], state_of([3]), logits_of([3]))
    assert [cache.find([token])[0] for token in (1, 2, 3)] == [1, 0, 1]
    assert (cache.evictions, cache.num_entries) == (1, 2)


def test_an_entry_larger_than_the_cache_is_counted_and_costs_nothing():
    cache = PrefixCache(alone([1]))
    assert cache.put([1], state_of([1]), logits_of([1]))
    assert not cache.put([1, 2], state_of([1, 2]), logits_of([1, 2]))
    assert (cache.rejections, cache.evictions, cache.nbytes) == (1, 0, alone([1]))
    assert cache.find([1, 2])[0] == 1


def test_storing_the_same_tokens_again_takes_the_new_state_and_no_more_bytes():
    cache = PrefixCache(10**6)
    cache.put([1, 2], state_of([1, 2]), logits_of([1, 2]))
    before = cache.nbytes
    cache.put([1, 2], SynapticState([torch.full((1, 8), 9.0)], torch.tensor([2]), 2), logits_of([1, 2]))
    assert cache.nbytes == before
    assert cache.find([1, 2])[1].sums[0].eq(9).all()


def test_a_shared_prefix_is_noticed_with_the_second_prompt():
    cache = PrefixCache(10**6)
    system = list(range(50))
    assert cache.branch_point([*system, 100, 101]) == 0
    assert cache.branch_point([*system, 200]) == 50
    assert cache.branch_point([*system, 100, 102]) == 51
    assert cache.branch_point(system[:20]) == 20
    assert cache.num_entries == 0
    # Nodes at 20, 50 and 51 tokens, and three ends.
    assert cache.nbytes == 4 * (50 + 2 + 1 + 1) + 6 * NODE_BYTES
    cache.clear()
    assert (cache.nbytes, cache.branch_point(system)) == (0, 0)


def test_prompts_are_remembered_within_their_own_bound():
    cache = PrefixCache(10**6, max_prompt_bytes=2 * (NODE_BYTES + 400))
    for start in (0, 1000, 2000):
        cache.branch_point(list(range(start, start + 100)))
    assert cache.nbytes == 2 * (NODE_BYTES + 400)
    assert cache.branch_point([0, 1, 2]) == 0  # the oldest is forgotten
    assert cache.branch_point([2000, 2001, 5]) == 2
    long = list(range(3000, 3000 + 10**4))
    cache.branch_point(long)
    assert cache.nbytes <= cache.max_prompt_bytes
    assert cache.branch_point(long) == (cache.max_prompt_bytes - NODE_BYTES) // 4  # of it the beginning


def test_the_memory_of_a_dropped_state_is_used_again():
    cache = PrefixCache(2 * alone([1]) + 10, max_prompt_bytes=0)
    for token in (1, 2):
        cache.put([token], state_of([token]))
    memory = cache.find([1])[1].sums[0].data_ptr()
    cache.find([2])
    cache.put([3], state_of([3]))
    state = cache.find([3])[1]
    assert state.sums[0].data_ptr() == memory
    assert state.sums[0].equal(state_of([3]).sums[0])
    assert cache.find([2])[1].sums[0].equal(state_of([2]).sums[0])


def test_a_copy_that_finds_no_memory_leaves_the_cache_right(monkeypatch):
    cache = PrefixCache(10**6)
    cache.put([1, 2], state_of([1, 2]), logits_of([1, 2]))
    before = cache.nbytes

    def fail(self):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(SynapticState, "clone", fail)
        with pytest.raises(MemoryError):
            cache.put([1, 3], state_of([1, 3]))
    assert (cache.nbytes, cache.num_entries, cache.find([1, 3])[0]) == (before, 1, 0)
    assert cache.put([1, 3], state_of([1, 3]))


@pytest.mark.parametrize("tokens", [[], [1], [1, 2, 3]])
def test_a_state_of_other_tokens_is_refused(tokens):
    state = state_of([1, 2])
    if not tokens:
        state.position = 0
    with pytest.raises(ValueError, match=r"the state has read \d+ tokens, but \d+ are given"):
        PrefixCache(10**6).put(tokens, state)


@pytest.mark.parametrize(("bounds", "told"), [
    ({"max_bytes": -1}, "max_bytes is -1: must be at least 0"),
    ({"max_bytes": 10, "max_prompt_bytes": 11}, "max_prompt_bytes is 11: must be at least 0 and at most max_bytes, 10"),
])  # fmt: skip
def test_bounds_that_make_no_sense_are_refused(bounds, told):
    with pytest.raises(ValueError, match=told):
        PrefixCache(**bounds)


def test_a_prompt_that_hits_gives_the_logits_of_one_read_whole(model):
    """The prefix ends at a multiple of the chunk size, 4, where pieces give the bits of the whole."""
    advancer = Advancer(model)
    prompt = torch.randint(61, (21,), generator=torch.Generator().manual_seed(0)).tolist()
    whole = advancer.new_state()
    (expected,) = advancer.advance([StepInput(whole, prompt)])
    cache, state = PrefixCache(10**9), advancer.new_state()
    (logits,) = advancer.advance([StepInput(state, prompt[:12])])
    cache.put(prompt[:12], state, logits)
    length, found, _ = cache.find(prompt)
    assert length == 12
    slot = advancer.new_state()
    slot.copy_(found)
    assert torch.equal(advancer.advance([StepInput(slot, prompt[length:])])[0], expected)
    assert found.position == 12
