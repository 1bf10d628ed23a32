"""Low-rank adapters (LoRA, arXiv 2106.09685) with ``peft``, and the record of their base model.

The adapters are attached to the linear modules of the model itself. For training, evaluation, sampling and saving it is
a model with some additional weights, which are the only ones with gradients.
"""

import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from bdh.model import BDHConfig, BDHForCausalLM
from bdh.model.fingerprint import Identity, identity
from bdh.model.quantization import check_not_quantized
from bdh.storage import recover_dir
from bdh.torchao_later import torchao_put_off
from bdh.train.config import LoraSettings
from bdh.train.places import ADAPTER_CONFIG, CheckpointFolder, check_peft

ADAPTER_WEIGHTS = "adapter_model.safetensors"
BASE_FILE = "base_model.json"
_NAME = "default"  # the name of the adapters within the model
_PEFT_PREFIX = "base_model.model."  # the prefix of weight names in a model that peft wraps
_IDENTITY = ("configuration", "weights", "fingerprint")


@dataclass(frozen=True)
class Base:
    """The record of the base model of adapters: its place and version, and the fingerprint of its weights."""

    name: str
    """The name, as in ``train.init_from``."""
    folder: str | None = None
    """The absolute path of the export, the run or the folder of adapters; None for a model from the hub."""
    relative_folder: str | None = None
    """The path relative to the folder that contains this record; None if there is no such path."""
    step: int | None = None
    """The step of the checkpoint, for a run."""
    export_step: int | None = None
    """The step of the exported checkpoint, for an export, if it is recorded."""
    commit: str | None = None
    """The hash of the commit, for a model from the hub."""
    dtype: str = "float32"
    """The dtype of the weights when the fingerprint was computed."""
    identity: Identity | None = None
    """The identity of the model; None if the version that wrote the adapters did not record it."""

    @property
    def fingerprint(self) -> str | None:
        return None if self.identity is None else self.identity.fingerprint

    def describe(self) -> str:
        """Returns a readable description in one line."""
        facts = {
            "checkpoint of step": self.step,
            "export of step": self.export_step,
            "commit": self.commit and self.commit[:12],
            "fingerprint": self.fingerprint and self.fingerprint[:12],
        }
        which = ", ".join(f"{what} {value}" for what, value in facts.items() if value is not None)
        return f"{self.name} ({which})" if which else self.name

    def summary(self) -> dict[str, Any]:
        """Returns a summary for the configuration of a model with merged adapters."""
        step = self.export_step if self.step is None else self.step
        return {"name": self.name, "step": step, "commit": self.commit, "fingerprint": self.fingerprint}

    def facts(self) -> dict[str, Any]:
        """Returns the record as JSON types."""
        known = (None, None) if self.identity is None else (self.identity.configuration, self.identity.weights)
        place = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "identity"}
        return place | dict(zip(_IDENTITY, (*known, self.fingerprint), strict=True))

    @classmethod
    def from_facts(cls, facts: dict[str, Any]) -> "Base":
        """Returns the record for JSON data. Raises ``ValueError`` if a field is missing or the fingerprint is wrong."""
        place = [field.name for field in fields(cls) if field.name != "identity"]
        if lacking := [name for name in (*place, *_IDENTITY) if name not in facts]:
            raise ValueError(f"it lacks {', '.join(lacking)}")
        configuration, weights, fingerprint = (facts[name] for name in _IDENTITY)
        identity = None if fingerprint is None else Identity(configuration, weights)
        if identity is not None and identity.fingerprint != fingerprint:
            raise ValueError(f"its fingerprint {fingerprint} is not that of its configuration and weights")
        return cls(**{name: facts[name] for name in place}, identity=identity)

    def check_same_layer(self, model: BDHForCausalLM) -> None:
        """Raises ``ValueError`` if a model, exported as adapters, differs from its base in more than these."""
        base = {} if self.identity is None else self.identity.configuration
        changed = [
            f"{name} is {value}, in {self.name} {base[name]}"
            for name, value in identity(model).configuration.items()
            if name in base and base[name] != value
        ]
        if changed:
            raise ValueError(
                f"merge is False: the run's model differs from its base in more than adapters ({'; '.join(changed)}), which "
                "adapters alone would lose: merge them (train.lora.merge true, bdh export --merge true)"
            )

    def folders(self, stored_in: Path) -> list[Path]:
        """Returns the folders in which a local model should be, for a record in the folder ``stored_in``."""
        relative = self.relative_folder and os.path.normpath(stored_in.resolve() / self.relative_folder)
        return [Path(path) for path in dict.fromkeys((relative, self.folder)) if path is not None]

    def seen_from(self, folder: Path) -> "Base":
        """Returns the record for storage in ``folder``, with the relative path from there."""
        if self.folder is None:
            return self
        try:
            relative = Path(os.path.relpath(self.folder, folder.resolve())).as_posix()
        except ValueError:  # on another drive
            relative = None
        return replace(self, relative_folder=relative)


