"""The processes that train together, and how they share the model, which does not know of it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from bdh.distributed.config import DistributedConfig, local_rank, rank, world_size
from bdh.model.weights import forget_kernels


class World:
    """One process among those that ``torchrun`` (or Slurm, through it) has started. Alone, its methods do nothing.

    Attributes:
        rank: number of this process, 0 to ``size - 1``. Rank 0 prints and writes.
        local_rank: its number on its machine, which is that of its GPU.
        size: number of processes.
        device_type: "cpu" or "cuda": what the tensors of :meth:`sum` live on.
        control: the group for small things, such as signals, which go over the CPU beside the training.
        storage: the group for checkpoints, which are written in the background and talk in between.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0, device_type: str = "cpu"):
        self.rank, self.size, self.local_rank, self.device_type = rank, size, local_rank, device_type
        self.control: dist.ProcessGroup | None = None
        self.storage: dist.ProcessGroup | None = None
        self._loading: dist.ProcessGroup | None = None  # of the threads that prepare batches

    @classmethod
    def join(cls, device_type: str, timeout_minutes: float = 30.0, *, even_alone: bool = False) -> "World":
        """Meets the other processes, where the environment variables of ``torchrun`` name any.

        Args:
            device_type: of the tensors that the processes exchange: NCCL carries them on "cuda", else gloo.
            even_alone: open a group of one, which FSDP needs.

        Raises:
            ValueError: several processes on a device that they cannot share.
        """
        world = cls(rank(), world_size(), local_rank(), device_type)
        if world.size == 1 and not even_alone:
            return world
        if device_type not in ("cpu", "cuda"):
            raise ValueError(f"train.device is {device_type!r}: several processes can train on cpu or cuda")
        timeout = timedelta(minutes=timeout_minutes)
        if not dist.is_initialized():
            options: dict[str, Any] = {"timeout": timeout}
            if world.size == 1:
                options |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}
            if device_type == "cuda":
                torch.cuda.set_device(world.local_rank)
                options["device_id"] = torch.device("cuda", world.local_rank)
            dist.init_process_group("cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo", **options)
        world.control, world.storage, world._loading = (
            dist.new_group(backend="gloo", timeout=timeout) for _ in range(3)
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
        return list(map(any, zip(*self.gather(flags), strict=True)))

    def gather(self, value: Any, *, beside_training: bool = False) -> list[Any]:
        """Every process's ``value``, by rank: small plain data.

        ``beside_training`` is for the thread that prepares batches, while the training's own may call other methods.
        """
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._loading if beside_training else self.control)
        return values

    def wait_for_all(self) -> None:
        """Returns when all processes have come here."""
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


@dataclass
class Parallel:
    """A model as the processes share it."""

    model: nn.Module
    strategy: str
    """none, ddp or fsdp."""
    step_model: Callable[..., Any]
    """What a training step calls. Its gradients are the mean over the processes."""
    mesh: DeviceMesh | None = None
    """Of the processes; None for "none"."""

    @contextmanager
    def without_exchange(self) -> Iterator[None]:
        """For all micro-batches of a step but the last: the gradients of the processes are exchanged only after that one."""
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(False)
            try:
                yield
            finally:
                self.model.set_requires_gradient_sync(True)
        elif isinstance(self.step_model, DistributedDataParallel):
            with self.step_model.no_sync():
                yield
        else:
            yield

    def sharded(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors of this process's sequences as shards of those of all processes, for a checkpoint."""
        if self.mesh is None:
            return tensors
        return {name: DTensor.from_local(tensor, self.mesh, [Shard(0)]) for name, tensor in tensors.items()}

    def gather_weights(self) -> None:
        """Gathers the weights now that the next forward pass needs; every process then holds all of them."""
        if isinstance(self.model, FSDPModule):
            self.model.unshard()

    @contextmanager
    def whole_model(self) -> Iterator[None]:
        """Every process holds all weights inside, and can use the model as often as it likes, with no other taking part."""
        if not isinstance(self.model, FSDPModule):
            yield
            return
        self.model.unshard()
        try:
            yield
        finally:
            forget_kernels(self.model)  # the next time, other weights are in the same memory
            self.model.reshard()


def choose_strategy(config: DistributedConfig, world: World) -> str:
    """The strategy that is set, or for "auto" DDP, where there is more than one process.

    Raises ``ValueError`` if it does not go with the number of processes.
    """
    strategy, more = config.strategy, "torchrun --nproc_per_node 2 -m bdh train ..."
    if strategy == "auto":
        return "ddp" if world.size > 1 else "none"
    fault = None
    if strategy == "none" and world.size > 1:
        fault = (
            f", but {world.size} processes were started, which would train as many models: set ddp or fsdp, or start one "
            "process"
        )
    elif strategy == "ddp" and world.size == 1:
        fault = f" with one process: set none, or start more with {more}"
    elif strategy == "fsdp" and world.size == 1 and world.device_type == "cpu":
        fault = (
            " with one process and no accelerator, where there is nothing to share: set none, or start more processes "
            f"with {more}"
        )
    if fault is not None:
        raise ValueError(f"distributed.strategy is {strategy!r}{fault}")
    return strategy


def parallelize(model: nn.Module, strategy: str, config: DistributedConfig, world: World) -> Parallel:
    """Spreads the model over the processes, in place.

    DDP: every process holds everything. Gradients are averaged as soon as they are complete: that of ``lm_head`` while the
    backward pass runs; those of E, Ev and Dec, to which all L layer steps add, only at its end.

    FSDP2: every weight, its gradient and its optimizer state are cut along their first dimension, one shard for each
    process. The unit that is gathered is **the whole model**: all L layer steps use one set of weights, so a unit for
    each, as other transformers have it, would gather the same weights and sum their gradient L times. As one unit they
    are gathered once, when the forward pass starts, and stay until the backward pass ends. That takes the memory of one
    copy of the weights during a step, which beside the (B, H, T, N) activations of a BDH is small.

    Args:
        model: on the process's device, with the same weights on every process.
        strategy: of :func:`choose_strategy`.
    """
    if strategy == "none":
        return Parallel(model, strategy, model)
    mesh = init_device_mesh(world.device_type, (world.size,))
    if strategy == "ddp":
        return Parallel(model, strategy, DistributedDataParallel(model, device_mesh=mesh), mesh)
    # None casts nothing: the weights may be float64.
    param_dtype, reduce_dtype = (
        None if name == "float32" else getattr(torch, name) for name in (config.param_dtype, config.reduce_dtype)
    )
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return Parallel(model, strategy, model, mesh)
