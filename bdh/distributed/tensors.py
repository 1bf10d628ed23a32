"""Tensors of all processes in one folder, by ``torch.distributed.checkpoint``.

Every process writes the parts that it holds. Whoever reads says which tensors it wants and how it holds them: the
number of processes, and how they share the tensors, may be another than when they were written.
"""

import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse

from bdh.distributed.world import World

Tensors = Mapping[str, torch.Tensor]

_ALONE = "torch.distributed is disabled"

# What the file of metadata names: shapes, dtypes, and where in which file a tensor lies.
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


class WritingError(OSError):
    """Some process could not write its part."""


def write_tensors(folder: Path, tensors: Tensors, world: World) -> None:
    """Writes a folder's tensors, all processes together. What is not sharded is written once.

    Raises:
        WritingError: what the disk of some process refused. It is raised on every process.
    """
    try:
        with _knowing_that_it_is_alone():
            dcp.save(
                dict(tensors), storage_writer=_writer(folder), process_group=world.storage, no_dist=world.size == 1
            )
    except CheckpointException as error:
        raise _writing_error(error) from error


class BackgroundWriter:
    """Writes a folder's tensors while the training goes on."""

    def __init__(self, world: World):
        self._world = world
        # In another thread, where warnings cannot be caught for a while only.
        warnings.filterwarnings("ignore", message=_ALONE)
        pinned = world.device_type == "cuda"
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=pinned, use_shared_memory=False, use_async_staging=True, use_non_blocking_copy=pinned
            )
        )
        self._staged: Future[None] | None = None

    def start(self, folder: Path, tensors: Tensors) -> Callable[[], None]:
        """Begins to copy and write. The tensors must stay as they are until :meth:`wait_until_copied`.

        Returns:
            A function that waits until all processes have written, and raises as :func:`write_tensors`.
        """
        with _knowing_that_it_is_alone():
            response = dcp.async_save(
                dict(tensors),
                storage_writer=_writer(folder),
                process_group=self._world.storage,
                async_stager=self._stager,
                no_dist=self._world.size == 1,
            )
        assert isinstance(response, AsyncSaveResponse)
        self._staged = response.staging_completion

        def wait() -> None:
            try:
                response.upload_completion.result()
            except CheckpointException as error:
                raise _writing_error(error) from error

        return wait

    def wait_until_copied(self) -> None:
        """Afterwards the tensors may change."""
        if self._staged is not None:
            self._staged.result()
            self._staged = None

    def close(self) -> None:
        self._stager.close()


def read_tensors(folder: Path, into: Tensors, world: World | None = None) -> None:
    """Fills tensors, which may be sharded, with what is stored under their names, all processes together.

    Args:
        world: None to read alone.

    Raises:
        ValueError: a tensor is not there, or has another shape.
    """
    stored = stored_shapes(folder)
    faults = [
        f"{name} is not stored" if name not in stored else f"{name} is stored as {tuple(stored[name][0])}"
        for name, tensor in into.items()
        if name not in stored or stored[name][0] != tensor.shape
    ]
    if faults:
        raise ValueError(f"{folder} does not hold what is asked for: {'; '.join(faults)}")
    if into:
        with _knowing_that_it_is_alone():
            dcp.load(
                dict(into),
                storage_reader=_Reader(folder),
                process_group=None if world is None else world.storage,
                no_dist=world is None or world.size == 1,
            )


def read_all(folder: Path, prefix: str) -> dict[str, torch.Tensor]:
    """The tensors whose names begin with ``prefix``, whole and on the CPU, under their names without it."""
    shapes = {name: facts for name, facts in stored_shapes(folder).items() if name.startswith(prefix)}
    tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in shapes.items()}
    read_tensors(folder, tensors)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def stored_shapes(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Name, shape and dtype of what a folder holds."""
    entries = _Reader(folder).read_metadata().state_dict_metadata
    return {
        name: (entry.size, entry.properties.dtype)
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }


class _Reader(FileSystemReader):
    """Reads the metadata, which are a pickle, without running code that somebody has put there."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _METADATA_CLASSES.get(module, ()):
            raise ValueError(f"the metadata of a checkpoint name {module}.{name}, which has no place there")
        return super().find_class(module, name)


@contextmanager
def _knowing_that_it_is_alone() -> Iterator[None]:
    """PyTorch warns of a process that stores tensors alone, which here is as it should be."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=_ALONE)
        yield


def _writer(folder: Path) -> FileSystemWriter:
    return FileSystemWriter(folder, sync_files=True)


def _writing_error(error: CheckpointException) -> Exception:
    reasons = {f"{fault}".splitlines()[0] for fault, _ in error.failures.values()}
    faults = [fault for fault, _ in error.failures.values()]
    if not all(isinstance(fault, (OSError, RuntimeError)) for fault in faults):
        return RuntimeError("; ".join(sorted(reasons)))
    return WritingError("; ".join(sorted(reasons)))
