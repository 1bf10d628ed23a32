"""Whether training in blocks follows the plain equations: the loss of every step, beside that of ``bdh/ops/naive.py``.

Runs of the same settings, and so of the same weights and batches, take turns: some compute as ``bdh train`` does, the
others by ``naive.forward`` and autograd. Without dropout, whose mask the naive form does not have.

In float64 the curves must be the same. In float32 no two orders of summation give the same curve for long: at the learning
rates of small models a rounding error of the first steps grows about a thousandfold in fifty steps. So there the blocks,
which run in the kernels, and the naive form are both compared with the float64 curve, and should leave it alike.

    python benchmarks/loss_curve.py --config configs/tiny.yaml --steps 500
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from bdh.cli.settings import parse_settings
from bdh.model.passes import plan_for
from bdh.ops import naive
from bdh.ops.loss import cross_entropy
from bdh.train.config import RunSettings
from bdh.train.run import Run, open_run
from bdh.train.step import training_step

TOLERANCE = 1e-3
"""Nats, at every step, in float64."""
_SHOWN = (1, 2, 5, 10, 20, 50)
_FORMS = ("naive float64", "blocks float64", "naive float32", "blocks float32")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/tiny.yaml")
    parser.add_argument("--steps", type=int, default=500)
    arguments, overrides = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = {
            name: _open(arguments.config, Path(folder) / name.replace(" ", "_"), name, overrides) for name in _FORMS
        }
        if runs[_FORMS[0]].model.config.dropout:
            print("model.dropout must be 0: the naive form draws no mask", file=sys.stderr)
            return 2
        for name, run in runs.items():
            run.model.train()
            train, config = run.settings.train, run.model.config
            plan = plan_for(run.model, train.batch_size, train.block_size, config.attention_form)
            assert plan is not None
            print(f"{name}: {plan.describe(config.n_layer) if name.startswith('blocks') else 'bdh/ops/naive.py'}")
        largest = _compare(runs, arguments.steps)
        for run in runs.values():
            run.close()
    print(
        f"blocks and naive, float64, {arguments.steps} steps: at most {largest:.1e} nats apart, allowed {TOLERANCE:.0e}"
    )
    return 0 if largest <= TOLERANCE else 1


def _compare(runs: dict[str, Run], num_steps: int) -> float:
    """Trains all, prints how far they are from the first, and returns how far the second was at most."""
    models = {name: run.model if name.startswith("blocks") else _naive(run) for name, run in runs.items()}
    expected, *others = _FORMS
    largest = dict.fromkeys(others, 0.0)
    print(f"{'step':>6}  {expected}" + "".join(f"  {name + ', apart':>24}" for name in others))
    for step in range(1, num_steps + 1):
        losses = {name: _step(run, models[name]) for name, run in runs.items()}
        for name in others:
            largest[name] = max(largest[name], abs(losses[name] - losses[expected]))
        if step in _SHOWN or step % 100 == 0 or step == num_steps:
            apart = "".join(f"  {value:24.1e}" for value in largest.values())
            print(f"{step:6}  {losses[expected]:13.6f}{apart}", flush=True)
    return largest["blocks float64"]


def _step(run: Run, model: Callable[..., Any]) -> float:
    run.optimizers.set_learning_rate(run.progress.step)
    loss = training_step(run, model).loss
    run.progress.step += 1
    return loss


def _open(config: str, folder: Path, name: str, overrides: list[str]) -> Run:
    argv = ["--config", config, "--run_dir", str(folder), "--train.dtype", name.split()[1], *overrides]
    return open_run(parse_settings(RunSettings, argv, prog="loss_curve.py", description="As of bdh train."))


def _naive(run: Run) -> Callable[..., Any]:
    """What stands in for the model in a training step."""
    model, config = run.model, run.model.config
    H, N = config.n_head, config.neurons_per_head

    def step_model(input_ids: torch.Tensor, shift_labels: torch.Tensor, num_items_in_batch: int, **others: Any) -> Any:
        assert others["document_starts"] is None
        assert others["past_key_values"] is None
        weights = naive.Weights(
            embed=model.embed.weight,
            encoder=model.encoder.weight.unflatten(0, (H, N)).transpose(1, 2),
            encoder_v=torch.stack([head.weight.t() for head in model.encoder_v]),  # type: ignore[operator]
            decoder=model.decoder.weight.t(),
            lm_head=model.lm_head.weight.t(),
        )
        logits = naive.forward(input_ids, weights, config.n_layer, theta=config.rope_theta, eps=config.layer_norm_eps)
        loss = cross_entropy(logits.flatten(0, 1), shift_labels.flatten(), num_items=num_items_in_batch)
        return SimpleNamespace(loss=loss)

    return step_model


if __name__ == "__main__":
    sys.exit(main())
