"""Where, and in which arithmetic, a run computes."""

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from bdh.distributed import environment
from bdh.model.network import choose_device
from bdh.train.config import TrainSettings

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

    def gradient_scaler(self) -> torch.amp.GradScaler:
        """Keeps small gradients in float16's range; does nothing for the other dtypes."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)


def choose_runtime(settings: TrainSettings) -> Runtime:
    """The device and dtype that the settings ask for, or the best ones there are.

    Of several processes on a machine, each takes the GPU of its number.

    Raises:
        ValueError: the device is not there.
    """
    device = choose_device(settings.device)
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", environment.local_rank())
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
