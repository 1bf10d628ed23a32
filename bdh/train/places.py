"""What lies at the place that a name stands for: an export, a run with its checkpoints, adapters, or nothing; and its lock.

Reads names and small files alone, without PyTorch, so that a wrong name is reported at once.
"""

import hashlib
import importlib.util
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bdh.extras import install_command
from bdh.hub import is_path, model_not_found, why_not_asked, why_not_reached
from bdh.storage import naming_full_disk, recover_dir, recover_dirs
from bdh.words import counted

if TYPE_CHECKING:
    from bdh.distributed.world import World

ADAPTER_CONFIG = "adapter_config.json"  # which ``peft`` puts beside adapters: a folder with it is one of adapters
CONFIG_FILE, LOCK_FILE, MANIFEST = "config.yaml", "lock", "manifest.json"


@dataclass(frozen=True)
class ModelPlace:
    """Where a model is."""

    path: Path
    kind: Literal["run", "adapters", "export", "hub"]
    checkpoint: str | None = None
    """Of a run: last, best, or a step."""


def find_model(name: str, *, checkpoint: str | None = None, base: str | None = None) -> ModelPlace:
    """The place of a model, as far as names and small files tell.

    Args:
        name: a folder with ``config.json``, or of adapters; a run's folder; the folder of one of its checkpoints; or a
            hub id.
        checkpoint: for a run: last (the default), best, or a step.
        base: for adapters: where their base is now.

    Raises:
        FileNotFoundError: there is nothing, or no model, or no such checkpoint.
        ValueError: ``checkpoint`` or ``base`` is given for what has none.
        ImportError: adapters need a package that is missing.
    """
    path = Path(name)
    if checkpoint is None and is_checkpoint(path):
        path, checkpoint = path.parent.parent, str(step_of_folder(path))
    recover_dir(path)
    has_adapters = (path / ADAPTER_CONFIG).is_file()
    if base is not None and not has_adapters:
        raise ValueError(f"base is {base!r}, but {name} is no folder of adapters: leave it out")
    if is_run(path):
        checkpoint = checkpoint or "last"
        find_checkpoint(path, checkpoint)
        return ModelPlace(path, "run", checkpoint)
    if checkpoint is not None:
        raise ValueError(f"checkpoint is {checkpoint!r}, but {name} is not a run: leave it out")
    if has_adapters:
        check_peft()
        return ModelPlace(path, "adapters")
    if path.exists():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"{name} holds no model: it has neither config.json nor checkpoints")
        return ModelPlace(path, "export")
    if is_path(name) or "/" not in name:
        raise FileNotFoundError(f"there is no folder {name} (and a model of the hub is named ORGANISATION/NAME)")
    if (reason := why_not_asked(name)) is not None:
        raise FileNotFoundError(f"there is no folder {name}, and {reason}")
    if (reason := why_not_reached(name)) is not None:
        raise model_not_found(name, reason)
    return ModelPlace(path, "hub")


def find_checkpoint(run_dir: Path, which: str) -> int | None:
    """The step of a run's checkpoint that "last", "best" (of the validation loss) or a step names; None for the newest.

    Raises:
        FileNotFoundError: the folder holds no run, or the run has no such checkpoint.
        ValueError: ``which`` is neither of the above.
    """
    if not is_run(run_dir):
        is_there = Path(run_dir).exists()
        raise FileNotFoundError(
            f"{run_dir} holds no run: it has no folder checkpoints" if is_there else f"there is no folder {run_dir}"
        )
    if which not in ("last", "best") and not which.isdigit():
        raise ValueError(f"checkpoint is {which!r}: must be last, best, or a step")
    checkpoints = CheckpointFolder(run_dir)
    checkpoints.recover()
    step = None if which == "last" else checkpoints.step_of("best") if which == "best" else int(which)
    checkpoints.check_there(step)
    return step


def is_run(folder: Path) -> bool:
    return (folder / "checkpoints").is_dir()


