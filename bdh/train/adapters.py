"""Low-rank adapters (LoRA, arXiv 2106.09685) beside weights that stay as they are, with ``peft``; and the model below them.

The adapters sit in the linear layers of the model itself: what trains, evaluates, samples and saves it sees a model
with a few weights more, of which these alone want gradients.
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
_NAME = "default"  # of the adapters, within the model
_PEFT_PREFIX = "base_model.model."  # of the weights of a model that peft wraps
_IDENTITY = ("configuration", "weights", "fingerprint")


@dataclass(frozen=True)
class Base:
    """The model below adapters, pinned to one checkpoint, export or commit, with the fingerprint of its weights."""

    name: str
    """As ``train.init_from`` names it."""
    folder: str | None = None
    """Absolute path of the export, the run or the folder of adapters; None for a model of the hub."""
    relative_folder: str | None = None
    """The same, seen from the folder that this record is stored in; None where there is no such path."""
    step: int | None = None
    """Of a run: the step of the checkpoint."""
    export_step: int | None = None
    """Of an export: the step of the checkpoint that it was made of, where it says so."""
    commit: str | None = None
    """Of a model of the hub: the hash of the commit."""
    dtype: str = "float32"
    """Of the weights, as they were when the fingerprint was taken."""
    identity: Identity | None = None
    """None where the version that wrote the adapters did not record it."""

    @property
    def fingerprint(self) -> str | None:
        return None if self.identity is None else self.identity.fingerprint

    def describe(self) -> str:
        """In a line, for a person."""
        facts = {
            "checkpoint of step": self.step,
            "export of step": self.export_step,
            "commit": self.commit and self.commit[:12],
            "fingerprint": self.fingerprint and self.fingerprint[:12],
        }
        which = ", ".join(f"{what} {value}" for what, value in facts.items() if value is not None)
        return f"{self.name} ({which})" if which else self.name

    def summary(self) -> dict[str, Any]:
        """For the configuration of a model that adapters were merged into."""
        step = self.export_step if self.step is None else self.step
        return {"name": self.name, "step": step, "commit": self.commit, "fingerprint": self.fingerprint}

    def facts(self) -> dict[str, Any]:
        """All of it, in JSON's types."""
        known = (None, None) if self.identity is None else (self.identity.configuration, self.identity.weights)
        place = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "identity"}
        return place | dict(zip(_IDENTITY, (*known, self.fingerprint), strict=True))

    @classmethod
    def from_facts(cls, facts: dict[str, Any]) -> "Base":
        """Raises ``ValueError`` where something is missing, or the fingerprint is not that of the rest."""
        place = [field.name for field in fields(cls) if field.name != "identity"]
        if lacking := [name for name in (*place, *_IDENTITY) if name not in facts]:
            raise ValueError(f"it lacks {', '.join(lacking)}")
        configuration, weights, fingerprint = (facts[name] for name in _IDENTITY)
        identity = None if fingerprint is None else Identity(configuration, weights)
        if identity is not None and identity.fingerprint != fingerprint:
            raise ValueError(f"its fingerprint {fingerprint} is not that of its configuration and weights")
        return cls(**{name: facts[name] for name in place}, identity=identity)

    def check_same_layer(self, model: BDHForCausalLM) -> None:
        """Raises ``ValueError`` if the model of a run that is to export adapters alone differs in more than weights."""
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
        """Where a local model should be, by the record that lies in the folder ``stored_in``."""
        relative = self.relative_folder and os.path.normpath(stored_in.resolve() / self.relative_folder)
        return [Path(path) for path in dict.fromkeys((relative, self.folder)) if path is not None]

    def seen_from(self, folder: Path) -> "Base":
        """The record as it is to be stored in ``folder``."""
        if self.folder is None:
            return self
        try:
            relative = Path(os.path.relpath(self.folder, folder.resolve())).as_posix()
        except ValueError:  # on another drive
            relative = None
        return replace(self, relative_folder=relative)


def read_base(folder: Path) -> Base | None:
    """The model that a folder of adapters belongs to; None if it is no such folder.

    Raises ``ValueError`` where the folder does not say, or its record is damaged.
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
    """Puts fresh adapters, which change nothing yet, into the layers, and freezes every other weight.

    Returns what :func:`merge` takes; raises ``ImportError`` without ``peft``.
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
    """Writes the adapters among a run's weights as ``peft.PeftModel.from_pretrained(base_model, folder)`` reads them.

    The model that they were trained beside is recorded in a file of its own, which ``peft`` does not read.
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
    """Puts the adapters of a folder into the layers of a model, and returns what :func:`merge` takes.

    Raises:
        ImportError: ``peft`` is missing.
        FileNotFoundError: the folder lacks their weights.
        ValueError: they are damaged or not complete, or those of a model of another shape.
    """
    check_peft()
    reason = "adapters cannot be merged into them, but into the weights of the model that it was made of"
    check_not_quantized(base, f"the base of {folder}", reason)
    from peft import PeftModel, get_peft_model_state_dict

    path = folder / ADAPTER_WEIGHTS
    if not path.is_file():  # which peft would ask the hub for
        raise FileNotFoundError(f"the adapters of {folder} are not complete: {ADAPTER_WEIGHTS} is missing")
    try:
        stored = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is cut off or damaged: {error}") from error
    try:
        with warnings.catch_warnings(), torchao_put_off():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks the model by a name that transformers will drop
            warnings.filterwarnings("ignore", message="Found missing adapter keys")  # an error below
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
    """The model, plain again, with its adapters added to its weights. Raises ``ValueError`` where a sum is not finite."""
    return tuner.merge_and_unload(safe_merge=True)  # into new memory, which shows that the weights are others


def scale(tuner: Any) -> float:
    """The factor of the adapters' product."""
    config = tuner.peft_config[_NAME]
    return config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)


def _peft_config(config: BDHConfig, settings: LoraSettings, base: Base | None = None) -> Any:
    from peft import LoraConfig, TaskType

    place = None if base is None else base.folder or base.name
    if base is not None and base.folder is not None and base.step is not None:
        # Absolute: peft and transformers take a path that is not there, such as runs/first, for a name of the hub.
        place = str(CheckpointFolder(Path(base.folder)).path_of(base.step))
    # peft looks for linear layers, of which encoder_v is a list: one a head.
    heads = [f"encoder_v.{head}" for head in range(config.n_head)]
    targets = [name for name in settings.target_modules if name != "encoder_v"]
    return LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=place,
        revision=None if base is None else base.commit,
        r=settings.r,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # any number: it is only divided by r
        lora_dropout=settings.dropout,
        target_modules=targets + (heads if "encoder_v" in settings.target_modules else []),
    )
