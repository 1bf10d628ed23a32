"""Checkpoints that are either complete or not there.

    <run_dir>/checkpoints/step-0001000/model.safetensors   the weights
                                       training.pt         optimizer, random states, position in the data ...
                                       manifest.json       the marker: size and SHA-256 of the other files
    <run_dir>/checkpoints/latest, best                     the name of a checkpoint, as text

A checkpoint is written under a temporary name, synced to the disk, and then renamed: a crash at any moment
leaves the ones before untouched.
"""

import hashlib
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from bdh.storage import whole_folder, write_text

WEIGHTS, TRAINING, MANIFEST = "model.safetensors", "training.pt", "manifest.json"


class CheckpointError(OSError):
    """A checkpoint could not be written; the ones before are untouched."""


@dataclass
class Checkpoint:
    """A complete checkpoint, read."""

    path: Path
    step: int
    weights: dict[str, torch.Tensor]
    training: dict[str, Any]


class Checkpointer:
    """Writes, keeps and finds the checkpoints of one run."""

    def __init__(self, run_dir: Path, keep_last: int = 2):
        self.folder = run_dir / "checkpoints"
        self._keep_last = keep_last

    def steps(self) -> list[int]:
        """Steps of the checkpoints that have their marker, ascending."""
        return sorted(step_of_folder(path.parent) for path in self.folder.glob(f"step-*/{MANIFEST}"))

    def save(
        self, step: int, weights: dict[str, torch.Tensor], training: dict[str, Any], *, is_best: bool = False
    ) -> Path:
        """Writes the checkpoint of ``step``, points ``latest`` to it, and removes what is not kept any more.

        Args:
            training: anything that ``torch.load(weights_only=True)`` reads back.
            is_best: point ``best`` to it too.

        Raises:
            CheckpointError: the disk is full or refuses.
        """
        final = self.folder / _name(step)
        try:
            with whole_folder(final) as folder:
                save_file({k: v.detach().cpu().contiguous() for k, v in weights.items()}, folder / WEIGHTS)
                torch.save(training, folder / TRAINING)
                files = {name: _facts(folder / name) for name in (WEIGHTS, TRAINING)}
                (folder / MANIFEST).write_text(json.dumps({"step": step, "files": files}, indent=1))
            self._point("latest", step)
            if is_best:
                self._point("best", step)
        # PyTorch and safetensors report what the disk refuses in errors of their own.
        except (OSError, RuntimeError, SafetensorError) as error:
            latest = self._named("latest")
            raise CheckpointError(
                f"the checkpoint of step {step} is not saved: {error}; "
                + (f"the newest one is that of step {latest}" if latest is not None else "there is none before it")
            ) from error
        self._remove_old()
        return final

    def load(self, step: int | None = None) -> Checkpoint:
        """Reads a checkpoint, by default the newest, and checks every byte of it.

        Raises:
            FileNotFoundError: there is none, or none of that step.
            ValueError: it is cut off or altered; the message names the newest one that is whole.
        """
        wanted = self._named("latest") if step is None else step
        if wanted is None:
            wanted = max(self.steps(), default=None)
        if wanted is None:
            raise FileNotFoundError(f"there is no complete checkpoint in {self.folder}")
        path = self.folder / _name(wanted)
        if not path.is_dir():
            there = ", ".join(map(str, self.steps())) or "none"
            raise FileNotFoundError(f"there is no checkpoint of step {wanted} in {self.folder}: there are {there}")
        if fault := _fault(path):
            whole = [s for s in self.steps() if s != wanted and not _fault(self.folder / _name(s))]
            advice = (
                f"the newest complete one is {_name(max(whole))}: train on from it with --resume_step {max(whole)}, "
                f"read it with --checkpoint {max(whole)}"
                if whole
                else "there is no complete one besides it"
            )
            raise ValueError(f"checkpoint {path} is damaged ({fault}); {advice}")
        return Checkpoint(
            path=path,
            step=wanted,
            weights=load_file(path / WEIGHTS),
            training=torch.load(path / TRAINING, map_location="cpu", weights_only=True),
        )

    def step_of(self, which: str) -> int:
        """The step that ``latest`` or ``best`` names.

        Raises:
            FileNotFoundError: nothing does.
        """
        step = self._named(which)
        if step is None:
            raise FileNotFoundError(f"{self.folder} has no {which!r}: there is no such checkpoint yet")
        return step

    def forget_after(self, step: int, best_step: int | None = None) -> None:
        """Removes the checkpoints of later steps: the run goes another way from ``step`` on.

        Args:
            best_step: the best one up to ``step``, which ``best`` then names, if its checkpoint is still there.
        """
        for later in [s for s in self.steps() if s > step]:
            shutil.rmtree(self.folder / _name(later))
        if (self._named("best") or 0) > step:
            (self.folder / "best").unlink()
            if best_step in self.steps():
                self._point("best", best_step)
        self._point("latest", step)

    def _named(self, which: str) -> int | None:
        pointer = self.folder / which
        return int(pointer.read_text().strip().removeprefix("step-")) if pointer.is_file() else None

    def _point(self, which: str, step: int) -> None:
        write_text(self.folder / which, _name(step) + "\n")

    def _remove_old(self) -> None:
        kept = {*self.steps()[-self._keep_last :], self._named("latest"), self._named("best")}
        for step in self.steps():
            if step not in kept:
                shutil.rmtree(self.folder / _name(step))


def _name(step: int) -> str:
    return f"step-{step:07d}"


def is_checkpoint(folder: Path) -> bool:
    """Whether the folder is that of one checkpoint, complete or not."""
    return folder.parent.name == "checkpoints" and re.fullmatch(r"step-\d+", folder.name) is not None


def step_of_folder(folder: Path) -> int:
    """The step in the name of a checkpoint's folder."""
    return int(folder.name.removeprefix("step-"))


def _facts(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _fault(path: Path) -> str | None:
    """What is wrong with the files of a checkpoint, or None."""
    if not (path / MANIFEST).is_file():
        return f"its {MANIFEST} is missing"
    try:
        files = json.loads((path / MANIFEST).read_text())["files"]
    except (ValueError, KeyError) as error:
        return f"its {MANIFEST} cannot be read: {error}"
    for name, facts in files.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if (size := (path / name).stat().st_size) != facts["bytes"]:
            return f"{name} has {size} bytes instead of {facts['bytes']}"
        if _facts(path / name) != facts:
            return f"the SHA-256 of {name} is not the recorded one"
    return None