def run_of(model: Path) -> Path | None:
    """The run that the folder of a model is, or lies in: as one of its checkpoints, or as its export."""
    run = model.parent.parent if is_checkpoint(model) else model.parent if model.name == "model" else model
    return run if is_run(run) else None


def holds_run(folder: Path) -> bool:
    """Whether anything of a run is in a folder, also of one that has no checkpoint yet."""
    return any((folder / name).exists() for name in (CONFIG_FILE, "checkpoints", "metrics.jsonl", "model"))


def taken_by_run(folder: Path) -> FileExistsError:
    """The error of a fresh start in a folder that holds a run."""
    checkpoints = CheckpointFolder(folder)
    if checkpoints.newest() is None and not (folder / "model").exists():
        return FileExistsError(f"{folder} already holds a run; {checkpoints.why_not_continued}")
    return FileExistsError(
        f"{folder} already holds a run, which is never overwritten: continue it with --resume, or give another --run_dir"
    )


def check_peft() -> None:
    """Raises ``ImportError``, which says how to get the package, where it is missing."""
    if importlib.util.find_spec("peft") is None:
        raise ImportError(f"LoRA needs the package peft: {install_command('finetune')}")


class CheckpointFolder:
    """The checkpoints of a run by their names: ``checkpoints/step-0001000``, and the files that name the newest and best."""

    def __init__(self, run_dir: Path):
        self.folder = run_dir / "checkpoints"

    def steps(self) -> list[int]:
        """Steps of the checkpoints that have their marker, ascending."""
        return sorted(step_of_folder(path.parent) for path in self.folder.glob(f"step-*/{MANIFEST}"))

    def path_of(self, step: int) -> Path:
        return self.folder / checkpoint_name(step)

    def newest(self) -> int | None:
        """The step that ``latest`` names, or, where that is not there, of the newest that has its marker."""
        named, steps = self.named("latest"), self.steps()
        return named if not steps or (named is not None and self.path_of(named).is_dir()) else steps[-1]

    @property
    def why_not_continued(self) -> str:
        """Of a run without a checkpoint."""
        return (
            f"there is no complete checkpoint in {self.folder}: a run that was stopped before its first one cannot be "
            f"continued; remove {self.folder.parent}, or train with another --run_dir"
        )

    def check_there(self, step: int | None) -> None:
        """Raises ``FileNotFoundError`` where there is no such checkpoint; None is the newest."""
        if step is None and self.newest() is None:
            raise FileNotFoundError(self.why_not_continued)
        if step is not None and not self.path_of(step).is_dir():
            there = ", ".join(map(str, self.steps())) or "none"
            raise FileNotFoundError(f"there is no checkpoint of step {step} in {self.folder}: there are {there}")

    def step_of(self, which: str) -> int:
        """The step that ``latest`` or ``best`` names. Raises ``FileNotFoundError`` without the file, ``ValueError`` if none."""
        if (step := self.named(which)) is not None:
            return step
        if not self.has(which):
            raise FileNotFoundError(f"{self.folder} has no {which!r}: there is no such checkpoint yet")
        raise ValueError(
            f"{self.folder / which} must hold the name of a checkpoint, such as {checkpoint_name(100)}, but holds "
            f"{self.excerpt(which)}: choose a step ({', '.join(map(str, self.steps())) or 'there is none'}); "
            "continuing the run restores the file"
        )

    def named(self, which: str) -> int | None:
        """The step in the file ``latest`` or ``best``; None if there is no such file, or it is empty or damaged."""
        if not self.has(which):
            return None
        text = (self.folder / which).read_text(encoding="utf-8", errors="replace").strip()
        return step_of_folder(Path(text)) if re.fullmatch(r"step-[0-9]+", text) else None

    def has(self, which: str) -> bool:
        return (self.folder / which).is_file()

    def excerpt(self, which: str) -> str:
        """What the file ``latest`` or ``best`` begins with, for a person."""
        text = (self.folder / which).read_text(encoding="utf-8", errors="replace")
        return repr(text[:40]) if text else "it is empty"

    def recover(self) -> None:
        """Puts back checkpoints that a process was replacing when it died."""
        recover_dirs(self.folder)


