"""The settings of a training run, one dataclass a section. A docstring under a field is its help text."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Le, Lt

from bdh.data.config import DataConfig
from bdh.distributed.config import DistributedConfig
from bdh.model.shape import decay_fault
from bdh.monitor.config import MonitorConfig
from bdh.ops import LayerPath
from bdh.tokenizer.config import TokenizerConfig
from bdh.train.places import LOCK_FILE, CheckpointFolder, check_peft, find_model, holds_run, taken_by_run
from bdh.validation import (
    Allowed,
    DeviceName,
    Faults,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PathText,
    PositiveFloat,
    PositiveInt,
    Settings,
)

_METRIC = re.compile(
    r"(val|val_ema)/(loss|perplexity|bits_per_byte|accuracy)"
    r"|val/(loss_at/\d+|dead_neurons|(density|norm)/(x|y|xy)/\d+)"
)
MetricName = Annotated[
    str,
    Allowed(
        _METRIC.fullmatch,
        "a metric of the evaluations, such as val/loss, val_ema/loss, val/accuracy or val/loss_at/64",
    ),
]


@dataclass
class ModelSettings(Settings):
    n_layer: PositiveInt = 6
    """L, passes through the one shared layer."""
    n_embd: PositiveInt = 256
    """D, width of the residual stream."""
    n_head: PositiveInt = 4
    """H, heads. They must divide n_embd * mlp_internal_dim_multiplier into even parts."""
    mlp_internal_dim_multiplier: PositiveInt = 128
    """Neurons of all heads together, in multiples of n_embd."""
    dropout: Fraction = 0.1
    """Share of the neurons' outputs that training drops, 0 to below 1."""
    rope_theta: Annotated[float, Gt(1)] = 65536.0
    """Base of the rotary frequencies."""
    attention_form: Literal["auto", "parallel", "chunked", "recurrent"] = "auto"
    """How attention is computed; the results are equal. auto takes the cheapest for the length."""
    chunk_size: PositiveInt = 128
    """Tokens in a chunk of the chunked form."""
    decay: list[float | None] | float | None = None
    """Half-life of the state in tokens: of the first head, twice as long in each further one; or a list, one a head, null for never. null for no decay."""
    vocab_size: int | None = None
    """Entries of the vocabulary. It follows from the tokenizer; given, it must agree with it."""

    def collect_faults(self, faults: Faults) -> None:
        sizes = ("n_layer", "n_embd", "n_head", "mlp_internal_dim_multiplier", "chunk_size")
        if wanted := decay_fault(self.decay, self.n_head):
            faults.require(False, "decay", self.decay, wanted)
        if min(getattr(self, name) for name in sizes) >= 1:
            neurons = self.n_embd * self.mlp_internal_dim_multiplier
            faults.require(
                neurons % (2 * self.n_head) == 0,
                "n_head",
                self.n_head,
                f"such that {self.n_embd} * {self.mlp_internal_dim_multiplier} = {neurons} neurons "
                "(n_embd * mlp_internal_dim_multiplier) divide into an even number for each head",
            )


LORA_LAYERS = ("encoder", "encoder_v", "decoder")
LoraLayers = Annotated[
    list[str],
    Allowed(lambda names: bool(names) and set(names) <= set(LORA_LAYERS), f"some of {', '.join(LORA_LAYERS)}"),
]


@dataclass
class LoraSettings(Settings):
    r: NonNegativeInt = 0
    """Rank of the adapters that are trained instead of the weights of init_from; 0 trains all weights."""
    alpha: PositiveFloat = 16.0
    """The adapters' product is scaled by alpha / r."""
    dropout: Fraction = 0.0
    """Share of an adapter's inputs that training drops, 0 to below 1."""
    target_modules: LoraLayers = field(default_factory=lambda: list(LORA_LAYERS))
    """Layers that get adapters, of encoder, encoder_v and decoder."""
    embeddings: bool = False
    """Train embed and lm_head too, as a whole: needed for tokens that init_from does not know, as those of chat."""
    merge: bool = True
    """Export: the weights with the adapters merged into them; false: a folder of adapters, for peft."""

    def collect_faults(self, faults: Faults) -> None:
        faults.require(
            self.merge or not self.embeddings, "merge", self.merge, "true with embeddings, which are no adapters"
        )

    def check_available(self) -> None:
        if self.r:
            check_peft()


