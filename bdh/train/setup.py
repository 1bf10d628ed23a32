"""A training run: its folder, its parts, what goes into its checkpoints, and how it is made or restored."""

import logging
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import CheckpointException
from transformers import PreTrainedTokenizerFast

import bdh
from bdh.data import Corpus, prepare_corpus
from bdh.data.chat import holds_chat
from bdh.distributed.world import Parallel, World, choose_strategy, parallelize
from bdh.model import BDHConfig, BDHForCausalLM
from bdh.model.config_fields import ConfigFields
from bdh.model.conversion import MovingAverage
from bdh.monitor import chosen_backends, cut_back
from bdh.ops.blocks.plan import LayerPlan
from bdh.storage import atomic_dir, write_text
from bdh.text_files import dump_yaml
from bdh.tokenizer import load_tokenizer, stop_token_ids, with_chat_template
from bdh.tokenizer.plain import document_end_id, vocabulary_size
from bdh.train.adapters import Base, add_adapters
from bdh.train.batches import Batches, CarriedState
from bdh.train.checkpoint import Checkpoint, Checkpointer
from bdh.train.config import RunSettings, check_unchanged, continued, settings_to_store, stored_settings
from bdh.train.models import TOKENIZER_FOLDER, InitialModel, OtherBaseError, check_base, warn_of_removal
from bdh.train.optim import LossScale, Optimizers, UpdateGuard
from bdh.train.places import CONFIG_FILE, RunLock, check_peft, holds_run, taken_by_run
from bdh.train.runtime import (
    Runtime,
    choose_runtime,
    layer_options,
    plan_training,
    random_states,
    restore_random_states,
)

_logger = logging.getLogger(__name__)
_SEEDS_APART = 1_000_003  # between the processes, whose dropout must differ


@dataclass
class Progress:
    """How far a run is."""

    step: int = 0
    """Optimizer steps done."""
    tokens_seen: int = 0
    skipped_steps: int = 0
    """Steps that did not change the weights: float16's overflows, and those of ``train.on_nonfinite`` "skip"."""
    best_value: float | None = None
    """Best value of ``checkpoint.best_metric``."""
    best_step: int | None = None
    evaluations_without_gain: int = 0
    last_metrics: dict[str, float] = field(default_factory=dict)
    """Of the last evaluation."""
    last_ema_metrics: dict[str, float] = field(default_factory=dict)
    """The same of the moving average of the weights."""
    last_evaluation: dict[str, int] = field(default_factory=dict)
    """Of the last evaluation: after which ``step`` it was, its ``windows``, and the ``tokens`` that were predicted."""
    skipped_in_a_row: int = 0
    """Of these, the last ones, up to now."""
    norm_statistics: dict[str, Any] = field(default_factory=dict)
    """See :class:`bdh.train.optim.NormStatistics`."""


