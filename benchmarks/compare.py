"""How fast this checkout is beside another one, in one run with both by turns; or whether both compute the same bits.

    python benchmarks/compare.py ../old                 # all figures, in one table; status 1 where one is over 3 % slower
    python benchmarks/compare.py --quick                # a few turns against the last release: status 1 beyond 25 %
    python benchmarks/compare.py ../old --bits          # logits, states and gradients of the CPU kernels, to the bit
    python benchmarks/compare.py ../old --only decode start

The other checkout is a folder, or a revision of this repository. Processes of the same code differ by up to a fifth here, for
as long as they live, so several of each checkout are started; their figures are taken by turns, old new new old.
"""

import argparse
import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent.parent
WORKER = Path(__file__).resolve().with_name("compare_worker.py")
IN_PROCESS = (
    "decode, 1 sequence",
    "decode, 8 sequences",
    "prefill of 512 tokens",
    "engine step, 1 request",
    "engine step, 8 requests",
    "train step, kernels",
    "train step, torch in blocks",
    "train step, plain",
)
BEFORE_FIRST_RELEASE = "8130d1f"
"""What --quick compares with while nothing has been released, that is, while no commit has a tag."""
OTHER_PACKAGES = ".packages"
"""Folder of a kept revision with what it depends on and this environment does not have."""
_SERVER_SECONDS = 60
_MOST_REPEATS = 3


@dataclass
class Figure:
    """Seconds of both checkouts, from several processes."""

    old: list[float] = field(default_factory=list)
    new: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """New to old: below 1 is faster."""
        return median(self.new) / median(self.old)