@dataclass
class TrainSettings(Settings):
    max_steps: PositiveInt = 3000
    """Optimizer steps of the whole run; the learning-rate schedule spans them."""
    stop_at_step: PositiveInt | None = None
    """Save and stop early at this step, the schedule unchanged. The run can be resumed."""
    block_size: PositiveInt = 512
    """Tokens of a training sequence."""
    batch_size: PositiveInt = 32
    """Sequences in one forward pass of a process. A step takes batch_size x gradient_accumulation_steps x processes."""
    carry_state: bool = False
    """Each row reads on where it ended in the step before, with the state that it had there, up to an <eos>."""
    gradient_accumulation_steps: PositiveInt = 1
    """Forward passes whose gradients are added up for one step."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: for the neurons' matrices, with AdamW for embedding and head (its products are bfloat16: slow on a CPU)."""
    learning_rate: PositiveFloat = 1e-3
    """Highest learning rate of the schedule. Muon's updates are scaled to fit AdamW's."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Course of the learning rate behind the warm-up; wsd: constant, then linear decay over decay_steps."""
    warmup_steps: NonNegativeInt = 100
    """Steps over which the learning rate rises from 0."""
    decay_steps: PositiveInt | None = None
    """wsd: steps of the final decay; None for a fifth of max_steps."""
    min_learning_rate_ratio: Annotated[float, Ge(0), Le(1)] = 0.1
    """Learning rate at the end of the schedule, as a share of learning_rate."""
    weight_decay: NonNegativeFloat = 0.1
    """Decay of the matrices' weights for each step, times the learning rate."""
    decay_embeddings: bool = False
    """Decay the embedding and the head too."""
    beta1: Fraction = 0.9
    """AdamW's decay of the mean gradient."""
    beta2: Fraction = 0.95
    """AdamW's decay of the mean squared gradient."""
    grad_clip: NonNegativeFloat = 1.0
    """Largest norm of the gradient; 0 does not clip."""
    dtype: Literal["auto", "float64", "float32", "bfloat16", "float16"] = "auto"
    """Arithmetic of the forward pass; weights stay float32, or are float64. auto: bfloat16 on hardware that has it, else float32."""
    device: DeviceName = "auto"
    """auto, cpu, cuda, cuda:N or mps. auto takes the first accelerator."""
    compile: bool = False
    """Compile the model with torch.compile: minutes at the start, faster steps."""
    recompute: Literal["none", "pass", "auto"] = "auto"
    """Wide activations in the backward pass: pass computes them again, none keeps them, auto keeps those of as many passes as the memory budget has room for."""
    memory_budget_gb: PositiveFloat | None = None
    """Memory for all wide activations, in GB of 10^9 bytes. null: a block, and 256 MiB of what may be kept."""
    layer_path: LayerPath = "auto"
    """Who computes the layer. kernels: in blocks, by the CPU's sparse kernels; torch: in blocks, by PyTorch; plain: all tokens at once, by autograd. auto takes the first that is there."""
    rows_per_block: PositiveInt | None = None
    """Sequences in a block of the layer, at most batch_size. null for what suits the device and the budget."""
    tokens_per_block: PositiveInt | None = None
    """Tokens of each sequence in a block, at most block_size. null for what costs least."""
    ema_decay: Annotated[float, Gt(0), Lt(1)] | None = None
    """Keep an exponential moving average of the weights with this decay, such as 0.999, and evaluate it too. null for none."""
    init_from: PathText | None = None
    """Model to start from, with a fresh optimizer: an export, a run, or a hub id. Its sizes and tokenizer are taken over."""
    lora: LoraSettings = field(default_factory=LoraSettings)
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is not finite: stop before the update, or leave the step out; 26 in a row stop anyway."""
    spike_threshold: PositiveFloat | None = None
    """Treat a gradient's norm that exceeds its running mean by so many standard deviations, such as 6, as on_nonfinite says."""
    # The seeds of the samples are counted on from it, and PyTorch's end at 2**64 - 1.
    seed: Annotated[int, Ge(0), Lt(2**63)] = 1337
    """Seed of the weights, the data order, the dropout and the samples."""
    eval_every_steps: PositiveInt = 250
    """Steps between evaluations on the validation windows; there is one at max_steps too."""
    eval_windows: PositiveInt = 64
    """Windows of block_size tokens in the fixed validation set."""
    patience: PositiveInt | None = None
    """Stop after so many evaluations in a row without a better validation loss; None never does."""
    sample_every_steps: NonNegativeInt = 500
    """Steps between text samples; 0 for none."""
    sample_prompts: list[Annotated[str, Allowed(bool, "non-empty texts")]] = field(default_factory=lambda: ["The "])
    """Prompts of the text samples."""
    sample_max_new_tokens: PositiveInt = 100
    """Tokens of a text sample."""

    gone: ClassVar[dict[str, str]] = {"gradient_checkpointing": "train.recompute: pass does what it did"}
    """Settings of earlier versions, and what to say of them."""

    def collect_faults(self, faults: Faults) -> None:
        for name, whole in (("rows_per_block", "batch_size"), ("tokens_per_block", "block_size")):
            value, most = getattr(self, name), getattr(self, whole)
            faults.require((value or 0) <= most, name, value, f"at most train.{whole}, {most}")
        faults.require(
            self.warmup_steps <= self.max_steps,
            "warmup_steps",
            self.warmup_steps,
            f"at most max_steps, {self.max_steps}",
        )
        faults.require(
            (self.decay_steps or 0) + self.warmup_steps <= self.max_steps or self.schedule != "wsd",
            "decay_steps",
            self.decay_steps,
            f"at most max_steps - warmup_steps, {self.max_steps - self.warmup_steps}",
        )
        if self.lora.r > 0:
            base, optimizer = self.init_from, self.optimizer
            faults.require(base is not None, "init_from", base, "the model that the adapters of train.lora are for")
            faults.require(optimizer == "adamw", "optimizer", optimizer, "adamw with train.lora")


