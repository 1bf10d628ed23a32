"""Exceptions at random operations of random steps: who is told that a text is finished has the text of an undisturbed run."""

import logging
import random
from collections import Counter
from dataclasses import replace

import pytest
import torch

import bdh.generate.advance
import bdh.ops.cpu.recurrence
import bdh.ops.eager
from bdh.generate.advance import Advancer, StatePool, StepInput
from bdh.generate.engine import Engine
from bdh.generate.params import EngineConfig, SamplingParams
from bdh.generate.prefix_cache import PrefixCache, PrefixStore
from bdh.generate.sequence import Continuation, Sampler, TextDecoder
from bdh.model.state import SynapticState
from bdh.ops.cpu.recurrence import Recurrence, ScaledSums

NUM_SEEDS = 200  # over all paths
EVERYWHERE = [
    *((SynapticState, name) for name in ("clone", "copy_", "clear")),
    *((Advancer, name) for name in ("advance", "read_all", "new_state")),
    *((StatePool, name) for name in ("take",)),
    *((PrefixStore, name) for name in ("find", "places", "mark")),
    *((PrefixCache, name) for name in ("put", "evict")),
    *((TextDecoder, name) for name in ("push", "flush", "state")),
    (Sampler, "sample"),
    *((Continuation, name) for name in ("__init__", "note_read", "draw", "end")),
    *((StepInput, name) for name in ("result", "record")),
    *((torch, name) for name in ("cat", "zeros", "tensor")),
]
KERNELS = [
    (Recurrence, "prepare_logits"),
    (Recurrence, "advance"),
    (Recurrence, "work_memory"),
    (torch, "empty"),
    (bdh.ops.cpu.recurrence, "run_by_threads"),
    (bdh.generate.advance, "recurrence_of"),
]
TORCH = [
    *((torch, name) for name in ("bmm",)),
    *((bdh.ops.eager, name) for name in ("advance", "layer_norm", "rotate")),
    (bdh.generate.advance, "rotation_table"),
]
PATHS = {
    "kernels": ({}, KERNELS),
    "kernels, decay": ({}, [*KERNELS, (ScaledSums, "rescaled")]),
    "torch": ({"path": "torch"}, [*TORCH, (bdh.ops.eager, "parallel_attention")]),
    "window, kernels": ({"window": 20}, KERNELS),
    "window, torch": (
        {"window": 20, "path": "torch"},
        [*TORCH[1:], *((bdh.ops.eager, name) for name in ("attend_window", "take_in"))],
    ),
}
"""The settings of an advancer, and operations of its own."""


class Faults:
    """Lets one call of one of these operations raise, before or after it has done its work."""

    def __init__(self, monkeypatch, operations):
        self.operations = [f"{owner.__name__}.{name}" for owner, name in operations]
        self.happened = Counter()
        self.disarm()
        for (owner, name), label in zip(operations, self.operations, strict=True):
            monkeypatch.setattr(owner, name, self._wrapped(getattr(owner, name), label))

    @property
    def is_armed(self):
        return self._operation is not None

    def arm(self, draw):
        """One after the other; those that have not happened come first."""
        rarest = min(self.happened[label] for label in self.operations)
        self._operation = draw.choice([label for label in self.operations if self.happened[label] <= rarest + 1])
        self._calls_left = draw.choice([1, 1, 1, 2, 4, 8])
        self._comes_after = draw.random() < 0.5
        self._error = draw.choice([MemoryError("no memory left"), RuntimeError("CUDA out of memory")])

    def disarm(self):
        self._operation = None

    def _wrapped(self, real, label):
        def call(*arguments, **keywords):
            if label != self._operation:
                return real(*arguments, **keywords)
            self._calls_left -= 1
            if self._calls_left:
                return real(*arguments, **keywords)
            self.disarm()
            self.happened[label] += 1
            if self._comes_after:
                real(*arguments, **keywords)
            raise self._error

        return call


SHARED = "What all of these have in common is a long beginning, of more than sixty-four tokens. "
GREEDY = SamplingParams(max_tokens=12, temperature=0)
SAMPLED = SamplingParams(max_tokens=10, seed=5, temperature=0.8, frequency_penalty=0.3, logprobs=1)


