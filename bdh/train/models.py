"""Finds the model that a name stands for: an exported folder, a run, adapters, or a hub id; and starts a run from one."""

import copy
import logging as standard_logging
from dataclasses import dataclass, fields, replace
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
from bdh.model.quantization import check_not_quantized, check_quantization
from bdh.quantize.rounding import quantize
from bdh.storage import recover_dir
from bdh.tokenizer import TextEncoder, TokenizerConfig, is_byte_tokenizer, load_tokenizer
from bdh.tokenizer.chat import CHAT_TOKENS, add_special_tokens
from bdh.tokenizer.plain import NUM_BYTES, vocabulary_size
from bdh.train.adapters import Base, add_adapters, load_adapters, merge, read_base, scale
from bdh.train.checkpoint import Checkpoint, Checkpointer
from bdh.train.config import LoraSettings, ModelSettings, RunSettings, TrainSettings, stored_settings
from bdh.train.places import find_checkpoint, find_model, is_run, not_found
from bdh.train.runtime import choose_runtime
from bdh.words import counted

TOKENIZER_FOLDER = "tokenizer"
_logger = standard_logging.getLogger(__name__)
_ADVICE = (
    "Nothing was merged. Bring that model back, or say where it is with --base (of bdh generate, chat, eval and serve, and "
    "of bdh export, which merges the adapters for all other commands)"
)
# What the weights fix. The rest, such as dropout, is the new run's to choose.
_TAKEN_OVER = ("n_layer", "n_embd", "n_head", "mlp_internal_dim_multiplier", "rope_theta")


class OtherBaseError(ValueError):
    """The model that adapters belong to was not found, but others in its place."""


@dataclass
class OpenedModel:
    """A model as it is stored: adapters are in its layers, but not yet in its weights."""

    place: Base
    """Where it is, without its fingerprint."""
    model: BDHForCausalLM
    tokenizer_path: str
    tuner: Any = None
    """Of the adapters; None without."""
    checkpoint: Checkpoint | None = None
    """Of a run."""

    def identity(self, dtype: torch.dtype | None = None) -> Identity:
        """What the model is, its weights in ``dtype``, or None for their own.

        Adapters count apart from the weights below them: their sum is rounded on each machine in its way.
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
        return replace(self.place, identity=self.identity(), dtype=str(self.model.dtype).removeprefix("torch."))

    def finished(self) -> BDHForCausalLM:
        """What an export of it is: :meth:`merged`, and quantized where a run has trained for that."""
        model = self.merged()
        settings = {} if self.checkpoint is None else self.checkpoint.training["settings"]["train"]
        return quantize(model, settings["quantize"]) if settings.get("quantize") else model

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
    return opened.finished().to(target), load_tokenizer(opened.tokenizer_path)  # type: ignore[arg-type]


def open_model(
    name: str, *, checkpoint: str | None = None, ema: bool = False, base: str | None = None, commit: str | None = None
) -> OpenedModel:
    """The model on the CPU; see :func:`load_model`.

    Args:
        ema: of a run, the moving average of the weights instead of the weights.
        commit: for a hub id, the hash of the commit; None for the newest.
    """
    there = find_model(name, checkpoint=checkpoint, base=base)
    path, folder = there.path, str(there.path.resolve())
    if there.kind == "run":
        found = Checkpointer(path).load(find_checkpoint(path, there.checkpoint or "last"))
        model = BDHForCausalLM(BDHConfig(**found.training["model_config"]))
        lora = found.training["settings"]["train"].get("lora")
        tuner = add_adapters(model, LoraSettings(**lora)) if lora and lora["r"] else None
        model.load_state_dict(run_weights(found, ema=ema))
        return OpenedModel(Base(str(path), folder, step=found.step), model, str(path / TOKENIZER_FOLDER), tuner, found)
    if there.kind == "adapters" and (adapters_of := read_base(path)) is not None:
        model = open_base(adapters_of, path, given=base).merged()
        model.config.__dict__.pop("train_data", None)  # of the base
        return OpenedModel(Base(name, folder), model, name, load_adapters(model, path))
    if there.kind == "hub":
        if not constants.HF_HUB_OFFLINE:
            _logger.warning("there is no folder %s: looking for it on the Hugging Face hub", name)
        model, commit = _pretrained(name, is_local=False, commit=commit)
        return OpenedModel(Base(name, commit=commit), model, name)
    model, _ = _pretrained(name, is_local=True)
    step = (getattr(model.config, "train_data", None) or {}).get("step")
    return OpenedModel(Base(name, folder, export_step=step), model, name)


def run_weights(checkpoint: Checkpoint, *, ema: bool) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint, or their moving average. Raises ``ValueError`` where it has none."""
    average = checkpoint.tensors("ema") if ema else {}
    if ema and not average:
        raise ValueError(f"{checkpoint.path} has no moving average of the weights: its run had no train.ema_decay")
    return checkpoint.tensors("weights") | average  # frozen weights have none


