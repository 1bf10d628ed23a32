"""The processes that train together, as one of them sees it. Alone, everything here does nothing."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from bdh.distributed import environment


class World:
    """One process among those that ``torchrun`` (or Slurm, through it) has started.

    Attributes:
        rank: number of this process, 0 to ``size - 1``. Rank 0 prints and writes.
        local_rank: its number on its machine, which is that of its GPU.
        size: number of processes.
        device_type: "cpu" or "cuda": what the tensors of :meth:`sum` live on.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0, device_type: str = "cpu"):
        self.rank, self.size, self.local_rank, self.device_type = rank, size, local_rank, device_type
        # Small things, such as signals, go over the CPU beside the training.
        self.control: dist.ProcessGroup | None = None
        # A checkpoint that is written in the background talks in between, so it needs a group of its own.
        self.storage: dist.ProcessGroup | None = None
        # So does the thread that prepares the next batch.
        self._loading: dist.ProcessGroup | None = None

    @classmethod
    def join(cls, device_type: str, timeout_minutes: float = 30.0, *, even_alone: bool = False) -> "World":
        """Meets the other processes, where the environment variables of ``torchrun`` name any.

        Args:
            device_type: of the tensors that the processes exchange: NCCL carries them on "cuda", else gloo.
            even_alone: open a group of one, which FSDP needs.

        Raises:
            ValueError: several processes on a device that they cannot share.
        """
        rank, size, local_rank = environment.rank(), environment.world_size(), environment.local_rank()
        world = cls(rank, size, local_rank, device_type)
        if size == 1 and not even_alone:
            return world
        if device_type not in ("cpu", "cuda"):
            raise ValueError(f"train.device is {device_type!r}: several processes can train on cpu or cuda")
        if not dist.is_initialized():
            options: dict[str, Any] = {"timeout": timedelta(minutes=timeout_minutes)}
            if size == 1:
                options |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}
            if device_type == "cuda":
                torch.cuda.set_device(local_rank)
                options["device_id"] = torch.device("cuda", local_rank)
            dist.init_process_group("cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo", **options)
        world.control, world.storage, world._loading = (
            dist.new_group(backend="gloo", timeout=timedelta(minutes=timeout_minutes)) for _ in range(3)
        )
        return world

    def leave(self) -> None:
        """Says goodbye, so that no other process waits or complains."""
        if self.control is not None:
            dist.destroy_process_group()
            self.control = self.storage = self._loading = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over all processes, the same to the bit on each; ``values`` is written over."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def any(self, flags: list[bool]) -> list[bool]:
        """For each flag, whether it is set on any process."""
        if self.size == 1:
            return flags
        numbers = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(numbers, group=self.control)
        return [number > 0 for number in numbers.tolist()]

    def gather(self, value: Any, *, beside_training: bool = False) -> list[Any]:
        """Every process's ``value``, by rank: small plain data.

        Args:
            beside_training: called by the thread that prepares batches, while the training's own may call other methods.
        """
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._loading if beside_training else self.control)
        return values

    def wait_for_all(self) -> None:
        if self.size > 1:
            dist.barrier(group=self.control)

    @contextmanager
    def rank0_first(self) -> Iterator[None]:
        """Lets rank 0 do something, such as filling a cache, then the first of each other machine, then the rest.

        So it is done once where the machines share a disk, and once on each where they do not.
        """
        turn = 0 if self.rank == 0 else 1 if self.local_rank == 0 else 2
        for _ in range(turn):
            self.wait_for_all()
        yield
        for _ in range(2 - turn):
            self.wait_for_all()
