"""Prompts of growing length, against the plain form."""

import time
from dataclasses import dataclass

import torch

from bdh.bench.baselines import naive_logits, recomputing
from bdh.bench.decode import TOLERANCE, DisagreementError
from bdh.bench.report import Report
from bdh.bench.weights import naive_weights
from bdh.generate.stepper import Feed, make_stepper
from bdh.model.modeling import BDHForCausalLM


@dataclass
class PrefillSizes:
    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192)
    naive_tokens: int = 4096
    agreement_tokens: int = 1000


def bench_prefill(model: BDHForCausalLM, tokens: list[int], report: Report, sizes: PrefillSizes) -> None:
    """
    Raises:
        DisagreementError: the forms differ; nothing has been timed.
    """
    stepper = make_stepper(model)
    report.facts["kernels"] = stepper.path
    some = tokens[: sizes.agreement_tokens]
    exact = naive_logits(model, naive_weights(model), torch.tensor([some]))
    (logits,) = stepper.step([Feed(stepper.new_state(), some, "all")])
    assert logits is not None
    report.section(f"agreement over {len(some):,} tokens, read at once")
    difference = report.add("largest difference from ops/naive.py", (logits - exact).abs().max().item(), "of a logit")
    if not difference <= TOLERANCE:
        raise DisagreementError(f"the forms differ by {difference:.2e} of a logit, more than {TOLERANCE:g}")
    report.section("reading a prompt into a state, the logits of its last token")
    found: dict[int, float] = {}
    for _ in range(2):  # in turn, the faster of two
        for length in sizes.lengths:
            state = stepper.new_state()
            start = time.perf_counter()
            stepper.step([Feed(state, tokens[:length])])
            found[length] = min(found.get(length, float("inf")), time.perf_counter() - start)
    for length, seconds in found.items():
        half = found.get(length // 2)
        note = f"{length / seconds:,.0f} tokens/s" + (f", {seconds / half:.2f} x half as many" if half else "")
        report.add(f"{length:,} tokens", seconds, "s", note)
    plain = recomputing(model, tokens[: sizes.naive_tokens])
    start = time.perf_counter()
    plain()
    seconds = time.perf_counter() - start
    ratio = seconds / found[sizes.naive_tokens]
    report.add(f"naive, {sizes.naive_tokens:,} tokens", seconds, "s", f"{ratio:.1f} x the kernels' time")
