"""Finds out what is stored under a name: an export, a run with its checkpoints, adapters, or nothing. Locks runs.

Only names and small files are read, without PyTorch, so that a wrong name is reported at once.
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

ADAPTER_CONFIG = "adapter_config.json"  # ``peft`` writes it with adapters; a folder with this file contains adapters
CONFIG_FILE, LOCK_FILE, MANIFEST = "config.yaml", "lock", "manifest.json"


@dataclass(frozen=True)
class ModelPlace:
    """The place of a model."""

    path: Path
    kind: Literal["run", "adapters", "export", "hub"]
    checkpoint: str | None = None
    """For a run, "last", "best", or a step."""


def find_model(name: str, *, checkpoint: str | None = None, base: str | None = None) -> ModelPlace:
    """Returns the place of a model, as far as names and small files tell.

    Args:
        name: a folder with ``config.json`` or with adapters, the folder of a run or of one of its checkpoints, or a hub
            id.
        checkpoint: for a run, "last" (the default), "best", or a step.
        base: for adapters, the current location of their base model.

    Raises:
        FileNotFoundError: there is nothing under this name, it is not a model, or the run has no such checkpoint.
        ValueError: ``checkpoint`` is invalid or given for something that is not a run, or ``base`` is given for
            something that is not a folder of adapters.
        ImportError: adapters require a package that is not installed.
    """
    path = Path(name)
    if checkpoint is None and is_checkpoint(path):
        path, checkpoint = path.parent.parent, str(step_of_folder(path))
    recover_dir(path)
    has_adapters = (path / ADAPTER_CONFIG).is_file()
    if base is not None and not has_adapters:
        raise ValueError(f"base is {base!r}, but {name} is not a folder of adapters: leave it out")
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
        if (path / CONFIG_FILE).is_file():
            raise FileNotFoundError(f"{name} is a run that has no checkpoint yet, and so no model")
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
    """Returns the step of a checkpoint of a run; None for the newest.

    Args:
        run_dir: the folder of the run.
        which: "last", "best" (by ``checkpoint.best_metric``), or a step.

    Raises:
        FileNotFoundError: the folder contains no run, or the run has no such checkpoint.
        ValueError: ``which`` is invalid, or the file that names the best checkpoint is damaged.
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
    """Returns the run to which the folder of a model belongs, or None.

    The folder can be that of the run, of one of its checkpoints, or of its export.
    """
    run = model.parent.parent if is_checkpoint(model) else model.parent if model.name == "model" else model
    return run if is_run(run) else None


def holds_run(folder: Path) -> bool:
    """Whether a folder contains files of a run, even if it has no checkpoint yet."""
    return any((folder / name).exists() for name in (CONFIG_FILE, "checkpoints", "metrics.jsonl", "model"))


def taken_by_run(folder: Path) -> FileExistsError:
    """Returns the error for a new run in a folder that already contains one."""
    checkpoints = CheckpointFolder(folder)
    if checkpoints.newest() is None and not (folder / "model").exists():
        return FileExistsError(f"{folder} already holds a run; {checkpoints.why_not_continued}")
    return FileExistsError(
        f"{folder} already holds a run, which is never overwritten: continue it with --resume, or give another --run_dir"
    )


def check_peft() -> None:
    """Raises ``ImportError`` with the command that installs ``peft`` if it is missing."""
    if importlib.util.find_spec("peft") is None:
        raise ImportError(f"LoRA needs the package peft: {install_command('finetune')}")


