"""Benchmarks of reading: single tokens in several forms, several sequences, and prompts. All forms must agree first.

All decoders read the same tokens, rather than their own continuations, so that they do the work of the same text.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle, pairwise
from statistics import mean

import torch

from bdh.bench import BenchOptions
from bdh.bench.common import (
    Bandwidth,
    Progress,
    Report,
    gpt2_shape,
    interleaved,
    measure_bandwidth,
    milliseconds,
    naive_logits,
    random_tokens,
    traffic,
)
from bdh.bench.decoders import (
    AllocatingDecoder,
    Decoder,
    Gpt2Decoder,
    RecomputingDecoder,
    StateDecoder,
    allowed_difference,
    made_gpt2,
    reader,
)
from bdh.memory import used_bytes
from bdh.model.modeling import BDHForCausalLM
from bdh.ops import StateFormat, WeightFormat

BATCHES = (1, 2, 4, 8)
POSITIONS = (1_000, 1_000_000)
_REFERENCE = "kernels float32"
_BY_WEIGHTS, _BY_BOTH = "kernels, weights bfloat16", "kernels, weights and state bfloat16"
_FORMATS: dict[str, tuple[WeightFormat, StateFormat]] = {
    _REFERENCE: ("float32", "float32"),
    _BY_WEIGHTS: ("bfloat16", "float32"),
    _BY_BOTH: ("bfloat16", "bfloat16"),
}
_SETTLING_SECONDS = 0.5
"""The time for busy programs to start, and for the kernels to notice them."""


def bench_decode(model: BDHForCausalLM, options: BenchOptions, progress: Progress = lambda stage: None) -> Report:
    """Returns figures of single tokens. Nothing is timed unless kernels, dense steps and ``ops/naive.py`` agree."""
    bench = _DecodeBench(model, options, progress)
    report = bench.report
    bench.compare()
    if report.failed:
        return report
    if options.busy:
        bench.time_busy()
        return report
    progress("measuring the bandwidth")
    bench.bandwidth = measure_bandwidth(options.copy_bytes)
    copied, read = bench.bandwidth.copy, bench.bandwidth.read
    report.figures["bandwidth"] = {"copy_bytes_per_s": copied, "read_bytes_per_s": read}
    report.say(f"memory    copies {copied / 1e9:.1f} GB/s (read and written together), reads {read / 1e9:.1f} GB/s")
    bench.time_forms()
    bench.time_positions()
    bench.time_batches()
    return report


class _DecodeBench:
    bandwidth: Bandwidth

    def __init__(self, model: BDHForCausalLM, options: BenchOptions, progress: Progress):
        self.model, self.options, self.progress = model, options, progress
        self.report = Report("decode")
        self.density = self.report.introduce(model, options.seed)
        self.report.say(f"path      {StateDecoder(model, path='kernels').advancer.description}")

    def text(self, count: int, seed: int) -> torch.Tensor:
        return random_tokens(self.model.config.vocab_size, count, self.options.seed + seed)

    def kernels(self, name: str) -> StateDecoder:
        weights, state = _FORMATS[name]
        return StateDecoder(self.model, name, path="kernels", weights=weights, state=state)

    def compare(self) -> None:
        """Compares the logits of all forms over the same tokens, read one by one."""
        report, count = self.report, self.options.agreement_tokens
        tokens = self.text(count, 2)
        found: dict[str, torch.Tensor] = {}  # (T, V) of each form
        memory: dict[str, list[int]] = {}
        for decoder in [*map(self.kernels, _FORMATS), StateDecoder(self.model, "dense", path="torch")]:
            self.progress(f"agreement: {decoder.name}, {count:,} tokens")
            logits = found[decoder.name] = torch.zeros(count, self.model.config.vocab_size)
            logits += 0  # so that its memory is allocated now
            used = memory[decoder.name] = []  # after the first token, and after the last
            for index, token in enumerate(tokens.tolist()):
                logits[index] = decoder.read(token)
                if index in (0, count - 1):
                    used.append(used_bytes(torch.device("cpu")))
        self.progress(f"agreement: ops/naive.py, {count:,} tokens")
        found["naive"] = naive_logits(self.model, tokens[None])[0]

        def difference(a: str, b: str) -> float:
            return (found[a] - found[b]).abs().max().item()

        largest, spread = found["naive"].abs().max().item(), found["naive"].std().item()
        allowed = allowed_difference(found["naive"])
        forms = {
            "kernels and dense recurrent": difference(_REFERENCE, "dense"),
            "kernels and ops/naive.py": difference(_REFERENCE, "naive"),
            "dense recurrent and ops/naive.py": difference("dense", "naive"),
        }
        drift = {
            "bfloat16 weights": difference(_REFERENCE, _BY_WEIGHTS),
            "bfloat16 state (both with bfloat16 weights)": difference(_BY_WEIGHTS, _BY_BOTH),
        }
        # Not `>`: NaN must not count as agreement.
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
            f"agreement: largest difference of logits over {count:,} tokens (their deviation {spread:.2f}, the largest "
            f"{largest:.2f})",
            ["", "difference", "allowed"],
            [[name, f"{value:.1e}", f"{allowed:.1e}"] for name, value in forms.items()]
            + [[name, f"{value:.1e}", "-"] for name, value in drift.items()],
        )
        if report.failed:
            report.say("the forms do not agree: nothing was timed")
            return
        before, after = memory[_REFERENCE][0], memory[_REFERENCE][-1]
        report.figures["resident_bytes"] = {"before": before, "after": after, "tokens": count}
        report.say()
        report.say(
            f"memory    {before / 2**20:,.1f} MiB before and {after / 2**20:,.1f} MiB after the {count:,} tokens of the "
            "kernels"
        )

    def time_forms(self) -> None:
        options = self.options
        text = self.text(options.context, 3).tolist()
        fast, slow = options.tokens_in_round, max(1, options.tokens_in_round // 4)
        decoders: list[tuple[Decoder, int]] = [(self.kernels(name), fast) for name in _FORMATS]
        decoders += [
            (StateDecoder(self.model, "dense recurrent, in place", path="torch"), slow),
            (AllocatingDecoder(self.model), slow),
            (RecomputingDecoder(self.model, options.context, text), 1),
        ]
        # From a little below the context to a little above it: the mean is at the context.
        gpt2_text = text[: max(1, options.context - options.reads // 2)]
        gpt2 = made_gpt2(
            self.model.config.vocab_size, 2 * max(512, options.context), gpt2_shape(self.model), options.seed
        )
        decoders.append((Gpt2Decoder(gpt2, gpt2_text), fast))
        self.progress("timing: kernels, dense recurrent steps, ops/naive.py, GPT-2")
        timings = interleaved(
            {decoder.name: reader(decoder, text) for decoder, _ in decoders},
            rounds=options.rounds,
            repeats={decoder.name: count for decoder, count in decoders},
        )
        reference = timings[_REFERENCE].median
        rows, figures = [], []
        for name, timing in timings.items():
            times = timing.median / reference
            figures.append({"name": name, **timing.figures("token"), "times_kernels_float32": times})
            limit = ["", "", ""]
            if name in _FORMATS:
                moved = traffic(self.model.config, self.density, *_FORMATS[name])
                least = moved.limit_seconds(self.bandwidth)
                share = least / timing.median
                figures[-1] |= {"bytes_per_token": moved.total, "limit_ms": 1000 * least, "of_limit": share}
                limit = [f"{moved.total / 2**20:,.1f}", milliseconds(least), f"{100 * share:.0f} %"]
            rows.append([name, *timing.cells(), f"{1 / timing.median:,.1f}", f"{times:,.2f}", *limit])
        self.report.figures["forms"] = figures
        self.report.table(
            f"one sequence, a token at a time: medians of {options.rounds} rounds by turns; GPT-2 at context "
            f"{options.context}",
            ["", "ms/token", "least", "tokens/s", "times kernels", "MiB moved", "limit ms", "of limit"],
            rows,
        )

    def time_positions(self) -> None:
        """Times the same tokens after an empty state, at positions far apart."""
        self.progress(f"timing: positions {POSITIONS[0]:,} and {POSITIONS[1]:,}")
        text = self.text(self.options.context, 4).tolist()
        readers = {}
        for position in POSITIONS:
            decoder = StateDecoder(self.model, path="kernels")
            decoder.states[0].position = position
            readers[f"{position:,}"] = reader(decoder, text)
        repeats = dict.fromkeys(readers, self.options.tokens_in_round)
        timings = interleaved(readers, rounds=self.options.rounds, warm_up=2, repeats=repeats)
        first, last = timings.values()
        ratio = last.median / first.median
        by_position = {name: 1000 * timing.median for name, timing in timings.items()}
        self.report.figures["positions"] = {"ms_per_token": by_position, "ratio": ratio}
        self.report.table(
            f"kernels float32 by position (the last is {ratio:.3f} times the first)",
            ["position", "ms/token", "least"],
            [[name, *timing.cells()] for name, timing in timings.items()],
        )

    def time_batches(self) -> None:
        self.progress(f"timing: {', '.join(map(str, BATCHES))} sequences in a step")
        decoder = StateDecoder(self.model, path="kernels", num_sequences=max(BATCHES))
        texts = self.text(self.options.context * max(BATCHES), 5)
        tokens = cycle(texts.view(-1, max(BATCHES)).tolist())
        readers = {
            str(batch): (lambda batch=batch: decoder.read_each(next(tokens)[:batch]).argmax(-1).tolist())
            for batch in BATCHES
        }
        repeats = dict.fromkeys(readers, max(1, self.options.tokens_in_round // 2))
        timings = interleaved(readers, rounds=self.options.rounds, warm_up=2, repeats=repeats)
        moved = traffic(self.model.config, self.density)
        rows, figures = [], []
        for batch in BATCHES:
            seconds, limit = timings[str(batch)].median, moved.limit_seconds(self.bandwidth, batch)
            found = {
                "sequences": batch,
                "ms_per_step": 1000 * seconds,
                "tokens_per_s": batch / seconds,
                "times_one": batch * timings["1"].median / seconds,
                "times_one_by_bytes": batch * moved.limit_seconds(self.bandwidth) / limit,
                "limit_ms": 1000 * limit,
            }
            figures.append(found)
            forms = ("{}", "{:,.2f}", "{:,.1f}", "{:.2f}", "{:.2f}", "{:,.2f}")
            rows.append([form.format(value) for form, value in zip(forms, found.values(), strict=True)])
        self.report.figures["batches"] = figures
        self.report.table(
            "kernels float32, sequences in one step",
            ["sequences", "ms/step", "tokens/s", "times one", "by bytes", "limit ms"],
            rows,
        )

    def time_busy(self) -> None:
        """Times a token and a prompt with one thread and with all, with and without busy programs, by turns.

        Each is timed for about ``busy_seconds`` in a round. The figures are means, since the time that is lost to other
        programs is lost in a few large pieces.
        """
        options, num_busy, seconds = self.options, self.options.busy, self.options.busy_seconds
        self.progress(f"timing: alone, and beside busy programs ({num_busy})")
        text = self.text(options.context, 3).tolist()
        decoder, other = (StateDecoder(self.model, path="kernels") for _ in range(2))
        candidates: dict[str, Callable[[], object]] = {
            "a token": reader(decoder, text),
            f"a prompt of {len(text)} tokens": lambda: other.read_prompt(text),
        }
        most = torch.get_num_threads()
        found: dict[tuple[str, int], dict[int, list[float]]] = {}
        try:
            for _ in range(options.rounds):
                for name, candidate in candidates.items():
                    for threads in sorted({1, most}):
                        torch.set_num_threads(threads)
                        for busy in (0, num_busy):
                            with busy_programs(busy):
                                _run(candidate, min(_SETTLING_SECONDS, seconds))
                                times = found.setdefault((name, threads), {}).setdefault(busy, [])
                                times += _run(candidate, seconds)
        finally:
            torch.set_num_threads(most)
        rows, figures = [], []
        for (name, threads), times_of in found.items():
            alone, beside = mean(times_of[0]), mean(times_of[num_busy])
            times_in_ms = {"ms_alone": 1000 * alone, "ms_beside": 1000 * beside, "speed_kept": alone / beside}
            figures.append({"name": name, "threads": threads, **times_in_ms})
            rows.append([name, str(threads), milliseconds(alone), milliseconds(beside), f"{alone / beside:.2f}"])
        self.report.figures["busy"] = {"programs": num_busy, "timings": figures}
        self.report.table(
            f"alone, and beside busy programs ({num_busy}): means of {options.rounds} rounds by turns",
            ["", "threads", "ms alone", "ms beside", "speed kept"],
            rows,
        )


def bench_prefill(model: BDHForCausalLM, options: BenchOptions, progress: Progress = lambda stage: None) -> Report:
    """Returns the seconds of prompts of several lengths, from an empty state to the logits after the last token."""
    report = Report("prefill")
    report.introduce(model, options.seed)
    decoder = StateDecoder(model, path="kernels")
    report.say(f"path      {decoder.advancer.description}")
    lengths, count = options.prompt_lengths, options.naive_prompt
    tokens = random_tokens(model.config.vocab_size, max(*lengths, count), options.seed + 6)
    text = tokens.tolist()

    def timed(*lengths: int) -> list[float]:
        """Returns the median seconds of the kernels for prompts of these lengths."""
        prompts = {str(length): lambda length=length: decoder.read_prompt(text[:length]) for length in lengths}
        timings = interleaved(prompts, rounds=options.prompt_rounds, warm_up=0)
        return [timing.median for timing in timings.values()]

    progress(f"timing: ops/naive.py over {count:,} tokens, once")
    start = time.perf_counter()
    expected = naive_logits(model, tokens[None, :count])[0, -1]
    naive_seconds = time.perf_counter() - start
    decoder.read_prompt(text[:64])  # for what is compiled on first use
    progress("timing: the kernels over the same tokens")
    (own,) = timed(count)
    difference = (decoder.read_prompt(text[:count]) - expected).abs().max().item()
    allowed = allowed_difference(expected)
    report.failed = not difference <= allowed  # NaN must not count as agreement
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
    seconds = timed(*lengths)
    ratios = [later / earlier for earlier, later in pairwise(seconds)]
    figures = [
        {"tokens": n, "seconds": each, "tokens_per_s": n / each} for n, each in zip(lengths, seconds, strict=True)
    ]
    report.figures |= {"prompts": figures, "last_to_the_one_before": ratios[-1]}
    report.table(
        f"kernels float32, medians of {options.prompt_rounds} rounds by turns",
        ["tokens", "seconds", "tokens/s", "times the one before"],
        [
            [f"{each['tokens']:,}", f"{each['seconds']:.2f}", f"{each['tokens_per_s']:,.0f}", ratio]
            for each, ratio in zip(figures, ["", *(f"{ratio:.2f}" for ratio in ratios)], strict=True)
        ],
    )
    return report


@contextmanager
def busy_programs(count: int) -> Iterator[None]:
    """Runs ``count`` other processes, each of which keeps a core busy."""
    programs = [subprocess.Popen([sys.executable, "-I", "-S", "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for program in programs:
            program.kill()
        for program in programs:
            program.wait()


def _run(candidate: Callable[[], object], seconds: float) -> list[float]:
    """Calls a candidate again and again for this many seconds. Returns the seconds of each call."""
    found: list[float] = []
    first = time.perf_counter()
    while not found or time.perf_counter() - first < seconds:
        start = time.perf_counter()
        candidate()
        found.append(time.perf_counter() - start)
    return found
