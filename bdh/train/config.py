"""The settings of a training run, a dataclass for each section, and how they are stored in the run's folder.

A docstring under a field is its help text.
"""

import shlex
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Le, Lt

from bdh.data.config import DataConfig
from bdh.distributed.config import DistributedConfig
from bdh.model.config_fields import decay_fault
from bdh.monitor import MonitorConfig
from bdh.ops import LayerPath
from bdh.text_files import read_yaml
from bdh.tokenizer.config import TokenizerConfig
from bdh.train.logged import BEST_METRICS
from bdh.train.places import CONFIG_FILE, LOCK_FILE, CheckpointFolder, check_peft, find_model, holds_run, taken_by_run
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
    of_setting,
)
from bdh.words import counted

MetricName = Annotated[
    str,
    Allowed(
        lambda name: any(each.stands_for(name) for each in BEST_METRICS),
        "a metric of the evaluations, such as val/loss, val_ema/loss, val/accuracy or val/loss_at/64",
    ),
]


@dataclass
class ModelSettings(Settings):
    n_layer: PositiveInt = 6
    """L, the number of times that the shared layer is applied."""
    n_embd: PositiveInt = 256
    """D, the width of the residual stream."""
    n_head: PositiveInt = 4
    """H, the number of heads. Each gets n_embd * mlp_internal_dim_multiplier / n_head neurons, which must be an even
    number."""
    mlp_internal_dim_multiplier: PositiveInt = 128
    """Number of neurons of all heads together, in multiples of n_embd."""
    dropout: Fraction = 0.1
    """Share of the neurons' outputs that is dropped in training, from 0 to below 1."""
    rope_theta: Annotated[float, Gt(1)] = 65536.0
    """Base of the rotary frequencies."""
    attention_form: Literal["auto", "parallel", "chunked", "recurrent"] = "auto"
    """How attention is computed; the results are equal. auto: the cheapest form for the length."""
    chunk_size: PositiveInt = 128
    """Tokens in a chunk of the chunked form."""
    decay: list[float | None] | float | None = None
    """Half-life of the state in tokens. A number is for the first head, and doubles with each further head; a list has
    one value for each head (null: no decay). null: no decay at all."""
    vocab_size: int | None = None
    """Size of the vocabulary. The tokenizer determines it; if it is given, it must agree."""

    def collect_faults(self, faults: Faults) -> None:
        if wanted := decay_fault(self.decay, self.n_head):
            faults.require(False, "decay", self.decay, wanted)
        if min(self.n_embd, self.n_head, self.mlp_internal_dim_multiplier) >= 1:
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
    """Rank of the adapters to train instead of the weights of init_from; 0 trains all weights."""
    alpha: PositiveFloat = 16.0
    """The output of the adapters is scaled by alpha / r."""
    dropout: Fraction = 0.0
    """Share of an adapter's inputs that is dropped in training, from 0 to below 1."""
    target_modules: LoraLayers = field(default_factory=lambda: list(LORA_LAYERS))
    """Layers that get adapters: some of encoder, encoder_v and decoder."""
    embeddings: bool = False
    """Also train embed and lm_head completely: needed for tokens that init_from does not know, such as those of a chat
    template."""
    merge: bool = True
    """Export the weights with the adapters merged into them; false: export a folder of adapters, for peft."""

    def collect_faults(self, faults: Faults) -> None:
        faults.require(
            self.merge or not self.embeddings, "merge", self.merge, "true with embeddings, which are not adapters"
        )

    def check_available(self) -> None:
        if self.r:
            check_peft()


