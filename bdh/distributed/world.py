"""The processes that train together, and how a model is distributed over them."""

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
    """This process in the group that ``torchrun`` started. With a single process, the methods do nothing.

    Attributes:
        rank: the number of this process, 0 to ``size - 1``. Rank 0 prints and writes.
        local_rank: its number on its machine, which is the number of its GPU.
        size: the number of processes.
        device_type: "cpu" or "cuda": the device of the tensors of :meth:`sum`.
        control: the group for small messages, such as signals, which are exchanged over the CPU beside the training.
        storage: the group for checkpoints, which are written in the background.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0, device_type: str = "cpu"):
        self.rank, self.size, self.local_rank, self.device_type = rank, size, local_rank, device_type
        self.control: dist.ProcessGroup | None = None
        self.storage: dist.ProcessGroup | None = None
        self._loading: dist.ProcessGroup | None = None  # for the threads that prepare batches

    @classmethod
    def join(cls, device_type: str, timeout_minutes: float = 30.0, *, even_alone: bool = False) -> "World":
        """Joins the process group, if the environment variables of ``torchrun`` describe one.

        Args:
            device_type: the device of exchanged tensors, which selects NCCL for "cuda" and otherwise gloo.
            timeout_minutes: how long a process waits for another one.
            even_alone: whether to create a group of a single process, which FSDP needs.

        Raises:
            ValueError: there are several processes on a device that they cannot share.
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
        """Leaves the process group, so that no other process waits or reports an error."""
        if self.control is not None:
            dist.destroy_process_group()
            self.control = self.storage = self._loading = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Returns the sum over all processes, bit-identical on each. ``values`` is overwritten."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def any(self, flags: list[bool]) -> list[bool]:
        """Returns for each flag whether it is set in any process."""
        return list(map(any, zip(*self.gather(flags), strict=True)))

    def gather(self, value: Any, *, beside_training: bool = False) -> list[Any]:
        """Returns the ``value`` of every process, by rank. Values must be small plain data.

        Args:
            value: the value of this process.
            beside_training: whether the thread that prepares batches is calling, while the main thread can call other
                methods.
        """
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._loading if beside_training else self.control)
        return values

    def wait_for_all(self) -> None:
        """Waits until all processes have called it."""
        if self.size > 1:
            dist.barrier(group=self.control)

    @contextmanager
    def rank0_first(self) -> Iterator[None]:
        """A context that rank 0 runs first, then the first process of each other machine, and then the others.

        Work such as filling a cache is thus done once if the machines share a disk, and otherwise once on each.
        """
        turn = 0 if self.rank == 0 else 1 if self.local_rank == 0 else 2
        for _ in range(turn):
            self.wait_for_all()
        yield
        for _ in range(2 - turn):
            self.wait_for_all()


@dataclass
class Parallel:
    """A model that is distributed over the processes."""

    model: nn.Module
    strategy: str
    """"none", "ddp" or "fsdp"."""
    step_model: Callable[..., Any]
    """The model that a training step calls. Its gradients are the mean over the processes."""
    mesh: DeviceMesh | None = None
    """The device mesh of the processes; None for "none"."""

    @contextmanager
    def without_exchange(self) -> Iterator[None]:
        """A context for all micro-batches of a step but the last, without exchanging gradients between processes."""
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
        """Returns the tensors of this process's sequences as shards of those of all processes, for a checkpoint."""
        if self.mesh is None:
            return tensors
        return {name: DTensor.from_local(tensor, self.mesh, [Shard(0)]) for name, tensor in tensors.items()}

    def gather_weights(self) -> None:
        """Gathers the weights ahead of the next forward pass, so that every process has all of them."""
        if isinstance(self.model, FSDPModule):
            self.model.unshard()

    @contextmanager
    def whole_model(self) -> Iterator[None]:
        """A context in which every process has all weights, and can use the model independently of the others."""
        if not isinstance(self.model, FSDPModule):
            yield
            return
        self.model.unshard()
        try:
            yield
        finally:
            forget_kernels(self.model)  # the memory of these weights will be reused for others
            self.model.reshard()


def choose_strategy(config: DistributedConfig, world: World) -> str:
    """Returns the strategy of the settings; "auto" is DDP if there are several processes, and otherwise none.

    Raises:
        ValueError: the strategy does not fit the number of processes.
    """
    strategy, more = config.strategy, "torchrun --nproc_per_node 2 -m bdh train ..."
    if strategy == "auto":
        return "ddp" if world.size > 1 else "none"
    fault = None
    if strategy == "none" and world.size > 1:
        fault = (
            f", but {world.size} processes were started, each of which would train its own model: set ddp or fsdp, or "
            "start one process"
        )
    elif strategy == "ddp" and world.size == 1:
        fault = f" with one process: set none, or start more with {more}"
    elif strategy == "fsdp" and world.size == 1 and world.device_type == "cpu":
        fault = (
            " with one process and no accelerator, where there is nothing to shard: set none, or start more processes "
            f"with {more}"
        )
    if fault is not None:
        raise ValueError(f"distributed.strategy is {strategy!r}{fault}")
    return strategy


def parallelize(model: nn.Module, strategy: str, config: DistributedConfig, world: World) -> Parallel:
    """Distributes a model over the processes, in place.

    With DDP, every process has all weights. Gradients are averaged as soon as they are complete: that of ``lm_head``
    during the backward pass, and those of E, Ev and Dec, to which all L layer steps contribute, at its end.

    With FSDP2, every weight, its gradient and its optimizer state are sharded along their first dimension. The unit
    that
    is gathered is **the whole model**: since all L layer steps use the same weights, a unit for each layer step, as in
    other transformers, would gather them and reduce their gradients L times. As a single unit they are gathered once,
    at the start of the forward pass, and stay until the backward pass ends. A step thus needs memory for one copy of
    the weights, which is small beside the (B, H, T, N) activations of a BDH.

    Args:
        model: the model, on the process's device, with the same weights in every process.
        strategy: the result of :func:`choose_strategy`.
        config: the settings.
        world: the processes.
    """
    if strategy == "none":
        return Parallel(model, strategy, model)
    mesh = init_device_mesh(world.device_type, (world.size,))
    if strategy == "ddp":
        return Parallel(model, strategy, DistributedDataParallel(model, device_mesh=mesh), mesh)
    # None means no cast: the weights can be float64.
    param_dtype, reduce_dtype = (
        None if name == "float32" else getattr(torch, name) for name in (config.param_dtype, config.reduce_dtype)
    )
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return Parallel(model, strategy, model, mesh)
