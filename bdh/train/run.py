"""A training run: its folder, its parts, and what goes into its checkpoints."""

import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PreTrainedTokenizerFast

import bdh
from bdh.data import Corpus, prepare_corpus
from bdh.data.conversations import holds_chat
from bdh.model import BDHConfig, BDHForCausalLM
from bdh.model.averaging import MovingAverage
from bdh.storage import whole_folder, write_text
from bdh.tokenizer import load_tokenizer, stop_token_ids, with_chat_template
from bdh.train.checkpoint import Checkpoint, Checkpointer
from bdh.train.config import RunSettings
from bdh.train.initial import InitialModel
from bdh.train.lora import add_adapters, check_peft
from bdh.train.models import TOKENIZER_FOLDER
from bdh.train.optim import Optimizers
from bdh.train.runtime import Runtime, choose_runtime, random_states, restore_random_states

CONFIG_FILE = "config.yaml"
# A run cannot go on exactly, or at all, if one of these is another: name of the section, and its fields.
_FIXED = {
    "model": None,
    "tokenizer": None,
    "data": None,
    "train": ("block_size", "batch_size", "gradient_accumulation_steps", "optimizer", "seed", "init_from", "lora"),
}
_FREE = {
    "model.attention_form",
    "model.chunk_size",
    "model.dropout",
    "data.cache_dir",
    "train.lora.dropout",
    "train.lora.merge",
}
_NOT_STORED = ("run_dir", "resume", "resume_step")


@dataclass
class Progress:
    """How far a run is."""

    step: int = 0
    """Optimizer steps done."""
    tokens_seen: int = 0
    skipped_steps: int = 0
    """Steps that did not change the weights: float16's overflows, and those of ``train.on_nonfinite`` "skip"."""
    best_loss: float | None = None
    """Best validation loss, nats per token."""
    best_step: int | None = None
    evaluations_without_gain: int = 0
    last_metrics: dict[str, float] = field(default_factory=dict)
    """Of the last evaluation."""
    last_ema_metrics: dict[str, float] = field(default_factory=dict)
    """The same of the moving average of the weights."""


