"""Benchmarks of the engine: its overhead in a step, concurrent requests, and the time to the first token."""

import time
from collections.abc import Callable
from statistics import median
from typing import Any

from bdh.bench import BenchOptions
from bdh.bench.common import (
    Progress,
    Report,
    interleaved,
    measure_bandwidth,
    milliseconds,
    percentile,
    random_tokens,
    traffic,
)
from bdh.bench.decoders import StateDecoder
from bdh.generate.advance import Advancer
from bdh.generate.engine import Engine
from bdh.generate.params import EngineConfig, SamplingParams
from bdh.model.modeling import BDHForCausalLM

CONCURRENT = 8
_QUESTION_TOKENS = 24
_CACHED_STATES = 16


def bench_engine(
    model: BDHForCausalLM, tokenizer: Any, options: BenchOptions, progress: Progress = lambda stage: None
) -> Report:
    """Returns figures of the engine with the kernels in float32. Nothing is timed if requests affect each other.

    Raises:
        ValueError: the tokenizer does not fit the model.
    """
    bench = _EngineBench(model, tokenizer, options, progress)
    bench.compare()
    if not bench.report.failed:
        bench.time_requests()
        bench.time_gaps()
        bench.time_shared_prefix()
    return bench.report


def _endless(seed: int, max_tokens: int = 10**6) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, ignore_eos=True, seed=seed)


