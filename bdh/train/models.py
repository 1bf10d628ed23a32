"""Finds the model that a name stands for: an exported folder, a run, adapters, or a hub id."""

import copy
import logging as standard_logging
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub import constants
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerFast
from transformers.utils import cached_file, logging

from bdh.model import BDHConfig, BDHForCausalLM
from bdh.model.fingerprint import Identity, identity
from bdh.model.network import one_line_type_faults
from bdh.storage import recover_dir
from bdh.tokenizer import TokenizerConfig, load_tokenizer
from bdh.train.base import Base, read_base
from bdh.train.checkpoint import Checkpoint, Checkpointer
from bdh.train.config import TrainSettings
from bdh.train.lora import load_adapters, load_weights, merge, scale
from bdh.train.places import find_checkpoint, find_model, is_run
from bdh.train.runtime import choose_runtime
from bdh.train.stored import stored_settings

TOKENIZER_FOLDER = "tokenizer"
_logger = standard_logging.getLogger(__name__)
_ADVICE = (
    "Nothing was merged. Bring that model back, or say where it is with --base (of bdh generate, chat, eval and serve, and "
    "of bdh export, which merges the adapters for all other commands)"
)


class OtherBaseError(ValueError):
    """The model that adapters belong to was not found, but others in its place."""


@dataclass
class OpenedModel:
    """A model as it is stored: adapters are in its layers, but not yet in its weights."""

    place: Base
    """Where it is, without its fingerprint."""
    model: BDHForCausalLM
    tokenizer: TokenizerConfig
    tuner: Any = None
    """Of the adapters; None without."""
    checkpoint: Checkpoint | None = None
    """Of a run."""

    def identity(self, dtype: torch.dtype | None = None) -> Identity:
        """What the model is, adapters apart from the weights below them: their sum is rounded on each machine in its way.

        Args:
            dtype: that the weights are brought into before; None for their own.
        """
        model: Any = self.model
        if dtype not in (None, model.dtype):
            model = copy.deepcopy(model).to(dtype)
        found = identity(model)
        if self.tuner is None:
            return found
        return Identity(found.configuration | {"adapters_scale": scale(self.tuner)}, found.weights)

    def pinned(self) -> Base:
        """The record of this model for what is trained beside it. Call it before :meth:`merged`."""
        return self.place.with_identity(self.identity(), self.model.dtype)

    def merged(self) -> BDHForCausalLM:
        """The model in evaluation mode, with the adapters in its weights."""
        return (self.model if self.tuner is None else merge(self.tuner)).eval()


def load_model(
    name: str, *, checkpoint: str | None = None, base: str | None = None, device: str = "auto"
) -> tuple[BDHForCausalLM, PreTrainedTokenizerFast]:
    """The model, in evaluation mode, and its tokenizer.

    Args:
        name: a folder with ``config.json``, or of adapters, which are merged into their base; a run's folder, of which
            the checkpoint is taken; the folder of one of its checkpoints; or a hub id.
        checkpoint: for a run: last (the default), best, or a step.
        base: for adapters: where their base is now, named as ``name`` is.
        device: as ``train.device``.

    Raises:
        FileNotFoundError: a folder that holds neither; or the base of adapters is not found.
        OtherBaseError: where the base of adapters should be, there are models with other weights.
        ValueError: it is no BDH model, its configuration is wrong, or its weights are not those of the configuration,
            not complete or damaged; or the device is not there.
    """
    target = choose_runtime(TrainSettings(device=device)).device
    opened = open_model(name, checkpoint=checkpoint, base=base)
    return opened.merged().to(target), load_tokenizer(opened.tokenizer)  # type: ignore[arg-type]


def open_model(
    name: str, *, checkpoint: str | None = None, base: str | None = None, commit: str | None = None
) -> OpenedModel:
    """The model on the CPU; see :func:`load_model`.

    Args:
        commit: for a hub id, the hash of the commit; None for the newest.
    """
    place_of_model = find_model(name, checkpoint=checkpoint, base=base)
    path, kind = place_of_model.path, place_of_model.kind
    folder = str(path.resolve())
    if kind == "run":
        found = _load_checkpoint(path, place_of_model.checkpoint or "last")
        model, tuner = _open_checkpoint(found, ema=False)
        place = Base(str(path), folder, step=found.step)
        return OpenedModel(place, model, TokenizerConfig(path=str(path / TOKENIZER_FOLDER)), tuner, found)
    if kind == "adapters" and (adapters_of := read_base(path)) is not None:
        model = open_base(adapters_of, path, given=base).merged()
        model.config.__dict__.pop("train_data", None)  # of the base
        return OpenedModel(Base(name, folder), model, TokenizerConfig(path=name), load_adapters(model, path))
    is_local = kind != "hub"
    if not is_local and not constants.HF_HUB_OFFLINE:
        _logger.warning("there is no folder %s: looking for it on the Hugging Face hub", name)
    model, commit = _pretrained(name, is_local=is_local, commit=None if is_local else commit)
    step = (getattr(model.config, "train_data", None) or {}).get("step")
    place = Base(name, folder, export_step=step) if is_local else Base(name, commit=commit)
    return OpenedModel(place, model, TokenizerConfig(path=name))


