"""Benchmarks of a training step. Its gradients must agree with the plain equations before it is timed."""

import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from bdh.bench.common import Progress, Report, Timing, interleaved, milliseconds
from bdh.bench.steps import (
    STEPS,
    BlocksStep,
    Memory,
    NaiveStep,
    Step,
    TrainCase,
    device_clock,
    dropout_masks,
    make_model,
    measure_memory,
    median_step,
    plan_step,
)
from bdh.memory import available_bytes
from bdh.model.modeling import BDHForCausalLM
from bdh.ops import naive
from bdh.train.runtime import Runtime, matmul_peak, training_flops_per_token

TOLERANCES = {"float32": 5e-3, "bfloat16": 0.1, "float16": 0.02}
"""The allowed norm of the difference of two gradients of a weight, relative to the norm of the gradient.

Float32 sums in another order differ by about 1e-6. But if x or y is that close to 0, the neuron may or may not fire. One
such neuron and token among the 10^7 of a batch changes the gradients by 1e-4. Among the 10^6 of a small batch it changes
them by up to 2e-3, which is also the error of the plain equations in float32. A half-precision product rounds each of its
factors, by up to 4e-3 in bfloat16 and 5e-4 in float16, and a gradient passes through some tens of products."""
_SHARE_OF_MEMORY = 0.6


def bench_train(
    cases: list[TrainCase],
    *,
    baselines: Sequence[str] = ("naive", "compiled", "gpt2"),
    rounds: int = 5,
    progress: Progress = lambda stage: None,
) -> Report:
    """Returns figures of each case and of ``baselines``.

    If the gradients of a case do not agree, neither this case nor those after it are timed.

    Raises:
        LayerOptionError: the options of a case require something that is not available. Nothing has been computed.
    """
    report = Report("train")
    benches = [CaseBench(report, case, progress) for case in cases]
    _introduce(report, cases[0])
    report.figures["cases"] = []
    for bench in benches:
        bench.figures["rounds"] = rounds
        report.figures["cases"].append(bench.figures)
        report.say()
        report.say(f"step      {bench.describe()}, {bench.case.dtype}")
        bench.compare()
        if report.failed:
            break
        bench.time(baselines, rounds)
    return report


def bench_one_step(case: TrainCase, progress: Progress = lambda stage: None) -> Report:
    """Returns the memory and time of a single optimizer step, measured in a separate process.

    Raises:
        LayerOptionError: the options of the case require something that is not available. Nothing has been computed.
    """
    report = Report("train")
    bench = CaseBench(report, case, progress)
    _introduce(report, case)
    progress("one optimizer step in a fresh process")
    memory = measure_memory(case, "bdh", update=True)
    report.figures["one_step"] = {
        **bench.figures,
        "bytes_before": memory.before,
        "peak_bytes": memory.peak,
        "seconds": memory.seconds,
        "tokens_per_s": case.num_tokens / memory.seconds,
        "naive_bytes": case.naive_bytes(),
    }
    report.say(f"step      {bench.describe()}, with AdamW")
    report.say(f"memory    {_mebibytes(memory.before)} before, at most {_mebibytes(memory.peak)} during the step")
    report.say(f"          the plain equations would keep about {_mebibytes(case.naive_bytes())} for the backward pass")
    report.say(f"time      {memory.seconds:,.1f} s, the first step: {case.num_tokens / memory.seconds:,.0f} tokens/s")
    return report


def _introduce(report: Report, case: TrainCase) -> None:
    report.introduce(make_model(case).eval().requires_grad_(False).to("cpu"), case.seed)