class CheckpointFolder:
    """The names of a run's checkpoints, ``checkpoints/step-0001000``, and the files that name the newest and best."""

    def __init__(self, run_dir: Path):
        self.folder = run_dir / "checkpoints"

    def steps(self) -> list[int]:
        """Returns the steps of the complete checkpoints, which have a manifest, in ascending order."""
        return sorted(step_of_folder(path.parent) for path in self.folder.glob(f"step-*/{MANIFEST}"))

    def path_of(self, step: int) -> Path:
        return self.folder / checkpoint_name(step)

    def newest(self) -> int | None:
        """Returns the step that ``latest`` names or, if that checkpoint does not exist, the newest complete one.

        It returns None if there is neither.
        """
        named, steps = self.named("latest"), self.steps()
        return named if not steps or (named is not None and self.path_of(named).is_dir()) else steps[-1]

    @property
    def why_not_continued(self) -> str:
        """Why a run without a complete checkpoint cannot be continued."""
        return (
            f"there is no complete checkpoint in {self.folder}: a run that was stopped before its first one cannot be "
            f"continued; remove {self.folder.parent}, or train with another --run_dir"
        )

    def check_there(self, step: int | None) -> None:
        """Raises ``FileNotFoundError`` if there is no checkpoint of a step; None stands for the newest."""
        if step is None and self.newest() is None:
            raise FileNotFoundError(self.why_not_continued)
        if step is not None and not self.path_of(step).is_dir():
            there = ", ".join(map(str, self.steps())) or "none"
            raise FileNotFoundError(f"there is no checkpoint of step {step} in {self.folder}: there are {there}")

    def step_of(self, which: str) -> int:
        """Returns the step that the file ``latest`` or ``best`` names.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file does not contain the name of a checkpoint.
        """
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
        """Returns the step that the file ``latest`` or ``best`` names; None if it is missing, empty or damaged."""
        if not self.has(which):
            return None
        text = (self.folder / which).read_text(encoding="utf-8", errors="replace").strip()
        return step_of_folder(Path(text)) if re.fullmatch(r"step-[0-9]+", text) else None

    def has(self, which: str) -> bool:
        return (self.folder / which).is_file()

    def excerpt(self, which: str) -> str:
        """Returns the beginning of the file ``latest`` or ``best``, for error messages."""
        text = (self.folder / which).read_text(encoding="utf-8", errors="replace")
        return repr(text[:40]) if text else "it is empty"

    def recover(self) -> None:
        """Restores checkpoints that a process was replacing when it died."""
        recover_dirs(self.folder)


def checkpoint_name(step: int) -> str:
    return f"step-{step:07d}"


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is that of a checkpoint, complete or not."""
    return folder.parent.name == "checkpoints" and re.fullmatch(r"step-\d+", folder.name) is not None


def step_of_folder(folder: Path) -> int:
    """Returns the step in the name of a checkpoint's folder."""
    return int(folder.name.removeprefix("step-"))


def file_facts(path: Path) -> dict[str, Any]:
    """Returns the size and SHA-256 of a file, as recorded in the manifest of a checkpoint."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def checkpoint_fault(path: Path) -> str | None:
    """Reads every byte of a checkpoint. Returns what is wrong with its files, or None."""
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
    """Keeps other processes from training in a run's folder.

    Rank 0 holds the lock. All processes must call :meth:`acquire` together.
    """

    def __init__(self, folder: Path, world: "World"):
        from bdh.locks import Lock  # takes a while to import

        self._folder, self._world = folder, world
        self._made: list[Path] = []
        advice = "wait until it has ended, and continue the run with --resume, or give another --run_dir"
        self._lock = Lock(folder / LOCK_FILE, str(folder), advice=advice)

    def acquire(self) -> None:
        """Acquires the lock, and creates the folder if it does not exist.

        If rank 0 fails with one of the other errors below, the other processes raise ``InUseError`` with its message.

        Raises:
            InUseError: another process holds the lock. All processes raise it.
            DiskFullError: there is no space for the lock. Folders that were created for it are removed.
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
        """Checks on rank 0 that the lock is still held; see :meth:`bdh.locks.Lock.check`."""
        if self._world.is_main:
            self._lock.check(seldom=seldom)

    def release(self) -> None:
        """Releases the lock, and removes the folders that it created if they are still empty."""
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
            with suppress(OSError):  # it is not empty
                folder.rmdir()
        self._made = []


@contextmanager
def lock_run_around(path: Path) -> Iterator[None]:
    """A context that locks the run in whose folder ``path`` is, if there is one, for a command that writes there.

    Raises ``InUseError`` if the run is being trained.
    """
    from bdh.locks import Lock

    run = next((folder for folder in path.resolve().parents if holds_run(folder)), None)
    if run is None:
        yield
        return
    with Lock(run / LOCK_FILE, str(run), advice="wait until it has ended, or write somewhere else"):
        yield
