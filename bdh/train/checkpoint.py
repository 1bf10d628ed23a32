"""Checkpoints of a run, which are written atomically and verified.

    <run_dir>/checkpoints/step-0001000/*.distcp, .metadata  tensors: weights, optimizer, moving average ...
                                       training.pt          position in the data, random states, settings ...
                                       manifest.json        the marker: size and SHA-256 of the other files
    <run_dir>/checkpoints/latest, best                      the name of a checkpoint, as text

A checkpoint is written under a temporary name, synced to the disk, and then renamed, so that a crash at any moment
leaves earlier checkpoints intact. Several processes write their shards of the tensors with
``torch.distributed.checkpoint`` into a shared folder; rank 0 does the rest. Any number of processes can read them.
"""

import json
import logging
import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse

from bdh.distributed.world import World
from bdh.storage import atomic_dir, remove, removed_name, temporary_name, write_text
from bdh.train.places import MANIFEST, CheckpointFolder, checkpoint_fault, checkpoint_name, file_facts

TRAINING = "training.pt"
Tensors = Mapping[str, torch.Tensor]
_logger = logging.getLogger(__name__)

_ALONE = "torch.distributed is disabled"  # a harmless warning when a single process saves or loads tensors
# The classes in the metadata file: shapes, dtypes, and the file and offset of each tensor.
_METADATA_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "float16", "bfloat16", "float32", "float64", "int32", "int64", "uint8", "bool", "device"},
    "pathlib": {"Path", "PosixPath", "WindowsPath", "PurePosixPath"},
    "collections": {"OrderedDict"},
}  # fmt: skip


class CheckpointError(OSError):
    """A checkpoint could not be written; earlier checkpoints are intact."""


