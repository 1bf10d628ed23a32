"""What the starter of several processes, ``torchrun``, tells each of them, and what it is told. Imports no PyTorch."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

# torchrun ends the others within about 0.1 s of the first that fails.
_PATIENCE_SECONDS = 3.0


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
def reported_to_starter() -> Iterator[None]:
    """Tells ``torchrun`` of an error inside, which names it as the cause and ends the other processes.

    Where all processes have the same error, as with a wrong setting, only that of rank 0 should be read: the others
    wait a moment, to be ended by ``torchrun`` before they print theirs.
    """
    try:
        yield
    except Exception as error:
        if world_size() > 1:
            from torch.distributed.elastic.multiprocessing.errors import get_error_handler

            if rank() > 0:
                time.sleep(_PATIENCE_SECONDS)
            get_error_handler().record_exception(error)
            error.add_note(f"on rank {rank()} of {world_size()} processes")
        raise
