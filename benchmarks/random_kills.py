"""Kills a training with SIGKILL again and again, starts it twice at once, and compares with an undisturbed run.

    python benchmarks/random_kills.py --kills 30 --starts 30

- Kills: half of them come at a random moment, the others as soon as a checkpoint is being written. After each, the
  newest checkpoint must load, every byte of it checked, and the training continues with --resume.
- Replacements: a process that replaces a folder over and over is killed as often, with and without a system that can
  exchange two folders in one step. After each kill, the folder must be there and hold one version as a whole, and none
  before the last that was reported as written.
- Starts: another training is started twice again and again with the same --run_dir, the second a random time after the
  first. Never may two processes have files of it open for writing, and each step must be logged once.

At the end all losses, samples and weights of both trainings must be those of the one that nobody disturbed, to the bit.
Exits with 1 if anything is not as it should be. Further flags, such as --train.carry_state=true or
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

from forked import Forked, ForkServer  # beside this file
from safetensors.torch import load_file
from torch import equal

from bdh.monitor import read_metrics
from bdh.storage import recover_dir
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

# Replaces a folder of many files by the next version, and says so, until it is killed.
REPLACE = """
import itertools, pathlib, sys, time
from bdh import storage
if sys.argv[2] == "renames":
    storage.exchange = lambda *_: False
    rename = pathlib.Path.rename
    # Or hardly a kill would come in between.
    pathlib.Path.rename = lambda *paths: (rename(*paths), time.sleep(0.02))[0]
folder = pathlib.Path(sys.argv[1])
version = int((folder / "0").read_text()) if folder.exists() else 0
for version in itertools.count(version + 1):
    with storage.atomic_dir(folder) as temporary:
        for name in range(20):
            (temporary / str(name)).write_text(str(version))
    print(version, flush=True)
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--starts", type=int, default=30, help="double ones")
    parser.add_argument("--steps", type=int, default=None, help="of the run; by default 40 for each kill")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--folder", type=Path, default=None, help="for the runs; by default a temporary one")
    given, more = parser.parse_known_args()
    steps = given.steps or 40 * max(given.kills, given.starts)
    generator = random.Random(given.seed)
    with tempfile.TemporaryDirectory() as temporary, ForkServer() as server:
        folder = given.folder or Path(temporary)
        settings = SETTINGS | {"train.max_steps": steps} | dict(flag.removeprefix("--").split("=", 1) for flag in more)
        if "data.mix" in settings:
            del settings["data.source"]
        flags = [f"--{name}={value}" for name, value in settings.items()]
        straight, disturbed, doubled = (folder / name for name in ("straight", "disturbed", "doubled"))
        undisturbed = server.start(command(straight, flags))
        if undisturbed.wait():
            raise SystemExit(f"the undisturbed training failed: {undisturbed.said()}")
        kills, in_saves = disturb(server, disturbed, flags, given.kills, generator)
        print(f"killed {kills} times, {in_saves} of them while a checkpoint was being written; newest always whole")
        faults = differences(straight, disturbed)
        for how in ("exchange", "renames"):
            recovered = replace_and_kill(folder / how, how, given.kills, generator)
            print(
                f"folders replaced by {how}: killed {given.kills} times, {recovered} of them between two renames; "
                "the newest version always whole"
            )
        if given.starts:
            print(start_twice(server, doubled, flags, given.starts, steps, generator))
            faults += differences(straight, doubled)
    for fault in faults:
        print(f"not the same: {fault}")
    if not faults:
        print(f"{steps} steps: losses, samples and weights are those of the undisturbed run, to the bit")
    return 1 if faults or kills < given.kills else 0


def command(run: Path, flags: list[str]) -> list[str]:
    return ["train", f"--run_dir={run}", *flags]


def disturb(server: ForkServer, run: Path, flags: list[str], wanted: int, generator: random.Random) -> tuple[int, int]:
    """Trains to the end through so many kills; returns how many there were, and how many within a save."""
    kills = in_saves = 0
    checkpointer = Checkpointer(run)
    while True:
        resume = ["--resume"] if checkpointer.steps() else []
        if not resume and run.exists():  # killed before its first checkpoint: there is nothing to go on from
            run.rename(run.with_name(f"{run.name}-{kills}"))
        before = progress_of(run)
        process = server.start(command(run, flags + resume))
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
            raise SystemExit(f"the training ended with status {process.returncode}: {process.said()}")
        kills += 1
        if checkpointer.steps():
            checkpointer.load()  # raises if it is not whole


