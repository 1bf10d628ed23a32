"""What a Dragon Hatchling and a GPT-2 of as many parameters learn from the same text, by bytes read and by time.

First both are timed by turns, a training step at a time, on one core of a machine that should be idle. Then each is trained
for as many steps as fit into ``--minutes``: so a neighbour cannot decide who learns more, and a training can be repeated to
the bit. The learning rate rises over 2 % of the steps, stays, and falls to a tenth over the last fifth. Both have the same
time in all; the losses after as many bytes are compared before it falls.

    python benchmarks/comparison.py --minutes 30              # every corpus, model and seed, one after the other
    python benchmarks/comparison.py --report --image picture.svg

A training writes a file into ``--out`` when it ends, and one whose file is there is not run again: several of these commands
can share the work, on a core each. ``--measure`` times the steps and ends.
"""

import argparse
import itertools
import json
import math
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median

import torch
from transformers import GPT2LMHeadModel

import bdh
from bdh.bench.common import gpt2_config, machine
from bdh.data import DataConfig, training_texts, validation_texts
from bdh.storage import write_text

CORPORA = {"stdlib": 0.0, "pydoc": 0.1}
"""With the dropout of both models: the small corpus is read many times."""
RATES = {"BDH": 4e-3, "GPT-2": 2e-3}
"""Over 300 steps of 12 blocks of 128 bytes of stdlib, 8e-3 and 2e-3 were the best of four, factors of two apart. Over half an
hour BDH learns more with 4e-3 than with 8e-3; for GPT-2 only 2e-3 was tried at that length."""
BLOCK, BATCH = 256, 8
MILLION_BYTES = BLOCK * BATCH / 1e6  # of a step
WINDOWS = 128
"""Blocks of held-out text that each evaluation reads."""
WARM_UP, COOL_DOWN, LAST_RATE = 0.02, 0.2, 0.1
"""Shares of the steps; of the learning rate."""
TIMED_STEPS = 80
POINTS = 60
"""Evaluations of a training."""
RESULTS = Path(__file__).parent / "results" / "comparison"


@dataclass
class Point:
    step: int
    loss: float
    """Of held-out text, nats a byte."""
    train_loss: float
    """Mean over the steps since the point before."""


@dataclass
class Result:
    corpus: str
    model: str
    seed: int
    learning_rate: float
    steps: int
    step_seconds: float
    """Of one core, alone."""
    seconds_used: float
    """Processor time of all steps, beside whatever else the machine did."""
    parameters: int
    processor: str
    torch: str
    points: list[Point]

    @property
    def constant(self) -> list[Point]:
        """The points before the learning rate falls."""
        return [point for point in self.points if point.step <= (1 - COOL_DOWN) * self.steps]


def made(model: str, dropout: float, seed: int) -> torch.nn.Module:
    """A model of bytes with 0.43 million parameters."""
    torch.manual_seed(seed)
    if model == "BDH":
        return bdh.BDH(
            bdh.BDHConfig(n_layer=3, n_embd=64, n_head=4, mlp_internal_dim_multiplier=32, dropout=dropout)
        ).train()
    return GPT2LMHeadModel(gpt2_config(256, BLOCK, layers=3, width=104, heads=4, dropout=dropout)).train()


def rate_at(share: float) -> float:
    """Share of the highest learning rate after this share of the training."""
    if share < WARM_UP:
        return max(share / WARM_UP, 0.02)
    return 1 - (1 - LAST_RATE) * max(0.0, share - (1 - COOL_DOWN)) / COOL_DOWN


def as_bytes(texts: Iterable[str]) -> torch.Tensor:
    return torch.frombuffer(bytearray("".join(texts).encode()), dtype=torch.uint8)


def spread(text: torch.Tensor, num_windows: int) -> torch.Tensor:
    """Windows of a block (num_windows, BLOCK), at equal distances in the text, none over another."""
    if len(text) < num_windows * BLOCK:
        raise ValueError(f"{len(text)} bytes of held-out text hold no {num_windows} windows of {BLOCK}")
    starts = [i * (len(text) - BLOCK) // (num_windows - 1) for i in range(num_windows)]
    return torch.stack([text[start : start + BLOCK] for start in starts]).long()


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, windows: torch.Tensor) -> float:
    model.eval()
    total = sum(float(model(part, labels=part).loss) * len(part) for part in windows.split(16))
    model.train()
    return total / len(windows)