def open_base(base: Base, stored_in: Path, *, given: str | None = None, advice: str = _ADVICE) -> OpenedModel:
    """Finds the model of a record again: where the record says, seen from its folder or by its absolute path.

    Args:
        stored_in: the folder that holds the record.
        given: where to look instead, as the name of :func:`load_model`.
        advice: the end of the error, which says what can be done.

    Returns:
        The model; its ``place`` is where it was found.

    Raises:
        FileNotFoundError: there is no such model.
        OtherBaseError: there is one, but with other weights.
    """
    if base.identity is None:
        _logger.warning(
            "whether %s has the weights that the adapters of %s were trained beside cannot be verified: the version that "
            "wrote them did not record their fingerprint",
            given or base.name,
            stored_in,
        )
    others: list[str] = []
    if given is not None:
        places = [given]
    elif base.folder is not None:
        folders = base.folders(stored_in)
        others = [str(other) for folder in folders for other in base.others(folder)]
        places = [*map(str, folders), *others]
    else:
        places = [base.name]
    faults: list[str] = []
    is_other = False
    for place in places:
        try:
            opened = _open_place(base, place, is_hub_id=base.folder is None or given is not None)
        except (FileNotFoundError, ValueError) as error:
            faults.append(str(error))
            if isinstance(error, OtherBaseError):  # of a base that is adapters itself
                is_other = is_other or place not in others
            continue
        if base.identity is None:
            return opened
        here = opened.identity(getattr(torch, base.dtype))
        if not (difference := here.difference(base.identity)):
            if place in others:
                _logger.warning("%s is not there: %s has the same weights, and is taken", base.describe(), place)
            return opened
        is_other = is_other or place not in others
        faults.append(f"{opened.place.describe()}: {difference} (fingerprint {here.fingerprint[:12]})")
    error_type = OtherBaseError if is_other else FileNotFoundError
    raise error_type(
        f"{stored_in} needs the model that its adapters were trained beside, {base.describe()}, which is not found: "
        f"{'; '.join(dict.fromkeys(faults))}. {advice}"
    )


def check_base(base: Base, stored_in: Path, *, merge: bool) -> Base:
    """Compares the base of a run with adapters, whose checkpoints hold its weights, with what is there now.

    Args:
        merge: whether the run exports whole weights; then another base is only warned of.

    Returns:
        The record, with the place where the base was found; as it was, where it was not.

    Raises:
        OtherBaseError: there is another model in its place.
    """
    if base.commit is not None or base.identity is None:  # what a commit holds does not change
        return base
    try:
        opened = open_base(base, stored_in, advice="The run's checkpoints hold its weights too")
    except FileNotFoundError as error:
        _logger.warning("%s", error)
    except OtherBaseError as error:
        if not merge:
            raise OtherBaseError(
                f"{error}. Adapters alone would name another model as their base: write whole weights, with "
                "--train.lora.merge true to continue the run or --merge true of bdh export, or bring that model back"
            ) from error
        _logger.warning("%s", error)
    else:
        return base.found_at(opened.place).seen_from(stored_in)
    return base


def warn_of_removal(base: Base) -> None:
    """Says where the run that a checkpoint belongs to will remove it when it trains on."""
    if base.step is None or base.folder is None:
        return
    try:
        settings = stored_settings(Path(base.folder))["checkpoint"]
        keep_last, keep_every_steps = settings["keep_last"], settings["keep_every_steps"]
    except (FileNotFoundError, ValueError, KeyError) as error:
        _logger.warning("whether %s keeps its checkpoint of step %s is not known: %s", base.name, base.step, error)
        return
    if keep_every_steps is None or base.step % keep_every_steps:
        _logger.warning(
            "%s keeps the last %s of its checkpoints: if it trains on, that of step %s is removed, which the adapters need. "
            "Start from an export of it that stays (bdh export), or set its checkpoint.keep_every_steps",
            base.name,
            keep_last,
            base.step,
        )