def open_base(base: Base, stored_in: Path, *, given: str | None = None, advice: str = _ADVICE) -> OpenedModel:
    """Finds the model of a record again: where the record says, seen from its folder or by its absolute path.

    Args:
        stored_in: the folder that holds the record.
        given: where to look instead, as the name of :func:`load_model`.
        advice: the end of the error.

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
    places = [given or base.name]
    others: list[str] = []
    if given is None and base.folder is not None:
        folders = base.folders(stored_in)
        others = [str(other) for folder in folders for other in _twins(base, folder)]
        places = [*map(str, folders), *others]
    faults: list[str] = []
    is_other = False
    for place in places:
        try:
            opened = _open_place(base, place, is_hub_id=base.folder is None or given is not None)
        except (FileNotFoundError, ValueError) as error:
            faults.append(str(error))
            is_other |= isinstance(error, OtherBaseError) and place not in others  # of a base that is adapters itself
            continue
        if base.identity is None:
            return opened
        here = opened.identity(getattr(torch, base.dtype))
        if not (difference := here.difference(base.identity)):
            if place in others:
                _logger.warning("%s is not there: %s has the same weights, and is taken", base.describe(), place)
            return opened
        is_other |= place not in others
        faults.append(f"{opened.place.describe()}: {difference} (fingerprint {here.fingerprint[:12]})")
    raise (OtherBaseError if is_other else FileNotFoundError)(
        f"{stored_in} needs the model that its adapters were trained beside, {base.describe()}, which is not found: "
        f"{'; '.join(dict.fromkeys(faults))}. {advice}"
    )


def _twins(base: Base, folder: Path) -> list[Path]:
    """Where the weights may be if ``folder`` has others by now: a run has them twice, in a checkpoint and its export."""
    export, run = folder / "model", folder.parent
    recover_dir(folder)
    if not folder.is_dir():
        return []
    recover_dir(export)
    found = [export] if base.step is not None and (export / "config.json").is_file() else []
    return found + ([run] if base.export_step is not None and is_run(run) else [])


def _open_place(base: Base, place: str, *, is_hub_id: bool) -> OpenedModel:
    path = Path(place)
    recover_dir(path)
    if not is_hub_id and not path.is_dir():
        raise FileNotFoundError(f"there is no folder {place}")
    step = base.export_step if base.step is None else base.step
    checkpoint = str(step) if step is not None and is_run(path) else None
    return open_model(place, checkpoint=checkpoint, commit=base.commit if place == base.name else None)


def check_base(base: Base, stored_in: Path, *, merge: bool) -> Base:
    """Compares the base of a run with adapters, whose checkpoints hold its weights, with what is there now.

    Returns the record with the place where the base was found, or as it was. Where there is another model in its place, it
    warns with ``merge``, when the run exports whole weights, and else raises ``OtherBaseError``.
    """
    if base.commit is not None or base.identity is None:  # what a commit holds does not change
        return base
    try:
        there = open_base(base, stored_in, advice="The run's checkpoints hold its weights too").place
    except (FileNotFoundError, OtherBaseError) as error:
        if isinstance(error, OtherBaseError) and not merge:
            raise OtherBaseError(
                f"{error}. Adapters alone would name another model as their base: write whole weights, with "
                "--train.lora.merge true to continue the run or --merge true of bdh export, or bring that model back"
            ) from error
        _logger.warning("%s", error)
        return base
    return replace(base, folder=there.folder, step=there.step, export_step=there.export_step).seen_from(stored_in)


def warn_of_removal(base: Base) -> None:
    """Warns where the run that a checkpoint belongs to will remove it when it trains on."""
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


def _pretrained(name: str, *, is_local: bool, commit: str | None = None) -> tuple[BDHForCausalLM, str | None]:
    """The model, and from the hub the hash of its commit."""
    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what its tables of warnings say is an error here
    try:
        if not is_local:  # the cache of the hub has a folder for each commit
            file = cached_file(name, "config.json", revision=commit)
            assert file is not None  # what is missing raises
            commit = Path(file).parent.name
        loaded: Any = BDHForCausalLM.from_pretrained(
            name,
            config=_pretrained_config(name, commit),
            revision=commit or "main",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
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
    except RuntimeError as error:  # sizes that no machine has memory for
        raise ValueError(f"{name} cannot be loaded: {error}") from error
    except OSError as error:
        if is_local:
            raise
        raise not_found(name, str(error)) from error
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
    check_quantization(getattr(config, "quantization_config", None), f"the config.json of {name} is wrong")
    return config


class InitialModel:
    """The model that ``train.init_from`` names: a run starts with its sizes, its tokenizer and its weights.

    Attributes:
        base: which model exactly it is.
    """

    def __init__(self, name: str):
        """Raises as :func:`load_model`."""
        self._name = name
        opened = open_model(name)
        reason = "train.init_from must be the model that it was made of, or a run"
        check_not_quantized(opened.model, name, reason)
        self.base = opened.pinned()
        self._model = opened.merged()
        self._tokenizer_path = opened.tokenizer_path
        self._tokenizer = load_tokenizer(opened.tokenizer_path)
        self._data: dict[str, Any] = getattr(self._model.config, "train_data", None) or {}  # where it says so
        if opened.checkpoint is not None:
            training = opened.checkpoint.training
            self._data = {"source": training["data_facts"]["source"], "fingerprint": training["data_fingerprint"]}

    def completed(self, settings: RunSettings) -> RunSettings:
        """The settings with the sizes, and unless another was chosen the tokenizer, of this model.

        Raises ``ValueError`` if a size was chosen that is not this model's.
        """
        defaults = {field.name: field.default for field in fields(ModelSettings)}
        sizes = {name: getattr(self._model.config, name) for name in _TAKEN_OVER}
        if wrong := [
            f"model.{name} is {value!r}, but {self._name} has {size!r}"
            for name, size in sizes.items()
            if (value := getattr(settings.model, name)) not in (defaults[name], size)
        ]:
            raise ValueError(
                f"train.init_from fixes the sizes of the model: {'; '.join(wrong)}. Leave them out, and they follow"
            )
        # A decay may be added, but one that the weights were trained with is not lost by leaving it out.
        decay = self._model.config.decay if settings.model.decay is None else settings.model.decay
        tokenizer = settings.tokenizer
        if tokenizer == TokenizerConfig(chat_template=tokenizer.chat_template):
            if is_byte_tokenizer(self._tokenizer) and self._tokenizer.chat_template is None:
                tokenizer = replace(tokenizer, special_tokens=len(self._tokenizer) > NUM_BYTES)
            else:
                tokenizer = replace(tokenizer, path=self._tokenizer_path)
        return replace(settings, model=replace(settings.model, **sizes, decay=decay), tokenizer=tokenizer)

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """Warns where the run's tokenizer gives other tokens than the model was trained on.

        Raises ``ValueError`` if it has another number of entries.
        """
        known = copy.deepcopy(self._tokenizer)
        if len(tokenizer) > len(known) and tokenizer.chat_template:
            new = [token for token in CHAT_TOKENS if token in set(tokenizer.get_vocab()) - set(known.get_vocab())]
            add_special_tokens(known, new)
            _logger.warning("%s does not know %s: they start from random weights", self._name, ", ".join(new))
        if vocabulary_size(tokenizer) != vocabulary_size(known):
            raise ValueError(
                f"the run's tokenizer has {counted(vocabulary_size(tokenizer), 'entry', 'entries')}, but {self._name} was trained with one of "
                f"{vocabulary_size(self._tokenizer)}: leave tokenizer.path out, and it takes that one"
            )
        if TextEncoder(tokenizer).hash != TextEncoder(known).hash:
            _logger.warning(
                "the tokenizer is not the one that %s was trained with: its tokens mean other text", self._name
            )

    def check_data(self, fingerprint: str) -> None:
        """Warns where the run's data are others than those the model was trained on, if that is known."""
        if self._data.get("fingerprint", fingerprint) != fingerprint:
            _logger.warning("%s was trained on other data, %s", self._name, self._data["source"])

    def copy_into(self, model: BDHForCausalLM, lora: LoraSettings) -> None:
        """Gives a model of the same sizes the weights, in the model's own dtype.

        Of a larger vocabulary, the entries at its end keep the weights that they have; raises ``ValueError`` if nothing would
        train those.
        """
        model.config.layer_norm_eps = self._model.config.layer_norm_eps
        weights, V = self._model.state_dict(), self._model.config.vocab_size
        if (num_new := model.config.vocab_size - V) > 0:
            if lora.r and not lora.embeddings:
                raise ValueError(
                    f"{self._name} does not know the last {counted(num_new, 'token')} of the vocabulary, and train.lora would leave "
                    "their weights random: set train.lora.embeddings=true, or start from a model that knows them"
                )
            for name in ("embed.weight", "lm_head.weight"):  # a token a row
                weights[name] = torch.cat([weights[name], model.state_dict()[name][V:].cpu()])
        model.load_state_dict(weights)
