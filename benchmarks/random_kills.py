"""Kills a training with SIGKILL again and again, and compares what comes out with an undisturbed run.

    python benchmarks/random_kills.py --kills 30

Half of the kills come at a random moment, the others as soon as a checkpoint is being written. After each, the newest
checkpoint must load, every byte of it checked, and the training goes on with --resume. At the end all losses, samples
and weights must be those of the run that nobody disturbed, to the bit. Exits with 1 if anything is not as it should be. Further flags, such as --train.carry_state=true or
--data.streaming=true, are settings of the training.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from safetensors.torch import load_file
from torch import equal

from bdh.monitor import read_metrics
from bdh.train.checkpoint import Checkpointer

SETTINGS = {
    "data.source": "pydoc",
    "model.n_layer": 2,
    "model.n_embd": 64,
    "model.n_head": 2,
    "model.mlp_internal_dim_multiplier": 16,
    "train.block_size": 64,
    "train.batch_size": 8,
    "train.warmup_steps": 10,
    "train.eval_every_steps": 20,
    "train.eval_windows": 8,
    "train.sample_every_steps": 20,
    "train.sample_max_new_tokens": 10,
    "checkpoint.every_steps": 15,
    "monitor.log_every_steps": 1,
    "monitor.backends": "jsonl",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--steps", type=int, default=None, help="of the run; by default 40 for each kill")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--folder", type=Path, default=None, help="for the runs; by default a temporary one")
    given, more = parser.parse_known_args()
    steps = given.steps or 40 * given.kills
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        settings = SETTINGS | {"train.max_steps": steps} | dict(flag.removeprefix("--").split("=", 1) for flag in more)
        if "data.mix" in settings:
            del settings["data.source"]
        flags = [f"--{name}={value}" for name, value in settings.items()]
        straight, disturbed = folder / "straight", folder / "disturbed"
        subprocess.run(command(straight, flags), check=True, stderr=subprocess.DEVNULL)
        kills, in_saves = disturb(disturbed, flags, given.kills, random.Random(given.seed))
        print(f"killed {kills} times, {in_saves} of them while a checkpoint was being written; newest always whole")
        faults = differences(straight, disturbed)
    for fault in faults:
        print(f"not the same: {fault}")
    if not faults:
        print(f"{steps} steps: losses, samples and weights are those of the undisturbed run, to the bit")
    return 1 if faults or kills < given.kills else 0


def command(run: Path, flags: list[str]) -> list[str]:
    return [sys.executable, "-m", "bdh", "train", f"--run_dir={run}", *flags]


def disturb(run: Path, flags: list[str], wanted: int, generator: random.Random) -> tuple[int, int]:
    """Trains to the end through so many kills; returns how many there were, and how many within a save."""
    kills = in_saves = 0
    checkpointer = Checkpointer(run)
    while True:
        resume = ["--resume"] if checkpointer.steps() else []
        if not resume and run.exists():  # killed before its first checkpoint: there is nothing to go on from
            run.rename(run.with_name(f"{run.name}-{kills}"))
        before = progress_of(run)
        process = subprocess.Popen(command(run, flags + resume), stderr=subprocess.DEVNULL)
        if kills < wanted and wait_for_training(process, run, before):
            if kills % 2:
                time.sleep(generator.uniform(0, 0.6))
            else:
                wait_for_save(process, run)
            in_saves += is_saving(run)
            process.send_signal(signal.SIGKILL)
        if process.wait() == 0:
            return kills, in_saves
        if process.returncode != -signal.SIGKILL:
            raise SystemExit(f"the training ended with status {process.returncode}")
        kills += 1
        if checkpointer.steps():
            checkpointer.load()  # raises if it is not whole


def progress_of(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return metrics.stat().st_size if metrics.exists() else 0


def wait_for_training(process: subprocess.Popen, run: Path, before: int) -> bool:
    """Until it has logged something; whether it still runs then."""
    while process.poll() is None:
        if progress_of(run) != before:
            return True
        time.sleep(0.005)
    return False


def wait_for_save(process: subprocess.Popen, run: Path) -> None:
    while process.poll() is None and not is_saving(run):
        time.sleep(0.0005)


def is_saving(run: Path) -> bool:
    folder = run / "checkpoints"
    return folder.exists() and any(name.startswith(".step-") for name in os.listdir(folder))


def differences(straight: Path, disturbed: Path) -> list[str]:
    faults = []
    for key in ("train/loss", "train/grad_norm", "val/loss"):
        ours, theirs = (
            [(row["step"], row[key]) for row in read_metrics(run / "metrics.jsonl") if key in row]
            for run in (straight, disturbed)
        )
        if ours != theirs:
            faults.append(f"{key}: {len(ours)} and {len(theirs)} values")
    if (straight / "samples.jsonl").read_text() != (disturbed / "samples.jsonl").read_text():
        faults.append("samples.jsonl")
    ours, theirs = (load_file(run / "model" / "model.safetensors") for run in (straight, disturbed))
    faults += [name for name, weight in ours.items() if not equal(weight, theirs[name])]
    return faults


if __name__ == "__main__":
    sys.exit(main())
