"""Reading prompts: what they cost by their length."""

import time
from statistics import median

import torch

from bdh.bench.config import BenchOptions
from bdh.bench.decode import TOLERANCE, Progress
from bdh.bench.report import Report, random_tokens
from bdh.bench.timing import interleaved
from bdh.bench.weights import naive_logits
from bdh.generate.advance import Advancer, StepInput
from bdh.model.modeling import BDHForCausalLM


def bench_prefill(model: BDHForCausalLM, options: BenchOptions, progress: Progress = lambda stage: None) -> Report:
    """Seconds of prompts of several lengths from an empty state to the logits behind their last token."""
    report = Report("prefill")
    report.introduce(model, options.seed)
    advancer = Advancer(model, path="kernels")
    report.say(f"path      {advancer.description}")
    state = advancer.new_state()
    lengths = options.prompt_lengths
    tokens = random_tokens(model.config.vocab_size, max(*lengths, options.naive_prompt), options.seed + 6)
    text = tokens.tolist()

    def read(length: int) -> torch.Tensor | None:
        state.clear()
        return advancer.advance([StepInput(state, text[:length])])[0]

    progress(f"timing: ops/naive.py over {options.naive_prompt:,} tokens, once")
    start = time.perf_counter()
    expected = naive_logits(model, tokens[None, : options.naive_prompt])[0, -1]
    naive_seconds = time.perf_counter() - start
    advancer.advance([StepInput(state, text[:64])])  # what is compiled on first use
    progress("timing: the kernels over the same tokens")
    seconds = []
    for _ in range(options.prompt_rounds):
        start = time.perf_counter()
        logits = read(options.naive_prompt)
        seconds.append(time.perf_counter() - start)
    assert logits is not None
    difference, allowed = (logits - expected).abs().max().item(), TOLERANCE * max(1.0, expected.std().item())
    report.failed = not difference <= allowed  # what is not a number does not agree
    report.figures["naive"] = {
        "tokens": options.naive_prompt,
        "seconds": naive_seconds,
        "kernels_seconds": median(seconds),
        "ratio": naive_seconds / median(seconds),
        "largest_difference_of_last_logits": difference,
        "allowed": allowed,
    }
    if report.failed:
        report.say(
            f"the last of {options.naive_prompt:,} tokens' logits differ by {difference:.1e}: must be at most {allowed:.1e}"
        )
        report.say("the forms do not agree: nothing more was timed")
        return report
    report.say()
    report.say(
        f"ops/naive.py over {options.naive_prompt:,} tokens, once: {naive_seconds:.2f} s, the kernels {median(seconds):.2f} s: "
        f"{naive_seconds / median(seconds):.1f} times; the last logits differ by {difference:.1e} at most"
    )

    progress(f"timing: prompts of {', '.join(f'{length:,}' for length in lengths)} tokens")
    timings = interleaved(
        {f"{length:,}": lambda length=length: read(length) for length in lengths},  # type: ignore[misc]
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
