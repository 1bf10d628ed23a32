import asyncio
import random
import threading

import pytest

from bdh.generate.advance import Advancer
from bdh.generate.async_engine import AsyncEngine, AsyncRequest
from bdh.generate.engine import Engine
from bdh.generate.params import EngineConfig, SamplingParams
from bdh.model.state import SynapticState


@pytest.fixture
def make_async_engine(byte_model, tokenizer):
    made = []

    def make(advancer=None, **config):
        made.append(AsyncEngine(Engine(byte_model, tokenizer, config=EngineConfig(**config), advancer=advancer)))
        return made[-1]

    yield make
    for async_engine in made:
        async_engine.close()


@pytest.fixture
def async_engine(make_async_engine):
    return make_async_engine()


async def idle(async_engine):
    """Waits until the engine has nothing to do."""
    for _ in range(2000):
        if not async_engine.engine.has_work:
            return
        await asyncio.sleep(0.005)
    raise AssertionError("the engine goes on")


def test_many_tasks_get_what_each_gets_alone(make_async_engine, byte_model, tokenizer):
    requests = [
        (f"prompt {i} " * (1 + i % 3), SamplingParams(max_tokens=5 + i, seed=i, n=1 + i % 2)) for i in range(12)
    ]
    engine = Engine(byte_model, tokenizer)
    alone = [[c.text for c in engine.generate([prompt], params)[0]] for prompt, params in requests]
    async_engine = make_async_engine(max_running=5)

    async def ask(prompt, params):
        return [completion.text for completion in await async_engine.generate(prompt, params)]

    async def ask_all():
        return await asyncio.gather(*(ask(*request) for request in requests))

    assert asyncio.run(ask_all()) == alone
    assert asyncio.run(ask_all()) == alone  # from another event loop too


def test_a_stream_gives_the_text_as_it_comes(async_engine):
    async def run():
        pieces = [output async for output in async_engine.stream("abc", SamplingParams(max_tokens=20, seed=1))]
        whole = await async_engine.generate("abc", SamplingParams(max_tokens=20, seed=1))
        assert "".join(piece.text for piece in pieces) == whole[0].text
        assert len(pieces) == 20

    asyncio.run(run())


def test_leaving_a_stream_ends_its_request(async_engine):
    async def run():
        stream = async_engine.stream("abc", SamplingParams(max_tokens=10**6, ignore_eos=True))
        async for _ in stream:
            break
        await stream.aclose()
        await idle(async_engine)

    asyncio.run(run())
    assert async_engine.engine.stats().state_bytes == 0
    assert async_engine.engine.stats().finished == {"abort": 1}


def test_a_cancelled_task_ends_its_request_wherever_it_stood(async_engine):
    async def run():
        draw = random.Random(1)
        for _ in range(20):
            task = asyncio.create_task(async_engine.generate("abc", SamplingParams(max_tokens=10**6, ignore_eos=True)))
            await asyncio.sleep(draw.choice([0, 0, 0.001, 0.01]))
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        await idle(async_engine)

    asyncio.run(run())
    assert async_engine.engine.stats().state_bytes == 0
    assert async_engine._receivers == {}


def test_wrong_requests_are_told_to_those_who_made_them(async_engine):
    async def run():
        with pytest.raises(ValueError, match="temperature is -1"):
            await async_engine.generate("abc", SamplingParams(temperature=-1))
        with pytest.raises(ValueError, match="the prompt is empty"):
            await async_engine.generate("")
        assert len(await async_engine.generate("abc", SamplingParams(max_tokens=2))) == 1

    asyncio.run(run())


def test_an_error_of_one_request_comes_with_its_completion(make_async_engine, byte_model):
    class Failing(Advancer):
        def read_all(self, inputs):
            if any(ord("Z") in each.tokens for each in inputs):
                raise RuntimeError("no Z today")
            return super().read_all(inputs)

    async_engine = make_async_engine(advancer=Failing(byte_model, path="torch"))

    async def run():
        params = SamplingParams(max_tokens=5, temperature=0, logit_bias={ord("Z"): -1000.0})
        bad, good = await asyncio.gather(async_engine.generate("Z", params), async_engine.generate("a", params))
        assert (bad[0].finish_reason, bad[0].error) == ("error", "no Z today")
        assert good[0].finish_reason == "length"

    asyncio.run(run())


