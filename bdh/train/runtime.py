"""Where, in which arithmetic and how fast a run computes, and how its layer is computed."""

import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch

from bdh.distributed.config import DistributedConfig, local_rank
from bdh.model import BDHConfig, BDHForCausalLM
from bdh.model.forward import layer_shape, plan_for
from bdh.model.network import choose_device
from bdh.ops.blocks.plan import LayerOptionError, LayerOptions, LayerPlan, LayerShape, plan_layer
from bdh.train.config import TrainSettings

_MEASURING_SECONDS = 0.04
_LARGEST_SIZE = 8192

_DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Runtime:
    device: torch.device
    dtype: torch.dtype
    """Of the matrix products; the weights are float32, or float64."""
    reason: str
    """Why this device and dtype, in a few words, for the banner."""

    def autocast(self) -> AbstractContextManager:
        if self.dtype in (torch.float32, torch.float64):
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)


def choose_runtime(settings: TrainSettings) -> Runtime:
    """The device and dtype that the settings ask for, or the best ones there are.

    Of several processes on a machine, each takes the GPU of its number.

    Raises:
        ValueError: the device is not there.
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
        return Runtime(device, _DTYPES[settings.dtype], f"{settings.dtype} as set")
    if device.type != "cuda":
        return Runtime(device, torch.float32, f"float32, the fast one on {device.type}")
    # Without this argument the question is answered with yes on a T4, which emulates bfloat16 slowly.
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return Runtime(device, torch.bfloat16, "bfloat16, which this GPU has in hardware")
    return Runtime(device, torch.float32, "float32: this GPU has no bfloat16; float16 is faster, if you set it")


def random_states(device: torch.device) -> dict[str, torch.Tensor]:
    """The states of the generators that training draws from."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_random_states(states: dict[str, torch.Tensor], device: torch.device) -> None:
    """Puts the generators back to ``random_states`` of a run on the same kind of device."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


_SETTINGS = {"path": "layer_path", "memory_budget": "memory_budget_gb"}  # where they are not called as the options are


def layer_options(settings: TrainSettings) -> LayerOptions:
    budget = settings.memory_budget_gb
    return LayerOptions(
        path=settings.layer_path,
        recompute=settings.recompute,
        memory_budget=None if budget is None else round(budget * 1e9),
        rows_per_block=settings.rows_per_block,
        tokens_per_block=settings.tokens_per_block,
    )


def plan_training(
    model: BDHForCausalLM, rows: int, tokens: int, runtime: Runtime, distributed: DistributedConfig
) -> LayerPlan:
    """How the model, with its ``layer_options``, will compute a training step's forward pass of so many sequences.

    Raises:
        ValueError: the options ask for what is not there; it names the setting.
    """
    was_training = model.training
    model.train()
    try:
        with _arithmetic(runtime, distributed), torch.enable_grad(), _faults_of_settings():
            plan = plan_for(model, rows, tokens, model.config.attention_form)
            # None is the plain forms with nothing to decide.
            return plan or plan_layer(_shape(model.config, rows, tokens, runtime, distributed), model.layer_options)
    finally:
        model.train(was_training)


def plan_settings(
    settings: TrainSettings,
    config: BDHConfig,
    runtime: Runtime,
    distributed: DistributedConfig,
    *,
    obstacle: str | None = None,
) -> LayerPlan:
    """The same, of a model that need not be there.

    Args:
        obstacle: what about it keeps the blocks from computing it, as for :func:`bdh.ops.blocks.plan.plan_layer`.

    Raises:
        ValueError: as of :func:`plan_training`.
    """
    with _faults_of_settings():
        return plan_layer(
            _shape(config, settings.batch_size, settings.block_size, runtime, distributed),
            layer_options(settings),
            form=config.attention_form,
            chunk_size=config.chunk_size,
            obstacle=obstacle,
        )


def _shape(config: BDHConfig, rows: int, tokens: int, runtime: Runtime, distributed: DistributedConfig) -> LayerShape:
    return layer_shape(config, rows, tokens, _dtype(runtime, distributed), runtime.device)


@contextmanager
def _faults_of_settings() -> Iterator[None]:
    """Within it, what is wrong with an option is said of the setting that it comes from."""
    try:
        yield
    except LayerOptionError as error:
        raise ValueError(f"train.{_SETTINGS.get(error.option, error.option)} {error.fault}") from error


def _arithmetic(runtime: Runtime, distributed: DistributedConfig) -> AbstractContextManager:
    """That of a step."""
    dtype = _dtype(runtime, distributed)
    return runtime.autocast() if dtype == runtime.dtype else torch.autocast(runtime.device.type, dtype=dtype)


def _dtype(runtime: Runtime, distributed: DistributedConfig) -> torch.dtype:
    """Of the matrix products. FSDP casts the weights only when it gathers them, so until then it has to be said."""
    gathered = getattr(torch, distributed.param_dtype)
    return gathered if runtime.dtype == torch.float32 and gathered != torch.float32 else runtime.dtype


class StepClock:
    """Times the training steps, without the pauses between them for evaluation, samples and checkpoints.

    On a GPU steps are asked for ahead of their computation, so only the time between two readings is that of steps.
    """

    _BAR_SECONDS = 0.25

    def __init__(self) -> None:
        self.tokens_per_second = 0.0
        """Over about the last twenty steps."""
        self._start = self._moved = time.perf_counter()
        self._tokens = self._steps = self._read_steps = self._mean_steps = 0
        self._seconds = self._data_seconds = 0.0

    def count(self, num_tokens: int) -> None:
        """A step was asked for."""
        self._tokens += num_tokens
        self._steps += 1

    def read(self) -> None:
        """All steps that were asked for are done."""
        now = time.perf_counter()
        seconds, steps = max(now - self._start, 1e-9), self._steps
        # The first steps compile and warm up; later ones count for about the last twenty.
        kept = 0.95**steps if self._read_steps >= 5 else 0.0
        self.tokens_per_second = kept * self.tokens_per_second + (1 - kept) * self._tokens / seconds
        self._read_steps += steps
        self._mean_steps += steps
        self._seconds += seconds
        self._tokens = self._steps = 0
        self._start = self._moved = now

    def bar_is_due(self) -> bool:
        """Whether a bar has not moved for a while."""
        return time.perf_counter() - self._moved > self._BAR_SECONDS

    def take_means(self) -> dict[str, float]:
        """Seconds of a step, and of waiting for its data, in the mean over the steps since the last call."""
        steps = max(1, self._mean_steps)
        means = {"step_seconds": self._seconds / steps, "data_seconds": self._data_seconds / steps}
        self._mean_steps, self._seconds, self._data_seconds = 0, 0.0, 0.0
        return means

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        before = time.perf_counter()
        yield
        self._data_seconds += time.perf_counter() - before

    @contextmanager
    def paused(self) -> Iterator[None]:
        before = time.perf_counter()
        yield
        self._start += time.perf_counter() - before


def training_flops_per_token(config: BDHConfig, block_size: int) -> float:
    """Floating-point operations that a training step needs for a token, at the least.

    A multiplication and an addition count as two. Counted are the matrix products of the three linear layers of
    each pass, of the head, and of the attention in its cheaper form: the lower half of the T x T scores, or the
    reads and updates of the state. The backward pass takes twice the forward pass. Left out are element-wise
    work, recomputation, and what sparsity would save.
    """
    D, V, T = config.n_embd, config.vocab_size, block_size
    neurons = config.n_head * config.neurons_per_head
    linear = 3 * 2 * D * neurons
    attention = min(T * (neurons + config.n_head * D), 2 * 2 * D * neurons)
    return 3.0 * (config.n_layer * (linear + attention) + 2 * D * V)


def matmul_peak(runtime: Runtime) -> float:
    """Operations per second of a large square matrix product on this device in this dtype, measured in about 0.1 s."""
    size, best = 256, 0.0
    while True:
        factor = torch.ones(size, size, device=runtime.device, dtype=runtime.dtype)
        # The fastest of several: the first may load libraries, and any may be interrupted.
        times: list[float] = []
        while len(times) < 3 or sum(times) < _MEASURING_SECONDS / 4:
            started = time.perf_counter()
            factor @ factor
            wait_for_device(runtime.device)
            times.append(time.perf_counter() - started)
        best = max(best, 2 * size**3 / min(times))
        if min(times) > _MEASURING_SECONDS / 8 or size >= _LARGEST_SIZE:
            return best
        size *= 2


def wait_for_device(device: torch.device) -> None:
    """Waits until what was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
