"""Sets up a training run: its parts, the content of its checkpoints, and creating or restoring it."""

import logging
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

import bdh
from bdh.data import Corpus, prepare_corpus
from bdh.data.batches import Batches
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
from bdh.train.carried import CarriedState
from bdh.train.checkpoint import Checkpoint, Checkpointer
from bdh.train.config import RunSettings, check_unchanged, continued, settings_to_store, stored_settings
from bdh.train.models import TOKENIZER_FOLDER, InitialModel, OtherBaseError, check_base, warn_of_removal
from bdh.train.optim import LossScale, Optimizers, UpdateGuard
from bdh.train.places import CONFIG_FILE, RunLock, check_peft, holds_run, taken_by_run
from bdh.train.rounding import fake_rounding, rounded_in_place, rounded_once
from bdh.train.runtime import (
    Runtime,
    choose_runtime,
    layer_options,
    plan_training,
    random_states,
    restore_random_states,
)

_logger = logging.getLogger(__name__)
_SEEDS_APART = 1_000_003  # the difference between the seeds of processes, whose dropout must differ


@dataclass
class Progress:
    """The progress of a run."""

    step: int = 0
    """The number of optimizer steps done."""
    tokens_seen: int = 0
    skipped_steps: int = 0
    """Steps that did not change the weights, because of a float16 overflow or ``train.on_nonfinite`` "skip"."""
    best_value: float | None = None
    """The best value of ``checkpoint.best_metric``."""
    best_step: int | None = None
    evaluations_without_gain: int = 0
    last_metrics: dict[str, float] = field(default_factory=dict)
    """The metrics of the last evaluation."""
    last_ema_metrics: dict[str, float] = field(default_factory=dict)
    """The same for the moving average of the weights."""
    last_evaluation: dict[str, int] = field(default_factory=dict)
    """The ``step`` of the last evaluation, and its numbers of ``windows`` and predicted ``tokens``."""
    skipped_in_a_row: int = 0
    """The number of consecutive skipped steps up to now."""
    norm_statistics: dict[str, Any] = field(default_factory=dict)
    """See :class:`bdh.train.optim.NormStatistics`."""


