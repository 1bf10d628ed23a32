"""The settings of training with several processes, and what ``torchrun`` reports to each of them. Imports no PyTorch."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from bdh.validation import Faults, PositiveFloat, Settings

# torchrun ends the others within about 0.1 s of the first that fails.
PATIENCE_SECONDS = 3.0


@dataclass
class DistributedConfig(Settings):
    strategy: Literal["auto", "none", "ddp", "fsdp"] = "auto"
    """How processes share the model: each holds all of it (ddp), or a shard (fsdp). auto: ddp, or none with a single
    process."""
    param_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """fsdp: dtype in which the weights are gathered and multiplied. The shards keep the dtype of the model."""
    reduce_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """fsdp: dtype in which gradients are summed over the processes."""
    timeout_minutes: PositiveFloat = 30.0
    """A process that waits this long for another one ends with an error."""

    def collect_faults(self, faults: Faults) -> None:
        allowed = f"float32 with strategy {self.strategy}, only fsdp casts"
        for name in ("param_dtype", "reduce_dtype"):
            value = getattr(self, name)
            faults.require(value == "float32" or self.strategy == "fsdp", name, value, allowed)


def rank() -> int:
    """Number of this process among all of them."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Number of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """Number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """Number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@contextmanager
def reported_to_torchrun() -> Iterator[None]:
    """A context that reports an error to ``torchrun``, which names it as the cause and ends the other processes.

    If all processes have the same error, such as a wrong setting, only rank 0 should print it. The others therefore
    wait a moment, in which ``torchrun`` ends them.
    """
    try:
        yield
    except Exception as error:
        if world_size() > 1:
            from torch.distributed.elastic.multiprocessing.errors import get_error_handler

            if rank() > 0:
                time.sleep(PATIENCE_SECONDS)
            get_error_handler().record_exception(error)
            error.add_note(f"on rank {rank()} of {world_size()} processes")
        raise
