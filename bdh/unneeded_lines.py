"""Hides log lines of quantization libraries about features that are not used here."""

import logging


def hide_unneeded_lines() -> None:
    """Hides such lines in this process from now on.

    On import, torchao 0.18 logs on a machine without suitable GPUs that it cannot load its kernels. It also logs that
    it registers enumerations, which PyTorch 2.13 calls deprecated. bitsandbytes 0.50 logs that it has no kernels from
    the hub, and in its first 8-bit product that the inputs are converted to float16.
    """
    for name in ("torchao", "torch.utils._pytree", "bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions"):
        logging.getLogger(name).addFilter(_is_shown)  # the same filter is added only once


def _is_shown(record: logging.LogRecord) -> bool:
    if record.name == "torch.utils._pytree":
        about = record.args if isinstance(record.args, tuple) else ()
        return not any(isinstance(each, type) and each.__module__.startswith("torchao.") for each in about)
    return not record.getMessage().startswith(("Failed to load ", "MatMul8bitLt: inputs will be cast "))
