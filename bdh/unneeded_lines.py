"""Leaves out lines that other quantization libraries log about nothing that is used here."""

import logging


def hide_unneeded_lines() -> None:
    """In this process, of what is logged from now on.

    When it is imported, torchao 0.18 logs on a machine without the GPUs that they are for that it cannot load its kernels, and
    that it registers enumerations, which PyTorch 2.13 calls old. bitsandbytes 0.50 logs that it has no kernels of the hub, and
    at its first 8-bit product that this is computed with inputs in float16.
    """
    for name in ("torchao", "torch.utils._pytree", "bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions"):
        logging.getLogger(name).addFilter(_is_shown)  # which is added once


def _is_shown(record: logging.LogRecord) -> bool:
    if record.name == "torch.utils._pytree":
        about = record.args if isinstance(record.args, tuple) else ()
        return not any(isinstance(each, type) and each.__module__.startswith("torchao.") for each in about)
    return not record.getMessage().startswith(("Failed to load ", "MatMul8bitLt: inputs will be cast "))