@dataclass
class CheckpointSettings(Settings):
    every_steps: PositiveInt = 500
    """Steps between checkpoints; there is always one at the end."""
    keep_last: PositiveInt = 2
    """Newest checkpoints that are kept; the best one is kept besides."""
    keep_every_steps: PositiveInt | None = None
    """Keep the checkpoints of the multiples of so many steps for good. null for none."""
    best_metric: MetricName = "val/loss"
    """Which metric of an evaluation makes a checkpoint the best one, such as val/accuracy or val_ema/loss."""
    best_mode: Literal["auto", "min", "max"] = "auto"
    """Whether a lower or a higher best_metric is better; auto: higher for an accuracy, else lower."""
    in_background: bool = False
    """Write checkpoints while the training goes on; takes memory for a copy of weights and optimizer state."""
    export: Literal["last", "best", "ema", "none"] = "last"
    """Which weights are exported to <run_dir>/model at the end: the last, those of the best loss, or the moving average."""


@dataclass
class RunSettings(Settings):
    model: ModelSettings = field(default_factory=ModelSettings)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainSettings = field(default_factory=TrainSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    run_dir: PathText | None = None
    """Folder of the run; by default runs/ and the time of the start. It must not hold a run yet."""
    resume: bool = False
    """Continue the run in run_dir from its newest checkpoint."""
    resume_step: int | None = None
    """With resume: continue from the checkpoint of this step instead of the newest."""
    dry_run: bool = False
    """Write no run: measure a step or two on this device, and tell the memory and the time that the run would take."""

    def collect_faults(self, faults: Faults) -> None:
        faults.require(
            not self.resume or self.run_dir is not None, "run_dir", self.run_dir, "the folder of the run to resume"
        )
        faults.require(
            self.resume_step is None or self.resume, "resume_step", self.resume_step, "given together with --resume"
        )
        faults.require(
            self.checkpoint.export != "ema" or self.train.ema_decay is not None,
            "checkpoint.export",
            self.checkpoint.export,
            "last, best or none without train.ema_decay, which keeps the moving average",
        )
        faults.require(
            not self.checkpoint.best_metric.startswith("val_ema/") or self.train.ema_decay is not None,
            "checkpoint.best_metric",
            self.checkpoint.best_metric,
            "one of val/... without train.ema_decay, which keeps the moving average",
        )

    def check_available(self) -> None:
        for section in (self.monitor, self.train.lora):
            section.check_available()
        if not self.resume and self.train.init_from is not None:
            find_model(self.train.init_from)
        folder = None if self.run_dir is None else Path(self.run_dir)
        if folder is not None and folder.exists() and not folder.is_dir():
            raise NotADirectoryError(f"run_dir is {str(folder)!r}: must be a folder, not a file")
        # A lock that somebody holds is reported first, by whoever takes it.
        if folder is not None and not (folder / LOCK_FILE).exists():
            if self.resume:
                CheckpointFolder(folder).check_there(self.resume_step)
            elif holds_run(folder):
                raise taken_by_run(folder)
        if not self.resume:  # a run keeps the tokenizer that it was started with
            self.tokenizer.check_available()
        self.data.check_available()
