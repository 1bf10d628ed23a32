"""The settings of training with several processes."""

from dataclasses import dataclass
from typing import Literal

from bdh.validation import Faults, PositiveFloat, Settings


@dataclass
class DistributedConfig(Settings):
    strategy: Literal["auto", "none", "ddp", "fsdp"] = "auto"
    """How processes share the model: each holds all of it (ddp), or a part (fsdp). auto: ddp, or none if alone."""
    param_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """fsdp: dtype in which the weights are gathered and multiplied. The parts that are kept stay in the model's."""
    reduce_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """fsdp: dtype in which gradients are summed over the processes."""
    timeout_minutes: PositiveFloat = 30.0
    """A process that waits for another for so long ends with an error."""

    def collect_faults(self, faults: Faults) -> None:
        if self.strategy != "fsdp":
            for name in ("param_dtype", "reduce_dtype"):
                value = getattr(self, name)
                faults.require(
                    value == "float32", name, value, f"float32 with strategy {self.strategy}, only fsdp casts"
                )