@dataclass
class Run:
    """Everything that the training loop works with."""

    settings: RunSettings
    folder: Path
    tokenizer: PreTrainedTokenizerFast
    corpus: Corpus
    model: BDHForCausalLM
    optimizers: Optimizers
    runtime: Runtime
    scaler: torch.amp.GradScaler
    loader: Any
    checkpointer: Checkpointer
    progress: Progress
    average: MovingAverage | None = None
    """Of the weights, with ``train.ema_decay``."""

    def save(self, *, is_best: bool = False) -> Path:
        """Writes a checkpoint of this moment; see :meth:`Checkpointer.save`."""
        training = {
            "bdh_version": bdh.__version__,
            "progress": asdict(self.progress),
            "settings": settings_to_store(self.settings),
            "model_config": {name: getattr(self.model.config, name) for name in BDHConfig.__annotations__},
            "data_facts": self.corpus.facts,
            "data_fingerprint": self.corpus.fingerprint,
            "optimizers": self.optimizers.state_dict(),
            "scaler": self.scaler.state_dict(),
            "loader": self.loader.state_dict(),
            "random_states": random_states(self.runtime.device),
            "ema": None if self.average is None else {k: v.cpu() for k, v in self.average.weights.items()},
        }
        return self.checkpointer.save(self.progress.step, self.model.state_dict(), training, is_best=is_best)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Puts every part back to where it was when the checkpoint was written.

        Raises:
            ValueError: the data are not the ones that the run was trained on.
        """
        training = checkpoint.training
        if training["data_fingerprint"] != self.corpus.fingerprint:
            raise ValueError(
                f"the text of {self.corpus.facts['source']} has changed since the run was started (its fingerprint was "
                f"{training['data_fingerprint']}, now it is {self.corpus.fingerprint}): nothing was changed"
            )
        self.model.load_state_dict(checkpoint.weights)
        self.optimizers.load_state_dict(training["optimizers"])
        if training["scaler"] and self.scaler.is_enabled():  # empty, if the run has not been in float16 until now
            self.scaler.load_state_dict(training["scaler"])
        self.loader.load_state_dict(training["loader"])
        restore_random_states(training["random_states"], self.runtime.device)
        self.progress = Progress(**training["progress"])
        if self.average is not None:
            # A run that had no average until now begins one with the weights of this step.
            self.average.load(training.get("ema") or dict(self.model.named_parameters()))


def open_run(settings: RunSettings, *, progress: Any = None) -> Run:
    """Makes or, with ``settings.resume``, restores a run. All faults come up here, before the first step.

    A fresh run's folder is made last, when nothing can fail any more but the disk.

    Args:
        progress: passed to :func:`bdh.data.prepare_corpus`, for its bars.

    Raises:
        ValueError: settings, tokenizer and data do not go together, or not with the run that is resumed.
        FileExistsError: the folder holds a run already.
        FileNotFoundError: there is nothing to resume, or nothing at ``train.init_from``.
        DiskFullError: there is no room for the run's folder.
    """
    folder = Path(settings.run_dir) if settings.run_dir else Path("runs") / time.strftime("%Y-%m-%d_%H-%M-%S")
    checkpointer = Checkpointer(folder, settings.checkpoint.keep_last)
    checkpoint = None
    if settings.resume:
        check_unchanged(settings, stored_settings(folder))
        checkpoint = checkpointer.load(settings.resume_step)
    elif holds_run(folder):
        raise FileExistsError(
            f"{folder} already holds a run, which is never overwritten: continue it with --resume, or give another "
            "--run_dir"
        )

    if settings.train.lora.r:
        check_peft()
    runtime = choose_runtime(settings.train)
    initial = None
    if checkpoint is None and settings.train.init_from is not None:
        initial = InitialModel(settings.train.init_from)
        settings = initial.completed(settings)
    # A run keeps the tokenizer that it was started with.
    tokenizer = load_tokenizer(folder / TOKENIZER_FOLDER if checkpoint else settings.tokenizer)
    if checkpoint is None:
        template = settings.tokenizer.chat_template
        tokenizer = with_chat_template(tokenizer, template, needs_one=holds_chat(settings.data))
    if initial is not None:
        initial.check_tokenizer(tokenizer)
    config = model_config(settings, tokenizer)
    corpus = prepare_corpus(settings.data, tokenizer, settings.train.block_size, progress=progress)

    if initial is not None:
        initial.check_data(corpus.fingerprint)

    torch.manual_seed(settings.train.seed)
    model = BDHForCausalLM(config).to(runtime.device)  # type: ignore[arg-type]
    if initial is not None:
        initial.copy_into(model)
        initial.check_lora(settings.train.lora, model)
    if settings.train.lora.r:
        add_adapters(model, settings.train.lora)
    if settings.train.gradient_checkpointing:
        model.activation_checkpointing_enable()
    run = Run(
        settings=settings,
        folder=folder,
        tokenizer=tokenizer,
        corpus=corpus,
        model=model,
        optimizers=Optimizers(model, settings.train),
        runtime=runtime,
        scaler=runtime.gradient_scaler(),
        loader=corpus.train_loader(
            settings.train.batch_size * settings.train.gradient_accumulation_steps, settings.train.seed
        ),
        checkpointer=checkpointer,
        progress=Progress(),
        average=None if settings.train.ema_decay is None else MovingAverage(model, settings.train.ema_decay),
    )
    if checkpoint is not None:
        run.restore(checkpoint)
    _write_folder(run, is_new=checkpoint is None)
    if checkpoint is not None:
        checkpointer.forget_after(run.progress.step, best_step=run.progress.best_step)
    return run


def _write_folder(run: Run, *, is_new: bool) -> None:
    existed = run.folder.exists()
    try:
        if is_new:
            with whole_folder(run.folder / TOKENIZER_FOLDER) as temporary:
                run.tokenizer.save_pretrained(temporary)
        stored = yaml.safe_dump(settings_to_store(run.settings), sort_keys=False)
        write_text(run.folder / CONFIG_FILE, stored)
    except OSError:
        if is_new:
            shutil.rmtree(run.folder / TOKENIZER_FOLDER if existed else run.folder, ignore_errors=True)
        raise


def model_config(settings: RunSettings, tokenizer: PreTrainedTokenizerFast) -> BDHConfig:
    """The model's configuration; its vocabulary and special tokens are the tokenizer's.

    Raises:
        ValueError: ``model.vocab_size`` is given and is another.
    """
    fields = asdict(settings.model)
    if fields.pop("vocab_size") not in (None, len(tokenizer)):
        raise ValueError(
            f"model.vocab_size is {settings.model.vocab_size}: the tokenizer {settings.tokenizer.path!r} has "
            f"{len(tokenizer)} entries; leave model.vocab_size out, and it follows from the tokenizer"
        )
    return BDHConfig(
        vocab_size=len(tokenizer),
        train_block_size=settings.train.block_size,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=stop_token_ids(tokenizer),
        **fields,
    )


def holds_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in (CONFIG_FILE, "checkpoints", "metrics.jsonl", "model"))


def settings_to_store(settings: RunSettings) -> dict[str, Any]:
    """The settings as plain data, without those that say where this start of the run reads and writes."""
    stored = asdict(settings)
    for name in _NOT_STORED:
        del stored[name]
    return stored


def stored_settings(folder: Path) -> dict[str, Any]:
    """What a run's ``config.yaml`` holds.

    Raises:
        FileNotFoundError: the folder holds no run.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"there is no run to resume in {folder}: it has no {CONFIG_FILE}")
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def check_unchanged(settings: RunSettings, stored: dict[str, Any]) -> None:
    """Raises ``ValueError`` naming every field of the model or the data that is not as it was stored."""
    now = settings_to_store(settings)
    changed = [
        f"{name}: {before.get(own)!r} in the run, {value!r} now"
        for section, names in _FIXED.items()
        for name, own, value, before in _fields(section, now[section], stored[section])
        if (names is None or name.split(".")[1] in names)
        and name not in _FREE
        and before.get(own, value) != value  # a setting that the run's version did not have is new
    ]
    if changed:
        raise ValueError("a resumed run keeps its model and data, but these differ: " + "; ".join(changed))


def _fields(prefix: str, now: dict[str, Any], stored: dict[str, Any]) -> Iterator[tuple[str, str, Any, dict[str, Any]]]:
    """Of each field, those of nested sections among them: its dotted name, its own, its value, and what was stored."""
    for own, value in now.items():
        if isinstance(value, dict):
            yield from _fields(f"{prefix}.{own}", value, stored.get(own) or {})
        else:
            yield f"{prefix}.{own}", own, value, stored
