"""What carrying the state and letting it decay do to the loss beyond the block that a model was trained on.

Trains one tiny model four times for each seed, from the same weights, on as many tokens of the same text: plainly, with
train.carry_state, with model.decay, and with both. Then reads the validation text in stretches of several blocks, each
from nothing, the state handed from block to block, and prints the loss of each block: means over the seeds, and their
range; the same as a picture with --image. Before that it checks that reading block by block gives what reading a stretch
at once gives.

    python benchmarks/long_context.py --image long_context.png     # three minutes on two CPU cores

With --results FILE the losses of each training are kept as it ends, and those that the file holds are not trained again: it
goes on after an interruption, and draws another picture in a moment. Further flags, such as --model.n_embd=32, are settings
of the training.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rich.console import Console

from bdh.bench.common import machine_line
from bdh.cli.settings import parse_settings
from bdh.evaluate.loss import Metrics, evaluate_text
from bdh.model import BDHForCausalLM
from bdh.monitor import Monitor
from bdh.storage import write_text
from bdh.train.config import RunSettings
from bdh.train.loop import fit
from bdh.train.setup import Run, open_run

MODEL = {
    "model.n_layer": 2,
    "model.n_embd": 48,
    "model.n_head": 4,
    "model.mlp_internal_dim_multiplier": 32,
    "model.dropout": 0.0,
    "tokenizer.special_tokens": "true",
    "train.learning_rate": 3e-3,
    "train.warmup_steps": 50,
    "train.batch_size": 16,
    "train.sample_every_steps": 0,
    "monitor.backends": "console,jsonl",
}
VARIANTS: dict[str, dict[str, object]] = {
    "plain": {},
    "carried": {"train.carry_state": "true"},
    "decay": {"model.decay": 32},
    "carried, decay": {"train.carry_state": "true", "model.decay": 32},
}


Losses = dict[str, dict[int, tuple[float, ...]]]
"""Of each variant and seed: the means of each few positions, from the first of a stretch to its last."""


def trained(folder: Path, arguments: argparse.Namespace, variant: dict[str, object], seed: int, more: list[str]) -> Run:
    steps = arguments.steps
    flags = {
        **MODEL,
        "data.source": arguments.source,
        "train.seed": seed,
        "train.block_size": arguments.block_size,
        "train.max_steps": steps,
        "train.warmup_steps": min(50, steps),
        "train.eval_every_steps": steps,
        "checkpoint.every_steps": steps,
        "monitor.log_every_steps": steps,
        **variant,
        **dict(flag.removeprefix("--").split("=", 1) for flag in more),
        "run_dir": folder,
    }
    argv = [f"--{name}={value}" for name, value in flags.items()]
    run = open_run(parse_settings(RunSettings, argv, prog="long_context", description=""))
    with Monitor(run.folder, run.settings.monitor, total_steps=steps, console=Console(quiet=True)) as monitor:
        fit(run, monitor)
    return run


def check_reading_on(model: BDHForCausalLM, tokens: torch.Tensor, block_size: int) -> None:
    """Stops where reading block by block is not reading all at once."""
    model.eval()
    with torch.no_grad():
        whole = model(tokens, use_cache=False, attention_form="parallel").logits
        state = model.new_state(len(tokens))
        parts = [model(part, cache=state).logits for part in tokens.split(block_size, 1)]
    # Float32 sums in another order, of states that grow with the text.
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-2, atol=1e-2)


def measured(run: Run, block_size: int, num_blocks: int, num_tokens: int) -> Metrics:
    """The loss by position on the first ``num_tokens`` of the validation part."""
    stretch = num_blocks * block_size
    tokens = run.corpus.validation_tokens()[: num_tokens // stretch * stretch + 1]
    if len(tokens) <= stretch:
        raise SystemExit(f"the validation part has {len(tokens)} tokens: one stretch needs {stretch + 1}")
    check_reading_on(run.model, torch.from_numpy(tokens[:stretch].astype("int64"))[None], block_size)
    return evaluate_text(
        run.model, tokens, bytes_per_token=1.0, block_size=block_size, carry_state=True, stretch_tokens=stretch
    )


def positions_in_mean(block_size: int) -> int:
    """About a quarter of a block, and a divisor of it."""
    return next(count for count in range(max(1, block_size // 4), 0, -1) if block_size % count == 0)


def by_block(losses: Sequence[float], num_blocks: int) -> list[float]:
    in_block = len(losses) // num_blocks
    return [mean(losses[start : start + in_block]) for start in range(0, len(losses), in_block)]


def table(losses: Losses, num_blocks: int) -> str:
    """Means over the seeds; of several seeds also the lowest and the highest."""
    lines = [f"{'':16}" + "".join(f"   block {i + 1}" for i in range(num_blocks))]
    for name, of_seeds in losses.items():
        blocks = list(zip(*(by_block(each, num_blocks) for each in of_seeds.values()), strict=True))
        forms = {name: mean} | ({"  lowest": min, "  highest": max} if len(of_seeds) > 1 else {})
        lines += [f"{form:16}" + "".join(f"  {of(block):8.4f}" for block in blocks) for form, of in forms.items()]
    return "\n".join(lines)


def draw(losses: Losses, block_size: int, path: Path) -> None:
    """The means over the seeds as lines, and what lies between the lowest and the highest as bands."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    width = positions_in_mean(block_size)
    for name, of_seeds in losses.items():
        points = list(zip(*of_seeds.values(), strict=True))
        at = [(i + 0.5) * width for i in range(len(points))]
        (line,) = axes.plot(at, [mean(each) for each in points], label=name)
        lowest, highest = ([of(each) for each in points] for of in (min, max))
        axes.fill_between(at, lowest, highest, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.axvline(block_size, color="grey", linestyle=":", label="end of the block")
    axes.set(xlabel="tokens read", ylabel="loss, nats per token", xscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


class Results:
    """The losses, and the file that keeps them.

    Raises:
        SystemExit: the file holds those of other settings.
    """

    def __init__(self, path: Path | None, settings: dict[str, Any]):
        self.path, self.settings = path, settings
        self.losses: Losses = {}
        if path is None or not path.exists():
            return
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["settings"] != settings:
            raise SystemExit(f"{path} holds losses of {found['settings']}: asked for are those of {settings}")
        for name, of_seeds in found["losses"].items():
            self.losses[name] = {int(seed): tuple(each) for seed, each in of_seeds.items()}

    def add(self, name: str, seed: int, losses: Sequence[float]) -> None:
        self.losses.setdefault(name, {})[seed] = tuple(round(loss, 5) for loss in losses)
        if self.path is not None:
            found = {"machine": machine_line(), "settings": self.settings, "losses": self.losses}
            write_text(self.path, json.dumps(found) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="stdlib", help="text, as data.source")
    parser.add_argument("--block_size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of the weights and of the batches")
    parser.add_argument("--blocks", type=int, default=8, help="blocks to read on through")
    parser.add_argument("--val_tokens", type=int, default=100_000, help="tokens to measure on, at most")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--threads", type=int, help="of torch and of the kernels; by default what torch takes")
    parser.add_argument("--results", type=Path, help="file that keeps the losses, as JSON")
    parser.add_argument("--image", type=Path, help="picture to write, as .svg or .png")
    arguments, more = parser.parse_known_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)

    block_size, num_blocks = arguments.block_size, arguments.blocks
    names = ("source", "block_size", "steps", "blocks", "val_tokens")
    results = Results(arguments.results, {name: getattr(arguments, name) for name in names} | {"more": more})
    print(machine_line())
    for seed in arguments.seeds:
        for name in arguments.variants:
            if seed in results.losses.get(name, {}):
                continue
            with tempfile.TemporaryDirectory() as folder:
                wall, cpu = time.perf_counter(), time.process_time()
                run = trained(Path(folder) / "run", arguments, VARIANTS[name], seed, more)
                wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
                metrics = measured(run, block_size, num_blocks, arguments.val_tokens)
            results.add(name, seed, metrics.loss_by_block(positions_in_mean(block_size)))
            print(
                f"seed {seed}, {name}: {metrics.num_tokens:,} tokens measured after a training of {wall:.0f} s "
                f"({cpu:.0f} s of processor time)",
                flush=True,
            )
    losses = {name: {seed: results.losses[name][seed] for seed in arguments.seeds} for name in arguments.variants}
    seeds = ", ".join(map(str, arguments.seeds))
    print(
        f"\nnats per token in each block of {block_size} tokens, trained for {arguments.steps:,} steps; seeds: {seeds}"
    )
    print(table(losses, num_blocks))
    if arguments.image:
        draw(losses, block_size, arguments.image)
        print(f"The picture is in {arguments.image}")


if __name__ == "__main__":
    main()
