"""What a run needs of the memory, counted from its settings: no weight has to be there for it."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from bdh.model import BDHConfig, BDHForCausalLM
from bdh.model.modeling import MAX_LOGITS_IN_ONE_PIECE
from bdh.model.weights import layer_modules, product_obstacle
from bdh.ops.attention import sum_dtype
from bdh.ops.blocks.plan import LayerPlan
from bdh.train.adapters import add_adapters
from bdh.train.config import RunSettings
from bdh.train.runtime import Runtime, plan_settings

_LEAST_SIZE = 16  # of a training sequence, and of the model's width, that is proposed


@dataclass(frozen=True)
class MemoryEstimate:
    """What one process of a run needs, counted from its settings: no weight has to be there for it."""

    settings: RunSettings
    config: BDHConfig
    runtime: Runtime
    strategy: str = "none"
    processes: int = 1

    def changed(self, section: str = "train", **fields: Any) -> "MemoryEstimate":
        """With other settings of a section. Raises ``ValueError`` where those of the model do not go together."""
        settings = replace(self.settings, **{section: replace(getattr(self.settings, section), **fields)})
        config = self.config
        if section == "model":
            config = BDHConfig(**{name: getattr(config, name) for name in BDHConfig.__annotations__} | fields)
        return replace(self, settings=settings, config=config)

    def of_sequences(self, number: int) -> "MemoryEstimate":
        """With so many sequences in a micro-batch, and blocks of at most as many."""
        block = self.settings.train.rows_per_block
        return self.changed(batch_size=number, rows_per_block=block and min(block, number))

    @cached_property
    def plan(self) -> LayerPlan:
        """Raises ``ValueError`` where the settings ask for what is not there."""
        train, obstacle = self.settings.train, None
        if train.lora.r:  # a model of the least size has the same obstacle; one on meta has another
            heads = self.config.n_head
            least = BDHForCausalLM(
                BDHConfig(n_embd=2, mlp_internal_dim_multiplier=heads, n_head=heads, n_layer=1, vocab_size=2)
            )
            add_adapters(least, train.lora)
            obstacle = product_obstacle(layer_modules(least.train()))
        return plan_settings(train, self.config, self.runtime, self.settings.distributed, obstacle=obstacle)

    @cached_property
    def parts(self) -> dict[str, int]:
        """Bytes, by what they are for."""
        train, plan, config = self.settings.train, self.plan, self.config
        weights, trained, optimizer = self._numbers
        block = plan.block_bytes
        if plan.backend == "eager":  # what is computed again has its gradients beside it; what is kept is all there is
            block = 2 * plan.block_bytes if plan.kept_layer_steps < config.n_layer else 0
        tokens = train.batch_size * train.block_size
        # Of each layer step its input, two norms' inputs and the sum that it adds to; and the logits with gradient and softmax.
        logits = 3 * min(tokens * config.vocab_size, MAX_LOGITS_IN_ONE_PIECE)
        narrow = 4 * (4 * (config.n_layer + 1) * tokens * config.n_embd + logits)
        found = {
            "weights": self._own(weights),
            "gradients": self._own(trained) * (2 if self.strategy == "ddp" else 1),  # DDP copies them to exchange them
            "optimizer": self._own(optimizer),
            "wide activations of a block": block,
            "wide activations that are kept": plan.kept_bytes,
            "narrow activations": narrow + 8 * tokens * train.gradient_accumulation_steps,
        }
        if self.strategy == "fsdp":
            gathered = getattr(torch, self.settings.distributed.param_dtype).itemsize
            found["weights and gradients, gathered"] = (weights + trained) * gathered
        if train.ema_decay is not None:
            found["moving average"] = self._own(trained)
        if train.carry_state:  # what a micro-batch begins with is kept beside what it leaves
            found["carried state"] = self._state_bytes * train.batch_size * (train.gradient_accumulation_steps + 1)
        if copied := self._copied_bytes:
            found["copy for the checkpoint"] = copied
        return found

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def fixed(self) -> int:
        """What has to be there before anything is computed, whatever the sequences of a micro-batch."""
        return sum(size for name, size in self.parts.items() if "activations" not in name) - self._copied_bytes

    @property
    def unmeasured(self) -> int:
        """What a measured step does not show: the copy for a checkpoint, and the states of other micro-batches."""
        train = self.settings.train
        others = (train.gradient_accumulation_steps - 1) * train.carry_state
        return self._copied_bytes + self._state_bytes * train.batch_size * others

    @cached_property
    def _numbers(self) -> tuple[int, int, int]:
        """Of weights, of trained ones, and of what the optimizer keeps."""
        with torch.device("meta"):
            model = BDHForCausalLM(self.config)
            if self.settings.train.lora.r:
                add_adapters(model, self.settings.train.lora)
        trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
        embeddings = sum(number for name, number in trained.items() if name.startswith(("embed.", "lm_head.")))
        number = sum(trained.values())
        each = 2 if self.settings.train.optimizer == "adamw" else 1
        return sum(p.numel() for p in model.parameters()), number, 2 * embeddings + each * (number - embeddings)

    def _own(self, number: int) -> int:
        """Bytes of this process's share of so many numbers that belong to the weights."""
        itemsize = 8 if self.runtime.dtype == torch.float64 else 4
        return -(-number // self.processes) * itemsize if self.strategy == "fsdp" else number * itemsize

    @property
    def _state_bytes(self) -> int:
        """Of one sequence."""
        config = self.config
        numbers = config.n_layer * config.n_head * config.neurons_per_head * config.n_embd
        return numbers * sum_dtype(self.runtime.dtype).itemsize

    @property
    def _copied_bytes(self) -> int:
        """What a checkpoint in the background copies; a GPU's go to the memory of the machine."""
        train, (weights, trained, optimizer) = self.settings.train, self._numbers
        if not self.settings.checkpoint.in_background or self.runtime.device.type == "cuda":
            return 0
        states = self._state_bytes * train.batch_size * train.gradient_accumulation_steps * train.carry_state
        return self._own(weights + optimizer + trained * (train.ema_decay is not None)) + states


def changes(now: MemoryEstimate) -> Iterator[Iterator[tuple[str, MemoryEstimate]]]:
    """Other settings that may need less, kind by kind and within a kind ever less, with their flags."""
    train, model_is_free = now.settings.train, not now.settings.resume and now.settings.train.init_from is None

    def fewer_sequences() -> Iterator[tuple[str, MemoryEstimate]]:
        number = train.batch_size
        for fewer in (each for each in range(number // 2, 0, -1) if number % each == 0):
            times = train.gradient_accumulation_steps * (number // fewer)
            changed = now.of_sequences(fewer).changed(gradient_accumulation_steps=times)
            flags = f"--train.batch_size {fewer} --train.gradient_accumulation_steps {times}"
            if changed.settings.train.rows_per_block != train.rows_per_block:
                flags += f" --train.rows_per_block {fewer}"
            yield flags, changed

    def shorter_sequences() -> Iterator[tuple[str, MemoryEstimate]]:
        for tokens in _halved(train.block_size, _LEAST_SIZE):
            block = train.tokens_per_block and min(train.tokens_per_block, tokens)
            more = f" --train.tokens_per_block {block}" if block != train.tokens_per_block else ""
            yield f"--train.block_size {tokens}{more}", now.changed(block_size=tokens, tokens_per_block=block)

    def smaller(section: str, name: str, size: int, least: int) -> Iterator[tuple[str, MemoryEstimate]]:
        for number in _halved(size, least):
            with suppress(ValueError):  # neurons that cannot be shared evenly by the heads
                yield f"--{section}.{name} {number}", now.changed(section, **{name: number})

    yield fewer_sequences()
    if now.settings.checkpoint.in_background:
        yield iter([("--checkpoint.in_background false", now.changed("checkpoint", in_background=False))])
    if train.layer_path == "plain":
        yield iter([("--train.layer_path auto", now.changed(layer_path="auto"))])
    if train.recompute != "pass":
        yield iter([("--train.recompute pass", now.changed(recompute="pass"))])
    if now.plan.backend != "eager":
        yield smaller("train", "rows_per_block", now.plan.sizes.rows, 1)
        yield smaller("train", "tokens_per_block", now.plan.sizes.columns, 1)
    if now.processes > 1 and now.strategy != "fsdp":
        flags = "--distributed.strategy fsdp, which shares weights, gradients and optimizer among the processes"
        yield iter([(flags, replace(now, strategy="fsdp"))])
    if not now.settings.resume:
        yield shorter_sequences()
    if model_is_free:
        yield smaller("model", "mlp_internal_dim_multiplier", now.config.mlp_internal_dim_multiplier, 1)
        yield smaller("model", "n_embd", now.config.n_embd, _LEAST_SIZE)


def _halved(number: int, least: int) -> Iterator[int]:
    while number // 2 >= least:
        number //= 2
        yield number