@dataclass
class Checkpoint:
    """A complete checkpoint. Everything except the tensors has been read."""

    path: Path
    step: int
    training: dict[str, Any]

    def tensors(self, group: str) -> dict[str, torch.Tensor]:
        """Returns the complete tensors of a group such as "weights", whose names begin with it, without this prefix."""
        group = f"{group}."
        shapes = {name: facts for name, facts in self.shapes().items() if name.startswith(group)}
        tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in shapes.items()}
        self.read_into(tensors)
        return {name.removeprefix(group): tensor for name, tensor in tensors.items()}

    def shapes(self) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """Returns the shape and dtype of every tensor."""
        entries = _Reader(self.path).read_metadata().state_dict_metadata
        return {
            name: (entry.size, entry.properties.dtype)
            for name, entry in entries.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    def read_into(self, tensors: Tensors, world: World | None = None) -> None:
        """Loads the stored values into tensors, which can be sharded. All processes of ``world`` must call it together.

        Raises:
            ValueError: a tensor is missing or has another shape.
        """
        stored = self.shapes()
        if faults := [
            f"{name} is not stored" if name not in stored else f"{name} is stored as {tuple(stored[name][0])}"
            for name, tensor in tensors.items()
            if name not in stored or stored[name][0] != tensor.shape
        ]:
            raise ValueError(f"{self.path} does not have the expected tensors: {'; '.join(faults)}")
        if tensors:
            world = world or World()
            with _no_warning_when_alone():
                dcp.load(
                    dict(tensors),
                    storage_reader=_Reader(self.path),
                    process_group=world.storage,
                    no_dist=world.size == 1,
                )


class _Reader(FileSystemReader):
    """Reads the metadata, which are a pickle, without running code that they may contain."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _METADATA_CLASSES.get(module, ()):
            raise ValueError(f"the metadata of a checkpoint refer to {module}.{name}, which is not allowed")
        return super().find_class(module, name)


@contextmanager
def _no_warning_when_alone() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=_ALONE)
        yield


class Checkpointer(CheckpointFolder):
    """Writes, finds and removes the checkpoints of a run. With several processes, all call each method together."""

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
        """Opens the checkpoints of a run.

        Args:
            run_dir: the folder of the run.
            keep_last: the number of newest checkpoints to keep, besides ``latest`` and ``best``.
            keep_every_steps: if given, checkpoints of multiples of this many steps are never removed.
            in_background: whether to write while training continues.
            world: the processes that train together.
            may_write: called on rank 0 before a checkpoint is renamed into place; raises ``OSError`` to prevent it.
        """
        super().__init__(run_dir)
        self._keep_last, self._keep_every_steps = keep_last, keep_every_steps
        self._world, self._may_write = world or World(), may_write
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: tuple[int, Future[None]] | None = None
        self._staged: Future[None] | None = None
        self._stager: DefaultStager | None = None
        if in_background:
            warnings.filterwarnings("ignore", message=_ALONE)  # for good: warning filters are not per thread
            pins = self._world.device_type == "cuda"
            self._stager = DefaultStager(
                StagingOptions(
                    use_pinned_memory=pins, use_shared_memory=False, use_async_staging=True, use_non_blocking_copy=pins
                )
            )

    def save(self, step: int, tensors: Tensors, training: dict[str, Any], *, is_best: bool = False) -> Path:
        """Writes the checkpoint of ``step``, points ``latest`` to it, and removes checkpoints that are no longer kept.

        In the background, this waits for the previous checkpoint, and returns when copying has started. Call
        :meth:`wait_until_copied` before changing the tensors.

        Args:
            step: the step.
            tensors: the tensors by name.
            training: other data that ``torch.load(weights_only=True)`` can read; that of rank 0 is stored.
            is_best: whether to point ``best`` to it too.

        Raises:
            CheckpointError: writing failed, for example because the disk is full. In the background, writing the
                previous checkpoint failed.
        """
        try:
            self.wait()
        finally:
            self._start(step, tensors, training, is_best)
        return self.path_of(step)

    def wait_until_copied(self) -> None:
        """Waits until the tensors that are being saved have been copied, and can be changed."""
        if self._staged is not None:
            self._staged.result()
            self._staged = None

    def wait(self) -> None:
        """Waits for the checkpoint that is being written in the background. Raises ``CheckpointError`` if it failed."""
        if self._pending is not None:
            (step, future), self._pending = self._pending, None
            self._all_do(step, future.result)

    def close(self) -> None:
        """Waits, and ends the background threads. Raises as :meth:`wait`."""
        try:
            self.wait()
        finally:
            self._executor.shutdown()
            if self._stager is not None:
                self._stager.close()

    def _start(self, step: int, tensors: Tensors, training: dict[str, Any], is_best: bool) -> None:
        final = self.path_of(step)
        stack = ExitStack()
        self._all_do(step, lambda: self._open_folder(stack, final))
        folder = temporary_name(final)
        write = self._writing(folder, tensors)

        def complete() -> None:
            with stack:
                try:
                    write()
                except CheckpointException as error:
                    reasons = {str(fault).splitlines()[0] for fault, _ in error.failures.values()}
                    raise OSError("; ".join(sorted(reasons))) from error
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

        if self._stager is not None:
            self._pending = step, self._executor.submit(complete)
        else:
            self._all_do(step, complete)

    def _open_folder(self, stack: ExitStack, final: Path) -> None:
        if self._world.is_main:
            self.recover()
            for left in self.folder.glob(".step-*"):  # left by a process that was killed
                remove(left)
            stack.enter_context(atomic_dir(final))

    def _writing(self, folder: Path, tensors: Tensors) -> Callable[[], Any]:
        """Returns a function that writes the tensors of all processes.

        In the background, writing starts now, and the function waits for its end.
        """
        where: dict[str, Any] = {
            "storage_writer": FileSystemWriter(folder, sync_files=True),
            "process_group": self._world.storage,
            "no_dist": self._world.size == 1,
        }
        if self._stager is None:

            def write() -> None:
                with _no_warning_when_alone():
                    dcp.save(dict(tensors), **where)

            return write
        response = dcp.async_save(dict(tensors), async_stager=self._stager, **where)
        assert isinstance(response, AsyncSaveResponse)
        self._staged = response.staging_completion
        return response.upload_completion.result

    def _all_do(self, step: int, action: Callable[[], None]) -> None:
        """Runs ``action``, and raises the same error in all processes if one of them could not write."""
        reason = None
        try:
            action()
        # PyTorch reports some disk errors with its own exceptions.
        except (OSError, RuntimeError) as error:
            reason = str(error)
        if reasons := sorted({each for each in self._world.gather(reason) if each is not None}):
            latest = self.named("latest")
            before = "there is none before it" if latest is None else f"the newest one is that of step {latest}"
            raise CheckpointError(f"the checkpoint of step {step} is not saved: {'; '.join(reasons)}; {before}")

    def load(self, step: int | None = None) -> Checkpoint:
        """Loads a checkpoint, by default the latest, and verifies every byte of it.

        If ``latest`` is empty or names a checkpoint that does not exist, the newest complete one is used, with a
        warning. If a running training removes that one meanwhile, the one that is then the newest is used.

        Raises:
            FileNotFoundError: there is no checkpoint, or none of that step.
            ValueError: the checkpoint is truncated or modified. The message names the newest intact one.
        """
        if self._world.is_main:
            self.recover()
        self._world.wait_for_all()
        newest = self._newest() if step is None else None
        try:
            return self._load(newest if step is None else step)
        except (OSError, ValueError):
            # Not with several processes, which might choose different checkpoints.
            if newest is None or self._world.size > 1 or self.path_of(newest).is_dir():
                raise
            now = self._newest()
            if now in (None, newest):
                raise
            return self._load(now)

    def _load(self, wanted: int | None) -> Checkpoint:
        self.check_there(wanted)
        assert wanted is not None  # otherwise there is no checkpoint, which has raised an exception
        path = self.path_of(wanted)
        if fault := self._world.gather(checkpoint_fault(path) if self._world.is_main else None)[0]:
            others = (s for s in reversed(self.steps()) if s != wanted)
            whole = next((s for s in others if not checkpoint_fault(self.path_of(s))), None)
            advice = "there is no complete one besides it"
            if whole is not None:
                advice = (
                    f"the newest complete one is {checkpoint_name(whole)}: train on from it with --resume_step {whole}, "
                    f"read it with --checkpoint {whole}"
                )
            raise ValueError(f"checkpoint {path} is damaged ({fault}); {advice}")
        return Checkpoint(path, wanted, torch.load(path / TRAINING, map_location="cpu", weights_only=True))

    def _newest(self) -> int | None:
        step = self.newest()
        if self._world.is_main and self.has("latest") and step != self.named("latest"):
            _logger.warning(
                "%s does not name an existing checkpoint (%s): using the newest complete one, that of step %s",
                self.folder / "latest",
                self.excerpt("latest"),
                step,
            )
        return step

    def forget_after(self, step: int, best_step: int | None = None) -> None:
        """Removes the checkpoints after ``step``, from which the run continues differently.

        Args:
            step: the step from which the run continues.
            best_step: the best step up to ``step``. ``best`` is pointed to it if it names a later checkpoint or none,
                and if the checkpoint still exists.
        """
        if self._world.is_main:
            # The pointers first, so that they name existing checkpoints if the process is killed in between.
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
        """Removes a checkpoint. It is renamed first, so that an interrupted removal leaves no incomplete checkpoint."""
        folder = self.path_of(step)
        remove(folder.rename(removed_name(folder)))