@dataclass
class TrainSettings(Settings):
    max_steps: PositiveInt = 3000
    """Number of optimizer steps of the whole run, which the learning-rate schedule spans."""
    stop_at_step: PositiveInt | None = None
    """Save and stop early at this step, without changing the schedule. The run can be resumed."""
    block_size: PositiveInt = 512
    """Tokens in a training sequence."""
    batch_size: PositiveInt = 32
    """Sequences in a micro-batch, which is one forward pass of a process. A step has batch_size x
    gradient_accumulation_steps x processes sequences."""
    carry_state: bool = False
    """Each sequence continues where it ended in the previous step, with the state that it had there; the state restarts
    after an <eos>."""
    gradient_accumulation_steps: PositiveInt = 1
    """Number of micro-batches whose gradients are added up for one step."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw, or muon: Muon for the neurons' matrices and AdamW for embedding and head (Muon multiplies in bfloat16,
    which is slow on a CPU)."""
    learning_rate: PositiveFloat = 1e-3
    """Peak learning rate of the schedule. Muon's updates are scaled to match those of AdamW."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Shape of the learning rate after the warm-up; wsd: constant, then a linear decay over decay_steps."""
    warmup_steps: NonNegativeInt = 100
    """Steps over which the learning rate rises from 0."""
    decay_steps: PositiveInt | None = None
    """wsd: number of steps of the final decay. None: a fifth of max_steps."""
    min_learning_rate_ratio: Annotated[float, Ge(0), Le(1)] = 0.1
    """Learning rate at the end of the schedule, as a share of learning_rate."""
    weight_decay: NonNegativeFloat = 0.1
    """Weight decay of the matrices. Each step decays them by this value times the learning rate."""
    decay_embeddings: bool = False
    """Apply weight decay to the embedding and the head too."""
    beta1: Fraction = 0.9
    """AdamW's decay rate for the mean of the gradient."""
    beta2: Fraction = 0.95
    """AdamW's decay rate for the mean of the squared gradient."""
    grad_clip: NonNegativeFloat = 1.0
    """Largest norm of the gradient; larger gradients are clipped. 0: no clipping."""
    dtype: Literal["auto", "float64", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the forward pass; weights stay float32, or are float64. auto: bfloat16 if the hardware supports it,
    else float32."""
    device: DeviceName = "auto"
    """auto, cpu, cuda, cuda:N or mps. auto: the first accelerator."""
    compile: bool = False
    """Compile the model with torch.compile: takes minutes at the start, then steps are faster."""
    recompute: Literal["none", "pass", "auto"] = "auto"
    """Wide activations for the backward pass. pass: recompute them; none: keep them; auto: keep those of as many layer
    steps as fit into the memory budget."""
    memory_budget_gb: PositiveFloat | None = None
    """Memory for all wide activations, in GB of 10^9 bytes. null: enough for one block, and 256 MiB for those that are
    kept."""
    layer_path: LayerPath = "auto"
    """Implementation of the layer. kernels: in blocks, by the CPU's sparse kernels; torch: in blocks, by PyTorch;
    plain: all tokens at once, by autograd. auto: the first of these that is available."""
    rows_per_block: PositiveInt | None = None
    """Sequences in a block of the layer, at most batch_size. null: chosen for the device and the memory budget."""
    tokens_per_block: PositiveInt | None = None
    """Tokens of each sequence in a block, at most block_size. null: the cheapest number."""
    ema_decay: Annotated[float, Gt(0), Lt(1)] | None = None
    """Decay, such as 0.999, of an exponential moving average of the weights, which is evaluated too. null: no average."""
    init_from: PathText | None = None
    """Model to start from, with a new optimizer: an export, a run, or a hub id. Its sizes and tokenizer are used."""
    lora: LoraSettings = field(default_factory=LoraSettings)
    quantize: Literal["int8", "int4", "mixed"] | None = None
    """Train for weights in this format: steps, evaluations and samples compute the layer with weights rounded to it,
    and the export is quantized. mixed: E in int8, Ev and Dec in int4."""
    quantize_from_step: NonNegativeInt = 0
    """Number of steps at the beginning that compute with unrounded weights. Evaluations and samples always round."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What to do if a loss or gradient is not finite: stop before the update, or skip the step; 26 skipped steps in a
    row stop the run."""
    spike_threshold: PositiveFloat | None = None
    """Apply on_nonfinite also to gradients whose norm exceeds its running mean by this many standard deviations, such
    as 6."""
    # The seeds of the samples are counted from it, and PyTorch's largest seed is 2**64 - 1.
    seed: Annotated[int, Ge(0), Lt(2**63)] = 1337
    """Seed of the initial weights, the data order, the dropout and the samples."""
    eval_every_steps: PositiveInt = 250
    """Number of steps between evaluations on the validation windows; there is also one at max_steps."""
    eval_windows: PositiveInt = 64
    """Number of windows of block_size tokens in the fixed validation set."""
    patience: PositiveInt | None = None
    """Stop after this many evaluations in a row that do not improve `checkpoint.best_metric`. None: never."""
    sample_every_steps: NonNegativeInt = 500
    """Number of steps between text samples; 0: no samples."""
    sample_prompts: list[Annotated[str, Allowed(bool, "non-empty texts")]] = field(default_factory=lambda: ["The "])
    """Prompts of the text samples."""
    sample_max_new_tokens: PositiveInt = 100
    """Number of tokens in a text sample."""

    REMOVED: ClassVar[dict[str, str]] = {"gradient_checkpointing": "train.recompute: pass does what it did"}
    """Settings of earlier versions, each with a hint for the error message."""

    @property
    def sequences_per_process(self) -> int:
        """The number of sequences of a process in a step, over all its micro-batches."""
        return self.batch_size * self.gradient_accumulation_steps

    def collect_faults(self, faults: Faults) -> None:
        for name, whole in (("rows_per_block", "batch_size"), ("tokens_per_block", "block_size")):
            value, most = getattr(self, name), getattr(self, whole)
            faults.require((value or 0) <= most, name, value, f"at most train.{whole}, {most}")
        warmup, decay, most = self.warmup_steps, self.decay_steps, self.max_steps
        faults.require(warmup <= most, "warmup_steps", warmup, f"at most max_steps, {most}")
        fits = (decay or 0) + warmup <= most or self.schedule != "wsd"
        faults.require(fits, "decay_steps", decay, f"at most max_steps - warmup_steps, {most - warmup}")
        if self.lora.r > 0:
            base, optimizer = self.init_from, self.optimizer
            faults.require(base is not None, "init_from", base, "the model that the adapters of train.lora are for")
            faults.require(optimizer == "adamw", "optimizer", optimizer, "adamw with train.lora")
        start, steps = self.quantize_from_step, self.max_steps
        if self.quantize is None:
            faults.require(start == 0, "quantize_from_step", start, "0 without train.quantize")
        else:
            faults.require(start < steps, "quantize_from_step", start, f"below max_steps, {steps}")
            faults.require(self.lora.r == 0, "lora.r", self.lora.r, "0 with train.quantize, which rounds whole weights")
            is_right = self.dtype != "float16"
            faults.require(is_right, "dtype", self.dtype, "auto, float64, float32 or bfloat16 with train.quantize")


@dataclass
class CheckpointSettings(Settings):
    every_steps: PositiveInt = 500
    """Number of steps between checkpoints; there is always one at the end."""
    keep_last: PositiveInt = 2
    """Number of newest checkpoints to keep; the best one is always kept."""
    keep_every_steps: PositiveInt | None = None
    """Also keep every checkpoint whose step is a multiple of this number. null: none."""
    best_metric: MetricName = "val/loss"
    """Metric of the evaluations that determines the best checkpoint, such as val/accuracy or val_ema/loss."""
    best_mode: Literal["auto", "min", "max"] = "auto"
    """Whether a lower or a higher best_metric is better. auto: higher for an accuracy, else lower."""
    in_background: bool = False
    """Write checkpoints while the training continues; needs memory for a copy of the weights and the optimizer state."""
    export: Literal["last", "best", "ema", "none"] = "last"
    """Weights to export to <run_dir>/model at the end: the last, those of the best checkpoint, the moving average, or
    none."""


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
    """Folder of the run. By default a new folder in runs/, named after the start time. It must not contain a run yet."""
    resume: bool = False
    """Continue the run in run_dir from its newest checkpoint."""
    resume_step: int | None = None
    """With resume: continue from the checkpoint of this step instead of the newest."""
    dry_run: bool = False
    """Do not train: measure a step or two on this device, and report the memory and the time that the run would take.
    The exit status is 1 if it does not fit."""

    def collect_faults(self, faults: Faults) -> None:
        run_dir, step = self.run_dir, self.resume_step
        if self.resume and run_dir is None:
            faults.add("--resume needs --run_dir, the folder of the run to continue")
        faults.require(step is None or self.resume, "resume_step", step, "given together with --resume")
        if self.train.quantize is not None:
            gathered = self.distributed.param_dtype
            allowed = "float32 with train.quantize, which would round the weights that are gathered a second time"
            faults.require(gathered == "float32", "distributed.param_dtype", gathered, allowed)
        if self.train.ema_decay is None:
            export, metric = self.checkpoint.export, self.checkpoint.best_metric
            without = "without train.ema_decay, which keeps the moving average"
            faults.require(export != "ema", "checkpoint.export", export, f"last, best or none {without}")
            is_right = not metric.startswith("val_ema/")
            faults.require(is_right, "checkpoint.best_metric", metric, f"one of val/... {without}")

    def check_available(self) -> None:
        for section in (self.monitor, self.train.lora):
            section.check_available()
        if not self.resume and self.train.init_from is not None:
            with of_setting("train.init_from", self.train.init_from):
                find_model(self.train.init_from)
        folder = None if self.run_dir is None else Path(self.run_dir)
        if folder is not None and folder.exists() and not folder.is_dir():
            raise NotADirectoryError(f"run_dir is {str(folder)!r}: must be a folder, not a file")
        # If there is a lock, this is checked later, so that a lock that is held is reported first.
        if folder is not None and not (folder / LOCK_FILE).exists():
            if self.resume:
                CheckpointFolder(folder).check_there(self.resume_step)
            elif holds_run(folder) and not self.dry_run:
                raise taken_by_run(folder)
        if not self.resume:  # a resumed run uses its stored tokenizer
            self.tokenizer.check_available()
        self.data.check_available()


# A run cannot continue exactly, or at all, if one of these changes: the sections, and their fields or None for all.
_FIXED = {
    "model": None,
    "tokenizer": None,
    "data": None,
    "train": ("block_size", "carry_state", "optimizer", "seed", "init_from", "lora", "quantize"),
}
_FREE = {
    # Run.restore compares the texts themselves, whatever their location.
    "data.source",
    "data.val_source",
    "model.attention_form",
    "model.chunk_size",
    "model.dropout",
    "data.cache_dir",
    "train.lora.dropout",
    "train.lora.merge",
}
_NOT_STORED = ("run_dir", "resume", "resume_step", "dry_run")


def resume_command(folder: Path) -> str:
    """Returns the command that continues the run of a folder, quoted for the shell."""
    return shlex.join(("bdh", "train", "--run_dir", str(folder), "--resume"))


def settings_to_store(settings: RunSettings) -> dict[str, Any]:
    """Returns the settings as plain data, without those that concern only this start of the run, such as ``resume``."""
    return {name: value for name, value in asdict(settings).items() if name not in _NOT_STORED}


def stored_settings(folder: Path) -> dict[str, Any]:
    """Returns the settings in a run's ``config.yaml``, with those of earlier versions converted.

    Raises:
        FileNotFoundError: the folder contains no run.
        ValueError: the file is truncated, contains something else, or has settings twice or without a value.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"there is no run to resume in {folder}: it has no {CONFIG_FILE}")
    faults = Faults()
    try:
        stored = read_yaml(path, faults).tree
    except ValueError as error:
        raise ValueError(f"{path} is cut off or damaged: {error}") from error
    sections = stored if isinstance(stored, dict) else {}
    if lacking := [name for name in _FIXED if not isinstance(sections.get(name), dict)]:
        raise ValueError(f"{path} is cut off or damaged: it has no settings for {', '.join(lacking)}")
    faults.raise_if_any()
    # Settings that earlier versions stored.
    if stored["train"].pop("gradient_checkpointing", False):
        stored["train"]["recompute"] = "pass"
    monitor = stored.get("monitor") or {}
    if monitor.pop("tensorboard", None) == "off":
        monitor["backends"] = ["console", "jsonl"]
    return stored