def checkpoint_name(step: int) -> str:
    return f"step-{step:07d}"


def is_checkpoint(folder: Path) -> bool:
    """Whether the folder is that of one checkpoint, complete or not."""
    return folder.parent.name == "checkpoints" and re.fullmatch(r"step-\d+", folder.name) is not None


def step_of_folder(folder: Path) -> int:
    """The step in the name of a checkpoint's folder."""
    return int(folder.name.removeprefix("step-"))


def file_facts(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file, as a checkpoint's manifest records them."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def checkpoint_fault(path: Path) -> str | None:
    """What is wrong with the files of a checkpoint, every byte of which is read; None where nothing is."""
    if not (path / MANIFEST).is_file():
        return f"its {MANIFEST} is missing"
    try:
        files = json.loads((path / MANIFEST).read_text())["files"]
        for name, facts in files.items():
            if not (path / name).is_file():
                return f"{name} is missing"
            if (size := (path / name).stat().st_size) != facts["bytes"]:
                return f"{name} has {counted(size, 'byte')} instead of {facts['bytes']:,}"
            if file_facts(path / name) != facts:
                return f"the SHA-256 of {name} is not the recorded one"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} was removed meanwhile"
    except (ValueError, KeyError) as error:
        return f"its {MANIFEST} cannot be read: {error}"
    return None


class RunLock:
    """Keeps other starts out of a run's folder. Rank 0 takes it; all processes call :meth:`acquire` together."""

    def __init__(self, folder: Path, world: "World"):
        from bdh.locks import Lock  # which takes a while to import

        self._folder, self._world = folder, world
        self._made: list[Path] = []
        advice = "wait until it has ended, and continue the run with --resume, or give another --run_dir"
        self._lock = Lock(folder / LOCK_FILE, str(folder), advice=advice)

    def acquire(self) -> None:
        """Takes the lock. The folder is made, if it is not there.

        Raises:
            InUseError: another process has it, on all processes alike.
            DiskFullError: there is no space for it; a folder that was made is removed.
            OSError: the folder cannot be written.
        """
        from bdh.locks import InUseError

        error = None
        if self._world.is_main:
            try:
                self._take()
            except OSError as caught:
                error = caught
        reason = self._world.gather(error and str(error))[0]
        if reason is not None:
            raise error or InUseError(reason)

    def check(self, *, seldom: bool = False) -> None:
        """Raises on rank 0, where another process has taken the lock meanwhile; see :meth:`bdh.locks.Lock.check`."""
        if self._world.is_main:
            self._lock.check(seldom=seldom)

    def release(self) -> None:
        """Gives the lock back; a folder that it made, and that has stayed empty, is removed."""
        if self._world.is_main:
            self._lock.release()
            self._remove_made()

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _take(self) -> None:
        self._made = [folder for folder in (self._folder, *self._folder.parents) if not folder.exists()]
        try:
            with naming_full_disk(self._folder):
                while True:
                    self._folder.mkdir(parents=True, exist_ok=True)
                    with suppress(FileNotFoundError):  # another start has failed and removed its empty folder
                        self._lock.acquire()
                        break
        except BaseException:
            self._remove_made()
            raise

    def _remove_made(self) -> None:
        for folder in self._made:
            with suppress(OSError):  # there is something in it
                folder.rmdir()
        self._made = []


@contextmanager
def lock_run_around(path: Path) -> Iterator[None]:
    """Locks the run in whose folder ``path`` lies, if it lies in one, for a command that writes there.

    Raises ``InUseError`` where the run is being trained.
    """
    from bdh.locks import Lock

    run = next((folder for folder in path.resolve().parents if holds_run(folder)), None)
    if run is None:
        yield
        return
    with Lock(run / LOCK_FILE, str(run), advice="wait until it has ended, or write somewhere else"):
        yield
