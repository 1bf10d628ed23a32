"""Another clock for one module. A change to ``time`` itself would be seen by every thread of the process: event loops of servers
that other tests have left running once slept for hours by it."""

import time
from types import SimpleNamespace


def time_with(**functions) -> SimpleNamespace:
    """What a module is given as its ``time``: these functions, and the others of the real one."""
    return SimpleNamespace(**vars(time) | functions)