def check_unchanged(settings: RunSettings, stored: dict[str, Any]) -> None:
    """Raises ``ValueError`` that names every setting of the model and the data that may not change but has changed."""
    now = settings_to_store(settings)
    changed = [
        f"{name}: {before!r} in the run, {value!r} now"
        for section, names in _FIXED.items()
        for name, value, before in _fields(section, now[section], stored.get(section, {}))
        if (names is None or name.split(".")[1] in names)
        and name not in _FREE
        and _without_places(before) != _without_places(value)
    ]
    if changed:
        raise ValueError(
            "a resumed run keeps its model and data, but these differ: " + "; ".join(changed) + "; leave out "
            "the --config and flags that set them: a resumed run's own settings are read"
        )


def _fields(prefix: str, now: dict[str, Any], stored: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yields the dotted name, the current value and the stored value of each field, including those of nested sections.

    Fields that the version of the run did not have count as stored with their current value.
    """
    for name, value in now.items():
        if isinstance(value, dict):
            yield from _fields(f"{prefix}.{name}", value, stored.get(name) or {})
        else:
            yield f"{prefix}.{name}", value, stored.get(name, value)


def _without_places(value: Any) -> Any:
    """Returns the value of ``data.mix`` without the locations of its texts, and any other value unchanged."""
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        return value
    return [{name: each for name, each in entry.items() if f"data.{name}" not in _FREE} for entry in value]


def continued(
    settings: RunSettings, stored: dict[str, Any], step: int, sequences_per_step: int, num_processes: int
) -> RunSettings:
    """Returns the settings with which a run continues: a step keeps its number of sequences on any number of processes.

    Args:
        settings: the settings of this start.
        stored: the settings of the run until now.
        step: the step that the run has reached.
        sequences_per_step: the number of sequences in a step until now.
        num_processes: the number of processes.

    Raises:
        ValueError: the run would end before ``step``; the processes cannot share the sequences evenly; or
            ``batch_size`` and ``gradient_accumulation_steps`` were changed and give another number of sequences.
    """
    train = settings.train
    for name in ("max_steps", "stop_at_step"):
        if (last := getattr(train, name)) is not None and last < step:
            raise ValueError(
                f"train.{name} is {last}, but the run has reached step {step}: give more to continue it, or an earlier "
                "checkpoint with --resume_step; nothing was changed"
            )
    now = train.sequences_per_process * num_processes
    if now == sequences_per_step:
        return settings
    if any(getattr(train, name) != stored["train"][name] for name in ("batch_size", "gradient_accumulation_steps")):
        raise ValueError(
            f"train.batch_size {train.batch_size} x train.gradient_accumulation_steps {train.gradient_accumulation_steps} "
            f"x {counted(num_processes, 'process', 'processes')} are {counted(now, 'sequence')} a step: must be "
            f"{sequences_per_step}, as in the run so far"
        )
    if sequences_per_step % num_processes:
        *others, most = (str(n) for n in range(1, sequences_per_step + 1) if sequences_per_step % n == 0)
        raise ValueError(
            f"a step of this run has {counted(sequences_per_step, 'sequence')}, which {num_processes} processes cannot share evenly: "
            f"start {', '.join(others)} or {most}"
        )
    share = sequences_per_step // num_processes
    batch_size = max(size for size in range(1, min(share, train.batch_size) + 1) if share % size == 0)
    return replace(
        settings, train=replace(train, batch_size=batch_size, gradient_accumulation_steps=share // batch_size)
    )