def requests():
    """Prompts, settings, and what else a request may have."""
    yield "abc", GREEDY, {}
    yield "Some words", replace(SAMPLED, max_tokens=20), {"keep_snapshot": True}
    yield SHARED, replace(GREEDY, max_tokens=6), {"keep_snapshot": True}
    yield SHARED + "One.", GREEDY, {}
    yield SHARED + "Two.", replace(SAMPLED, n=3), {"keep_snapshot": True}
    yield "Fork", replace(SAMPLED, n=2, max_tokens=8), {}
    yield "Watched", replace(GREEDY, max_tokens=8), {"record_activations": 4}
    yield "b" * 40, replace(SAMPLED, prompt_logprobs=1, logprobs=None), {}
    yield "Stops", replace(SAMPLED, max_tokens=30, stop_token_ids=list(range(0, 256, 6)), stop=["e", "\n"]), {}
    yield "Echo", replace(GREEDY, max_tokens=0, echo=True), {}


class Trial:
    """Requests that come, are aborted, and go on from snapshots, in an engine whose operations fail now and then."""

    def __init__(self, make_engine, faults, twins, seed):
        self.draw = random.Random(seed)
        self.make_engine, self.faults, self.twins = make_engine, faults, twins
        self.engine = make_engine(self.draw)
        self.kinds, self.found, self.streamed = {}, {}, {}

    def add(self, kind):
        (prompt, params, more), snapshot = self.twins[kind][:2]
        params = replace(params)
        try:
            number = self.engine.add_request(None if snapshot else prompt, params, snapshot=snapshot, **more)
        except (MemoryError, RuntimeError):
            pass  # refused: nothing has changed
        else:
            self.kinds[number] = kind

    def step(self):
        for output in self.engine.step():
            key = output.request_id, output.index
            assert key not in self.found, "an output after the last one"
            tokens, texts = self.streamed.setdefault(key, ([], []))
            tokens += output.token_ids
            texts.append(output.text)
            if output.completion is not None:
                self.found[key] = output.completion

    def run(self):
        waiting = [self.draw.randrange(len(self.twins)) for _ in range(6)]
        for _ in range(600):
            if self.draw.random() < (0.1 if self.faults.is_armed else 0.6):
                self.faults.arm(self.draw)
            if waiting and self.draw.random() < 0.5:
                self.add(waiting.pop())
            if self.kinds and self.draw.random() < 0.04:
                self.engine.abort(self.draw.choice(sorted(self.kinds)), keep_snapshot=self.draw.random() < 0.7)
            self.step()
            if not waiting and not self.engine.has_work:
                break
        self.faults.disarm()
        assert not self.engine.has_work, "a request never ends"

    def check(self):
        wanted = {(number, index) for number, kind in self.kinds.items() for index in range(self.twins[kind][0][1].n)}
        assert set(self.found) == wanted
        for (number, index), completion in self.found.items():
            tokens, text = self.streamed[number, index]
            twin = self.twins[self.kinds[number]][2][index]
            assert tokens == twin.token_ids[: len(tokens)]
            if completion.finish_reason == "error":
                assert completion.error
                assert completion.snapshot is None
                continue
            assert completion.error is None
            assert completion.token_ids == tokens
            assert completion.text == "".join(text)
            if completion.finish_reason != "abort":
                assert (completion.text, completion.token_ids) == (twin.text, twin.token_ids)
                assert completion.finish_reason == twin.finish_reason
                assert (completion.snapshot is None) == (twin.snapshot is None or completion.snapshot_error is not None)
            if completion.snapshot is not None:
                self.check_snapshot(completion, self.twins[self.kinds[number]][0][1], twin)
        stats = self.engine.stats()
        assert (stats.running, stats.waiting, stats.state_bytes) == (0, 0, 0)
        assert sum(stats.finished.values()) == len(self.found)
        assert all(not state.is_torn for state in self.engine._pool._free)
        check_cache(self.engine.prefixes.cache)

    def check_snapshot(self, completion, params, twin):
        """That of a text that has ended is its twin's; from that of one that was cut off comes the rest of its twin."""
        snapshot = completion.snapshot
        if completion.finish_reason != "abort":
            assert snapshot.tokens == twin.snapshot.tokens
            torch.testing.assert_close(snapshot.state.tensors, twin.snapshot.state.tensors)
        elif rest := params.max_tokens - len(completion.token_ids):
            params = replace(params, n=1, max_tokens=rest, echo=False, prompt_logprobs=None)
            (other,) = alone(self.make_engine(), None, params, snapshot, {})
            assert completion.token_ids + other.token_ids == twin.token_ids

    def check_serving(self):
        """Each request once more: no wrong state has been left anywhere."""
        numbers = {}
        for kind in self.draw.sample(range(len(self.twins)), 4):
            self.add(kind)
            numbers[max(self.kinds)] = kind
        self.found.clear()
        while self.engine.has_work:
            self.step()
        for (number, index), completion in self.found.items():
            twin = self.twins[numbers[number]][2][index]
            assert (completion.text, completion.finish_reason) == (twin.text, twin.finish_reason)


