"""The engine: what it adds to a step, how requests run beside each other, and how soon they begin."""

import time
from collections.abc import Callable
from statistics import median

from transformers import PreTrainedTokenizerFast

from bdh.bench.bandwidth import measure_bandwidth, traffic
from bdh.bench.baselines import AdvancerDecoder
from bdh.bench.config import BenchOptions
from bdh.bench.decode import Progress
from bdh.bench.report import Report, milliseconds, random_tokens
from bdh.bench.timing import interleaved, percentile
from bdh.bench.weights import Density
from bdh.generate.advance import Advancer
from bdh.generate.config import EngineConfig
from bdh.generate.engine import Engine
from bdh.generate.params import SamplingParams
from bdh.model.modeling import BDHForCausalLM

CONCURRENT = 8
_QUESTION_TOKENS = 24
_CACHED_STATES = 16


def bench_engine(
    model: BDHForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    options: BenchOptions,
    progress: Progress = lambda stage: None,
) -> Report:
    """Figures of the engine over the kernels in float32. Nothing is timed unless requests do not disturb each other.

    Raises:
        ValueError: the tokenizer is not the model's.
    """
    report = Report("engine")
    density = report.introduce(model, options.seed)
    advancer = Advancer(model, path="kernels")
    report.say(f"path      {advancer.description}")
    _compare(report, model, tokenizer, advancer, options, progress)
    if report.failed:
        return report
    _time_requests(report, model, tokenizer, advancer, options, density, progress)
    _time_gaps(report, model, tokenizer, advancer, options, progress)
    _time_shared_prefix(report, model, tokenizer, advancer, options, progress)
    return report


def _engine(
    model: BDHForCausalLM, tokenizer: PreTrainedTokenizerFast, advancer: Advancer, num_states: int, num_cached: int = 0
) -> Engine:
    config = EngineConfig(
        max_state_bytes=num_states * advancer.state_bytes,
        # Of each state also its logits and tokens, which are small beside it.
        prefix_cache_bytes=num_cached * (advancer.state_bytes + (1 << 20)),
    )
    return Engine(model, tokenizer, config=config, advancer=advancer)


def _endless(seed: int, max_tokens: int = 10**6) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, ignore_eos=True, seed=seed)


def _prompt(model: BDHForCausalLM, count: int, seed: int) -> list[int]:
    return random_tokens(model.config.vocab_size, count, seed).tolist()


def _compare(
    report: Report,
    model: BDHForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    advancer: Advancer,
    options: BenchOptions,
    progress: Progress,
) -> None:
    """The tokens of requests that run together, and of each alone."""
    progress(f"agreement: {CONCURRENT} requests together and alone, {options.engine_tokens} tokens each")
    engine = _engine(model, tokenizer, advancer, CONCURRENT)
    prompts = [_prompt(model, 3 + 5 * number, options.seed + 50 + number) for number in range(CONCURRENT)]
    params = [_endless(number, max_tokens=options.engine_tokens) for number in range(CONCURRENT)]
    together = [each[0].token_ids for each in engine.generate(prompts, params)]
    alone = [engine.generate([prompt], each)[0][0].token_ids for prompt, each in zip(prompts, params, strict=True)]
    num_equal = sum(a == b for a, b in zip(together, alone, strict=True))
    report.failed = num_equal != CONCURRENT
    report.figures["agreement"] = {"requests": CONCURRENT, "equal": num_equal, "tokens": options.engine_tokens}
    report.say(f"agree     {num_equal} of {CONCURRENT} requests have the same tokens together as alone")
    if report.failed:
        report.say("the requests disturb each other: nothing was timed")


