"""What a run needs of the memory, counted from its settings: no weight has to be there for it."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from bdh.distributed import environment
from bdh.distributed.world import World
from bdh.memory import available_bytes, used_bytes
from bdh.model import BDHConfig, BDHForCausalLM
from bdh.model.modeling import MAX_LOGITS_IN_ONE_PIECE
from bdh.model.weights import layer_modules, product_obstacle
from bdh.ops.attention import sum_dtype
from bdh.ops.blocks.plan import LayerPlan
from bdh.train.config import RunSettings
from bdh.train.layer import plan_settings
from bdh.train.lora import add_adapters
from bdh.train.runtime import Runtime

_LOGITS = 3  # their gradient and its softmax among them


class NoRoomError(Exception):
    """The weights, and what belongs to each of them, need more memory than there is."""

    def __init__(self, need: "Need", base: int, available: int):
        super().__init__("there is no room for the weights and what belongs to them")
        self.need, self.base, self.available = need, base, available


def available_to_each(runtime: Runtime, world: World) -> int:
    """Bytes that every process can come to use in all, what it has among them: the same number on all of them."""
    device = runtime.device
    own = available_bytes(device, environment.local_world_size()) + used_bytes(device)
    return min(world.gather(own))


@dataclass(frozen=True)
class Weights:
    """Of a model, by number."""

    all: int
    trained: int
    trained_ends: int
    """Of embedding and head, which AdamW trains beside any optimizer."""

    @classmethod
    def of(cls, model: nn.Module) -> "Weights":
        trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
        ends = sum(number for name, number in trained.items() if name.startswith(("embed.", "lm_head.")))
        return cls(sum(p.numel() for p in model.parameters()), sum(trained.values()), ends)


@dataclass(frozen=True)
class Need:
    """What one process of a run needs."""

    settings: RunSettings
    config: BDHConfig
    weights: Weights
    runtime: Runtime
    strategy: str = "none"
    """See :func:`bdh.distributed.parallelize.parallelize`."""
    processes: int = 1
    obstacle: str | None = None
    """What about the model keeps the blocks from computing its layer."""

    @classmethod
    def of(
        cls, settings: RunSettings, config: BDHConfig, runtime: Runtime, strategy: str = "none", processes: int = 1
    ) -> "Need":
        """Of a model that is not there yet."""
        with torch.device("meta"):
            model = BDHForCausalLM(config)
            if settings.train.lora.r:
                add_adapters(model, settings.train.lora)
        weights = Weights.of(model)
        return cls(settings, config, weights, runtime, strategy, processes, _obstacle(settings, config.n_head))

    def changed(self, **train: Any) -> "Need":
        """With other settings of the section ``train``."""
        return replace(self, settings=replace(self.settings, train=replace(self.settings.train, **train)))

    def with_rows(self, rows: int) -> "Need":
        """With so many sequences in a pass, and blocks of at most as many."""
        block = self.settings.train.rows_per_block
        return self.changed(batch_size=rows, rows_per_block=block and min(block, rows))

    def with_model(self, **sizes: Any) -> "Need":
        """With a model of other sizes.

        Raises:
            ValueError: they do not go together.
        """
        settings = replace(self.settings, model=replace(self.settings.model, **sizes))
        config = BDHConfig(**{name: getattr(self.config, name) for name in BDHConfig.__annotations__} | sizes)
        return Need.of(settings, config, self.runtime, self.strategy, self.processes)

    @property
    def rows(self) -> int:
        """Sequences in a forward pass."""
        return self.settings.train.batch_size

    @cached_property
    def plan(self) -> LayerPlan:
        """
        Raises:
            ValueError: the settings ask for what is not there.
        """
        train, distributed = self.settings.train, self.settings.distributed
        return plan_settings(train, self.config, self.runtime, distributed, obstacle=self.obstacle)

    @cached_property
    def parts(self) -> dict[str, int]:
        """Bytes, by what they are for."""
        train, plan = self.settings.train, self.plan
        own = self._own
        found = {
            "weights": own(self.weights.all),
            # DDP copies them into the buffers that it exchanges.
            "gradients": own(self.weights.trained) * (2 if self.strategy == "ddp" else 1),
            "optimizer": own(self._optimizer_numbers),
            "wide activations of a block": self._block_bytes,
            "wide activations that are kept": plan.kept_bytes,
            "narrow activations": self._narrow_bytes,
        }
        if self.strategy == "fsdp":
            gathered = getattr(torch, self.settings.distributed.param_dtype).itemsize
            found["weights and gradients, gathered"] = (self.weights.all + self.weights.trained) * gathered
        if train.ema_decay is not None:
            found["moving average"] = own(self.weights.trained)
        if train.carry_state:  # what a pass goes on from is kept beside what it leaves
            found["carried state"] = self._state_bytes * self.rows * (train.gradient_accumulation_steps + 1)
        if copied := self._copied_bytes:
            found["copy for the checkpoint"] = copied
        return found

    @cached_property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def fixed(self) -> int:
        """What does not depend on the blocks and the sequences of a pass: it has to be there before anything is computed."""
        varying = ("wide activations of a block", "wide activations that are kept", "narrow activations")
        return sum(size for name, size in self.parts.items() if name not in varying) - self._copied_bytes

    @property
    def unmeasured(self) -> int:
        """What no measured pass shows: no checkpoint is written, and on a CPU fresh states are not touched yet."""
        train = self.settings.train
        untouched = 0
        if train.carry_state and self.runtime.device.type != "cuda" and not self.settings.resume:
            untouched = self._state_bytes * self.rows * train.gradient_accumulation_steps
        return self._copied_bytes + untouched

    def _own(self, number: int) -> int:
        """Bytes of this process's part of so many numbers that belong to the weights."""
        itemsize = 8 if self.runtime.dtype == torch.float64 else 4
        return -(-number // self.processes) * itemsize if self.strategy == "fsdp" else number * itemsize

    @property
    def _block_bytes(self) -> int:
        plan = self.plan
        if plan.path != "plain":
            return plan.block_bytes
        # Where the plain path keeps all passes, that is all. One that is computed again has its gradients beside it: with
        # 4 passes of H * N 4,096 neurons over 16 x 128 tokens 31 wide tensors exist without recomputation, and 15 with it.
        return 2 * plan.block_bytes if plan.kept_passes < self.config.n_layer else 0

    @property
    def _optimizer_numbers(self) -> int:
        each_of_matrices = 2 if self.settings.train.optimizer == "adamw" else 1
        ends = self.weights.trained_ends
        return 2 * ends + each_of_matrices * (self.weights.trained - ends)

    @property
    def _narrow_bytes(self) -> int:
        """Of each pass its input, two norms' inputs and the sum that it adds to; the logits; and the step's tokens."""
        tokens = self.rows * self.settings.train.block_size
        logits = min(tokens * self.config.vocab_size, MAX_LOGITS_IN_ONE_PIECE)
        narrow = 4 * (4 * (self.config.n_layer + 1) * tokens * self.config.n_embd + _LOGITS * logits)
        return narrow + 8 * tokens * self.settings.train.gradient_accumulation_steps

    @property
    def _state_bytes(self) -> int:
        """Of one sequence."""
        config = self.config
        numbers = config.n_layer * config.n_head * config.neurons_per_head * config.n_embd
        return numbers * sum_dtype(self.runtime.dtype).itemsize

    @property
    def _copied_bytes(self) -> int:
        """What a checkpoint in the background copies; a GPU's go to the memory of the machine."""
        if not self.settings.checkpoint.in_background or self.runtime.device.type == "cuda":
            return 0
        train = self.settings.train
        carried = self._state_bytes * self.rows * train.gradient_accumulation_steps if train.carry_state else 0
        average = self.weights.trained if train.ema_decay is not None else 0
        return self._own(self.weights.all + self._optimizer_numbers + average) + carried


def _obstacle(settings: RunSettings, num_heads: int) -> str | None:
    """What about the model keeps the blocks from computing its layer: adapters, if anything, and not its size."""
    if not settings.train.lora.r:
        return None
    # On no device called meta, which would be an obstacle of its own.
    config = BDHConfig(n_embd=2, mlp_internal_dim_multiplier=num_heads, n_head=num_heads, n_layer=1, vocab_size=2)
    smallest = BDHForCausalLM(config)
    add_adapters(smallest, settings.train.lora)
    return product_obstacle(layer_modules(smallest.train()))