class Training:
    """A model, and the step that trains it."""

    def __init__(self, corpus: str, model: str, seed: int, rate: float) -> None:
        self.text = as_bytes(training_texts(DataConfig(source=corpus)))
        self.model = made(model, CORPORA[corpus], seed)
        self.rate = rate
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=rate, weight_decay=0.1, betas=(0.9, 0.95), fused=True
        )
        self.chosen = torch.Generator().manual_seed(seed)

    def step(self, share: float) -> float:
        """The loss of the step after this share of the training."""
        starts = torch.randint(len(self.text) - BLOCK, (BATCH,), generator=self.chosen).tolist()
        batch = torch.stack([self.text[start : start + BLOCK] for start in starts]).long()
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * rate_at(share)
        loss = self.model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss)


def measure(folder: Path) -> dict[str, float]:
    """Seconds of a training step of each model, medians of steps that take turns; kept in ``folder``."""
    path = folder / "step_seconds.json"
    if path.exists():
        return dict(json.loads(path.read_text()))
    trainings = {model: Training("stdlib", model, 0, rate) for model, rate in RATES.items()}
    seconds: dict[str, list[float]] = {model: [] for model in trainings}
    for turn in range(TIMED_STEPS):
        for model, training in trainings.items():
            began = time.process_time()
            training.step(turn / TIMED_STEPS)
            seconds[model].append(time.process_time() - began)
    found = {model: median(each[5:]) for model, each in seconds.items()}
    write_text(path, json.dumps(found) + "\n")
    return found


def train(corpus: str, model: str, seed: int, rate: float, steps: int, step_seconds: float, every: int) -> Result:
    training = Training(corpus, model, seed, rate)
    windows = spread(as_bytes(validation_texts(DataConfig(source=corpus))), WINDOWS)
    points: list[Point] = []
    losses: list[float] = []
    used = 0.0
    for step in range(1, steps + 1):
        began = time.process_time()
        losses.append(training.step(step / steps))
        used += time.process_time() - began
        if not math.isfinite(losses[-1]):
            raise SystemExit(
                f"{model} on {corpus}, seed {seed}, rate {rate:g}: the loss of step {step} is {losses[-1]}"
            )
        if step % every == 0 or step == steps:
            found = held_out_loss(training.model, windows)
            points.append(Point(step, found, mean(losses)))
            losses.clear()
            print(f"{model}, {corpus}, seed {seed}, step {step:>6,} of {steps:,}: held out {found:.4f}", flush=True)
    parameters = sum(each.numel() for each in training.model.parameters())
    return Result(
        corpus,
        model,
        seed,
        rate,
        steps,
        step_seconds,
        used,
        parameters,
        str(machine()["cpu"]),
        torch.__version__,
        points,
    )


def load(folder: Path) -> list[Result]:
    results = []
    for path in sorted(folder.glob("*-*.json")):
        fields = json.loads(path.read_text())
        results.append(Result(**{**fields, "points": [Point(**point) for point in fields["points"]]}))
    return results


def loss_after(result: Result, step: int) -> float:
    """Held-out loss after so many steps, between the two nearest points, before the learning rate falls."""
    points = result.constant
    for before, after in itertools.pairwise(points):
        if before.step <= step <= after.step:
            share = (step - before.step) / (after.step - before.step)
            return before.loss + share * (after.loss - before.loss)
    raise ValueError(
        f"{result.model} on {result.corpus}: no two evaluations around step {step} at a constant learning rate"
    )


def listed(values: list[float], digits: int = 3) -> str:
    """Mean and, of several seeds, the range."""
    shown, least, most = (f"{value:.{digits}f}" for value in (mean(values), min(values), max(values)))
    return f"{shown} ({least} to {most})" if len(values) > 1 else shown