class CaseBench:
    """Benchmarks one case. The constructor plans how its layer is computed, and describes it in ``figures``."""

    def __init__(self, report: Report, case: TrainCase, progress: Progress):
        self.report, self.case, self.progress = report, case, progress
        self.plan = plan_step(case)
        layer: dict[str, Any] = {"path": "plain", "reason": "asked for"}
        if self.plan is not None:
            layer = asdict(self.plan)
            layer["path"], layer["kept_passes"] = self.plan.path, layer.pop("kept_layer_steps")
            del layer["backend"]
            sizes = layer.pop("sizes")
            layer |= {"rows_per_block": sizes["sequences"], "tokens_per_block": sizes["tokens"]}
        self.figures: dict[str, Any] = {
            "batch_size": case.batch_size,
            "block_size": case.block_size,
            "device": case.device,
            "dtype": case.dtype,
            "dropout": case.config.dropout,
            "requested_density": case.density,
            "seed": case.seed,
            "threads": case.threads or torch.get_num_threads(),
            "layer_options": asdict(case.options),
            "layer": layer,
        }

    def describe(self) -> str:
        return f"{self.case.num_tokens:,} tokens: {self.case.batch_size} sequences of {self.case.block_size:,}"

    def compare(self) -> None:
        """Compares loss and gradients with ``ops/naive.py`` and the same dropout, on as many sequences as fit in memory."""
        case, report = self.case, self.report
        available = int(available_bytes(torch.device(case.device)) * _SHARE_OF_MEMORY)
        each = 3 * replace(case, batch_size=1).naive_bytes()  # in float64, and the masks
        small = replace(case, batch_size=max(1, min(case.batch_size, available // each)))
        if each > available:  # even one sequence is too large; a shorter one has fewer blocks of the same size
            small = replace(small, block_size=max(1, int(case.block_size * (available / each) ** 0.5)))
        self.progress(f"agreement: gradients over {small.batch_size} x {small.block_size} tokens")
        torch.manual_seed(case.seed)
        blocks = BlocksStep(small)
        torch.manual_seed(case.seed)
        loss = blocks()
        plan = plan_step(small)
        backend = "eager" if plan is None else plan.backend
        exact, plain = (_naive(small, dtype, backend) for dtype in (torch.float64, torch.float32))
        expected, rounded = exact(), plain()
        differences = {"loss": relative(abs(loss - expected), abs(expected))}
        of_naive = {"loss": relative(abs(rounded - expected), abs(expected))}
        for name, grad in _gradients(blocks.model).items():
            wanted, also = (getattr(step.weights, name).grad.double() for step in (exact, plain))
            differences[name] = relative((grad.double() - wanted).norm().item(), wanted.norm().item())
            of_naive[name] = relative((also - wanted).norm().item(), wanted.norm().item())
        allowed = TOLERANCES[case.dtype]
        # Not `>`: NaN must not count as agreement.
        report.failed = not all(value <= allowed for value in differences.values())
        self.figures["agreement"] = {
            "batch_size": small.batch_size,
            "block_size": small.block_size,
            "agrees": not report.failed,
            "allowed": allowed,
            "relative_difference": differences,
            "relative_difference_of_naive_in_float32": of_naive,
        }
        where = "" if small == case else f" over {small.batch_size} x {small.block_size:,} tokens, which fit in memory"
        report.table(
            f"agreement with ops/naive.py in float64{where}: norm of the difference as a share of the norm, allowed "
            f"{allowed:.0e}",
            ["", *differences],
            [
                [name, *(f"{value:.1e}" for value in found.values())]
                for name, found in (("bdh", differences), ("ops/naive.py in float32", of_naive))
            ],
        )
        if report.failed:
            report.say("the gradients do not agree: nothing was timed")
        report.say()

    def time(self, baselines: Sequence[str], rounds: int) -> None:
        case, report, left_out = self.case, self.report, self._left_out(baselines)
        memory = {}
        for form in STEPS:
            if form == "bdh" or (form in baselines and form not in left_out):
                self.progress(f"memory: {form}")
                try:
                    memory[form] = measure_memory(case, form)
                except torch.OutOfMemoryError as error:
                    if form == "bdh":
                        raise
                    left_out[form] = f"runs out of memory: {error}"
        steps: dict[str, Step] = {}
        for form in memory:
            self.progress(f"making {form}")
            steps[form] = STEPS[form](case)
        self.progress(f"timing: {', '.join(steps)}")
        timings = interleaved(steps, rounds=rounds, warm_up=2)
        report.say(f"layer     {self.plan.describe(case.config.n_layer) if self.plan else 'plain (asked for)'}")
        self._say_forms(steps, timings, memory)
        for form, reason in left_out.items():
            report.say(f"  {STEPS[form].name} is left out: it {reason}")
        self.figures["left_out"] = left_out
        # The least number of operations that the step needs, compared with the speed of matrix products.
        peak = matmul_peak(Runtime(torch.device(case.device), getattr(torch, case.dtype), ""))
        useful = training_flops_per_token(case.config, case.block_size) * case.num_tokens / timings["bdh"].median
        self.figures["flops"] = {"useful_per_s": useful, "matmul_peak_per_s": peak, "share": useful / peak}
        report.say()
        report.say(
            f"useful    {useful / 1e9:,.0f} GFLOP/s, {100 * useful / peak:.0f} % of the {peak / 1e9:,.0f} that matrix "
            "products reach (as if all neurons fired: what is not computed counts too)"
        )
        self.progress("timing: the parts of bdh")
        total, parts = median_step(steps["bdh"], device_clock(case.device), rounds)
        self.figures["parts"] = {name: 1000 * value for name, value in parts.items()}
        self.figures["ms_of_step_with_clocks"] = 1000 * total
        report.table(
            f"where the time goes, over all layer steps: in a step with clocks in it, of {milliseconds(total)} ms, the median of "
            f"{rounds}",
            ["", "ms/step", "share"],
            [[name, milliseconds(value), f"{100 * value / total:.0f} %"] for name, value in parts.items()],
        )

    def _left_out(self, baselines: Sequence[str]) -> dict[str, str]:
        """Returns the baselines that cannot run here, and why."""
        case, left_out = self.case, dict[str, str]()
        if case.device == "cuda":  # a GPU reports a lack of memory, without effect on other programs
            torch.cuda.empty_cache()  # other processes need the memory of the comparison
        elif case.naive_bytes() > available_bytes(torch.device(case.device)) * _SHARE_OF_MEMORY:
            reason = f"would keep about {_mebibytes(case.naive_bytes())} for the backward pass"
            left_out = {"naive": reason, "compiled": reason}
        elif not any(map(shutil.which, ("g++", "clang++", "cl"))):
            left_out = {"compiled": "torch.compile needs a C++ compiler"}
        return {form: reason for form, reason in left_out.items() if form in baselines}

    def _say_forms(self, steps: dict[str, Step], timings: dict[str, Timing], memory: dict[str, Memory]) -> None:
        own = timings["bdh"].median
        rows, figures = [], []
        for form, timing in timings.items():
            before, peak, _ = memory[form]
            figures.append(
                {
                    "name": steps[form].name,
                    **timing.figures("step", self.case.num_tokens),
                    "bdh_is_faster": timing.median / own,
                    "bytes_before": before,
                    "peak_bytes": peak,
                }
            )
            times = [f"{1000 * timing.median:,.1f}", f"{1000 * timing.least:,.1f}"]
            speeds = [f"{self.case.num_tokens / timing.median:,.0f}", f"{timing.median / own:.2f} x"]
            rows.append(
                [steps[form].name, *times, *speeds, *(f"{n / 2**20:,.0f}" for n in (before, peak, peak - before))]
            )
        self.figures["forms"] = figures
        self.report.table(
            f"forward and backward pass, medians of {len(timings['bdh'].seconds)} rounds by turns; memory in processes of "
            "their own",
            ["", "ms/step", "least", "tokens/s", "bdh is faster", "MiB before", "peak", "more"],
            rows,
        )


def relative(difference: float, size: float) -> float:
    """Returns the relative difference; 0 if both are 0, since a text of one token gives most weights no gradient."""
    if size == 0:
        return 0.0 if difference == 0 else math.inf
    return difference / size


def _naive(case: TrainCase, dtype: torch.dtype, backend: str) -> NaiveStep:
    """Returns a step of the plain equations in this precision, with the dropout that this backend draws."""
    step = NaiveStep(replace(case, dtype="float32"))
    step.weights = naive.Weights(*(weight.detach().to(dtype).requires_grad_() for weight in step.weights))
    if case.config.dropout:
        torch.manual_seed(case.seed)
        plain_dtype = getattr(torch, case.dtype) if backend == "eager" else None
        masks = dropout_masks(step.model, case.batch_size, case.block_size, plain_dtype)
        step.masks = [mask.to(dtype) for mask in masks]
    return step


def _gradients(model: BDHForCausalLM) -> dict[str, torch.Tensor]:
    """Returns the gradients in the layout of ``naive.Weights``."""
    shape = (model.config.n_head, model.config.neurons_per_head)
    grads: dict[str, Any] = {name: weight.grad for name, weight in model.named_parameters()}
    return {
        "embed": grads["embed.weight"],
        "encoder": grads["encoder.weight"].unflatten(0, shape).transpose(1, 2),
        "encoder_v": torch.stack([grads[f"encoder_v.{head}.weight"].t() for head in range(shape[0])]),
        "decoder": grads["decoder.weight"].t(),
        "lm_head": grads["lm_head.weight"].t(),
    }


def _mebibytes(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.0f} MiB"
