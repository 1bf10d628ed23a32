"""Spreads a model over processes. The model does not know of it."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from bdh.distributed.config import DistributedConfig
from bdh.distributed.world import World
from bdh.model.kernels import forget_kernels


class Parallel:
    """A model as the processes share it.

    Attributes:
        strategy: "none", "ddp" or "fsdp".
        step_model: what a training step calls. Its gradients are the mean over the processes.
        mesh: of the processes; None for "none".
    """

    def __init__(self, model: nn.Module, strategy: str, step_model: Callable[..., Any], mesh: DeviceMesh | None):
        self.strategy, self.step_model, self.mesh = strategy, step_model, mesh
        self._model = model

    @contextmanager
    def accumulating(self, is_last: bool) -> Iterator[None]:
        """For one forward and backward pass of several: only behind the last one are gradients exchanged."""
        if self.strategy == "fsdp":
            assert isinstance(self._model, FSDPModule)
            self._model.set_requires_gradient_sync(is_last)
        waits: AbstractContextManager = nullcontext()
        if self.strategy == "ddp" and not is_last:
            assert isinstance(self.step_model, DistributedDataParallel)
            waits = self.step_model.no_sync()
        with waits:
            yield

    def by_rows(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors of this process's rows as parts of those of all processes, for a checkpoint."""
        if self.mesh is None:
            return tensors
        return {name: DTensor.from_local(tensor, self.mesh, [Shard(0)]) for name, tensor in tensors.items()}

    @contextmanager
    def whole_model(self) -> Iterator[None]:
        """Every process holds all weights inside, and can use the model as often as it likes, with no other taking part."""
        if self.strategy != "fsdp":
            yield
            return
        assert isinstance(self._model, FSDPModule)
        self._model.unshard()
        try:
            yield
        finally:
            forget_kernels(self._model)  # the next time, other weights are in the same memory
            self._model.reshard()


def choose_strategy(config: DistributedConfig, world: World) -> str:
    """The strategy that is set, or for "auto" DDP, where there is more than one process.

    Raises:
        ValueError: it does not go with the number of processes.
    """
    start = "torchrun --nproc_per_node 2 -m bdh train ..."
    if config.strategy == "auto":
        return "ddp" if world.size > 1 else "none"
    if config.strategy == "none" and world.size > 1:
        raise ValueError(
            f"distributed.strategy is 'none', but {world.size} processes were started, which would train as many models: "
            "set ddp or fsdp, or start one process"
        )
    if config.strategy == "ddp" and world.size == 1:
        raise ValueError(f"distributed.strategy is 'ddp' with one process: set none, or start more with {start}")
    if config.strategy == "fsdp" and world.size == 1 and world.device_type == "cpu":
        raise ValueError(
            "distributed.strategy is 'fsdp' with one process and no accelerator, where there is nothing to share: set "
            f"none, or start more processes with {start}"
        )
    return config.strategy


def parallelize(model: nn.Module, strategy: str, config: DistributedConfig, world: World) -> Parallel:
    """Spreads the model over the processes, in place.

    DDP: every process holds everything, and gradients are averaged while the backward pass still runs.

    FSDP2: every weight, its gradient and its optimizer state are cut along their first dimension, one part for each
    process. The unit that is gathered is **the whole model**: all passes go through one set of weights, so a unit a
    pass, as other transformers have it, would gather the same weights L times in the forward pass and again in the
    backward pass, and their gradient would be summed over the processes L times. As one unit they are gathered once
    when the forward pass starts, stay until the backward pass ends, and the gradients are summed once. What that
    costs is the memory of one copy of the weights during a step, which beside the (B, H, T, N) activations of a
    BDH is small; between steps only the parts are held.

    Args:
        model: on the process's device, with the same weights on every process.
        strategy: of :func:`choose_strategy`.
    """
    if strategy == "none":
        return Parallel(model, strategy, model, None)
    mesh = init_device_mesh(world.device_type, (world.size,))
    if strategy == "fsdp":
        policy = MixedPrecisionPolicy(
            param_dtype=_dtype(config.param_dtype), reduce_dtype=_dtype(config.reduce_dtype), cast_forward_inputs=False
        )
        fully_shard(model, mesh=mesh, mp_policy=policy)
        return Parallel(model, strategy, model, mesh)
    return Parallel(model, strategy, DistributedDataParallel(model, device_mesh=mesh), mesh)


def _dtype(name: str) -> torch.dtype | None:
    """None, which casts nothing, for float32: the weights may be float64."""
    return None if name == "float32" else getattr(torch, name)