def replace_and_kill(folder: Path, how: str, wanted: int, generator: random.Random) -> int:
    """Returns after how many of the kills the folder had to be put back in its place."""
    recovered = 0
    for _ in range(wanted):
        process = subprocess.Popen([sys.executable, "-c", REPLACE, folder, how], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        lines = [process.stdout.readline()]
        time.sleep(generator.uniform(0, 0.2))
        process.send_signal(signal.SIGKILL)
        lines += process.communicate()[0].splitlines()
        if process.returncode != -signal.SIGKILL:
            raise SystemExit(f"the process that replaces {folder} ended with status {process.returncode}")
        recovered += not folder.exists()
        recover_dir(folder)
        versions = {path.read_text() for path in folder.iterdir()}
        if len(versions) != 1 or len(list(folder.iterdir())) != 20 or int(versions.pop()) < int(lines[-1]):
            raise SystemExit(f"{folder} is not whole, or older than version {lines[-1]}")
    return recovered


def start_twice(
    server: ForkServer, run: Path, flags: list[str], wanted: int, steps: int, generator: random.Random
) -> str:
    """Trains to the end in so many rounds of two starts; returns what happened."""
    checkpointer = Checkpointer(run)
    refused = after = most = 0
    # Every other second start comes within a second; the rest is spread over half of a round.
    span = 0.0
    for number in range(1, wanted + 1):
        stop = steps * number // wanted
        resume = ["--resume"] if checkpointer.steps() else []
        line = command(run, [*flags, *resume, f"--train.stop_at_step={stop}"])
        began = time.monotonic()
        processes = [server.start(line)]
        second = began + generator.uniform(0, span if number % 2 else 1)
        while any(process.poll() is None for process in processes) or len(processes) == 1:
            most = max(most, writers(processes, run))
            if len(processes) == 1 and time.monotonic() >= second:
                processes.append(server.start(line))
            if len(processes) == 1 and processes[0].poll() is not None:
                second = began
            time.sleep(0.002)
        span = (time.monotonic() - began) / 2
        statuses = sorted(process.wait() for process in processes)
        said = "".join(process.said() for process in processes)
        if statuses == [0, 2] and " is in use by process " in said:
            refused += 1
        elif statuses == [0, 0] or (statuses == [0, 2] and "already holds a run" in said):
            after += 1  # the first had ended
        else:
            raise SystemExit(f"two starts ended with {statuses}: {said}")
        logged = [row["step"] for row in read_metrics(run / "metrics.jsonl") if "train/loss" in row]
        if logged != list(range(1, stop + 1)) or checkpointer.load().step != stop or most > 1:
            raise SystemExit(f"round {number}: {most} writers at once, logged were {logged}")
    return (
        f"started twice {wanted} times: {refused} times one was refused, {after} times one had ended before; "
        f"at most {most} process was writing"
    )


def writers(processes: list[Forked], run: Path) -> int:
    """How many of the processes have a file of the run, besides its lock, open."""
    return sum(any(name.startswith(f"{run}/") and name != f"{run}/lock" for name in open_files(p)) for p in processes)


def open_files(process: Forked) -> list[str]:
    folder = f"/proc/{process.pid}/fd"
    names = []
    try:
        for number in os.listdir(folder):
            names.append(os.readlink(f"{folder}/{number}"))
    except OSError:  # the file is closed, or the process has ended, in between
        pass
    return names


def progress_of(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return metrics.stat().st_size if metrics.exists() else 0


def wait_for_training(process: Forked, run: Path, before: int) -> bool:
    """Until it has logged something; whether it still runs then."""
    while process.poll() is None:
        if progress_of(run) != before:
            return True
        time.sleep(0.005)
    return False


def wait_for_save(process: Forked, run: Path) -> None:
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
