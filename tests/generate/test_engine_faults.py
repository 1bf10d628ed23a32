"""What becomes of a request, and of those beside it, where something fails."""

import pytest
import torch

from bdh.generate.advance import Advancer, StatePool, StepInput
from bdh.generate.engine import Engine
from bdh.generate.params import EngineConfig, SamplingParams
from bdh.generate.sequence import Continuation, Sampler, TextDecoder
from bdh.model.state import SynapticState
from bdh.ops.cpu import recurrence


def no_memory(*arguments, **keywords):
    raise MemoryError("not a byte")


def stepped(engine):
    """The completions of a step, by request and index."""
    return {(o.request_id, o.index): o.completion for o in engine.step() if o.completion is not None}


def drained(engine):
    """Those of all steps until there is nothing to do."""
    found = {}
    while engine.has_work:
        found |= stepped(engine)
    return found


@pytest.fixture
def make_engine(byte_model, tokenizer):
    def make(**config):
        return Engine(byte_model, tokenizer, config=EngineConfig(**config))

    return make


@pytest.fixture
def engine(make_engine):
    return make_engine()


class Failing(Advancer):
    """Cannot read the byte Z."""

    def read_all(self, inputs):
        if any(ord("Z") in each.tokens for each in inputs):
            raise RuntimeError("no Z today")
        return super().read_all(inputs)


@pytest.fixture(params=["kernels", "torch"])
def broken_once(request, byte_model, tokenizer, monkeypatch):
    """An engine, and what lets its next reading of several tokens fail once: before, or after the states have moved."""
    engine = Engine(byte_model, tokenizer, config=EngineConfig(path=request.param, tokens_per_step=20))
    read_all, when = engine.advancer.read_all, []

    def failing(inputs):
        if when and any(len(each.tokens) > 1 for each in inputs):
            if when.pop() == "after":
                read_all([each for each in inputs if len(each.tokens) == 1])
            raise RuntimeError("out of memory")
        return read_all(inputs)

    monkeypatch.setattr(engine.advancer, "read_all", failing)
    return engine, when


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_prompt_that_finds_no_memory_leaves_those_beside_it_alone(broken_once, make_engine, caplog, moment):
    """States that had moved before the exception were fed their token again: another text, and no error."""
    engine, when = broken_once
    params = SamplingParams(max_tokens=20, temperature=0)
    expected = [engine.generate(prompt, params)[0][0].token_ids for prompt in ("abc", "The other prompt")]
    first = engine.add_request("abc", params)
    for _ in range(3):
        engine.step()
    second = engine.add_request("The other prompt", params)
    when.append(moment)
    found = drained(engine)
    assert not when
    assert [found[number, 0].token_ids for number in (first, second)] == expected
    assert [record.exc_info is not None for record in caplog.records if record.levelname == "ERROR"] == [True]
    assert "a step of 2 sequences has failed" in caplog.text


def test_a_state_that_may_have_moved_ends_with_an_error_and_is_not_used_again(byte_model, tokenizer, monkeypatch):
    """The kernels write all states of a call at once."""
    engine = Engine(byte_model, tokenizer, config=EngineConfig(path="kernels"))
    params = SamplingParams(max_tokens=9, temperature=0)
    expected = engine.generate("abc", params)[0][0].token_ids
    numbers = [engine.add_request("abc", params) for _ in range(2)]
    engine.step()
    run_by_threads = recurrence.run_by_threads

    def interrupted(*arguments):
        monkeypatch.undo()
        run_by_threads(*arguments)
        raise MemoryError

    monkeypatch.setattr(recurrence, "run_by_threads", interrupted)
    found = drained(engine)
    assert [(found[number, 0].finish_reason, found[number, 0].error) for number in numbers] == [
        ("error", "MemoryError")
    ] * 2
    assert engine.stats().state_bytes == 0
    assert engine.generate("abc", params)[0][0].token_ids == expected


def test_among_many_only_the_sequence_that_cannot_be_read_ends(byte_model, tokenizer):
    engine = Engine(byte_model, tokenizer, advancer=Failing(byte_model, path="torch"))
    params = SamplingParams(max_tokens=6, temperature=0, logit_bias={ord("Z"): -1000.0})
    expected = engine.generate("abc", params)[0][0].token_ids
    numbers = [engine.add_request("aZc" if place in (3, 7) else "abc", params) for place in range(9)]
    found = drained(engine)
    for place, number in enumerate(numbers):
        if place in (3, 7):
            assert found[number, 0].error == "no Z today"
        else:
            assert found[number, 0].token_ids == expected