def test_a_failed_engine_tells_everyone(make_async_engine, monkeypatch):
    async_engine = make_async_engine()

    async def run():
        waiting = asyncio.create_task(async_engine.generate("abc", SamplingParams(max_tokens=10**6, ignore_eos=True)))
        while not async_engine.engine.has_work:
            await asyncio.sleep(0.001)

        def fail():
            raise MemoryError("no memory for anything")

        monkeypatch.setattr(async_engine.engine, "step", fail)
        with pytest.raises(RuntimeError, match="the engine has failed: no memory for anything"):
            await waiting
        with pytest.raises(RuntimeError, match="the engine has failed"):
            await async_engine.generate("abc")

    asyncio.run(run())
    async_engine._thread.join(10)
    assert not async_engine._thread.is_alive()


def test_closing_ends_what_runs(make_async_engine):
    async_engine = make_async_engine()

    async def run():
        waiting = asyncio.create_task(async_engine.generate("abc", SamplingParams(max_tokens=10**6, ignore_eos=True)))
        while not async_engine.engine.has_work:
            await asyncio.sleep(0.001)
        await asyncio.to_thread(async_engine.close)
        with pytest.raises(RuntimeError, match="closed"):
            await waiting
        with pytest.raises(RuntimeError, match="the engine is closed"):
            await async_engine.generate("abc")

    asyncio.run(run())
    assert all(thread.name != "bdh-engine" or thread is not async_engine._thread for thread in threading.enumerate())


def test_a_snapshot_goes_on_through_the_async_engine(async_engine):
    async def run():
        (part,) = await async_engine.generate("abc", SamplingParams(max_tokens=8, seed=3), keep_snapshot=True)
        (rest,) = await async_engine.generate(None, SamplingParams(max_tokens=8, seed=3), snapshot=part.snapshot)
        (whole,) = await async_engine.generate("abc", SamplingParams(max_tokens=16, seed=3))
        assert part.token_ids + rest.token_ids == whole.token_ids

    asyncio.run(run())


def test_a_stop_without_memory_for_the_snapshot_ends_its_own_request_only(async_engine, monkeypatch):
    """It ended the engine's thread."""

    def no_memory(state):
        raise MemoryError("not a byte")

    async def run():
        other = asyncio.create_task(async_engine.generate("abc", SamplingParams(max_tokens=300, seed=1)))
        request = AsyncRequest("abc", SamplingParams(max_tokens=10**6, ignore_eos=True))
        await async_engine.submit(request)
        monkeypatch.setattr(SynapticState, "clone", no_memory)
        outputs = request.outputs()
        await anext(outputs)
        async_engine.stop(request)
        completion = [output async for output in outputs][-1].completion
        assert (completion.finish_reason, completion.snapshot) == ("abort", None)
        assert completion.snapshot_error == "not a byte"
        assert len((await other)[0].token_ids) == 300
        await idle(async_engine)

    asyncio.run(run())
    assert async_engine.failure is None
    assert async_engine.engine.stats().state_bytes == 0


def test_an_order_that_fails_does_not_end_the_engine(async_engine, monkeypatch, caplog):
    def no_memory(*arguments, **keywords):
        raise MemoryError("not a byte")

    async def run():
        request = AsyncRequest("abc", SamplingParams(max_tokens=300, seed=1))
        await async_engine.submit(request)
        with monkeypatch.context() as patch:
            patch.setattr(async_engine.engine, "abort", no_memory)
            async_engine.stop(request)
            assert len(await async_engine.generate("abc", SamplingParams(max_tokens=2))) == 1
        outputs = [output async for output in request.outputs()]
        assert outputs[-1].completion.finish_reason == "length"

    asyncio.run(run())
    assert async_engine.failure is None
    assert "the engine could not process a call" in caplog.text
