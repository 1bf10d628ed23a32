"""The device and dtype of a run, the plan for its layer, and its theoretical speed."""

import os
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from bdh.distributed.config import DistributedConfig, local_rank
from bdh.model import BDHConfig
from bdh.model.forward import layer_shape
from bdh.model.network import choose_device
from bdh.model.weights import ADAPTERS_HAVE_DROPOUT
from bdh.ops.blocks.plan import LayerOptionError, LayerOptions, LayerPlan, plan_layer
from bdh.train.config import TrainSettings

MEASURING_SECONDS = 0.04
_LARGEST_SIZE = 8192


@dataclass(frozen=True)
class Runtime:
    """The device of a run, and the dtype of its matrix products."""

    device: torch.device
    dtype: torch.dtype
    """The dtype of the matrix products; the weights are float32, or float64."""
    reason: str
    """Why this device and dtype were chosen, in a few words for the banner."""

    def autocast(self) -> AbstractContextManager:
        """Returns a context in which matrix products are computed in ``dtype``."""
        if self.dtype in (torch.float32, torch.float64):
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)


def choose_runtime(settings: TrainSettings) -> Runtime:
    """Returns the device and dtype of the settings, or the best available ones.

    With several processes on a machine, each uses the GPU with its local rank.

    Raises:
        ValueError: the device is not available.
    """
    device = choose_device(settings.device)
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", local_rank())
        if device.index >= torch.cuda.device_count():
            raise ValueError(
                f"process {device.index} of this machine has no GPU: there are {torch.cuda.device_count()}, so start "
                "torchrun with --nproc_per_node of at most that many"
            )
    if settings.dtype != "auto":
        return Runtime(device, getattr(torch, settings.dtype), f"{settings.dtype} as set")
    if device.type != "cuda":
        return Runtime(device, torch.float32, f"float32, the fast one on {device.type}")
    # Without this argument, the answer is True for a T4, which emulates bfloat16 slowly.
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return Runtime(device, torch.bfloat16, "bfloat16, which this GPU has in hardware")
    return Runtime(device, torch.float32, "float32: this GPU has no bfloat16; float16 is faster, if you set it")


def random_states(device: torch.device) -> dict[str, torch.Tensor]:
    """Returns the states of the random generators that training uses."""
    cuda = {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
    return {"cpu": torch.get_rng_state()} | cuda


def restore_random_states(states: dict[str, torch.Tensor], device: torch.device) -> None:
    """Restores the random generators to :func:`random_states` of a run on the same kind of device."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


_SETTINGS = {"path": "layer_path", "memory_budget": "memory_budget_gb"}  # settings with other names than the options


def layer_options(settings: TrainSettings) -> LayerOptions:
    """Returns the layer options of the settings, in bytes instead of GB."""
    budget = settings.memory_budget_gb
    return LayerOptions(
        path=settings.layer_path,
        recompute=settings.recompute,
        memory_budget=None if budget is None else round(budget * 1e9),
        rows_per_block=settings.rows_per_block,
        tokens_per_block=settings.tokens_per_block,
    )


def plan_training(
    train: TrainSettings, config: BDHConfig, runtime: Runtime, distributed: DistributedConfig
) -> LayerPlan:
    """Returns the plan for the layer in a training step from the settings alone, without a model.

    Raises:
        ValueError: the settings require something that is not available. The message names the setting.
    """
    # FSDP casts the weights only when it gathers them.
    gathered = getattr(torch, distributed.param_dtype)
    dtype = gathered if runtime.dtype == torch.float32 and gathered != torch.float32 else runtime.dtype
    shape = layer_shape(config, train.batch_size, train.block_size, dtype, runtime.device)
    obstacle = ADAPTERS_HAVE_DROPOUT if train.lora.r and train.lora.dropout else None
    try:
        return plan_layer(
            shape, layer_options(train), form=config.attention_form, chunk_size=config.chunk_size, obstacle=obstacle
        )
    except LayerOptionError as error:
        raise ValueError(f"train.{_SETTINGS.get(error.option, error.option)} {error.fault}") from error


def training_flops_per_token(config: BDHConfig, block_size: int) -> float:
    """Returns the minimum number of floating-point operations that a training step needs for a token.

    A multiplication and an addition count as two. The count includes the matrix products of the three linear modules in
    each layer step, of the head, and of attention in its cheaper form: the lower half of the T x T scores, or the reads
    and updates of the state. The backward pass counts twice the forward pass. Element-wise operations, recomputation
    and savings by sparsity are ignored.
    """
    D, V, T = config.n_embd, config.vocab_size, block_size
    neurons = config.n_head * config.neurons_per_head
    linear = 3 * 2 * D * neurons
    attention = min(T * (neurons + config.n_head * D), 2 * 2 * D * neurons)
    return 3.0 * (config.n_layer * (linear + attention) + 2 * D * V)


def matmul_peak(runtime: Runtime) -> float:
    """Measures, in about 0.1 s, the operations per second of a large square matrix product on the run's device."""
    device, size, best = runtime.device, 256, 0.0
    while True:
        factor = torch.ones(size, size, device=device, dtype=runtime.dtype)
        # The fastest of several runs: the first may load libraries, and any may be interrupted.
        times: list[float] = []
        while len(times) < 3 or sum(times) < MEASURING_SECONDS / 4:
            started = time.perf_counter()
            factor @ factor
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            elif device.type == "mps":
                torch.mps.synchronize()
            times.append(time.perf_counter() - started)
        best = max(best, 2 * size**3 / min(times))
        if min(times) > MEASURING_SECONDS / 8 or size >= _LARGEST_SIZE:
            return best
        size *= 2