class _EngineBench:
    def __init__(self, model: BDHForCausalLM, tokenizer: Any, options: BenchOptions, progress: Progress):
        self.model, self.tokenizer, self.options, self.progress = model, tokenizer, options, progress
        self.report = Report("engine")
        self.density = self.report.introduce(model, options.seed)
        self.advancer = Advancer(model, path="kernels")  # shared by all engines
        self.report.say(f"path      {self.advancer.description}")

    def engine(self, num_states: int, num_cached: int = 0) -> Engine:
        each = self.advancer.state_bytes
        # Each cached state also has logits and tokens, which are small in comparison.
        config = EngineConfig(max_state_bytes=num_states * each, prefix_cache_bytes=num_cached * (each + (1 << 20)))
        return Engine(self.model, self.tokenizer, config=config, advancer=self.advancer)

    def prompt(self, count: int, seed: int) -> list[int]:
        return random_tokens(self.model.config.vocab_size, count, self.options.seed + seed).tolist()

    def compare(self) -> None:
        """Compares the tokens of requests that run together with those of each request alone."""
        num_tokens = self.options.engine_tokens
        self.progress(f"agreement: {CONCURRENT} requests together and alone, {num_tokens} tokens each")
        engine = self.engine(CONCURRENT)
        prompts = [self.prompt(3 + 5 * number, 50 + number) for number in range(CONCURRENT)]
        params = [_endless(number, max_tokens=num_tokens) for number in range(CONCURRENT)]
        together = [each[0].token_ids for each in engine.generate(prompts, params)]
        alone = [engine.generate([prompt], each)[0][0].token_ids for prompt, each in zip(prompts, params, strict=True)]
        num_equal = sum(a == b for a, b in zip(together, alone, strict=True))
        self.report.failed = num_equal != CONCURRENT
        self.report.figures["agreement"] = {"requests": CONCURRENT, "equal": num_equal, "tokens": num_tokens}
        self.report.say(f"agree     {num_equal} of {CONCURRENT} requests have the same tokens together as alone")
        if self.report.failed:
            self.report.say("requests together do not generate the same tokens as alone: nothing was timed")

    def time_requests(self) -> None:
        """Times steps with one and with several running requests, by turns with steps of the backend alone."""
        self.progress("measuring the bandwidth")
        bandwidth = measure_bandwidth(self.options.copy_bytes)
        self.progress(f"timing: {CONCURRENT} requests and one, beside the backend alone")
        text, rounds = self.prompt(CONCURRENT, 9), self.options.rounds
        candidates: dict[str, Callable[[], object]] = {}
        counts = (1, CONCURRENT)
        for count in counts:
            engine = self.engine(count)
            for number in range(count):
                engine.add_request(self.prompt(4, 10 + number), _endless(number))
            while engine.stats().generated_tokens < 2 * count:
                engine.step()
            bare = StateDecoder(self.model, path="kernels", num_sequences=count)
            candidates[f"engine, {count}"] = engine.step
            candidates[f"backend, {count}"] = lambda bare=bare: bare.read_each(text).argmax(-1).tolist()  # type: ignore[misc]
        repeats = dict.fromkeys(candidates, max(1, self.options.engine_tokens // rounds))
        timings = interleaved(candidates, rounds=rounds, repeats=repeats)
        moved = traffic(self.model.config, self.density)
        rows, figures = [], []
        for count in counts:
            seconds, without = timings[f"engine, {count}"].median, timings[f"backend, {count}"].median
            gain = count * timings["engine, 1"].median / seconds
            most = count * moved.limit_seconds(bandwidth) / moved.limit_seconds(bandwidth, count)
            found = {
                "requests": count,
                "ms_per_step": 1000 * seconds,
                "tokens_per_s": count / seconds,
                "times_one": gain,
                "times_one_by_bytes": most,
                "stepper_ms_per_step": 1000 * without,
                "overhead_ms_per_token": 1000 * (seconds - without) / count,
            }
            figures.append(found)
            forms = ("{}", "{:,.2f}", "{:,.1f}", "{:.2f}", "{:.2f}", "{:,.2f}", "{:,.2f}")
            rows.append([form.format(value) for form, value in zip(forms, found.values(), strict=True)])
        self.report.figures["requests"] = figures
        self.report.table(
            f"running requests, sampled at temperature 1: medians of {rounds} rounds by turns",
            ["requests", "ms/step", "tokens/s", "times one", "by bytes", "backend alone", "ms/token more"],
            rows,
        )

    def time_gaps(self) -> None:
        """Measures the times between the tokens of a request while the long prompt of another is read."""
        num_tokens = self.options.long_prompt
        self.progress(f"timing: a running request beside a prompt of {num_tokens:,} tokens")
        engine = self.engine(2)
        running = engine.add_request(self.prompt(4, 20), _endless(1))
        while engine.stats().generated_tokens < 4:
            engine.step()
        start = last = time.perf_counter()
        reading = engine.add_request(self.prompt(num_tokens, 21), _endless(2, max_tokens=1))
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
        self.report.figures["gaps"] = {
            "prompt_tokens": num_tokens,
            "tokens_per_step": engine.config.tokens_per_step,
            "tokens_meanwhile": len(gaps),
            "seconds": total,
            **{name: 1000 * seconds for name, seconds in figures.items()},
        }
        self.report.table(
            f"a running request while a prompt of {num_tokens:,} tokens is read, in {total:.1f} s",
            ["tokens meanwhile", "p50 ms", "p99 ms", "largest ms"],
            [[f"{len(gaps):,}", *map(milliseconds, figures.values())]],
        )

    def time_shared_prefix(self) -> None:
        """Measures the time to the first token of requests whose prompts begin alike and end differently."""
        shared = self.options.shared_prefix
        self.progress(f"timing: requests that share {shared:,} tokens")
        seconds = []
        for number in range(3):  # several pairs, each with an empty cache
            engine = self.engine(1, num_cached=_CACHED_STATES)
            prefix = self.prompt(shared, 30 + number)
            pair = []
            for question in range(2):
                own = self.prompt(_QUESTION_TOKENS, 40 + 2 * number + question)
                start = time.perf_counter()
                engine.add_request(prefix + own, _endless(0, max_tokens=1))
                while not engine.step():
                    pass
                pair.append(time.perf_counter() - start)
            seconds.append(pair)
            hits = engine.stats().prefix_cache_hits
            if hits != 1:
                raise RuntimeError(f"the prefix of the second request was found {hits} times: must be once")
        first, second = (median(pair[place] for pair in seconds) for place in (0, 1))
        self.report.figures["shared_prefix"] = {
            "prefix_tokens": shared,
            "question_tokens": _QUESTION_TOKENS,
            "first_ms": 1000 * first,
            "second_ms": 1000 * second,
            "ratio": second / first,
        }
        self.report.table(
            f"time to the first token after {shared:,} shared tokens and {_QUESTION_TOKENS} others, medians of 3",
            ["request", "ms", "of the first"],
            [["first", milliseconds(first), ""], ["second", milliseconds(second), f"{100 * second / first:.1f} %"]],
        )
