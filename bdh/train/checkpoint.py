"""Checkpoints that are either complete or not there.

    <run_dir>/checkpoints/step-0001000/*.distcp, .metadata  tensors: weights, optimizer, moving average ...
                                       training.pt          position in the data, random states, settings ...
                                       manifest.json        the marker: size and SHA-256 of the other files
    <run_dir>/checkpoints/latest, best                      the name of a checkpoint, as text

A checkpoint is written under a temporary name, synced to the disk, and then renamed: a crash at any moment
leaves the ones before untouched. Several processes write their parts of the tensors; rank 0 does the rest. The
folder must be one that all of them see.
"""

import json
import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bdh.distributed.tensors import BackgroundWriter, Tensors, read_all, read_tensors, stored_shapes, write_tensors
from bdh.distributed.world import World
from bdh.storage import atomic_dir, remove, removed_name, temporary_name, write_text
from bdh.train.places import MANIFEST, CheckpointFolder, checkpoint_fault, checkpoint_name, file_facts

TRAINING = "training.pt"
_logger = logging.getLogger(__name__)


class CheckpointError(OSError):
    """A checkpoint could not be written; the ones before are untouched."""


@dataclass
class Checkpoint:
    """A complete checkpoint, whose small parts are read."""

    path: Path
    step: int
    training: dict[str, Any]

    def tensors(self, group: str) -> dict[str, torch.Tensor]:
        """Those whose names begin with ``group`` and a dot, such as "weights", whole, under the rest of their names."""
        return read_all(self.path, f"{group}.")

    def shapes(self) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """Shape and dtype of every tensor."""
        return stored_shapes(self.path)

    def read_into(self, tensors: Tensors, world: World) -> None:
        """Fills tensors, sharded or not, all processes together; see :func:`bdh.distributed.tensors.read_tensors`."""
        read_tensors(self.path, tensors, world)