def _open_place(base: Base, place: str, *, is_hub_id: bool) -> OpenedModel:
    path = Path(place)
    recover_dir(path)
    if not is_hub_id and not path.is_dir():
        raise FileNotFoundError(f"there is no folder {place}")
    step = base.export_step if base.step is None else base.step
    checkpoint = str(step) if step is not None and is_run(path) else None
    return open_model(place, checkpoint=checkpoint, commit=base.commit if place == base.name else None)


def load_run(
    run_dir: Path, which: str = "last", *, ema: bool = False
) -> tuple[BDHForCausalLM, PreTrainedTokenizerFast, Checkpoint]:
    """The model and tokenizer of a run, straight from one of its checkpoints.

    Args:
        which: "last", "best" (of the validation loss), or a step.
        ema: the moving average of the weights instead of the weights.

    Raises:
        FileNotFoundError: ``run_dir`` holds no run, or the run has no such checkpoint.
        ValueError: the checkpoint is damaged or has no moving average, or ``which`` is neither of the above.
    """
    checkpoint = _load_checkpoint(run_dir, which)
    model, tuner = _open_checkpoint(checkpoint, ema=ema)
    model = model if tuner is None else merge(tuner)
    return model.eval(), load_tokenizer(run_dir / TOKENIZER_FOLDER), checkpoint


def _load_checkpoint(run_dir: Path, which: str) -> Checkpoint:
    return Checkpointer(run_dir).load(find_checkpoint(run_dir, which))


def _open_checkpoint(checkpoint: Checkpoint, *, ema: bool) -> tuple[BDHForCausalLM, Any]:
    """The model, and, if it has adapters, what merges them."""
    training = checkpoint.training
    model = BDHForCausalLM(BDHConfig(**training["model_config"]))
    tuner = load_weights(model, run_weights(checkpoint, ema=ema), training["settings"]["train"].get("lora"))
    return model, tuner


def run_weights(checkpoint: Checkpoint, *, ema: bool) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint, or their moving average.

    Raises:
        ValueError: there is no average in it.
    """
    if not ema:
        return checkpoint.tensors("weights")
    average = checkpoint.tensors("ema")
    if not average:
        raise ValueError(f"{checkpoint.path} has no moving average of the weights: its run had no train.ema_decay")
    return checkpoint.tensors("weights") | average  # frozen weights have none


def _pretrained(name: str, *, is_local: bool, commit: str | None) -> tuple[BDHForCausalLM, str | None]:
    """The model, and from the hub the hash of its commit."""
    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what its tables of warnings say is an error here
    try:
        if not is_local:  # the cache of the hub has a folder for each commit
            file = cached_file(name, "config.json", revision=commit)
            assert file is not None  # what is missing raises
            commit = Path(file).parent.name
        config = _pretrained_config(name, commit)
        loaded: Any = BDHForCausalLM.from_pretrained(
            name, config=config, revision=commit or "main", output_loading_info=True, ignore_mismatched_sizes=True
        )
        model, report = loaded
        if lacking := sorted(report["missing_keys"]):
            raise ValueError(f"the weights of {name} are not complete: it lacks {', '.join(lacking)}")
        if wrong := sorted(
            f"{key} is {tuple(has)}, not {tuple(needs)}" for key, has, needs in report["mismatched_keys"]
        ):
            raise ValueError(f"the weights of {name} do not have the shapes of its config.json: {'; '.join(wrong)}")
        return model, commit
    except SafetensorError as error:
        raise ValueError(f"the weights of {name} are cut off or damaged: {error}") from error
    except UnpicklingError as error:  # whose text is a page of advice
        raise ValueError(
            f"the weights of {name} are damaged, or hold more than tensors: PyTorch refuses them"
        ) from error
    except RuntimeError as error:  # sizes that no machine has room for
        raise ValueError(f"{name} cannot be loaded: {error}") from error
    except OSError as error:
        if is_local:
            raise
        reason = str(error).splitlines()[0].rstrip(".")
        raise FileNotFoundError(
            f"{name!r} is neither a folder here nor a model that the hub gives: {reason}. Without a network, give the "
            "folder of an export or of a run"
        ) from error
    finally:
        logging.set_verbosity(verbosity)


def _pretrained_config(name: str, commit: str | None) -> BDHConfig:
    try:
        with one_line_type_faults(f"the config.json of {name} is wrong"):
            config = BDHConfig.from_pretrained(name, revision=commit or "main")
    except (TypeError, AttributeError) as error:  # no object of JSON, or a dtype that PyTorch does not have
        raise ValueError(f"the config.json of {name} is wrong: {error}") from error
    if config.model_type != "bdh" or "n_embd" not in config.to_dict():
        raise ValueError(f"{name} is no BDH model: its model_type is {config.model_type!r}")
    return config