@dataclass
class Run:
    """Everything that the training loop works with."""

    settings: RunSettings
    folder: Path
    tokenizer: PreTrainedTokenizerFast
    corpus: Corpus
    model: BDHForCausalLM
    optimizers: Optimizers
    world: World
    parallel: Parallel
    runtime: Runtime
    guard: UpdateGuard
    loss_scale: LossScale
    batches: Batches
    """Of this process's share of the sequences."""
    checkpointer: Checkpointer
    progress: Progress
    plan: LayerPlan
    """How the layer is computed in a training step."""
    lock: RunLock
    """On the folder, from before anything is written; not taken in a dry run."""
    average: MovingAverage | None = None
    """Of the weights, with ``train.ema_decay``."""
    base: Base | None = None
    """The model of ``train.init_from``, as it was when the run was started."""
    carried: CarriedState | None = None
    """Of this process's sequences, with ``train.carry_state``."""

    @property
    def document_end(self) -> int | None:
        """The token after which training, and so its evaluation, sees nothing of what was before; None without."""
        is_apart = self.settings.train.carry_state or self.settings.data.pack == "documents"
        return document_end_id(self.tokenizer) if is_apart else None

    @property
    def counts_all_tokens(self) -> bool:
        """Whether the loss counts every token of every sequence."""
        train, data = self.settings.train, self.settings.data
        return not (self.corpus.is_chat or train.carry_state or data.pack == "documents")

    @property
    def rows_per_step(self) -> int:
        """Sequences of a step, over all micro-batches and processes."""
        return self.settings.train.sequences_per_process * self.world.size

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a checkpoint holds of this moment, sharded as the processes share it."""
        groups = {"weights": self.model.state_dict(), "optimizer": self.optimizers.tensors()}
        if self.average is not None:
            groups["ema"] = self.average.weights
        if self.carried is not None:
            groups["carried"] = self.parallel.sharded(self.carried.tensors())
        return {f"{group}.{name}": tensor for group, tensors in groups.items() for name, tensor in tensors.items()}

    def save(self, *, is_best: bool = False, is_before_fault: bool = False) -> Path:
        """Writes a checkpoint of this moment; see :meth:`Checkpointer.save`.

        Args:
            is_before_fault: the text cannot be read any further. A run that continues from here may find what is after this
                place changed.
        """
        position = self.batches.state_dict()
        self.progress.norm_statistics = self.guard.state_dict() or self.progress.norm_statistics
        training = {
            "bdh_version": bdh.__version__,
            "progress": asdict(self.progress),
            "settings": settings_to_store(self.settings),
            "model_config": {name: getattr(self.model.config, name) for name in ConfigFields.__annotations__},
            "base": None if self.base is None else self.base.facts(),
            "data_facts": self.corpus.facts,
            "data_fingerprint": self.corpus.fingerprint,
            "rows_per_step": self.rows_per_step,
            "scaler": self.loss_scale.state_dict(),
            "data_fingerprint_before": self._fingerprint_before(position) if is_before_fault else None,
            "loader": position,
            "random_states": self.world.gather(random_states(self.runtime.device)),
        }
        return self.checkpointer.save(self.progress.step, self.tensors(), training, is_best=is_best)

    def _fingerprint_before(self, position: dict[str, Any]) -> str | None:
        try:
            return self.corpus.fingerprint_before(position)
        except OSError as error:
            _logger.warning("%s: the run can only continue with the very text that it had", error)
            return None

    def close(self, *, release: bool = True) -> None:
        """Waits for what is still being written, leaves the other processes, and releases the folder.

        Args:
            release: False for whoever writes into the folder still, and calls ``lock.release()`` then.
        """
        self.checkpointer.close()
        self.world.leave()
        if release:
            self.lock.release()

    def restore(self, checkpoint: Checkpoint) -> None:
        """Puts every part back to where it was when the checkpoint was written.

        The number of processes, and how they share the model, may be another. Then dropout draws other numbers.

        Raises:
            ValueError: the data are not the ones that the run was trained on.
        """
        training = checkpoint.training
        is_same = training["data_fingerprint"] == self.corpus.fingerprint
        if not is_same and (before := training.get("data_fingerprint_before")) is not None:
            is_same = before == self._fingerprint_before(training["loader"])
            if is_same:
                _logger.warning(
                    "the text of %s has changed after the place where it could not be read",
                    self.corpus.facts["source"],
                )
        if not is_same:
            source, before = self.corpus.facts["source"], training["data_facts"]["source"]
            what = f"the text of {source} has changed since the run was started"
            if source != before:
                what = f"the text of {source} is not that of {before}, which the run was started with"
            raise ValueError(
                f"{what} (its fingerprint was {training['data_fingerprint']}, now it is {self.corpus.fingerprint}): "
                "nothing was changed"
            )
        stored = checkpoint.shapes()
        if any(name.startswith("optimizer.") for name in stored):  # not before the first update
            self.optimizers.make_state()
        has_average = any(name.startswith("ema.") for name in stored)
        wanted = {name: tensor for name, tensor in self.tensors().items() if has_average or not name.startswith("ema.")}
        checkpoint.read_into(wanted, self.world)
        if self.carried is not None:
            group = "carried."
            self.carried.load({name.removeprefix(group): t for name, t in wanted.items() if name.startswith(group)})
        self.loss_scale.load_state_dict(training["scaler"])
        self.batches.load_state_dict(training["loader"])
        states = training["random_states"]
        if len(states) == self.world.size:
            restore_random_states(states[self.world.rank], self.runtime.device)
        else:
            torch.manual_seed(self.settings.train.seed + checkpoint.step + _SEEDS_APART * self.world.rank)
        self.progress = Progress(**training["progress"])
        self.guard.load_state_dict(self.progress.norm_statistics)
        if self.average is not None and not has_average:
            # A run that had no average until now begins one with the weights of this step.
            self.average.load(dict(self.model.named_parameters()))


CheckRoom = Callable[[RunSettings, BDHConfig, Runtime, str, World], None]


def open_run(settings: RunSettings, *, progress: Any = None, check_room: CheckRoom | None = None) -> Run:
    """Makes or, with ``settings.resume``, restores a run. All faults come up here, before the first step.

    The run's folder is locked first, until :meth:`Run.close`. A fresh run's files are written last, when nothing can
    fail any more but the disk; with ``settings.dry_run`` none is made or changed. Started by ``torchrun``, all processes
    call this together.

    Args:
        progress: passed to :func:`bdh.data.prepare_corpus`, for its bars.
        check_room: called before the model is made; what it raises comes out.

    Raises:
        ValueError: a setting is out of range; settings, tokenizer and data do not go together, or not with the run
            that is resumed; or a package that a setting asks for is missing.
        FileExistsError: the folder holds a run already.
        InUseError: another process is training in the folder.
        FileNotFoundError: there is nothing to resume, or nothing at ``train.init_from``.
        OtherBaseError: a resumed run is to export adapters alone, and the model that they belong to has changed.
        DiskFullError: there is no room for the run's folder.
    """
    settings.validated()
    chosen_backends(settings.monitor)  # raises where one is not there
    runtime = choose_runtime(settings.train)
    world = World.join(
        runtime.device.type,
        settings.distributed.timeout_minutes,
        even_alone=settings.distributed.strategy == "fsdp" and runtime.device.type == "cuda",
    )
    strategy = choose_strategy(settings.distributed, world)
    name = world.gather(time.strftime("%Y-%m-%d_%H-%M-%S"))[0]
    folder = Path(settings.run_dir) if settings.run_dir else Path("runs") / name
    lock = RunLock(folder, world)
    if settings.dry_run:
        return _open(settings, folder, world, runtime, strategy, lock, progress, check_room)
    with ExitStack() as undo:
        lock.acquire()
        undo.enter_context(lock)
        run = _open(settings, folder, world, runtime, strategy, lock, progress, check_room)
        undo.pop_all()
    return run


def _open(
    settings: RunSettings,
    folder: Path,
    world: World,
    runtime: Runtime,
    strategy: str,
    lock: RunLock,
    progress: Any,
    check_room: CheckRoom | None,
) -> Run:
    """Raises as :func:`open_run`."""
    checkpointer = Checkpointer(
        folder,
        keep_last=settings.checkpoint.keep_last,
        keep_every_steps=settings.checkpoint.keep_every_steps,
        in_background=settings.checkpoint.in_background,
        world=world,
        may_write=lock.check,
    )
    checkpoint = None
    if settings.resume:
        stored = stored_settings(folder)
        check_unchanged(settings, stored)
        checkpoint = checkpointer.load(settings.resume_step)
        settings = continued(settings, stored, checkpoint.step, checkpoint.training["rows_per_step"], world.size)
    elif any(world.gather(holds_run(folder))):
        raise taken_by_run(folder)

    if settings.train.lora.r:
        check_peft()
    initial = None
    if checkpoint is None and settings.train.init_from is not None:
        initial = InitialModel(settings.train.init_from)
        settings = initial.completed(settings)
    base = _base(settings, folder, initial, checkpoint, world)
    # A run keeps the tokenizer that it was started with.
    tokenizer = load_tokenizer(folder / TOKENIZER_FOLDER if checkpoint else settings.tokenizer)
    if checkpoint is None:
        template = settings.tokenizer.chat_template
        tokenizer = with_chat_template(tokenizer, template, needs_one=holds_chat(settings.data))
    if initial is not None:
        initial.check_tokenizer(tokenizer)
    config = model_config(settings, tokenizer)
    with world.rank0_first():  # which fills the cache
        corpus = prepare_corpus(settings.data, tokenizer, settings.train.block_size, progress=progress)
    if initial is not None:
        initial.check_data(corpus.fingerprint)

    if check_room is not None:
        check_room(settings, config, runtime, strategy, world)
    torch.manual_seed(settings.train.seed)
    model = BDHForCausalLM(config).to(runtime.device)  # type: ignore[arg-type]
    if runtime.dtype == torch.float64:
        model = model.double()
    if initial is not None:
        initial.copy_into(model, settings.train.lora)
    if settings.train.lora.r:
        if base is not None and not settings.train.lora.merge:
            base.check_same_layer(model)
        add_adapters(model, settings.train.lora)
    model.layer_options = layer_options(settings.train)
    plan = plan_training(model, settings.train.batch_size, settings.train.block_size, runtime, settings.distributed)
    if world.rank > 0:
        torch.manual_seed(settings.train.seed + _SEEDS_APART * world.rank)
    parallel = parallelize(model, strategy, settings.distributed, world)
    is_float16 = runtime.dtype == torch.float16
    run = Run(
        settings=settings,
        folder=folder,
        tokenizer=tokenizer,
        corpus=corpus,
        model=model,
        optimizers=Optimizers(model, settings.train),
        world=world,
        parallel=parallel,
        runtime=runtime,
        guard=UpdateGuard(settings.train, runtime.device, world, is_float16=is_float16),
        loss_scale=LossScale(runtime.device, is_float16=is_float16),
        batches=Batches(
            corpus.train_loader(
                settings.train.sequences_per_process * world.size,
                settings.train.seed,
                rank=world.rank,
                world_size=world.size,
                carry_state=settings.train.carry_state,
            ),
            world,
            is_streaming=corpus.facts["streaming"],
            pin_memory=runtime.device.type == "cuda",
        ),
        checkpointer=checkpointer,
        progress=Progress(),
        plan=plan,
        lock=lock,
        average=None if settings.train.ema_decay is None else MovingAverage(model, settings.train.ema_decay),
        base=base,
    )
    if settings.train.carry_state:
        run.carried = CarriedState(model, settings.train.gradient_accumulation_steps, settings.train.batch_size)
    if checkpoint is not None:
        _restore(run, checkpoint)
    if settings.dry_run:
        return run
    if world.is_main:
        _write_folder(run, is_new=checkpoint is None)
    world.wait_for_all()
    if checkpoint is not None:
        checkpointer.forget_after(run.progress.step, best_step=run.progress.best_step)
        if world.is_main:
            cut_back(folder / "samples.jsonl", run.progress.step)
    return run


def _restore(run: Run, checkpoint: Checkpoint) -> None:
    """Raises as :meth:`Run.restore`."""
    try:
        run.restore(checkpoint)
    except (OSError, CheckpointException):
        settings = run.settings
        if not settings.dry_run or settings.resume_step is not None or run.world.size > 1 or checkpoint.path.is_dir():
            raise
        run.restore(run.checkpointer.load())  # a training that is running there has removed it


def _base(
    settings: RunSettings, folder: Path, initial: InitialModel | None, checkpoint: Checkpoint | None, world: World
) -> Base | None:
    """The model that the run started from; that of adapters is compared with what is there when the run is resumed.

    Raises:
        OtherBaseError: it has other weights now, and the adapters alone are to be exported; on all processes.
    """
    if initial is not None:
        if settings.train.lora.r and not settings.train.lora.merge and world.is_main:
            warn_of_removal(initial.base)
        return initial.base.seen_from(folder)
    if checkpoint is None or (facts := checkpoint.training.get("base")) is None:
        return None
    base, lora = Base.from_facts(facts), settings.train.lora
    fault = None
    if lora.r and world.is_main:
        try:
            base = check_base(base, folder, merge=lora.merge)
        except OtherBaseError as error:
            fault = str(error)
    base, fault = world.gather((base, fault))[0]
    if fault:
        raise OtherBaseError(fault)
    return base


def _write_folder(run: Run, *, is_new: bool) -> None:
    try:
        if is_new:
            with atomic_dir(run.folder / TOKENIZER_FOLDER) as temporary:
                run.tokenizer.save_pretrained(temporary)
        stored = dump_yaml(settings_to_store(run.settings), sort_keys=False)
        write_text(run.folder / CONFIG_FILE, stored)
    except OSError:
        if is_new:
            shutil.rmtree(run.folder / TOKENIZER_FOLDER, ignore_errors=True)
        raise


def model_config(settings: RunSettings, tokenizer: PreTrainedTokenizerFast) -> BDHConfig:
    """The model's configuration; its vocabulary and special tokens are the tokenizer's.

    Raises:
        ValueError: ``model.vocab_size`` is given and is another.
    """
    fields = asdict(settings.model)
    if fields.pop("vocab_size") not in (None, vocabulary_size(tokenizer)):
        raise ValueError(
            f"model.vocab_size is {settings.model.vocab_size}: the tokenizer {settings.tokenizer.path!r} has "
            f"{vocabulary_size(tokenizer)} entries; leave model.vocab_size out, and it follows from the tokenizer"
        )
    return BDHConfig(
        vocab_size=vocabulary_size(tokenizer),
        train_block_size=settings.train.block_size,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=stop_token_ids(tokenizer),
        **fields,
    )