class Checkpointer(CheckpointFolder):
    """Writes, keeps and finds the checkpoints of one run. With several processes, all call each method together."""

    def __init__(
        self,
        run_dir: Path,
        *,
        keep_last: int = 2,
        keep_every_steps: int | None = None,
        in_background: bool = False,
        world: World | None = None,
        may_write: Callable[[], None] = lambda: None,
    ):
        """
        Args:
            keep_last: newest checkpoints that are kept, besides ``latest`` and ``best``.
            keep_every_steps: keep those of the multiples of so many steps for good.
            in_background: write while the training goes on.
            may_write: called on rank 0 before a checkpoint takes its place; raises ``OSError`` where it must not.
        """
        super().__init__(run_dir)
        self._keep_last, self._keep_every_steps = keep_last, keep_every_steps
        self._world, self._may_write = world or World(), may_write
        self._background = BackgroundWriter(self._world) if in_background else None
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: tuple[int, Future[None]] | None = None

    def save(self, step: int, tensors: Tensors, training: dict[str, Any], *, is_best: bool = False) -> Path:
        """Writes the checkpoint of ``step``, points ``latest`` to it, and removes what is not kept any more.

        In the background, this waits for the checkpoint before and returns when copying has begun: then call
        :meth:`wait_until_copied` before the tensors change.

        Args:
            training: anything that ``torch.load(weights_only=True)`` reads back; that of rank 0 is stored.
            is_best: point ``best`` to it too.

        Raises:
            CheckpointError: the disk is full or refuses; in the background, it did so for the checkpoint before.
        """
        try:
            self.wait()
        finally:
            self._start(step, tensors, training, is_best)
        return self.path_of(step)

    def wait_until_copied(self) -> None:
        """Afterwards the tensors that are being saved may change."""
        if self._background is not None:
            self._background.wait_until_copied()

    def wait(self) -> None:
        """Waits for the checkpoint that is being written in the background.

        Raises:
            CheckpointError: it could not be written.
        """
        if self._pending is None:
            return
        (step, future), self._pending = self._pending, None
        self._agree(step, _reason(future.result))

    def close(self) -> None:
        """Waits, and ends the background's threads. Raises as :meth:`wait`."""
        try:
            self.wait()
        finally:
            self._executor.shutdown()
            if self._background is not None:
                self._background.close()

    def _start(self, step: int, tensors: Tensors, training: dict[str, Any], is_best: bool) -> None:
        final = self.path_of(step)
        stack = ExitStack()
        self._agree(step, _reason(lambda: self._open_folder(stack, final)))
        folder = temporary_name(final)
        written: Callable[[], None]
        if self._background is not None:
            written = self._background.start(folder, tensors)
        else:
            written = lambda: write_tensors(folder, tensors, self._world)  # noqa: E731

        def complete() -> None:
            with stack:
                written()
                if self._world.is_main:
                    torch.save(training, folder / TRAINING)
                    files = {path.name: file_facts(path) for path in sorted(folder.iterdir())}
                    (folder / MANIFEST).write_text(json.dumps({"step": step, "files": files}, indent=1))
                    self._may_write()
            if self._world.is_main:
                self._point("latest", step)
                if is_best:
                    self._point("best", step)
                self._remove_old()

        if self._background is not None:
            self._pending = step, self._executor.submit(complete)
        else:
            self._agree(step, _reason(complete))

    def _open_folder(self, stack: ExitStack, final: Path) -> None:
        if self._world.is_main:
            self.recover()
            for left in self.folder.glob(".step-*"):  # by a process that was killed
                remove(left)
            stack.enter_context(atomic_dir(final))

    def _agree(self, step: int, reason: str | None) -> None:
        """Raises the same error on all processes, if any of them has one."""
        reasons = sorted({reason for reason in self._world.gather(reason) if reason is not None})
        if reasons:
            latest = self.named("latest")
            raise CheckpointError(
                f"the checkpoint of step {step} is not saved: {'; '.join(reasons)}; "
                + (f"the newest one is that of step {latest}" if latest is not None else "there is none before it")
            )

    def load(self, step: int | None = None) -> Checkpoint:
        """Finds a checkpoint, by default the newest, and checks every byte of it.

        Where ``latest`` names none that is there, as when it was emptied, the newest complete one is taken, with a warning.
        If a training that is running there removes the newest meanwhile, the one that is then the newest is taken.

        Raises:
            FileNotFoundError: there is none, or none of that step.
            ValueError: it is cut off or altered; the message names the newest one that is whole.
        """
        if self._world.is_main:
            self.recover()
        self._world.wait_for_all()
        newest = self._newest() if step is None else None
        try:
            return self._load(newest if step is None else step)
        except (OSError, ValueError):
            # Several processes might not see the same.
            if newest is None or self._world.size > 1 or self.path_of(newest).is_dir():
                raise
            now = self._newest()
            if now in (None, newest):
                raise
            return self._load(now)

    def _load(self, wanted: int | None) -> Checkpoint:
        self.check_there(wanted)
        assert wanted is not None  # there would be none
        path = self.path_of(wanted)
        if fault := self._world.gather(checkpoint_fault(path) if self._world.is_main else None)[0]:
            whole = [s for s in self.steps() if s != wanted and not checkpoint_fault(self.path_of(s))]
            advice = (
                f"the newest complete one is {checkpoint_name(max(whole))}: train on from it with --resume_step {max(whole)}, "
                f"read it with --checkpoint {max(whole)}"
                if whole
                else "there is no complete one besides it"
            )
            raise ValueError(f"checkpoint {path} is damaged ({fault}); {advice}")
        training = torch.load(path / TRAINING, map_location="cpu", weights_only=True)
        return Checkpoint(path=path, step=wanted, training=training)

    def _newest(self) -> int | None:
        step = self.newest()
        if self._world.is_main and self.has("latest") and step != self.named("latest"):
            _logger.warning(
                "%s names no checkpoint that is there (%s): the newest complete one is taken, that of step %s",
                self.folder / "latest",
                self.excerpt("latest"),
                step,
            )
        return step

    def forget_after(self, step: int, best_step: int | None = None) -> None:
        """Removes the checkpoints of later steps: the run goes another way from ``step`` on.

        Args:
            best_step: the best one up to ``step``, which ``best`` then names, if its checkpoint is still there and
                ``best`` names a later one or none.
        """
        if self._world.is_main:
            # The pointers first: killed in between, they name checkpoints that are there.
            best = self.named("best")
            if self.has("best") and (best is None or best > step):
                (self.folder / "best").unlink()
                if best_step in self.steps():
                    self._point("best", best_step)
            self._point("latest", step)
            for later in [s for s in self.steps() if s > step]:
                self._remove(later)
        self._world.wait_for_all()

    def _point(self, which: str, step: int) -> None:
        write_text(self.folder / which, checkpoint_name(step) + "\n")

    def _remove_old(self) -> None:
        kept = {*self.steps()[-self._keep_last :], self.named("latest"), self.named("best")}
        for step in self.steps():
            if step not in kept and (self._keep_every_steps is None or step % self._keep_every_steps):
                self._remove(step)

    def _remove(self, step: int) -> None:
        """Out of sight first: what is left of it, if the process is killed meanwhile, is no checkpoint."""
        folder = self.path_of(step)
        remove(folder.rename(removed_name(folder)))


def _reason(action: Callable[[], None]) -> str | None:
    """Runs ``action``; why it could not write, or None."""
    try:
        action()
    # PyTorch reports some of what the disk refuses in errors of its own.
    except (OSError, RuntimeError) as error:
        return str(error)
    return None
