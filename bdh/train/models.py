"""Loads a model by name, from an export, a run, adapters or the hub, and initializes runs from it."""

import copy
import logging as standard_logging
from dataclasses import dataclass, fields, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from bdh.hub import model_folder
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
from bdh.train.places import find_checkpoint, find_model, is_run
from bdh.train.runtime import choose_runtime
from bdh.validation import of_setting
from bdh.words import counted

TOKENIZER_FOLDER = "tokenizer"
_logger = standard_logging.getLogger(__name__)
_ADVICE = (
    "Nothing was merged. Restore that model, or say where it is with --base (of bdh generate, chat, eval and serve, "
    "and of bdh export, which merges the adapters for all other commands)"
)
# The fields that the weights determine. The new run chooses the others, such as dropout.
_TAKEN_OVER = ("n_layer", "n_embd", "n_head", "mlp_internal_dim_multiplier", "rope_theta")


class OtherBaseError(ValueError):
    """The base model of adapters was not found, but a model with other weights is in its place."""


@dataclass
class OpenedModel:
    """A loaded model as it is stored: adapters are attached to its layers, but not merged into its weights."""

    place: Base
    """Where the model is stored, without its fingerprint."""
    model: BDHForCausalLM
    tokenizer_path: str
    tuner: Any = None
    """The tuner of the adapters; None without adapters."""
    checkpoint: Checkpoint | None = None
    """The checkpoint, if the model is that of a run."""

    def identity(self, dtype: torch.dtype | None = None) -> Identity:
        """Returns the identity of the model with its weights in ``dtype``, or in their own dtype.

        Adapters and base weights are hashed separately, since the rounding of their sum depends on the machine.
        """
        model: Any = self.model
        if dtype not in (None, model.dtype):
            model = copy.deepcopy(model).to(dtype)
        found = identity(model)
        if self.tuner is None:
            return found
        return Identity(found.configuration | {"adapters_scale": scale(self.tuner)}, found.weights)

    def pinned(self) -> Base:
        """Returns the record of this model for adapters that are trained on it. Call it before :meth:`merged`."""
        return replace(self.place, identity=self.identity(), dtype=str(self.model.dtype).removeprefix("torch."))

    def finished(self) -> BDHForCausalLM:
        """Returns the model as an export contains it: :meth:`merged`, and quantized if the run was trained for that."""
        model = self.merged()
        settings = {} if self.checkpoint is None else self.checkpoint.training["settings"]["train"]
        return quantize(model, settings["quantize"]) if settings.get("quantize") else model

    def merged(self) -> BDHForCausalLM:
        """Returns the model in evaluation mode, with the adapters merged into its weights."""
        return (self.model if self.tuner is None else merge(self.tuner)).eval()


def load_model(
    name: str, *, checkpoint: str | None = None, base: str | None = None, device: str = "auto"
) -> tuple[BDHForCausalLM, PreTrainedTokenizerFast]:
    """Loads a model, in evaluation mode, and its tokenizer.

    Args:
        name: one of:

            - a folder with ``config.json``, such as an export
            - a folder of adapters, which are merged into their base model
            - the folder of a run, or of one of its checkpoints
            - a hub id
        checkpoint: for a run, "last" (the default), "best", or a step.
        base: for adapters, the current location of their base model, in the form of ``name``.
        device: as ``train.device``.

    Raises:
        FileNotFoundError: the folder contains no model, or the base model of adapters is not found.
        OtherBaseError: the model at the place of the base model has other weights.
        ValueError: it is not a BDH model; its configuration is invalid; its weights are damaged, incomplete, or do not
            match the configuration; or the device is not available.
    """
    target = choose_runtime(TrainSettings(device=device)).device
    opened = open_model(name, checkpoint=checkpoint, base=base)
    return opened.finished().to(target), load_tokenizer(opened.tokenizer_path)  # type: ignore[arg-type]