def environment(tree: Path) -> dict[str, str]:
    paths = os.pathsep.join([str(tree), str(tree / OTHER_PACKAGES)])
    return {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive"}


class Worker:
    """A process that lives on with the code of one checkout."""

    def __init__(self, tree: Path, size: str):
        command = [sys.executable, str(WORKER), size]
        self._process = subprocess.Popen(
            command, cwd=tree, env=environment(tree), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip

    def seconds(self, figure: str, least: float) -> float:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps({"figure": figure, "seconds": least}), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process for {figure!r} ended with status {self._process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


def until_end(tree: Path, arguments: Sequence[str], status: int = 0) -> float:
    """Seconds until a command has ended, with this status."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "bdh", *arguments]
    done = subprocess.run(
        command, cwd=tree, env=environment(tree), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    if done.returncode != status:
        ended = f"bdh {' '.join(arguments)} ended with status {done.returncode} in {tree}: must be {status}"
        raise RuntimeError(f"{ended}\n{done.stderr}")
    return time.perf_counter() - start


def until_first_token(tree: Path, model: Path) -> float:
    """Seconds until ``bdh generate`` has printed something after the prompt."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "bdh", "generate", str(model), "--prompt", "The ", "--max_new_tokens", "64"]
    process = subprocess.Popen(
        command, cwd=tree, env=environment(tree), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None
    seen = b""
    while len(seen) <= len(b"The "):
        piece = os.read(process.stdout.fileno(), 64)
        if not piece:
            raise RuntimeError(f"bdh generate ended with status {process.wait()} and printed {seen!r}")
        seen += piece
    seconds = time.perf_counter() - start
    process.kill()
    process.communicate()
    return seconds


def until_ready(tree: Path, model: Path) -> float:
    """Seconds until ``bdh serve`` answers that it is ready."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    start = time.perf_counter()
    command = [sys.executable, "-m", "bdh", "serve", str(model), "--port", str(port)]
    process = subprocess.Popen(
        command, cwd=tree, env=environment(tree), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        while time.perf_counter() - start < _SERVER_SECONDS:
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health/ready", timeout=5).close()
                return time.perf_counter() - start
            if process.poll() is not None:
                raise RuntimeError(f"bdh serve ended with status {process.returncode}")
            time.sleep(0.05)
        raise RuntimeError(f"bdh serve was not ready after {_SERVER_SECONDS} s")
    finally:
        process.terminate()
        process.wait()


def start_figures(model: Path) -> dict[str, Callable[[Path], float]]:
    return {
        "start: bdh --help": lambda tree: until_end(tree, ["--help"]),
        "start: bdh train --help": lambda tree: until_end(tree, ["train", "--help"]),
        "start: a mistyped flag": lambda tree: until_end(tree, ["eval", "--modle", "x"], status=2),
        "start: bdh generate, first token": lambda tree: until_first_token(tree, model),
        "start: bdh serve, ready": lambda tree: until_ready(tree, model),
    }


def measure(old: Path, new: Path, names: Sequence[str], settings: argparse.Namespace) -> dict[str, Figure]:
    """All figures that are asked for; each turn of each process is one of its numbers."""
    wanted = [name for name in IN_PROCESS if name in names]
    found = {name: Figure() for name in names}
    for number in range(settings.processes if wanted else 0):
        show(f"processes {number + 1} of {settings.processes}")
        with contextlib.ExitStack() as stack:
            workers = {"old": Worker(old, settings.size), "new": Worker(new, settings.size)}
            for worker in workers.values():
                stack.callback(worker.close)
            for name in wanted:
                times: dict[str, list[float]] = {"old": [], "new": []}
                for _ in range(settings.turns):
                    for tree in ("old", "new", "new", "old"):
                        times[tree].append(workers[tree].seconds(name, settings.seconds))
                # One number a process: its turns are no more independent of each other than its memory is.
                found[name].old.append(median(times["old"]))
                found[name].new.append(median(times["new"]))
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        starts = {name: run for name, run in start_figures(model).items() if name in names}
        if starts:
            command = [sys.executable, str(WORKER), "save", "small", str(model)]
            subprocess.run(command, cwd=old, env=environment(old), check=True, capture_output=True)
        for name, run in starts.items():
            show(name)
            if settings.starts > 1:
                run(old), run(new)  # files are read and kernels compiled
            for _ in range(settings.starts):
                for tree, times in ((old, "old"), (new, "new"), (new, "new"), (old, "old")):
                    getattr(found[name], times).append(run(tree))
    return found


def show(stage: str) -> None:
    print(f"{stage} ...", file=sys.stderr, flush=True)


def table(found: dict[str, Figure], tolerance: float) -> tuple[str, list[str]]:
    """Lines for people, and the names of the figures that are too slow."""
    lines = [f"{'':34} {'old':>10} {'new':>10} {'new/old':>8} {'old: least to most':>22}"]
    slow = []
    for name, figure in found.items():
        ratio = figure.ratio
        mark = ""
        if ratio > 1 + tolerance:
            slow.append(name)
            mark = f"  over {100 * tolerance:.0f} % slower"
        spread = f"{1000 * min(figure.old):,.2f} to {1000 * max(figure.old):,.2f}"
        lines.append(
            f"{name:34} {1000 * median(figure.old):>7,.2f} ms {1000 * median(figure.new):>7,.2f} ms "
            f"{ratio:>8.3f} {spread:>22}{mark}"
        )
    return "\n".join(lines), slow


def compare_bits(old: Path, new: Path) -> int:
    """Prints what differs; the exit status."""
    import torch

    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for number, tree in enumerate((old, new)):
            show(f"bits of {tree}")
            file = Path(folder) / f"{number}.pt"
            command = [sys.executable, str(WORKER), "bits", str(file)]
            subprocess.run(command, cwd=tree, env=environment(tree), check=True)
            found.append(torch.load(file))
    apart = differences(*found)
    count = len(found[0].keys() | found[1].keys())
    print("\n".join([*apart, f"{count - len(apart)} of {count} tensors are equal to the bit"]))
    return 1 if apart else 0


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """A line for each tensor that is not the same in both, to the bit."""
    apart = []
    for name in sorted(old.keys() | new.keys()):
        a, b = old.get(name), new.get(name)
        if a is None or b is None:
            apart.append(f"{name}: only in {'new' if a is None else 'old'}")
        elif a.shape != b.shape or a.dtype != b.dtype:
            apart.append(f"{name}: {a.dtype} {tuple(a.shape)}, now {b.dtype} {tuple(b.shape)}")
        elif (count := (a != b).sum().item()) > 0:
            by = (a.float() - b.float()).abs().max().item()
            apart.append(f"{name}: {count} of {a.numel()} numbers, by up to {by:.1e}")
    return apart


def checkout(of: str | None) -> Path:
    """The folder, or that of a revision of this repository; None for the last release.

    Revisions are kept in the cache, where the kernels that are compiled for them stay too.
    """
    if of is not None and Path(of).is_dir():
        return Path(of).resolve()
    git = ["git", "-C", str(HERE)]
    if of is None:
        tags = subprocess.run([*git, "describe", "--tags", "--abbrev=0"], capture_output=True, text=True, check=False)
        of = tags.stdout.strip() or BEFORE_FIRST_RELEASE
    commit = subprocess.run([*git, "rev-parse", f"{of}^{{commit}}"], capture_output=True, text=True, check=True)
    cache = Path(os.environ.get("BDH_CACHE") or Path.home() / ".cache" / "bdh")
    folder = cache / "compare" / commit.stdout.strip()
    show(f"beside {of}, in {folder}")
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            archive = Path(temporary) / "tree.tar"
            subprocess.run([*git, "archive", "-o", str(archive), of], check=True)
            with tarfile.open(archive) as file:
                file.extractall(Path(temporary) / "tree", filter="data")
            (Path(temporary) / "tree").rename(folder)
    install_missing(folder)  # of one that was kept too: this environment may be another
    return folder


def install_missing(tree: Path) -> None:
    """Puts into the tree what it depends on and this environment lacks: a dependency that is gone since, for example."""
    project = tomllib.loads((tree / "pyproject.toml").read_text())["project"]
    installed = {re.sub(r"[-_.]+", "-", found.name).lower() for found in metadata.distributions()}
    missing = [
        requirement
        for requirement in project["dependencies"]
        if re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower() not in installed  # type: ignore[index]
    ]
    if missing and not (tree / OTHER_PACKAGES).is_dir():
        show(f"installing {', '.join(missing)} for it")
        with tempfile.TemporaryDirectory(dir=tree) as temporary:
            target = Path(temporary) / "packages"
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(target)]
            subprocess.run([*pip, "-c", str(tree / "constraints.txt"), *missing], check=True)
            target.rename(tree / OTHER_PACKAGES)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", nargs="?", help="a folder or a revision; by default the last release")
    parser.add_argument(
        "--new", type=Path, default=HERE, help="the checkout that is compared with it; by default this one"
    )
    parser.add_argument("--bits", action="store_true", help="compare what the CPU kernels compute instead of speed")
    parser.add_argument("--quick", action="store_true", help="fewer turns and a small model; fails beyond 25 %%")
    parser.add_argument("--tolerance", type=float, help="share that a figure may be slower; by default 0.03")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="figures whose names contain one of these")
    parser.add_argument("--size", default=None, help="25M (the default), small or odd: the model that reads")
    parser.add_argument("--processes", type=int, help="of each checkout, one after the other; by default 6")
    parser.add_argument("--turns", type=int, default=1, help="old new new old, in each process")
    parser.add_argument("--seconds", type=float, help="of a turn, at least; by default 0.4")
    parser.add_argument("--starts", type=int, help="old new new old, of each command; by default 3")
    parser.add_argument("--json", type=Path, help="file for all numbers")
    settings = parser.parse_args()
    quick = settings.quick
    defaults = {"tolerance": 0.25, "size": "small", "processes": 2, "seconds": 0.2, "starts": 1} if quick else {
        "tolerance": 0.03, "size": "25M", "processes": 6, "seconds": 0.4, "starts": 3
    }  # fmt: skip
    for name, value in defaults.items():
        if getattr(settings, name) is None:
            setattr(settings, name, value)
    new = settings.new.resolve()
    old = checkout(settings.old)
    if settings.bits:
        return compare_bits(old, new)
    words = settings.only or [""]
    names = [name for name in (*IN_PROCESS, *start_figures(new)) if any(word in name for word in words)]
    if not names:
        parser.error(f"--only {' '.join(words)}: no figure has such a name")
    found = measure(old, new, names, settings)
    text, slow = table(found, settings.tolerance)
    for _ in range(_MOST_REPEATS):  # in other processes: something else may have been running
        if not slow:
            break
        show(f"again: {', '.join(slow)}")
        for name, again in measure(old, new, slow, settings).items():
            found[name].old += again.old
            found[name].new += again.new
        text, slow = table(found, settings.tolerance)
    print(text)
    if settings.json is not None:
        settings.json.write_text(json.dumps({name: vars(each) for name, each in found.items()}, indent=1) + "\n")
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
