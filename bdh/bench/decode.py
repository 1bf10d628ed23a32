"""Reading: one token at a time beside other forms, several sequences, prompts by their length. All forms must agree first."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import cycle
from statistics import mean
from typing import Any

import torch

from bdh.bench import BenchOptions
from bdh.bench.decoders import AllocatingDecoder, Decoder, Gpt2Decoder, RecomputingDecoder, StateDecoder
from bdh.bench.models import Bandwidth, Density, measure_bandwidth, naive_logits, random_tokens, traffic
from bdh.bench.report import Progress, Report, interleaved, milliseconds
from bdh.memory import used_bytes
from bdh.model.modeling import BDHForCausalLM
from bdh.ops import Storage

TOLERANCE = 1e-4
"""Of the largest difference of two logits; where their standard deviation is above 1, as many times that."""
BATCHES = (1, 2, 4, 8)
POSITIONS = (1_000, 1_000_000)
_FORMATS: dict[str, tuple[Storage, Storage]] = {
    "kernels float32": ("float32", "float32"),
    "kernels, weights bfloat16": ("bfloat16", "float32"),
    "kernels, weights and state bfloat16": ("bfloat16", "bfloat16"),
}
_REFERENCE = "kernels float32"
_SETTLING_SECONDS = 0.5
"""For busy programs to start, and for the kernels to find out that they have."""


def bench_decode(model: BDHForCausalLM, options: BenchOptions, progress: Progress = lambda stage: None) -> Report:
    """Figures of single tokens. Nothing is timed unless kernels, dense steps and ``ops/naive.py`` agree."""
    report = Report("decode")
    density = report.introduce(model, options.seed)
    report.say(f"path      {StateDecoder(model, path='kernels').description}")
    _compare(report, model, options, progress)
    if report.failed:
        return report
    if options.busy:
        _time_busy(report, model, options, progress)
        return report
    progress("measuring the bandwidth")
    bandwidth = measure_bandwidth(options.copy_bytes)
    report.figures["bandwidth"] = {"copy_bytes_per_s": bandwidth.copy, "read_bytes_per_s": bandwidth.read}
    report.say(
        f"memory    copies {bandwidth.copy / 1e9:.1f} GB/s (read and written together), reads {bandwidth.read / 1e9:.1f} GB/s"
    )
    _time_forms(report, model, options, density, bandwidth, progress)
    _time_positions(report, model, options, progress)
    _time_batches(report, model, options, density, bandwidth, progress)
    return report


def _kernels(model: BDHForCausalLM, name: str) -> StateDecoder:
    weights, state = _FORMATS[name]
    return StateDecoder(model, name, path="kernels", weights=weights, state=state)


def _compare(report: Report, model: BDHForCausalLM, options: BenchOptions, progress: Progress) -> None:
    """The logits of all forms over the same tokens, read one by one."""
    count = options.agreement_tokens
    tokens = random_tokens(model.config.vocab_size, count, options.seed + 2)
    found: dict[str, torch.Tensor] = {}  # (T, V) of each form
    memory: dict[str, tuple[int, int]] = {}
    for decoder in [*(_kernels(model, name) for name in _FORMATS), StateDecoder(model, "dense", path="torch")]:
        progress(f"agreement: {decoder.name}, {count:,} tokens")
        found[decoder.name], memory[decoder.name] = _read_all(decoder, tokens)
    progress(f"agreement: ops/naive.py, {count:,} tokens")
    found["naive"] = naive_logits(model, tokens[None])[0]

    def difference(a: str, b: str) -> float:
        return (found[a] - found[b]).abs().max().item()

    largest, spread = found["naive"].abs().max().item(), found["naive"].std().item()
    allowed = TOLERANCE * max(1.0, spread)
    forms = {
        "kernels and dense recurrent": difference(_REFERENCE, "dense"),
        "kernels and ops/naive.py": difference(_REFERENCE, "naive"),
        "dense recurrent and ops/naive.py": difference("dense", "naive"),
    }
    _, by_weights, by_both = _FORMATS
    drift = {
        "bfloat16 weights": difference(_REFERENCE, by_weights),
        "bfloat16 state (both with bfloat16 weights)": difference(by_weights, by_both),
    }
    # Not `>`: what is not a number does not agree.
    report.failed = not all(value <= allowed for value in forms.values())
    report.figures["agreement"] = {
        "tokens": count,
        "largest_logit": largest,
        "standard_deviation": spread,
        "allowed": allowed,
        "agrees": not report.failed,
        "largest_difference": forms,
        "largest_difference_by_rounding": drift,
    }
    report.table(
        f"agreement: largest difference of logits over {count:,} tokens (their deviation {spread:.2f}, the largest {largest:.2f})",
        ["", "difference", "allowed"],
        [[name, f"{value:.1e}", f"{allowed:.1e}"] for name, value in forms.items()]
        + [[name, f"{value:.1e}", "-"] for name, value in drift.items()],
    )
    if report.failed:
        report.say("the forms do not agree: nothing was timed")
        return
    before, after = memory[_REFERENCE]
    report.figures["resident_bytes"] = {"before": before, "after": after, "tokens": count}
    report.say()
    report.say(
        f"memory    {before / 2**20:,.1f} MiB before and {after / 2**20:,.1f} MiB after the {count:,} tokens of the kernels"
    )


def _read_all(decoder: StateDecoder, tokens: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
    """The logits (T, V), and the memory of the process after the first token and after the last."""
    logits = torch.zeros(len(tokens), decoder.vocab_size)
    logits += 0  # so that its memory is mapped
    before = 0
    for index, token in enumerate(tokens.tolist()):
        logits[index] = decoder.read(token)
        before = before or used_bytes(torch.device("cpu"))
    return logits, (before, used_bytes(torch.device("cpu")))


def _time_forms(
    report: Report,
    model: BDHForCausalLM,
    options: BenchOptions,
    density: list[Density],
    bandwidth: Bandwidth,
    progress: Progress,
) -> None:
    text = random_tokens(model.config.vocab_size, options.context, options.seed + 3).tolist()
    fast, slow = options.tokens_in_round, max(1, options.tokens_in_round // 4)
    decoders: list[tuple[Decoder, int]] = [(_kernels(model, name), fast) for name in _FORMATS]
    decoders += [
        (StateDecoder(model, "dense recurrent, in place", path="torch"), slow),
        (AllocatingDecoder(model), slow),
        (RecomputingDecoder(model, options.context, text), 1),
    ]
    # From a little below the context to a little above it: the mean is at the context.
    num_reads = (options.rounds + 1) * fast
    torch.manual_seed(options.seed)
    gpt2 = Gpt2Decoder(model.config.vocab_size, (text * 2)[: max(1, options.context - num_reads // 2)])
    decoders.append((gpt2, fast))
    progress("timing: kernels, dense recurrent steps, ops/naive.py, GPT-2")
    timings = interleaved(
        {decoder.name: _reader(decoder, text) for decoder, _ in decoders},
        rounds=options.rounds,
        repeats={decoder.name: count for decoder, count in decoders},
    )
    reference = timings[_REFERENCE].median
    rows, figures = [], []
    for name, timing in timings.items():
        found: dict[str, Any] = {
            "name": name,
            "ms_per_token": 1000 * timing.median,
            "least_ms": 1000 * timing.least,
            "tokens_per_s": 1 / timing.median,
            "times_kernels_float32": timing.median / reference,
        }
        limit = ["", "", ""]
        if name in _FORMATS:
            moved = traffic(model.config, density, *_FORMATS[name])
            least = moved.limit_seconds(bandwidth)
            found |= {"bytes_per_token": moved.total, "limit_ms": 1000 * least, "of_limit": least / timing.median}
            limit = [f"{moved.total / 2**20:,.1f}", milliseconds(least), f"{100 * least / timing.median:.0f} %"]
        figures.append(found)
        times = [milliseconds(timing.median), milliseconds(timing.least)]
        rows.append([name, *times, f"{1 / timing.median:,.1f}", f"{timing.median / reference:,.2f}", *limit])
    report.figures["forms"] = figures
    report.table(
        f"one sequence, a token at a time: medians of {options.rounds} rounds by turns; GPT-2 at context {options.context}",
        ["", "ms/token", "least", "tokens/s", "times kernels", "MiB moved", "limit ms", "of limit"],
        rows,
    )


def _reader(decoder: Decoder, tokens: list[int]) -> Callable[[], int]:
    """Each call reads a further token of an endless text, and says which is likeliest to follow, as a greedy loop does."""
    text: Iterator[int] = cycle(tokens)
    return lambda: int(decoder.read(next(text)).argmax())


def _time_positions(report: Report, model: BDHForCausalLM, options: BenchOptions, progress: Progress) -> None:
    """The same tokens after an empty state, at positions far apart."""
    progress(f"timing: positions {POSITIONS[0]:,} and {POSITIONS[1]:,}")
    text = random_tokens(model.config.vocab_size, options.context, options.seed + 4).tolist()
    readers = {}
    for position in POSITIONS:
        decoder = StateDecoder(model, f"{position:,}", path="kernels")
        decoder.states[0].position = position
        readers[decoder.name] = _reader(decoder, text)
    repeats = dict.fromkeys(readers, options.tokens_in_round)
    timings = interleaved(readers, rounds=options.rounds, warm_up=2, repeats=repeats)
    first, last = (timings[f"{position:,}"] for position in POSITIONS)
    report.figures["positions"] = {
        "ms_per_token": {name: 1000 * timing.median for name, timing in timings.items()},
        "ratio": last.median / first.median,
    }
    report.table(
        f"kernels float32 by position (the last is {last.median / first.median:.3f} times the first)",
        ["position", "ms/token", "least"],
        [[name, milliseconds(timing.median), milliseconds(timing.least)] for name, timing in timings.items()],
    )


def _time_batches(
    report: Report,
    model: BDHForCausalLM,
    options: BenchOptions,
    density: list[Density],
    bandwidth: Bandwidth,
    progress: Progress,
) -> None:
    progress(f"timing: {', '.join(map(str, BATCHES))} sequences in a step")
    decoder = StateDecoder(model, path="kernels", num_sequences=max(BATCHES))
    texts = random_tokens(model.config.vocab_size, options.context * max(BATCHES), options.seed + 5)
    tokens = cycle(texts.view(-1, max(BATCHES)).tolist())
    readers = {
        str(batch): (lambda batch=batch: decoder.read_each(next(tokens)[:batch]).argmax(-1).tolist())
        for batch in BATCHES
    }
    repeats = dict.fromkeys(readers, max(1, options.tokens_in_round // 2))
    timings = interleaved(readers, rounds=options.rounds, warm_up=2, repeats=repeats)
    moved = traffic(model.config, density)
    rows, figures = [], []
    for batch in BATCHES:
        seconds, limit = timings[str(batch)].median, moved.limit_seconds(bandwidth, batch)
        gain = batch * timings["1"].median / seconds
        most = batch * moved.limit_seconds(bandwidth) / limit
        figures.append(
            {
                "sequences": batch,
                "ms_per_step": 1000 * seconds,
                "tokens_per_s": batch / seconds,
                "times_one": gain,
                "times_one_by_bytes": most,
                "limit_ms": 1000 * limit,
            }
        )
        speeds = [f"{batch / seconds:,.1f}", f"{gain:.2f}", f"{most:.2f}"]
        rows.append([str(batch), milliseconds(seconds), *speeds, milliseconds(limit)])
    report.figures["batches"] = figures
    report.table(
        "kernels float32, sequences in one step",
        ["sequences", "ms/step", "tokens/s", "times one", "by bytes", "limit ms"],
        rows,
    )


def bench_prefill(model: BDHForCausalLM, options: BenchOptions, progress: Progress = lambda stage: None) -> Report:
    """Seconds of prompts of several lengths from an empty state to the logits after their last token."""
    report = Report("prefill")
    report.introduce(model, options.seed)
    decoder = StateDecoder(model, path="kernels")
    report.say(f"path      {decoder.description}")
    lengths, count = options.prompt_lengths, options.naive_prompt
    tokens = random_tokens(model.config.vocab_size, max(*lengths, count), options.seed + 6)
    text = tokens.tolist()
    progress(f"timing: ops/naive.py over {count:,} tokens, once")
    start = time.perf_counter()
    expected = naive_logits(model, tokens[None, :count])[0, -1]
    naive_seconds = time.perf_counter() - start
    decoder.read_prompt(text[:64])  # what is compiled on first use
    progress("timing: the kernels over the same tokens")
    own = interleaved({"": lambda: decoder.read_prompt(text[:count])}, rounds=options.prompt_rounds, warm_up=0)[
        ""
    ].median
    difference = (decoder.read_prompt(text[:count]) - expected).abs().max().item()
    allowed = TOLERANCE * max(1.0, expected.std().item())
    report.failed = not difference <= allowed  # what is not a number does not agree
    report.figures["naive"] = {
        "tokens": count,
        "seconds": naive_seconds,
        "kernels_seconds": own,
        "ratio": naive_seconds / own,
        "largest_difference_of_last_logits": difference,
        "allowed": allowed,
    }
    if report.failed:
        report.say(f"the last of {count:,} tokens' logits differ by {difference:.1e}: must be at most {allowed:.1e}")
        report.say("the forms do not agree: nothing more was timed")
        return report
    report.say()
    report.say(
        f"ops/naive.py over {count:,} tokens, once: {naive_seconds:.2f} s, the kernels {own:.2f} s: "
        f"{naive_seconds / own:.1f} times; the last logits differ by {difference:.1e} at most"
    )
    progress(f"timing: prompts of {', '.join(f'{length:,}' for length in lengths)} tokens")
    timings = interleaved(
        {f"{length:,}": lambda length=length: decoder.read_prompt(text[:length]) for length in lengths},  # type: ignore[misc]
        rounds=options.prompt_rounds,
        warm_up=0,
    )
    found = {length: timings[f"{length:,}"].median for length in lengths}
    rows = []
    for length, shorter in zip(lengths, (0, *lengths), strict=False):
        ratio = f"{found[length] / found[shorter]:.2f}" if shorter else ""
        rows.append([f"{length:,}", f"{found[length]:.2f}", f"{length / found[length]:,.0f}", ratio])
    report.figures["prompts"] = [
        {"tokens": length, "seconds": seconds, "tokens_per_s": length / seconds} for length, seconds in found.items()
    ]
    report.figures["last_to_the_one_before"] = found[lengths[-1]] / found[lengths[-2]]
    report.table(
        f"kernels float32, medians of {options.prompt_rounds} rounds by turns",
        ["tokens", "seconds", "tokens/s", "times the one before"],
        rows,
    )
    return report


def _time_busy(report: Report, model: BDHForCausalLM, options: BenchOptions, progress: Progress) -> None:
    progress(f"timing: alone, and beside busy programs ({options.busy})")
    text = random_tokens(model.config.vocab_size, options.context, options.seed + 3).tolist()
    decoder, other = (StateDecoder(model, path="kernels") for _ in range(2))
    candidates: dict[str, Callable[[], object]] = {
        "a token": _reader(decoder, text),
        f"a prompt of {len(text)} tokens": lambda: other.read_prompt(text),
    }
    time_busy(report, candidates, options.busy, rounds=options.rounds, seconds=options.busy_seconds)


@contextmanager
def busy_programs(count: int) -> Iterator[None]:
    """So many other processes, each of which keeps a core busy."""
    programs = [subprocess.Popen([sys.executable, "-I", "-S", "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for program in programs:
            program.kill()
        for program in programs:
            program.wait()


def time_busy(
    report: Report, candidates: Mapping[str, Callable[[], object]], num_busy: int, *, rounds: int, seconds: float
) -> None:
    """Times each candidate for about so many seconds a round, with one thread and with all, alone and beside busy programs, by
    turns. Means, since what is lost to others is lost in lumps."""
    most = torch.get_num_threads()
    found: dict[tuple[str, int, int], list[float]] = {}
    try:
        for _ in range(rounds):
            for name, candidate in candidates.items():
                for threads in sorted({1, most}):
                    torch.set_num_threads(threads)
                    for busy in (0, num_busy):
                        with busy_programs(busy):
                            _run(candidate, min(_SETTLING_SECONDS, seconds))
                            found.setdefault((name, threads, busy), []).extend(_run(candidate, seconds))
    finally:
        torch.set_num_threads(most)
    rows, figures = [], []
    for name in candidates:
        for threads in sorted({1, most}):
            alone, beside = mean(found[name, threads, 0]), mean(found[name, threads, num_busy])
            times = {"ms_alone": 1000 * alone, "ms_beside": 1000 * beside, "speed_kept": alone / beside}
            figures.append({"name": name, "threads": threads, **times})
            rows.append([name, str(threads), milliseconds(alone), milliseconds(beside), f"{alone / beside:.2f}"])
    report.figures["busy"] = {"programs": num_busy, "timings": figures}
    report.table(
        f"alone, and beside busy programs ({num_busy}): means of {rounds} rounds by turns",
        ["", "threads", "ms alone", "ms beside", "speed kept"],
        rows,
    )


def _run(candidate: Callable[[], object], seconds: float) -> list[float]:
    """The seconds of each call."""
    found: list[float] = []
    first = time.perf_counter()
    while not found or time.perf_counter() - first < seconds:
        start = time.perf_counter()
        candidate()
        found.append(time.perf_counter() - start)
    return found