def report(results: list[Result]) -> str:
    """Table of the losses, as Markdown."""
    lines = [
        "| text | model | seeds | million bytes read | minutes used | after as many bytes | after as much time | lowest |",
        "| --- | --- | ---: | ---: | --- | --- | --- | --- |",
    ]
    for corpus in CORPORA:
        of_corpus = [each for each in results if each.corpus == corpus]
        equal_step = min((each.constant[-1].step for each in of_corpus), default=0)
        for model in RATES:
            group = [each for each in of_corpus if each.model == model]
            if not group:
                continue
            read = mean(each.steps for each in group) * MILLION_BYTES
            equal = listed([loss_after(each, equal_step) for each in group])
            last = listed([each.points[-1].loss for each in group])
            lowest = listed([min(point.loss for point in each.points) for each in group])
            used = listed([each.seconds_used / 60 for each in group], 1)
            lines.append(
                f"| {corpus} | {model} | {len(group)} | {read:.1f} | {used} | {equal} at {equal_step * MILLION_BYTES:.1f} "
                f"| {last} | {lowest} |"
            )
    return "\n".join(lines)


def draw(results: list[Result], path: Path) -> None:
    from matplotlib.figure import Figure

    corpora = [corpus for corpus in CORPORA if any(each.corpus == corpus for each in results)]
    figure = Figure(figsize=(9, 3.4 * len(corpora)), layout="constrained")
    for (left, right), corpus in zip(
        figure.subplots(len(corpora), 2, sharey="row", squeeze=False), corpora, strict=True
    ):
        seen: set[str] = set()
        for each in results:
            if each.corpus != corpus:
                continue
            style = {
                "color": "teal" if each.model == "BDH" else "darkorange",
                "label": None if each.model in seen else each.model,
            }
            seen.add(each.model)
            losses = [point.loss for point in each.points]
            left.plot([point.step * MILLION_BYTES for point in each.points], losses, **style)
            right.plot([point.step * each.step_seconds / 60 for point in each.points], losses, **style)
        first = [each.points[0].loss for each in results if each.corpus == corpus]
        last = [point.loss for each in results if each.corpus == corpus for point in each.points]
        left.set(title=f"{corpus}: by text read", xlabel="million bytes", ylabel="held-out loss, nats a byte")
        left.set_ylim(min(last) - 0.05, max(first) + 0.05)
        right.set(title=f"{corpus}: by time on one core", xlabel="minutes")
        left.legend()
        for axes in (left, right):
            axes.grid(alpha=0.3)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpora", nargs="+", choices=CORPORA, default=list(CORPORA))
    parser.add_argument("--models", nargs="+", choices=RATES, default=list(RATES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--minutes", type=float, default=30, help="of one core, for each training")
    parser.add_argument("--learning_rate", type=float, help="instead of the model's own")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument(
        "--measure", action="store_true", help="time the steps, where --out does not have that, and end"
    )
    parser.add_argument("--report", action="store_true", help="train nothing; print the table of what is in --out")
    parser.add_argument("--image", type=Path, help="with --report: picture to draw, as .svg or .png")
    arguments = parser.parse_args()
    folder: Path = arguments.out
    if arguments.report:
        results = load(folder)
        if not results:
            raise SystemExit(f"{folder} holds no results: run this without --report first")
        print(report(results))
        if arguments.image:
            draw(results, arguments.image)
        return
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    step_seconds = measure(folder)
    print("seconds of a step:", *(f"{model} {seconds:.3f}" for model, seconds in step_seconds.items()), flush=True)
    if arguments.measure:
        return
    for seed in arguments.seeds:
        for corpus in arguments.corpora:
            for model in arguments.models:
                path = folder / f"{corpus}-{model}-{seed}.json"
                if path.exists():
                    continue
                rate = arguments.learning_rate or RATES[model]
                steps = max(1, round(60 * arguments.minutes / step_seconds[model]))
                every = max(1, steps // POINTS)
                result = train(corpus, model, seed, rate, steps, step_seconds[model], every)
                write_text(path, json.dumps(asdict(result)) + "\n")


if __name__ == "__main__":
    main()