@dataclass
class Run:
    """Everything that the training loop uses, newly created or restored from a checkpoint."""

    settings: RunSettings
    folder: Path
    tokenizer: PreTrainedTokenizerFast
    corpus: Corpus
    model: BDHForCausalLM
    parallel: Parallel
    world: World
    runtime: Runtime
    plan: LayerPlan
    """The plan for computing the layer in a training step."""
    checkpointer: Checkpointer
    lock: RunLock
    """The lock of the run's folder, held before anything is written; not acquired in a dry run."""
    base: Base | None = None
    """The record of the model of ``train.init_from``, as of the start of the run."""
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        train, world, device = self.settings.train, self.world, self.runtime.device
        is_float16 = self.runtime.dtype == torch.float16
        self.autocast = self.runtime.autocast()  # for the forward passes of all steps
        self.optimizers = Optimizers(self.model, train)
        self.guard = UpdateGuard(train, device, world, is_float16=is_float16)
        self.loss_scale = LossScale(device, is_float16=is_float16)
        # For this process's sequences only, as are the carried states.
        loader = self.corpus.train_loader(
            self.sequences_per_step, train.seed, world.rank, world.size, carry_state=train.carry_state
        )
        self.batches = Batches(
            loader,
            world.gather,
            num_processes=world.size,
            are_alike=self._counts_all_tokens and not self.corpus.facts["streaming"],
            pin_memory=device.type == "cuda",
        )
        self.carried: CarriedState | None = None
        if train.carry_state:
            self.carried = CarriedState(self.model, train.gradient_accumulation_steps, train.batch_size)
        self.average = None if train.ema_decay is None else MovingAverage(self.model, train.ema_decay)

    @property
    def document_end(self) -> int | None:
        """The token that ends documents, if tokens do not attend across documents in this run; otherwise None."""
        is_apart = self.settings.train.carry_state or self.settings.data.pack == "documents"
        return document_end_id(self.tokenizer) if is_apart else None

    @property
    def _counts_all_tokens(self) -> bool:
        """Whether the loss counts every token of every sequence."""
        train, data = self.settings.train, self.settings.data
        return not (self.corpus.is_chat or train.carry_state or data.pack == "documents")

    @property
    def sequences_per_step(self) -> int:
        """The number of sequences of all micro-batches and processes."""
        return self.settings.train.sequences_per_process * self.world.size

    def rounded_weights(self) -> AbstractContextManager[None]:
        """A context for the passes of a step. With ``train.quantize``, weights are rounded once for all of them."""
        train = self.settings.train
        if train.quantize is None:
            return nullcontext()
        rounds = self.progress.step >= train.quantize_from_step
        if rounds:
            self.parallel.gather_weights()
        return rounded_once(self.model, rounds=rounds)

    @contextmanager
    def measured_model(self) -> Iterator[None]:
        """A context for evaluation and samples, in which each process has all weights, as an export would have them."""
        with self.parallel.whole_model(), rounded_in_place(self.model):
            yield

    def tensors(self) -> dict[str, torch.Tensor]:
        """Returns the tensors of a checkpoint at this moment, sharded over the processes."""
        groups = {"weights": self.model.state_dict(), "optimizer": self.optimizers.tensors()}
        if self.average is not None:
            groups["ema"] = self.average.weights
        if self.carried is not None:
            groups["carried"] = self.parallel.sharded(self.carried.tensors())
        return {f"{group}.{name}": tensor for group, tensors in groups.items() for name, tensor in tensors.items()}

    def save(self, *, is_best: bool = False, is_before_fault: bool = False) -> Path:
        """Writes a checkpoint of this moment; see :meth:`Checkpointer.save`.

        Args:
            is_best: whether the model is the best so far.
            is_before_fault: whether the text cannot be read any further. A run that resumes from this checkpoint then
                accepts that the text after it has changed.
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
            "rows_per_step": self.sequences_per_step,
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
            _logger.warning("%s: the run can be continued only with unchanged text", error)
            return None

    def close(self, *, release: bool = True) -> None:
        """Waits for pending writes, leaves the process group, and releases the lock of the folder.

        Args:
            release: if False, the lock is kept for further writes. Call ``lock.release()`` afterwards.
        """
        self.checkpointer.close()
        self.world.leave()
        if release:
            self.lock.release()

    def restore(self, checkpoint: Checkpoint) -> None:
        """Restores the state of the run when the checkpoint was written.

        The number of processes and the sharding can differ; dropout then draws other numbers.

        Raises:
            ValueError: the data differ from those that the run was trained on.
        """
        training = checkpoint.training
        source, old_source = self.corpus.facts["source"], training["data_facts"]["source"]
        if training["data_fingerprint"] != self.corpus.fingerprint:
            before = training.get("data_fingerprint_before")
            if before is None or before != self._fingerprint_before(training["loader"]):
                what = f"the text of {source} has changed since the run was started"
                if source != old_source:
                    what = f"the text of {source} is not that of {old_source}, which the run was started with"
                raise ValueError(
                    f"{what} (its fingerprint was {training['data_fingerprint']}, now it is {self.corpus.fingerprint}): "
                    "nothing was changed"
                )
            _logger.warning("the text of %s has changed after the place where it could not be read", source)
        stored = checkpoint.shapes()
        if any(name.startswith("optimizer.") for name in stored):  # there are none before the first update
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
            # A run without an average so far starts one with the weights of this step.
            self.average.load(dict(self.model.named_parameters()))


CheckRoom = Callable[[RunSettings, BDHConfig, Runtime, World, int], None]


def open_run(settings: RunSettings, *, progress: Any = None, check_room: CheckRoom | None = None) -> Run:
    """Creates a run or, with ``settings.resume``, restores it. All faults are reported here, before the first step.

    The run's folder is locked first, until :meth:`Run.close`. The files of a new run are written last, when only the
    disk can still fail. With ``settings.dry_run``, no file is written or changed. Under ``torchrun``, all processes
    must call this together.

    Args:
        settings: the settings of the run.
        progress: passed to :func:`bdh.data.prepare_corpus` for its progress bars.
        check_room: called before the model is created, with the settings, what was chosen by them, and the bytes on the
            device that the model of ``train.init_from`` takes until its weights are copied. Its exceptions are passed on.

    Raises:
        ValueError: a setting is out of range; settings, tokenizer and data are incompatible with each other or with the
            resumed run; or a package that a setting requires is missing.
        FileExistsError: the folder already contains a run.
        InUseError: another process is training in the folder.
        FileNotFoundError: there is nothing to resume, or no model at ``train.init_from``.
        OtherBaseError: the resumed run is to export only adapters, and their base model has changed.
        DiskFullError: there is no space for the run's folder.
    """
    settings.validated()
    chosen_backends(settings.monitor)  # raises an exception if one is not available
    runtime, distributed = choose_runtime(settings.train), settings.distributed
    even_alone = distributed.strategy == "fsdp" and runtime.device.type == "cuda"
    world = World.join(runtime.device.type, distributed.timeout_minutes, even_alone=even_alone)
    strategy = choose_strategy(distributed, world)
    name = world.gather(time.strftime("%Y-%m-%d_%H-%M-%S"))[0]
    folder = Path(settings.run_dir) if settings.run_dir else Path("runs") / name
    lock = RunLock(folder, world)
    with ExitStack() as undo:
        if not settings.dry_run:
            lock.acquire()
            undo.enter_context(lock)
        wanted, checkpoint = settings.checkpoint, None
        checkpointer = Checkpointer(
            folder,
            keep_last=wanted.keep_last,
            keep_every_steps=wanted.keep_every_steps,
            in_background=wanted.in_background,
            world=world,
            may_write=lock.check,
        )
        if settings.resume:
            stored = stored_settings(folder)
            check_unchanged(settings, stored)
            checkpoint = checkpointer.load(settings.resume_step)
            settings = continued(settings, stored, checkpoint.step, checkpoint.training["rows_per_step"], world.size)
        elif any(world.gather(holds_run(folder) and not settings.dry_run)):
            raise taken_by_run(folder)
        if settings.train.lora.r:
            check_peft()
        initial = None
        if checkpoint is None and settings.train.init_from is not None:
            initial = InitialModel(settings.train.init_from)
            settings = initial.completed(settings)
        base = _base(settings, folder, initial, checkpoint, world)
        if checkpoint is not None:  # a run keeps the tokenizer with which it was started
            tokenizer = load_tokenizer(folder / TOKENIZER_FOLDER)
        else:
            template, is_chat = settings.tokenizer.chat_template, holds_chat(settings.data)
            tokenizer = with_chat_template(load_tokenizer(settings.tokenizer), template, needs_one=is_chat)
        if initial is not None:
            initial.check_tokenizer(tokenizer)
        config = _model_config(settings, tokenizer)
        with world.rank0_first(), _any_text_will_do(settings.dry_run):  # the first process fills the cache
            corpus = prepare_corpus(settings.data, tokenizer, settings.train.block_size, progress=progress)
        if initial is not None:
            initial.check_data(corpus.fingerprint)
        if check_room is not None:
            passing = initial.nbytes if initial is not None and runtime.device.type == "cpu" else 0
            check_room(settings, config, runtime, world, passing)

        model = _make_model(settings, config, runtime, initial, base)
        train = settings.train
        plan = plan_training(train, config, runtime, distributed)
        if world.rank > 0:
            torch.manual_seed(train.seed + _SEEDS_APART * world.rank)
        run = Run(
            settings=settings,
            folder=folder,
            tokenizer=tokenizer,
            corpus=corpus,
            model=model,
            parallel=parallelize(model, strategy, distributed, world),
            world=world,
            runtime=runtime,
            plan=plan,
            checkpointer=checkpointer,
            lock=lock,
            base=base,
        )
        if checkpoint is not None:
            run.restore(checkpoint)
        if not settings.dry_run:
            _write_folder(run, is_new=checkpoint is None)
        undo.pop_all()
    return run


@contextmanager
def _any_text_will_do(is_dry_run: bool) -> Iterator[None]:
    """A context in which, in a dry run, an error about missing text says how to do without this text."""
    try:
        yield
    except FileNotFoundError as error:
        if not is_dry_run:
            raise
        raise FileNotFoundError(
            f"{error}. A dry run reads text too, and any will do: with --data.source pydoc, which comes with Python, it measures "
            "nearly the same memory and time"
        ) from error


def _base(
    settings: RunSettings, folder: Path, initial: InitialModel | None, checkpoint: Checkpoint | None, world: World
) -> Base | None:
    """Returns the record of the model from which the run started, or None. When resuming, checks the base of adapters.

    Raises ``OtherBaseError`` in all processes if its weights have changed and only the adapters are to be exported.
    """
    lora = settings.train.lora
    if initial is not None:
        if lora.r and not lora.merge and world.is_main:
            warn_of_removal(initial.base)
        return initial.base.seen_from(folder)
    if checkpoint is None or (facts := checkpoint.training.get("base")) is None:
        return None
    base, fault = Base.from_facts(facts), None
    if lora.r and world.is_main:
        try:
            base = check_base(base, folder, merge=lora.merge)
        except OtherBaseError as error:
            fault = str(error)
    base, fault = world.gather((base, fault))[0]
    if fault:
        raise OtherBaseError(fault)
    return base


def _model_config(settings: RunSettings, tokenizer: PreTrainedTokenizerFast) -> BDHConfig:
    """Returns the model's configuration, with the vocabulary size and special tokens of the tokenizer.

    Raises ``ValueError`` if ``model.vocab_size`` is given and differs.
    """
    fields, V = asdict(settings.model), vocabulary_size(tokenizer)
    if fields.pop("vocab_size") not in (None, V):
        raise ValueError(
            f"model.vocab_size is {settings.model.vocab_size}: must be {V}, the number of entries of the tokenizer "
            f"{settings.tokenizer.path!r}, or left out"
        )
    return BDHConfig(
        vocab_size=V,
        train_block_size=settings.train.block_size,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=stop_token_ids(tokenizer),
        **fields,
    )


def _make_model(
    settings: RunSettings, config: BDHConfig, runtime: Runtime, initial: InitialModel | None, base: Base | None
) -> BDHForCausalLM:
    """Returns a model with random weights or those of ``initial``, with adapters if the settings require them."""
    train = settings.train
    torch.manual_seed(train.seed)
    model = BDHForCausalLM(config).to(runtime.device)  # type: ignore[arg-type]
    if runtime.dtype == torch.float64:
        model = model.double()
    if initial is not None:
        initial.copy_into(model, train.lora)
    if train.lora.r:
        if base is not None and not train.lora.merge:
            base.check_same_layer(model)
        add_adapters(model, train.lora)
    if train.quantize is not None:
        fake_rounding(model, train.quantize)
    model.layer_options = layer_options(train)
    return model


def _write_folder(run: Run, *, is_new: bool) -> None:
    """Writes the files of a new run. For a resumed run, removes what came after the step from which it continues."""
    folder, progress = run.folder, run.progress
    if run.world.is_main:
        try:
            if is_new:
                with atomic_dir(folder / TOKENIZER_FOLDER) as temporary:
                    run.tokenizer.save_pretrained(temporary)
            write_text(folder / CONFIG_FILE, dump_yaml(settings_to_store(run.settings), sort_keys=False))
        except OSError:
            if is_new:
                shutil.rmtree(folder / TOKENIZER_FOLDER, ignore_errors=True)
            raise
    run.world.wait_for_all()
    if not is_new:
        run.checkpointer.forget_after(progress.step, best_step=progress.best_step)
        if run.world.is_main:
            cut_back(folder / "samples.jsonl", progress.step)
