"""Importing this leaves out what torchao logs when transformers imports it, which is about nothing that is used here.

transformers 5.23 imports torchao, where it is installed, with its model classes (``quantizers/quantizer_torchao.py``); torchao
0.18 then logs on a machine without the GPUs that they are for that it cannot load its kernels, and that it registers
enumerations, which PyTorch 2.13 calls old. It happens on import since that is all that a server of processes can be told.
"""

import logging


def _is_shown(record: logging.LogRecord) -> bool:
    if record.name == "torchao":
        return not record.getMessage().startswith("Failed to load ")
    about = record.args if isinstance(record.args, tuple) else ()
    return not any(isinstance(each, type) and each.__module__.startswith("torchao.") for each in about)


for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).addFilter(_is_shown)