@pytest.mark.parametrize("path", ["kernels", "torch"])
def test_neurons_that_cannot_be_noted_end_their_own_request(make_engine, monkeypatch, path):
    engine, params = make_engine(path=path), SamplingParams(max_tokens=9, temperature=0)
    expected = engine.generate("abc", params)[0][0].token_ids
    watched = engine.add_request("abc", params, record_activations=3)
    plain = engine.add_request("abc", params)
    engine.step()
    monkeypatch.setattr(StepInput, "record", no_memory)
    found = drained(engine)
    assert (found[watched, 0].finish_reason, found[watched, 0].error) == ("error", "not a byte")
    assert found[plain, 0].token_ids == expected


@pytest.mark.parametrize("moment", ["before", "during", "after"])
@pytest.mark.parametrize("path", ["kernels", "torch"])
def test_an_interrupted_step_leaves_no_request_that_goes_on_from_it(make_engine, monkeypatch, path, moment):
    """Ctrl-C, in a notebook say: the engine is used again, and what the step worked on is not gone on with."""
    engine, params = make_engine(path=path), SamplingParams(max_tokens=9, temperature=0)
    expected = engine.generate("abc", params)[0][0].token_ids
    numbers = [engine.add_request("abc", params, keep_snapshot=True) for _ in range(2)]
    engine.step()
    owner, name = {
        "before": (engine.advancer, "read_all"), "during": (StepInput, "commit"), "after": (Sampler, "sample")
    }[moment]  # fmt: skip
    real = getattr(owner, name)

    def interrupted(*arguments):
        if moment == "after":
            real(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(owner, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    monkeypatch.undo()
    engine.abort(numbers[1], keep_snapshot=True)
    third = engine.add_request("abc", params)
    found = drained(engine)
    for number in numbers:
        assert (found[number, 0].finish_reason, found[number, 0].snapshot) == ("error", None)
        assert found[number, 0].error == "the step that worked on it was interrupted"
        assert found[number, 0].token_ids == expected[:1]
    assert found[third, 0].token_ids == expected
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.state_bytes) == (0, 0, 0)


@pytest.mark.parametrize("ends", ["by itself", "by an abort"])
def test_without_memory_for_its_snapshot_a_text_ends_all_the_same(engine, monkeypatch, ends):
    """An abort that was to keep the states raised out of the engine."""
    expected = engine.generate("abc", SamplingParams(max_tokens=9, temperature=0))[0][0].token_ids
    params = SamplingParams(max_tokens=9 if ends == "by itself" else 100, temperature=0, n=2)
    kept = engine.add_request("abc", params, keep_snapshot=True)
    plain = engine.add_request("abc", SamplingParams(max_tokens=9, temperature=0))
    engine.step()
    monkeypatch.setattr(SynapticState, "clone", no_memory)
    if ends == "by an abort":
        engine.abort(kept, keep_snapshot=True)
    found = drained(engine)
    for index in range(2):
        completion = found[kept, index]
        assert completion.finish_reason == ("length" if ends == "by itself" else "abort")
        assert completion.token_ids == expected[: len(completion.token_ids)]
        assert (completion.snapshot, completion.snapshot_error, completion.error) == (None, "not a byte", None)
    assert found[plain, 0].token_ids == expected
    assert found[plain, 0].snapshot_error is None
    assert engine.stats().state_bytes == 0


@pytest.mark.parametrize("where", [(Continuation, "__init__"), (TextDecoder, "flush"), (StatePool, "take")])
def test_a_request_that_can_neither_fork_nor_end_ends_alone(engine, monkeypatch, where):
    params = SamplingParams(max_tokens=9, temperature=0)
    expected = engine.generate("abc", params)[0][0].token_ids
    plain = engine.add_request("abc", params)
    engine.step()
    forked = engine.add_request("abc", SamplingParams(max_tokens=100, n=3))
    waiting = engine.add_request("abc", SamplingParams(max_tokens=3, n=2))
    with monkeypatch.context() as patch:
        patch.setattr(*where, no_memory)
        engine.abort(waiting)
        found = stepped(engine)
        engine.abort(forked)
    found |= drained(engine)
    assert found[plain, 0].token_ids == expected
    assert {key for key in found if key[0] != plain} == {*((forked, i) for i in range(3)), (waiting, 0), (waiting, 1)}
    assert all(found[forked, index].finish_reason == "error" for index in range(3))
    assert found[forked, 2].error == "not a byte"
    assert engine.stats().state_bytes == 0


@pytest.mark.parametrize("error", [MemoryError("not a byte"), ValueError("of another kind")])
def test_a_beginning_that_cannot_be_copied_is_dropped_and_counted(make_engine, monkeypatch, caplog, error):
    engine, params = make_engine(prefix_cache_bytes=1 << 20), SamplingParams(max_tokens=4, temperature=0)
    expected = engine.generate("abc" * 30, params)[0][0].token_ids
    drained(engine)
    before = engine.stats().prefix_cache_bytes

    def failing(state):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(SynapticState, "clone", failing)
        other = engine.generate("abd" * 30, params)[0][0]
        drained(engine)
    assert other.finish_reason == "length"
    assert f"the beginning of a prompt, 90 tokens, could not be stored: {error}" in caplog.text
    assert engine.stats().prefix_cache_failures == 1
    assert engine.stats().prefix_cache_bytes - before < engine.advancer.state_bytes
    assert engine.generate("abc" * 30, params)[0][0].token_ids == expected
    assert engine.generate("abd" * 30, params)[0][0].token_ids == other.token_ids


@pytest.mark.parametrize("error", [MemoryError("not a byte"), KeyboardInterrupt()])
def test_a_state_that_cannot_be_given_back_leaves_no_request_behind(engine, monkeypatch, error):
    """The request had ended for its owner, but ran for ever, and its state was never free again."""

    def failing(*arguments):
        raise error

    engine.add_request("Once", SamplingParams(max_tokens=3, temperature=0))
    found = {}
    with monkeypatch.context() as patch:
        patch.setattr(StatePool, "give_back", failing)
        for _ in range(20):
            try:
                found |= stepped(engine)
            except KeyboardInterrupt:
                patch.undo()
    found |= drained(engine)
    assert [completion.finish_reason for completion in found.values()] == ["length"]
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.state_bytes, engine.has_work) == (0, 0, 0, False)
    assert engine.generate("Once", SamplingParams(max_tokens=3))[0][0].finish_reason == "length"


