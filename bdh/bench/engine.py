"""Many requests at once through the engine."""

import statistics
import time
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from bdh.bench.decode import DisagreementError
from bdh.bench.report import Report
from bdh.generate.config import EngineConfig
from bdh.generate.engine import Engine
from bdh.generate.params import SamplingParams
from bdh.generate.stepper import Feed, make_stepper
from bdh.model.modeling import BDHForCausalLM


@dataclass
class EngineSizes:
    prompt: int = 64
    steps: int = 60
    long_prompt: int = 20_000
    shared_prefix: int = 2_000
    question: int = 20
    agreement_requests: int = 16


def bench_engine(
    model: BDHForCausalLM, tokenizer: PreTrainedTokenizerFast, tokens: list[int], report: Report, sizes: EngineSizes
) -> None:
    """
    Raises:
        DisagreementError: a request's tokens depend on what ran beside it; nothing has been timed.
    """
    report.facts["kernels"] = make_stepper(model).path
    _agreement(model, tokenizer, tokens, report, sizes)
    _concurrent(model, tokenizer, tokens, report, sizes)
    _long_prompt(model, tokenizer, tokens, report, sizes)
    _shared_prefix(model, tokenizer, tokens, report, sizes)


def _agreement(
    model: BDHForCausalLM, tokenizer: PreTrainedTokenizerFast, tokens: list[int], report: Report, sizes: EngineSizes
) -> None:
    requests = [
        (tokens[7 * i : 7 * i + (3, 20, 90)[i % 3]], SamplingParams(max_tokens=4 + i, seed=i, temperature=float(i % 2)))
        for i in range(sizes.agreement_requests)
    ]
    alone = [Engine(model, tokenizer).generate([prompt], params)[0][0].token_ids for prompt, params in requests]
    engine, waiting, found = Engine(model, tokenizer), list(requests), {}
    while waiting or engine.has_work:  # a new one with every second step
        for _ in range(2):
            for output in engine.step():
                if output.completion is not None:
                    found[output.request_id] = output.completion.token_ids
        if waiting:
            engine.add_request(*waiting.pop(0))
    same = sum(found[number] == ids for number, ids in enumerate(alone))
    report.section("agreement: requests of mixed length arriving over time, greedy and sampled")
    report.add("requests", len(alone), "")
    report.add("with the tokens that each has alone", same, "")
    if same < len(alone):
        raise DisagreementError(f"{len(alone) - same} requests depend on what runs beside them: nothing is timed")


def _concurrent(
    model: BDHForCausalLM, tokenizer: PreTrainedTokenizerFast, tokens: list[int], report: Report, sizes: EngineSizes
) -> None:
    found = {}
    for count in (1, 8):
        engine = Engine(model, tokenizer)
        params = SamplingParams(max_tokens=2 * sizes.steps + 100, temperature=0, ignore_eos=True)
        for number in range(count):
            engine.add_request(tokens[number * 11 : number * 11 + sizes.prompt], params)
        while len(engine.step()) < count:
            pass
        for _ in range(5):
            engine.step()
        start = time.perf_counter()
        written = sum(len(output.token_ids) for _ in range(sizes.steps) for output in engine.step())
        found[count] = (time.perf_counter() - start) / written
    stepper = make_stepper(model)
    state = stepper.new_state()
    stepper.step([Feed(state, tokens[: sizes.prompt])])
    start = time.perf_counter()
    for token in tokens[: sizes.steps]:
        stepper.step([Feed(state, [token])])
    bare = (time.perf_counter() - start) / sizes.steps
    report.section("continuing")
    report.add(
        "1 request",
        found[1] * 1e3,
        "ms a token",
        f"{1 / found[1]:,.0f} tokens/s; without the engine {bare * 1e3:.2f} ms",
    )
    note = f"{1 / found[8]:,.0f} tokens/s, {found[1] / found[8]:.2f} times one's"
    report.add("8 requests at once", found[8] * 1e3, "ms a token", note)


def _long_prompt(
    model: BDHForCausalLM, tokenizer: PreTrainedTokenizerFast, tokens: list[int], report: Report, sizes: EngineSizes
) -> None:
    engine = Engine(model, tokenizer)
    endless = SamplingParams(max_tokens=10**6, temperature=0, ignore_eos=True)
    running = engine.add_request(tokens[: sizes.prompt], endless)
    for _ in range(10):
        engine.step()
    repeated = (tokens * (sizes.long_prompt // len(tokens) + 1))[: sizes.long_prompt]
    late = engine.add_request(repeated, SamplingParams(max_tokens=1, temperature=0))
    gaps, last, is_read = [], time.perf_counter(), False
    start = last
    while not is_read:
        for output in engine.step():
            now = time.perf_counter()
            if output.request_id == running:
                gaps.append(now - last)
                last = now
            is_read |= output.request_id == late
    gaps.sort()
    report.section(f"the time between two tokens, while a prompt of {sizes.long_prompt:,} tokens is read")
    report.add("median", statistics.median(gaps) * 1e3, "ms")
    report.add("99 of 100", gaps[min(len(gaps) - 1, int(0.99 * len(gaps)))] * 1e3, "ms")
    report.add("longest", gaps[-1] * 1e3, "ms")
    report.add("until the prompt was read", last - start, "s", f"{sizes.long_prompt / (last - start):,.0f} tokens/s")


def _shared_prefix(
    model: BDHForCausalLM, tokenizer: PreTrainedTokenizerFast, tokens: list[int], report: Report, sizes: EngineSizes
) -> None:
    engine = Engine(model, tokenizer, config=EngineConfig(prefix_cache_bytes=4 << 30))
    params = SamplingParams(max_tokens=1, temperature=0)
    engine.generate([tokens[:8]], params)  # whatever the first request of all has to set up
    shared = tokens[100 : 100 + sizes.shared_prefix]
    report.section(f"{sizes.shared_prefix:,} shared tokens and a question of {sizes.question}: time to the first token")
    first = 0.0
    for number in range(3):
        start_of = 10 + number * sizes.question
        question = tokens[start_of : start_of + sizes.question]
        start = time.perf_counter()
        (completion,) = engine.generate([shared + question], params)[0]
        seconds = time.perf_counter() - start
        first = first or seconds
        cold = Engine(model, tokenizer).generate([shared + question], params)[0][0]
        if completion.token_ids != cold.token_ids:
            raise DisagreementError("a stored beginning has changed the token behind it")
        note = (
            f"{seconds / first:.1%} of the first, {completion.num_cached_tokens:,} tokens not read again"
            if number
            else ""
        )
        report.add(f"request {number + 1}", seconds * 1e3, "ms", note)
