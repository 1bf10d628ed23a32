"""One token at a time: whether all forms agree, and then what each costs."""

from collections.abc import Callable, Iterator
from itertools import cycle
from typing import Any

import torch

from bdh.bench.bandwidth import Bandwidth, measure_bandwidth, traffic
from bdh.bench.baselines import AdvancerDecoder, AllocatingDecoder, Decoder, Gpt2Decoder, RecomputingDecoder
from bdh.bench.busy import time_busy
from bdh.bench.config import BenchOptions
from bdh.bench.report import Report, milliseconds, random_tokens
from bdh.bench.timing import interleaved
from bdh.bench.weights import Density, naive_logits
from bdh.generate.advance import Advancer, StepInput, Storage
from bdh.memory import used_bytes
from bdh.model.modeling import BDHForCausalLM

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

Progress = Callable[[str], None]


def bench_decode(model: BDHForCausalLM, options: BenchOptions, progress: Progress = lambda stage: None) -> Report:
    """Figures of single tokens. Nothing is timed unless kernels, dense steps and ``ops/naive.py`` agree."""
    report = Report("decode")
    density = report.introduce(model, options.seed)
    report.say(f"path      {Advancer(model, path='kernels').description}")
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


def _compare(report: Report, model: BDHForCausalLM, options: BenchOptions, progress: Progress) -> None:
    """The logits of all forms over the same tokens, read one by one."""
    count = options.agreement_tokens
    tokens = random_tokens(model.config.vocab_size, count, options.seed + 2)
    found: dict[str, torch.Tensor] = {}  # (T, V) of each form
    memory = (0, 0)
    for name, (weights, state) in _FORMATS.items():
        progress(f"agreement: {name}, {count:,} tokens")
        decoder = AdvancerDecoder(name, Advancer(model, path="kernels", weights=weights, state=state))
        found[name], before_and_after = _read_all(decoder, tokens)
        memory = before_and_after if name == _REFERENCE else memory
    progress(f"agreement: dense recurrent steps, {count:,} tokens")
    found["dense"], _ = _read_all(AdvancerDecoder("dense", Advancer(model, path="torch")), tokens)
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
    report.figures["resident_bytes"] = {"before": memory[0], "after": memory[1], "tokens": count}
    report.say()
    report.say(
        f"memory    {memory[0] / 2**20:,.1f} MiB before and {memory[1] / 2**20:,.1f} MiB behind the {count:,} tokens of the kernels"
    )


def _read_all(decoder: AdvancerDecoder, tokens: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
    """The logits (T, V), and the memory of the process behind the first token and behind the last."""
    logits = torch.zeros(len(tokens), decoder.advancer.model.config.vocab_size)
    logits += 0  # so that its pages are there
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
    decoders: list[Decoder] = [
        AdvancerDecoder(name, Advancer(model, path="kernels", weights=weights, state=state))
        for name, (weights, state) in _FORMATS.items()
    ]
    decoders += [
        AdvancerDecoder("dense recurrent, in place", Advancer(model, path="torch")),
        AllocatingDecoder(model),
        RecomputingDecoder(model, options.context, text),
    ]
    fast, slow = options.tokens_in_round, max(1, options.tokens_in_round // 4)
    repeats = {decoder.name: fast for decoder in decoders[:3]} | {decoder.name: slow for decoder in decoders[3:5]}
    # From a little below the context to a little above it: the mean is at the context.
    num_reads = (options.rounds + 1) * fast
    torch.manual_seed(options.seed)
    gpt2 = Gpt2Decoder(model.config.vocab_size, (text * 2)[: max(1, options.context - num_reads // 2)])
    decoders.append(gpt2)
    repeats[gpt2.name] = fast
    progress("timing: kernels, dense recurrent steps, ops/naive.py, GPT-2")
    timings = interleaved(
        {decoder.name: _reader(decoder, text) for decoder in decoders}, rounds=options.rounds, repeats=repeats
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
        rows.append(
            [
                name,
                milliseconds(timing.median),
                milliseconds(timing.least),
                f"{1 / timing.median:,.1f}",
                f"{timing.median / reference:,.2f}",
                *limit,
            ]
        )
    report.figures["forms"] = figures
    report.table(
        f"one sequence, a token at a time: medians of {options.rounds} rounds by turns; GPT-2 at context {options.context}",
        ["", "ms/token", "least", "tokens/s", "times kernels", "MiB moved", "limit ms", "of limit"],
        rows,
    )


def _reader(decoder: Decoder, tokens: list[int]) -> Callable[[], int]:
    """Each call reads a further token of an endless text."""
    text: Iterator[int] = cycle(tokens)
    return lambda: decoder.next(next(text))


def _time_busy(report: Report, model: BDHForCausalLM, options: BenchOptions, progress: Progress) -> None:
    progress(f"timing: alone, and beside busy programs ({options.busy})")
    text = random_tokens(model.config.vocab_size, options.context, options.seed + 3).tolist()
    decoder = AdvancerDecoder("a token", Advancer(model, path="kernels"))
    state = decoder.advancer.new_state()

    def read_prompt() -> None:
        state.clear()
        decoder.advancer.advance([StepInput(state, text)])

    candidates = {"a token": _reader(decoder, text), f"a prompt of {len(text)} tokens": read_prompt}
    time_busy(report, candidates, options.busy, rounds=options.rounds, seconds=options.busy_seconds)


def _time_positions(report: Report, model: BDHForCausalLM, options: BenchOptions, progress: Progress) -> None:
    """The same tokens behind an empty state, at positions far apart."""
    progress(f"timing: positions {POSITIONS[0]:,} and {POSITIONS[1]:,}")
    text = random_tokens(model.config.vocab_size, options.context, options.seed + 4).tolist()
    readers = {}
    for position in POSITIONS:
        decoder = AdvancerDecoder(f"{position:,}", Advancer(model, path="kernels"))
        decoder.state.position = position
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
    config = model.config
    largest = AdvancerDecoder("kernels", Advancer(model, path="kernels"), batch=max(BATCHES))
    texts = random_tokens(config.vocab_size, options.context * max(BATCHES), options.seed + 5)
    columns = cycle(texts.view(-1, max(BATCHES)).tolist())
    readers: dict[str, Callable[[], object]] = {}
    for batch in BATCHES:
        decoder = AdvancerDecoder("kernels", largest.advancer, batch=0)
        decoder.states = largest.states[:batch]
        readers[str(batch)] = (
            lambda decoder=decoder, batch=batch: [  # type: ignore[misc]
                int(row.argmax()) for row in decoder.read_each(next(columns)[:batch])
            ]
        )
    repeats = dict.fromkeys(readers, max(1, options.tokens_in_round // 2))
    timings = interleaved(readers, rounds=options.rounds, warm_up=2, repeats=repeats)
    moved = traffic(config, density)
    alone = timings["1"].median
    rows, figures = [], []
    for batch in BATCHES:
        seconds, limit = timings[str(batch)].median, moved.limit_seconds(bandwidth, batch)
        gain = batch * alone / seconds
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
        rows.append(
            [
                str(batch),
                milliseconds(seconds),
                f"{batch / seconds:,.1f}",
                f"{gain:.2f}",
                f"{most:.2f}",
                milliseconds(limit),
            ]
        )
    report.figures["batches"] = figures
    report.table(
        "kernels float32, sequences in one step",
        ["sequences", "ms/step", "tokens/s", "times one", "by bytes", "limit ms"],
        rows,
    )