def test_a_request_that_is_interrupted_while_it_is_admitted_reserves_nothing(engine, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    engine.add_request("Once", SamplingParams(n=2, max_tokens=3))
    with monkeypatch.context() as patch:
        patch.setattr(StatePool, "take", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    assert {completion.finish_reason for completion in drained(engine).values()} == {"error"}
    assert engine.stats().state_bytes == 0


@pytest.mark.parametrize("path", ["kernels", "torch"])
def test_a_prompt_whose_beginning_cannot_be_looked_up_is_read(make_engine, monkeypatch, caplog, path):
    engine, params = make_engine(path=path, prefix_cache_bytes=1 << 20), SamplingParams(max_tokens=4, temperature=0)
    expected = engine.generate("abc" * 30, params)[0][0].token_ids
    drained(engine)
    with monkeypatch.context() as patch:
        patch.setattr(engine.prefixes, "mark_of_weights", no_memory)
        found = engine.generate("abc" * 30, params)[0][0]
        drained(engine)
    assert found.token_ids == expected
    assert "could not be looked up: not a byte" in caplog.text
    assert engine.generate("abc" * 30, params)[0][0].token_ids == expected


@pytest.mark.parametrize("settings", [{"path": "kernels"}, {"path": "torch"}, {"path": "torch", "window": 8}])
def test_states_that_were_made_in_inference_mode_serve_outside_of_it(make_engine, settings):
    engine, params = make_engine(prefix_cache_bytes=1 << 20, **settings), SamplingParams(max_tokens=4, temperature=0)
    with torch.inference_mode():
        expected = engine.generate("abc" * 30, params)[0][0].token_ids
    found = engine.generate("abc" * 30, params)[0][0]
    assert (found.finish_reason, found.token_ids) == ("length", expected)