def _time_requests(
    report: Report,
    model: BDHForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    advancer: Advancer,
    options: BenchOptions,
    density: list[Density],
    progress: Progress,
) -> None:
    """Steps of running requests, one and several, by turns with the advancer's own."""
    progress("measuring the bandwidth")
    bandwidth = measure_bandwidth(options.copy_bytes)
    progress(f"timing: {CONCURRENT} requests and one, beside the advancer alone")
    engines = {1: _engine(model, tokenizer, advancer, 1), CONCURRENT: _engine(model, tokenizer, advancer, CONCURRENT)}
    for count, engine in engines.items():
        for number in range(count):
            engine.add_request(_prompt(model, 4, options.seed + 10 + number), _endless(number))
        while engine.stats().generated_tokens < 2 * count:
            engine.step()
    text = _prompt(model, CONCURRENT, options.seed + 9)
    bare = {count: AdvancerDecoder("advancer", advancer, batch=count) for count in engines}
    candidates: dict[str, Callable[[], object]] = {}
    for count, engine in engines.items():
        candidates[f"engine, {count}"] = engine.step
        candidates[f"advancer, {count}"] = (
            lambda count=count: [  # type: ignore[misc]
                int(row.argmax()) for row in bare[count].read_each(text[:count])
            ]
        )
    rounds = options.rounds
    repeats = dict.fromkeys(candidates, max(1, options.engine_tokens // rounds))
    timings = interleaved(candidates, rounds=rounds, repeats=repeats)

    moved = traffic(model.config, density)
    alone = timings["engine, 1"].median
    rows, figures = [], []
    for count in engines:
        seconds, without = timings[f"engine, {count}"].median, timings[f"advancer, {count}"].median
        limit = moved.limit_seconds(bandwidth, count)
        gain = count * alone / seconds
        most = count * moved.limit_seconds(bandwidth) / limit
        figures.append(
            {
                "requests": count,
                "ms_per_step": 1000 * seconds,
                "tokens_per_s": count / seconds,
                "times_one": gain,
                "times_one_by_bytes": most,
                "stepper_ms_per_step": 1000 * without,
                "overhead_ms_per_token": 1000 * (seconds - without) / count,
            }
        )
        rows.append(
            [
                str(count),
                milliseconds(seconds),
                f"{count / seconds:,.1f}",
                f"{gain:.2f}",
                f"{most:.2f}",
                milliseconds(without),
                milliseconds((seconds - without) / count),
            ]
        )
    report.figures["requests"] = figures
    report.table(
        f"running requests, sampled at temperature 1: medians of {rounds} rounds by turns",
        ["requests", "ms/step", "tokens/s", "times one", "by bytes", "advancer alone", "ms/token more"],
        rows,
    )


def _time_gaps(
    report: Report,
    model: BDHForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    advancer: Advancer,
    options: BenchOptions,
    progress: Progress,
) -> None:
    """The times between the tokens of one request while the long prompt of another is read."""
    progress(f"timing: a running request beside a prompt of {options.long_prompt:,} tokens")
    engine = _engine(model, tokenizer, advancer, 2)
    running = engine.add_request(_prompt(model, 4, options.seed + 20), _endless(1))
    while engine.stats().generated_tokens < 4:
        engine.step()
    start = last = time.perf_counter()
    reading = engine.add_request(_prompt(model, options.long_prompt, options.seed + 21), _endless(2, max_tokens=1))
    gaps = []
    while engine.knows(reading):
        outputs = engine.step()
        now = time.perf_counter()
        if any(output.request_id == running and output.token_ids for output in outputs):
            gaps.append(now - last)
            last = now
    total = time.perf_counter() - start
    engine.abort(running)
    if not gaps:
        raise RuntimeError("the running request got no token while the prompt was read")
    figures = {"p50_ms": percentile(gaps, 0.5), "p99_ms": percentile(gaps, 0.99), "max_ms": max(gaps)}
    report.figures["gaps"] = {
        "prompt_tokens": options.long_prompt,
        "tokens_per_step": engine.config.tokens_per_step,
        "tokens_meanwhile": len(gaps),
        "seconds": total,
        **{name: 1000 * seconds for name, seconds in figures.items()},
    }
    report.table(
        f"a running request while a prompt of {options.long_prompt:,} tokens is read, in {total:.1f} s",
        ["tokens meanwhile", "p50 ms", "p99 ms", "largest ms"],
        [[f"{len(gaps):,}", *(milliseconds(seconds) for seconds in figures.values())]],
    )


def _time_shared_prefix(
    report: Report,
    model: BDHForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    advancer: Advancer,
    options: BenchOptions,
    progress: Progress,
) -> None:
    """Time to the first token of requests whose prompts begin alike, and end differently."""
    progress(f"timing: requests that share {options.shared_prefix:,} tokens")
    seconds = []
    for number in range(3):  # of several pairs, each with an empty cache
        engine = _engine(model, tokenizer, advancer, 1, num_cached=_CACHED_STATES)
        prefix = _prompt(model, options.shared_prefix, options.seed + 30 + number)
        pair = []
        for question in range(2):
            own = _prompt(model, _QUESTION_TOKENS, options.seed + 40 + 2 * number + question)
            start = time.perf_counter()
            engine.add_request(prefix + own, _endless(0, max_tokens=1))
            while not engine.step():
                pass
            pair.append(time.perf_counter() - start)
        seconds.append(pair)
        hits = engine.stats().prefix_cache_hits
        if hits != 1:
            raise RuntimeError(f"of the second request the prefix was found {hits} times: must be once")
    first, second = (median(pair[place] for pair in seconds) for place in (0, 1))
    report.figures["shared_prefix"] = {
        "prefix_tokens": options.shared_prefix,
        "question_tokens": _QUESTION_TOKENS,
        "first_ms": 1000 * first,
        "second_ms": 1000 * second,
        "ratio": second / first,
    }
    report.table(
        f"time to the first token behind {options.shared_prefix:,} shared tokens and {_QUESTION_TOKENS} others, medians of 3",
        ["request", "ms", "of the first"],
        [["first", milliseconds(first), ""], ["second", milliseconds(second), f"{100 * second / first:.1f} %"]],
    )
