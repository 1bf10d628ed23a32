"""Whether training in blocks follows the plain equations: the loss of every step, beside that of ``bdh/ops/naive.py``.

Runs of the same settings, and so of the same weights and batches, take turns: some compute as ``bdh train`` does, the
others by ``naive.forward`` and autograd. Without dropout, whose mask the naive form does not have, a carried state or documents.

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
from typing import Any, NoReturn

import torch

from bdh.bench.common import naive_forward
from bdh.cli.settings import parse_settings
from bdh.data.chat import holds_chat
from bdh.model.forward import plan_for
from bdh.ops.eager import cross_entropy
from bdh.train.config import RunSettings
from bdh.train.loop import training_step
from bdh.train.setup import Run, open_run
from bdh.validation import Faults

TOLERANCE = 1e-3
"""Nats, at every step, in float64."""
_EPILOG = "All else are settings of bdh train, such as --train.batch_size 4."
_SHOWN = (1, 2, 5, 10, 20, 50)
_FORMS = ("naive float64", "blocks float64", "naive float32", "blocks float32")


def main(argv: list[str] | None = None) -> int:
    """Returns 0 where the curves are the same, 1 where they are not, and 2 for bad input."""
    parser = _Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, epilog=_EPILOG
    )
    parser.add_argument("--config", default="configs/tiny.yaml", metavar="FILE", help="a configuration of bdh train")
    parser.add_argument("--steps", type=int, default=500, help="at least 1")
    try:
        arguments, overrides = parser.parse_known_args(argv)
        if arguments.steps < 1:
            raise ValueError(f"--steps is {arguments.steps}: must be at least 1, or nothing is compared")
        with tempfile.TemporaryDirectory() as folder:
            settings = {name: _settings(arguments.config, Path(folder), name, overrides) for name in _FORMS}
            _check(settings[_FORMS[0]])
            runs = {name: open_run(each) for name, each in settings.items()}
            largest = _compare(runs, arguments.steps)
            for run in runs.values():
                run.close()
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(
        f"blocks and naive, float64, {arguments.steps} steps: at most {largest:.1e} nats apart, allowed {TOLERANCE:.0e}"
    )
    return 0 if largest <= TOLERANCE else 1


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _check(settings: RunSettings) -> None:
    """
    Raises:
        ValueError: the naive form, as it is called here, does not compute what the settings ask for.
    """
    faults = Faults()
    model, train, pack = settings.model, settings.train, settings.data.pack
    faults.require(model.dropout == 0, "model.dropout", model.dropout, "0, since the naive form draws no mask")
    faults.require(
        not train.carry_state,
        "train.carry_state",
        train.carry_state,
        "false, since the naive form starts from no state",
    )
    faults.require(
        pack != "documents", "data.pack", pack, "another, since the naive form is given texts without starts"
    )
    is_chat = holds_chat(settings.data)
    faults.require(not is_chat, "data.source", settings.data.source, "no conversations, of which a row holds several")
    faults.require(train.lora.r == 0, "train.lora.r", train.lora.r, "0, since the naive form has no adapters")
    faults.raise_if_any()


def _compare(runs: dict[str, Run], num_steps: int) -> float:
    """Trains all, prints how far they are from the first, and returns how far the second was at most."""
    models = {name: run.model if name.startswith("blocks") else _naive(run) for name, run in runs.items()}
    for name, run in runs.items():
        print(f"{name}: {_path(run) if name.startswith('blocks') else 'bdh/ops/naive.py'}")
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
    training_step(run, model, *run.batches.next())
    run.progress.step += 1
    return run.guard.read(run.progress.step)[0].loss


def _path(run: Run) -> str:
    train, config = run.settings.train, run.model.config
    run.model.train()
    plan = plan_for(run.model, train.batch_size, train.block_size, config.attention_form)
    return "plain (asked for)" if plan is None else plan.describe(config.n_layer)


def _settings(config: str, folder: Path, name: str, overrides: list[str]) -> RunSettings:
    run_dir = folder / name.replace(" ", "_")
    argv = [f"--config={config}", f"--run_dir={run_dir}", f"--train.dtype={name.split()[1]}", *overrides]
    return parse_settings(RunSettings, argv, prog="loss_curve.py", description="As of bdh train.")


def _naive(run: Run) -> Callable[..., Any]:
    """What stands in for the model in a training step."""

    def step_model(input_ids: torch.Tensor, shift_labels: torch.Tensor, num_items_in_batch: int, **others: Any) -> Any:
        assert others["document_starts"] is None
        assert others["cache"] is None
        logits = naive_forward(run.model, input_ids)
        loss = cross_entropy(logits.flatten(0, 1), shift_labels.flatten(), num_items=num_items_in_batch)
        return SimpleNamespace(loss=loss)

    return step_model


if __name__ == "__main__":
    sys.exit(main())