def open_model(
    name: str, *, checkpoint: str | None = None, ema: bool = False, base: str | None = None, commit: str | None = None
) -> OpenedModel:
    """Loads a model on the CPU, without merging adapters.

    The other arguments, and the exceptions, are those of :func:`load_model`.

    Args:
        ema: for a run, whether to load the moving average of the weights.
        commit: for a hub id, the hash of the commit; None for the latest.
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
        model.config.__dict__.pop("train_data", None)  # describes the data of the base model
        return OpenedModel(Base(name, folder), model, name, load_adapters(model, path))
    if there.kind == "hub":
        cached = model_folder(name, commit)
        model = _pretrained(str(cached), name)
        model.name_or_path = model.config.name_or_path = name
        return OpenedModel(Base(name, commit=cached.name), model, name)
    model = _pretrained(name, name)
    step = (getattr(model.config, "train_data", None) or {}).get("step")
    return OpenedModel(Base(name, folder, export_step=step), model, name)


def run_weights(checkpoint: Checkpoint, *, ema: bool) -> dict[str, torch.Tensor]:
    """Returns the weights of a checkpoint, or their moving average. Raises ``ValueError`` if there is no average."""
    average = checkpoint.tensors("ema") if ema else {}
    if ema and not average:
        raise ValueError(f"{checkpoint.path} has no moving average of the weights: its run had no train.ema_decay")
    return checkpoint.tensors("weights") | average  # frozen weights have no average


def open_base(base: Base, stored_in: Path, *, given: str | None = None, advice: str = _ADVICE) -> OpenedModel:
    """Loads the base model of a record, from its path relative to the record or its absolute path.

    Args:
        base: the record.
        stored_in: the folder that contains the record.
        given: a name to use instead, as for :func:`load_model`.
        advice: the end of the error message.

    Raises:
        FileNotFoundError: there is no such model.
        OtherBaseError: the model that was found has other weights.
    """
    if base.identity is None:
        _logger.warning(
            "cannot verify that %s has the weights that the adapters of %s were trained on: the version of bdh that "
            "wrote them did not record a fingerprint",
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
            is_other |= isinstance(error, OtherBaseError) and place not in others  # if the base consists of adapters
            continue
        if base.identity is None:
            return opened
        here = opened.identity(getattr(torch, base.dtype))
        if not (difference := here.difference(base.identity)):
            if place in others:
                _logger.warning(
                    "%s was not found: %s has the same weights, and is used instead", base.describe(), place
                )
            return opened
        is_other |= place not in others
        faults.append(f"{opened.place.describe()}: {difference} (fingerprint {here.fingerprint[:12]})")
    raise (OtherBaseError if is_other else FileNotFoundError)(
        f"{stored_in} needs the base model of its adapters, {base.describe()}, which was not found: "
        f"{'; '.join(dict.fromkeys(faults))}. {advice}"
    )


def _twins(base: Base, folder: Path) -> list[Path]:
    """Returns other places of the weights, if ``folder`` has changed: a run has a checkpoint and an export of them."""
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
    """Checks that the base model of a run with adapters is unchanged. The run's checkpoints contain its weights.

    Args:
        base: the record of the base model.
        stored_in: the folder that contains the record.
        merge: whether the run exports merged weights, so that another model in place of the base only causes a warning.

    Returns:
        The record with the place where the base was found, or unchanged.

    Raises:
        OtherBaseError: another model is in place of the base, and ``merge`` is False.
    """
    if base.commit is not None or base.identity is None:  # a commit never changes
        return base
    try:
        there = open_base(base, stored_in, advice="The run's checkpoints hold its weights too").place
    except (FileNotFoundError, OtherBaseError) as error:
        if isinstance(error, OtherBaseError) and not merge:
            raise OtherBaseError(
                f"{error}. Adapters alone would refer to a different base model: write whole weights, with "
                "--train.lora.merge true to continue the run or --merge true of bdh export, or restore that model"
            ) from error
        _logger.warning("%s", error)
        return base
    return replace(base, folder=there.folder, step=there.step, export_step=there.export_step).seen_from(stored_in)


def warn_of_removal(base: Base) -> None:
    """Warns if the run of a checkpoint will remove it when training continues."""
    if base.step is None or base.folder is None:
        return
    try:
        settings = stored_settings(Path(base.folder))["checkpoint"]
        keep_last, keep_every_steps = settings["keep_last"], settings["keep_every_steps"]
    except (FileNotFoundError, ValueError, KeyError) as error:
        _logger.warning("cannot tell whether %s keeps its checkpoint of step %s: %s", base.name, base.step, error)
        return
    if keep_every_steps is None or base.step % keep_every_steps:
        _logger.warning(
            "%s keeps only the last %s of its checkpoints: if its training continues, it removes that of step %s, "
            "which the adapters need. Start from an export of it (bdh export), or set its checkpoint.keep_every_steps",
            base.name,
            keep_last,
            base.step,
        )


def _pretrained(folder: str, name: str) -> BDHForCausalLM:
    """Returns the model in a folder. Messages call it ``name``."""
    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # the code below raises errors for what transformers only warns about
    try:
        loaded: Any = BDHForCausalLM.from_pretrained(
            folder,
            config=_pretrained_config(folder, name),
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
        return model
    except SafetensorError as error:
        raise ValueError(f"the weights of {name} are cut off or damaged: {error}") from error
    except UnpicklingError as error:  # its message is a page of advice
        raise ValueError(
            f"the weights of {name} are damaged, or hold more than tensors: PyTorch refuses them"
        ) from error
    except RuntimeError as error:  # such as sizes that no machine has memory for
        raise ValueError(f"{name} cannot be loaded: {error}") from error
    finally:
        logging.set_verbosity(verbosity)


def _pretrained_config(folder: str, name: str) -> BDHConfig:
    try:
        with one_line_type_faults(f"the config.json of {name} is wrong"):
            config = BDHConfig.from_pretrained(folder)
    except (TypeError, AttributeError) as error:  # not a JSON object, or an unknown dtype
        raise ValueError(f"the config.json of {name} is wrong: {error}") from error
    if config.model_type != "bdh" or "n_embd" not in config.to_dict():
        raise ValueError(f"{name} is not a BDH model: its model_type is {config.model_type!r}")
    check_quantization(getattr(config, "quantization_config", None), f"the config.json of {name} is wrong")
    return config


class InitialModel:
    """The model of ``train.init_from``, from which a run takes its sizes, tokenizer and weights.

    Attributes:
        base: the record of the model, with its fingerprint.
    """

    def __init__(self, name: str):
        """Loads the model. Raises as :func:`load_model`."""
        self._name = name
        with of_setting("train.init_from", name):
            opened = open_model(name)
        reason = "train.init_from must be the unquantized model, or a run"
        check_not_quantized(opened.model, name, reason)
        self.base = opened.pinned()
        self._model = opened.merged()
        self._tokenizer_path = opened.tokenizer_path
        self._tokenizer = load_tokenizer(opened.tokenizer_path)
        self._data: dict[str, Any] = getattr(self._model.config, "train_data", None) or {}  # empty if not recorded
        if opened.checkpoint is not None:
            training = opened.checkpoint.training
            self._data = {"source": training["data_facts"]["source"], "fingerprint": training["data_fingerprint"]}

    @property
    def nbytes(self) -> int:
        """The bytes of its weights."""
        return sum(weight.nbytes for weight in self._model.parameters())

    def completed(self, settings: RunSettings) -> RunSettings:
        """Returns the settings with the sizes of this model, and with its tokenizer unless another one was chosen.

        Raises:
            ValueError: a size in the settings differs from that of this model.
        """
        defaults = {field.name: field.default for field in fields(ModelSettings)}
        sizes = {name: getattr(self._model.config, name) for name in _TAKEN_OVER}
        if wrong := [
            f"model.{name} is {value!r}, but {self._name} has {size!r}"
            for name, size in sizes.items()
            if (value := getattr(settings.model, name)) not in (defaults[name], size)
        ]:
            raise ValueError(
                f"train.init_from fixes the sizes of the model: {'; '.join(wrong)}. Leave them out: they are "
                "taken from that model"
            )
        # A decay can be added. Without one in the settings, the model keeps its own.
        decay = self._model.config.decay if settings.model.decay is None else settings.model.decay
        tokenizer = settings.tokenizer
        if tokenizer == TokenizerConfig(chat_template=tokenizer.chat_template):
            if is_byte_tokenizer(self._tokenizer) and self._tokenizer.chat_template is None:
                tokenizer = replace(tokenizer, special_tokens=len(self._tokenizer) > NUM_BYTES)
            else:
                tokenizer = replace(tokenizer, path=self._tokenizer_path)
        return replace(settings, model=replace(settings.model, **sizes, decay=decay), tokenizer=tokenizer)

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """Warns if the run's tokenizer differs from the one that the model was trained with.

        Raises:
            ValueError: the vocabularies have different sizes.
        """
        known = copy.deepcopy(self._tokenizer)
        if len(tokenizer) > len(known) and tokenizer.chat_template:
            new = [token for token in CHAT_TOKENS if token in set(tokenizer.get_vocab()) - set(known.get_vocab())]
            add_special_tokens(known, new)
            _logger.warning(
                "%s was trained without the tokens %s: they start from random weights", self._name, ", ".join(new)
            )
        if vocabulary_size(tokenizer) != vocabulary_size(known):
            raise ValueError(
                f"the run's tokenizer has {counted(vocabulary_size(tokenizer), 'entry', 'entries')}, but {self._name} was trained with one of "
                f"{vocabulary_size(self._tokenizer)}: leave tokenizer.path out to use that one"
            )
        if TextEncoder(tokenizer).hash != TextEncoder(known).hash:
            _logger.warning(
                "the tokenizer is not the one that %s was trained with: its token ids stand for other text", self._name
            )

    def check_data(self, fingerprint: str) -> None:
        """Warns if the run's data differ from the model's training data, if these are known."""
        if self._data.get("fingerprint", fingerprint) != fingerprint:
            _logger.warning("%s was trained on other data, %s", self._name, self._data["source"])

    def copy_into(self, model: BDHForCausalLM, lora: LoraSettings) -> None:
        """Copies the weights into a model of the same sizes, in the dtype of that model.

        If its vocabulary is larger, the additional entries keep their weights.

        Raises:
            ValueError: there are additional entries, but they would not be trained.
        """
        model.config.layer_norm_eps = self._model.config.layer_norm_eps
        weights, V = self._model.state_dict(), self._model.config.vocab_size
        if (num_new := model.config.vocab_size - V) > 0:
            if lora.r and not lora.embeddings:
                raise ValueError(
                    f"{self._name} was trained without the last {counted(num_new, 'token')} of the vocabulary, and "
                    "with train.lora their weights would stay random: set train.lora.embeddings=true, or start from a "
                    "model that has these tokens"
                )
            for name in ("embed.weight", "lm_head.weight"):  # their rows are vocabulary entries
                weights[name] = torch.cat([weights[name], model.state_dict()[name][V:].cpu()])
        model.load_state_dict(weights)
