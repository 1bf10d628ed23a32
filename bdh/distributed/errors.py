"""Errors of one process among several."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from bdh.distributed import environment

# torchrun ends the others within about 0.1 s of the first that fails.
_PATIENCE_SECONDS = 3.0


@contextmanager
def reported_to_starter() -> Iterator[None]:
    """Tells ``torchrun`` of an error inside, which names it as the cause and ends the other processes.

    Where all processes have the same error, as with a wrong setting, only that of rank 0 should be read: the others
    wait a moment, to be ended by ``torchrun`` before they print theirs.
    """
    try:
        yield
    except Exception as error:
        if environment.world_size() > 1:
            if environment.rank() > 0:
                time.sleep(_PATIENCE_SECONDS)
            get_error_handler().record_exception(error)
            error.add_note(f"on rank {environment.rank()} of {environment.world_size()} processes")
        raise
