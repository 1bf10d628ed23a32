"""One token after the other: the kernels, the dense forms of the same model, and a transformer."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from bdh.bench.bandwidth import bytes_of_a_token, copy_bandwidth
from bdh.bench.baselines import AllocatingStepper, naive_logits, recomputing, transformer
from bdh.bench.report import Report
from bdh.bench.timing import resident_bytes, timed
from bdh.bench.weights import densities, naive_weights
from bdh.generate.stepper import Feed, SequenceState, Stepper, TorchStepper, make_stepper
from bdh.model.modeling import BDHForCausalLM

TOLERANCE = 1e-4
"""Largest difference of logits of about 1 between forms that add the same float32 numbers in another order."""


class DisagreementError(Exception):
    """The forms to be timed do not compute the same."""


@dataclass
class DecodeSizes:
    agreement_tokens: int = 2000
    context: int = 512
    """Of what reads all of it again, and of the transformer."""
    rounds: int = 7
    calls: int = 10
    """Tokens in a round."""
    flat_tokens: int = 2000
    """Over which the memory is watched."""


def bench_decode(model: BDHForCausalLM, tokens: list[int], report: Report, sizes: DecodeSizes) -> None:
    """
    Args:
        tokens: a text that is longer than ``agreement_tokens`` and ``context``.

    Raises:
        DisagreementError: the forms differ; nothing has been timed.
    """
    kernels = make_stepper(model)
    half_weights = make_stepper(model, weights="bfloat16")
    half_both = make_stepper(model, weights="bfloat16", state="bfloat16")
    dense = TorchStepper(model)
    report.facts["kernels"] = kernels.path
    _agreement(model, kernels, dense, half_weights, half_both, tokens[: sizes.agreement_tokens], report)

    context = tokens[: sizes.context]
    gpt2, gpt2_parameters = transformer(sizes.context)
    fast = {
        "kernels, float32": _next(kernels, context),
        "kernels, weights bfloat16": _next(half_weights, context),
        "kernels, weights and state bfloat16": _next(half_both, context),
        "dense recurrent, in place": _next(dense, context),
        f"GPT-2 of {gpt2_parameters / 1e6:.0f}M, context {sizes.context}": gpt2,
    }
    found = timed(fast, rounds=sizes.rounds, calls=sizes.calls)
    slow = {"dense recurrent, new states": _next(AllocatingStepper(model), context)}
    found |= timed(slow, rounds=3, calls=2)
    found |= timed({f"naive, {sizes.context} tokens again": recomputing(model, context)}, rounds=2)
    report.section("one sequence")
    ours = found["kernels, float32"].median
    for name, timing in found.items():
        ratio = f"{timing.median / ours:.1f} x the kernels' time"
        report.add(name, timing.median * 1e3, "ms a token", f"{1 / timing.median:,.1f} tokens/s, {ratio}")

    _limits(model, tokens, ours, found["kernels, weights bfloat16"].median, report)
    _positions(kernels, context, report, sizes)
    _batches(model, kernels, context, tokens, report, sizes)


def _next(stepper: Stepper, context: list[int]) -> Callable[[], object]:
    """Greedy decoding behind a context, a token a call."""
    state = stepper.new_state()
    last = [stepper.step([Feed(state, context)])[0]]

    def step() -> object:
        assert last[0] is not None
        last[:] = stepper.step([Feed(state, [int(last[0].argmax())])])
        return last

    return step


def _agreement(
    model: BDHForCausalLM,
    kernels: Stepper,
    dense: Stepper,
    half_weights: Stepper,
    half_both: Stepper,
    tokens: list[int],
    report: Report,
) -> None:
    exact = naive_logits(model, naive_weights(model), torch.tensor([tokens]))
    report.section(f"agreement over {len(tokens):,} tokens, read one by one: largest difference from ops/naive.py")
    report.add("largest logit", exact.abs().max().item(), "")
    worst = 0.0
    for name, stepper in (("kernels, float32", kernels), ("dense recurrent", dense)):
        worst = max(worst, report.add(name, _difference(stepper, tokens, exact), "of a logit"))
    if not worst <= TOLERANCE:
        raise DisagreementError(
            f"the forms differ by {worst:.2e} of a logit, more than {TOLERANCE:g}: nothing is timed"
        )
    for name, stepper in (("weights bfloat16", half_weights), ("weights and state bfloat16", half_both)):
        report.add(name, _difference(stepper, tokens, exact), "of a logit", "rounding, for which they are an option")


def _difference(stepper: Stepper, tokens: list[int], exact: torch.Tensor) -> float:
    state = stepper.new_state()
    worst = 0.0
    for place, token in enumerate(tokens):
        (logits,) = stepper.step([Feed(state, [token])])
        assert logits is not None
        worst = max(worst, (logits - exact[place]).abs().max().item())
    return worst


def _limits(model: BDHForCausalLM, tokens: list[int], float32: float, bfloat16: float, report: Report) -> None:
    bandwidth = copy_bandwidth()
    found = densities(model, torch.tensor(tokens[:256]))
    report.section("what a token has to move, and how long a copy of as much takes")
    report.add("copy bandwidth", bandwidth / 1e9, "GB/s", "read and written, of 1 GiB")
    for name, weight_bytes, seconds in (("float32", 4, float32), ("weights bfloat16", 2, bfloat16)):
        parts = bytes_of_a_token(model.config, found, weight_bytes=weight_bytes)
        for part, num_bytes in parts.items():
            report.add(f"{name}: {part}", num_bytes / 1e6, "MB")
        limit = sum(parts.values()) / bandwidth
        note = f"the kernels reach {limit / seconds:.0%} of this speed (more than 100 % where caches hold some of it)"
        report.add(f"{name}: all of it", limit * 1e3, "ms", note)


def _positions(kernels: Stepper, context: list[int], report: Report, sizes: DecodeSizes) -> None:
    states = {position: kernels.new_state() for position in (1_000, 1_000_000)}
    for position, state in states.items():
        kernels.step([Feed(state, context)])
        state.position = position
    found = timed(
        {str(position): _repeat(kernels, state) for position, state in states.items()},
        rounds=sizes.rounds,
        calls=sizes.calls,
    )
    report.section("far out")
    near, far = found["1000"].median, found["1000000"].median
    report.add("at position 1,000", near * 1e3, "ms a token")
    report.add("at position 1,000,000", far * 1e3, "ms a token", f"{far / near - 1:+.1%}")
    step = _repeat(kernels, states[1_000_000])
    before = resident_bytes()
    for _ in range(sizes.flat_tokens):
        step()
    grown = resident_bytes() - before
    report.add(f"memory grown over {sizes.flat_tokens:,} tokens", grown / 1e6, "MB", f"of {before / 1e6:,.0f} MB")


def _repeat(stepper: Stepper, state: SequenceState, token: int = 65) -> Callable[[], object]:
    return lambda: stepper.step([Feed(state, [token])])


def _batches(
    model: BDHForCausalLM,
    kernels: Stepper,
    context: list[int],
    tokens: list[int],
    report: Report,
    sizes: DecodeSizes,
) -> None:
    """Sequences that share a step: each on its own text, so that other neurons fire."""
    found = {}
    for count in (1, 2, 4, 8):
        states = [kernels.new_state() for _ in range(count)]
        texts = [tokens[number * 7 :] for number in range(count)]
        kernels.step([Feed(state, text[:64]) for state, text in zip(states, texts, strict=True)])
        place = [64]

        def step(
            states: list[SequenceState] = states, texts: list[list[int]] = texts, place: list[int] = place
        ) -> object:
            place[0] = 64 + (place[0] - 63) % (len(context) - 64)
            at = place[0]
            return kernels.step([Feed(state, [text[at]]) for state, text in zip(states, texts, strict=True)])

        found[count] = timed({"step": step}, rounds=sizes.rounds, calls=sizes.calls)["step"].median / count
    report.section("several sequences in a step")
    for count, seconds in found.items():
        speed = f"{1 / seconds:,.0f} tokens/s, {found[1] / seconds:.2f} times one's"
        report.add(f"{count} sequences", seconds * 1e3, "ms a token", speed)
    own = bytes_of_a_token(model.config, densities(model, torch.tensor(tokens[:256])))
    state_bytes = own["state, pairs that fire, read and written"]
    report.add(
        "of which each one's state",
        state_bytes / copy_bandwidth(rounds=3) * 1e3,
        "ms a token",
        f"{state_bytes / 1e6:,.0f} MB that no other sequence shares, at copy bandwidth",
    )
