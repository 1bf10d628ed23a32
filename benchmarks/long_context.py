"""What carrying the state and letting it decay do to the loss beyond the block that a model was trained on.

Trains one tiny model four times, from the same weights, on as many tokens of the same text: plainly, with
train.carry_state, with model.decay, and with both. Then reads the validation text in stretches of several blocks, each
from nothing, the state handed from block to block, and prints the loss of each block; the same as a picture with --png.
Before that it checks that reading block by block gives what reading a stretch at once gives.

    python benchmarks/long_context.py --png long_context.png     # three minutes on two CPU cores

Further flags, such as --model.n_embd=32, are settings of the training.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console

from bdh.cli.settings import parse_settings
from bdh.evaluate.loss import Metrics, evaluate_text
from bdh.model import BDHForCausalLM
from bdh.monitor import Monitor
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


def trained(folder: Path, source: str, block_size: int, steps: int, variant: dict[str, object], more: list[str]) -> Run:
    flags = {
        **MODEL,
        "data.source": source,
        "train.block_size": block_size,
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
        parts = [model(part, past_key_values=state).logits for part in tokens.split(block_size, 1)]
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


def draw(metrics: dict[str, Metrics], block_size: int, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    width = max(1, block_size // 4)
    for name, each in metrics.items():
        means = each.loss_by_block(width)
        axes.plot([(i + 0.5) * width for i in range(len(means))], means, label=name)
    axes.axvline(block_size, color="grey", linestyle=":", label="end of the block")
    axes.set(xlabel="tokens read", ylabel="loss, nats per token", xscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="stdlib", help="text, as data.source")
    parser.add_argument("--block_size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--blocks", type=int, default=8, help="blocks to read on through")
    parser.add_argument("--val_tokens", type=int, default=100_000, help="tokens to measure on, at most")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--png", type=Path, help="picture to write")
    arguments, more = parser.parse_known_args()

    metrics: dict[str, Metrics] = {}
    print(f"{'':16}" + "".join(f"  block {i + 1:<3}" for i in range(arguments.blocks)) + "  training")
    for name in arguments.variants:
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            run = trained(
                Path(folder) / "run", arguments.source, arguments.block_size, arguments.steps, VARIANTS[name], more
            )
            seconds = time.perf_counter() - started
            metrics[name] = measured(run, arguments.block_size, arguments.blocks, arguments.val_tokens)
        losses = metrics[name].loss_by_block(arguments.block_size)
        print(f"{name:16}" + "".join(f"  {loss:9.4f}" for loss in losses) + f"  {seconds:.0f} s", flush=True)
    if arguments.png:
        draw(metrics, arguments.block_size, arguments.png)
        print(f"The picture is in {arguments.png}")


if __name__ == "__main__":
    main()
