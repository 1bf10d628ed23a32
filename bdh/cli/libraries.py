"""What libraries log while a command gets ready: kept back, so that an error is the one line that its reader sees.

transformers, datasets, huggingface_hub and others log what they raise too, and each try of a download.

Two kinds of lines are left out altogether, but with ``--debug``. transformers 5.23 imports torchao, where it is installed,
as soon as one of its model classes is imported, by ``quantizers/quantizer_torchao.py``, and has no setting against it. On a
machine without the GPUs that they are for, torchao 0.18 then logs that it cannot load its kernels, and that it
registers enumerations, which PyTorch 2.13 calls old.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_shows_all = True
_kept: list[tuple[logging.Logger, logging.LogRecord]] | None = None
"""None where nothing is kept back."""


@contextmanager
def kept_back(*, show_on_error: bool) -> Iterator[None]:
    """Keeps back the lines of libraries that are imported within, until :func:`show_kept` or the end.

    At the end they are shown, but where an exception is raised only with ``show_on_error``. Our own are never kept.
    """
    global _kept, _shows_all
    _shows_all = show_on_error
    logger_class = logging.getLoggerClass()
    logging.setLoggerClass(_KeepingLogger)
    logging.captureWarnings(True)
    _kept = []
    try:
        yield
    except Exception:
        if not show_on_error:
            _kept = []
        raise
    finally:
        show_kept()
        logging.setLoggerClass(logger_class)


def show_kept() -> None:
    """Shows what was kept back; from now on, lines are shown as they come."""
    global _kept
    kept, _kept = _kept or [], None
    logging.captureWarnings(False)
    for logger, record in kept:
        if logger.name == "py.warnings":  # which has no handler but for this time
            print(record.getMessage(), end="", file=sys.stderr)
        else:
            logger.handle(record)


class _KeepingLogger(logging.Logger):
    def handle(self, record: logging.LogRecord) -> None:
        if not _shows_all and _is_of_importing_torchao(record):
            return
        if _kept is None or self.name.partition(".")[0] == "bdh":
            super().handle(record)
        else:
            _kept.append((self, record))


def _is_of_importing_torchao(record: logging.LogRecord) -> bool:
    if record.name == "torch.utils._pytree":
        about = record.args if isinstance(record.args, tuple) else ()
        return any(isinstance(each, type) and each.__module__.startswith("torchao.") for each in about)
    return record.name == "torchao" and record.getMessage().startswith("Failed to load ")