def check_cache(cache):
    """Its sums are those of what it holds."""
    nodes = [cache._root]
    for node in nodes:
        nodes += node.children.values()
    assert cache._tensor_bytes == sum(node.tensor_bytes for node in nodes)
    assert cache._path_bytes == sum(node.path_bytes for node in nodes[1:])
    assert {node for node in nodes if node.state is not None} == set(cache._stored)
    assert all(node.state.position > 0 and not node.state.is_torn for node in cache._stored)


@pytest.fixture
def quickly():
    """Without threads, which cost more than they bring to so small a model, and the log of thousands of faults."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    logging.disable()
    yield
    logging.disable(logging.NOTSET)
    torch.set_num_threads(num_threads)


@pytest.mark.slow
@pytest.mark.usefixtures("quickly")
@pytest.mark.parametrize("name", PATHS)
def test_no_fault_changes_the_text_of_a_request_that_ends_well(make_model, tokenizer, monkeypatch, name):
    settings, operations = PATHS[name]
    model = make_model(
        vocab_size=256, n_embd=16, n_head=2, n_layer=2, chunk_size=64, decay=3 if "decay" in name else None
    )
    with torch.no_grad():
        model.lm_head.weight *= 0.5
    if "torch" in name:
        model = model.double()  # whose rounding, other with other neighbours, is far from changing a token
    advancer = Advancer(model, **settings)

    def make_engine(draw=None):
        config = EngineConfig()
        if draw is not None:
            config = EngineConfig(
                tokens_per_step=draw.choice([8, 40, 100]),
                max_running=draw.choice([3, 6]),
                max_state_bytes=draw.choice([3, 6]) * advancer.state_bytes,
                prefix_cache_bytes=int(draw.choice([1.5, 3.5]) * advancer.state_bytes) + 8000,
            )
        return Engine(model, tokenizer, config=config, advancer=advancer)

    twins = []
    for prompt, params, more in requests():
        twins.append(((prompt, params, more), None, alone(make_engine(), prompt, replace(params), None, more)))
    for _, _, completions in [twins[1], twins[4]]:
        more, snapshot = {"keep_snapshot": True}, completions[0].snapshot
        twins.append(((None, SAMPLED, more), snapshot, alone(make_engine(), None, replace(SAMPLED), snapshot, more)))

    operations = [*EVERYWHERE, *operations]
    faults = Faults(monkeypatch, operations)
    reasons = Counter()
    for seed in range(list(PATHS).index(name), NUM_SEEDS, len(PATHS)):
        trial = Trial(make_engine, faults, twins, seed)
        try:
            trial.run()
            trial.check()
            reasons.update(completion.finish_reason for completion in trial.found.values())
            trial.check_serving()
        except BaseException as error:
            error.add_note(f"with seed {seed} of {name!r}, after {dict(faults.happened)}")
            raise
    # Some are rarely called, those of the cache of prefixes above all: most of all must have failed somewhere.
    assert len(faults.happened) > 0.8 * len(operations)
    assert min(reasons[reason] for reason in ("length", "stop", "abort", "error")) > 5


def alone(engine, prompt, params, snapshot, more):
    """The completions of a request in an engine of its own."""
    engine.add_request(prompt, params, snapshot=snapshot, **more)
    found = {}
    while engine.has_work:
        found |= {output.index: output.completion for output in engine.step() if output.completion is not None}
    return [found[index] for index in range(params.n)]