def read_base(folder: Path) -> Base | None:
    """Reads the record of the base model from a folder of adapters. Returns None for any other folder.

    Raises:
        ValueError: the record is missing or damaged.
    """
    recover_dir(folder)
    path, record = folder / ADAPTER_CONFIG, folder / BASE_FILE
    if not path.is_file():
        return None
    try:
        name = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
        if not isinstance(name, str):
            raise TypeError(f"base_model_name_or_path is {name!r}")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} does not say which model the adapters belong to: {error!r}") from error
    if not record.is_file():
        return Base(name)
    try:
        return Base.from_facts(json.loads(record.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{record} is cut off or damaged: {error}") from error


def add_adapters(model: BDHForCausalLM, settings: LoraSettings) -> Any:
    """Attaches new adapters, which do not change the outputs yet, to the layers, and freezes all other weights.

    Returns:
        The tuner, which :func:`merge` takes.

    Raises:
        ImportError: ``peft`` is not installed.
    """
    check_peft()
    from peft import LoraModel

    with torchao_put_off():
        tuner = LoraModel(model, _peft_config(model.config, settings), adapter_name=_NAME)
    if settings.embeddings:
        for layer in (model.embed, model.lm_head):
            layer.requires_grad_(True)
    return tuner


def write_adapters(
    folder: Path, config: BDHConfig, weights: Mapping[str, torch.Tensor], settings: LoraSettings, base: Base
) -> None:
    """Writes the adapters of a run's weights in the format of ``peft.PeftModel.from_pretrained(base_model, folder)``.

    The base model is recorded in a separate file, which ``peft`` does not read.
    """
    check_peft()
    ours = {
        f"{_PEFT_PREFIX}{name.replace(f'.{_NAME}.', '.')}": weight.contiguous()
        for name, weight in weights.items()
        if ".lora_" in name
    }
    save_file(ours, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    peft_config = _peft_config(config, settings, base)
    peft_config.inference_mode = True
    peft_config.save_pretrained(str(folder))
    (folder / BASE_FILE).write_text(json.dumps(base.facts(), indent=2) + "\n", encoding="utf-8")


def load_adapters(base: BDHForCausalLM, folder: Path) -> Any:
    """Attaches the adapters of a folder to the layers of a model.

    Returns:
        The tuner, which :func:`merge` takes.

    Raises:
        ImportError: ``peft`` is not installed.
        FileNotFoundError: the folder has no weights of adapters.
        ValueError: the weights are damaged, incomplete, or for a model of another shape.
    """
    check_peft()
    reason = "adapters can only be merged into the weights of the unquantized model"
    check_not_quantized(base, f"the base of {folder}", reason)
    from peft import PeftModel, get_peft_model_state_dict

    path = folder / ADAPTER_WEIGHTS
    if not path.is_file():  # peft would look for it on the hub
        raise FileNotFoundError(f"the adapters of {folder} are not complete: {ADAPTER_WEIGHTS} is missing")
    try:
        stored = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is cut off or damaged: {error}") from error
    try:
        with warnings.catch_warnings(), torchao_put_off():
            warnings.simplefilter("ignore", FutureWarning)  # peft uses a name that transformers will remove
            warnings.filterwarnings("ignore", message="Found missing adapter keys")  # reported as an error below
            tuner = PeftModel.from_pretrained(base, str(folder))
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"the adapters of {folder} do not fit the model that they name, or {ADAPTER_CONFIG} is damaged: {reason}"
        ) from error
    needed, known = (get_peft_model_state_dict(tuner, save_embedding_layers=each).keys() for each in (False, True))
    if lacking := sorted(needed - stored.keys()):
        raise ValueError(f"the adapters of {folder} are not complete: {ADAPTER_WEIGHTS} lacks {', '.join(lacking)}")
    if left := sorted(stored.keys() - known):
        raise ValueError(
            f"{path} holds weights of layers that {folder / ADAPTER_CONFIG} does not name: {', '.join(left)}"
        )
    return tuner


def merge(tuner: Any) -> BDHForCausalLM:
    """Merges adapters into the weights, and returns the plain model. Raises ``ValueError`` if a sum is not finite."""
    return tuner.merge_and_unload(safe_merge=True)  # allocates new memory, by which the change of weights is detected


def scale(tuner: Any) -> float:
    """Returns the scaling factor of the adapters' product."""
    config = tuner.peft_config[_NAME]
    return config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)


def _peft_config(config: BDHConfig, settings: LoraSettings, base: Base | None = None) -> Any:
    from peft import LoraConfig, TaskType

    place = None if base is None else base.folder or base.name
    if base is not None and base.folder is not None and base.step is not None:
        # Absolute, since peft and transformers would take a missing relative path, such as runs/first, for a hub id.
        place = str(CheckpointFolder(Path(base.folder)).path_of(base.step))
    # peft needs the names of linear modules; encoder_v is a list of them, one for each head.
    heads = [f"encoder_v.{head}" for head in range(config.n_head)]
    targets = [name for name in settings.target_modules if name != "encoder_v"]
    return LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=place,
        revision=None if base is None else base.commit,
        r=settings.r,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # can be any number, since it is only divided by r
        lora_dropout=settings.dropout,
        target_modules=targets + (heads if "encoder_v" in settings.target_modules else []),
    )
