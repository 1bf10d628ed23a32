"""Training of low-rank adapters (LoRA, arXiv 2106.09685) beside weights that stay as they are, with ``peft``.

The adapters sit in the linear layers of the model itself: what trains, evaluates, samples and saves it sees a model
with a few weights more, of which these alone want gradients.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from bdh.model import BDHConfig, BDHForCausalLM
from bdh.train.base import Base, write_base
from bdh.train.config import LoraSettings
from bdh.train.places import ADAPTER_CONFIG, CheckpointFolder, check_peft

ADAPTER_WEIGHTS = "adapter_model.safetensors"
_NAME = "default"  # of the adapters, within the model
_PEFT_PREFIX = "base_model.model."  # of the weights of a model that peft wraps


def add_adapters(model: BDHForCausalLM, settings: LoraSettings) -> Any:
    """Puts fresh adapters, which change nothing yet, into the layers, and freezes every other weight.

    Returns:
        What ``peft`` keeps of it: its ``merge_and_unload()`` gives the model with the adapters in its weights.

    Raises:
        ImportError: ``peft`` is missing.
    """
    check_peft()
    from peft import LoraModel

    tuner = LoraModel(model, _config(model.config, settings), adapter_name=_NAME)
    if settings.embeddings:
        for layer in (model.embed, model.lm_head):
            layer.requires_grad_(True)
    return tuner


def load_weights(model: BDHForCausalLM, weights: Mapping[str, torch.Tensor], lora: Mapping[str, Any] | None) -> Any:
    """Gives a fresh model the weights of a run, its adapters among them.

    Args:
        lora: the run's settings of them, as stored; None where its version had none.

    Returns:
        What :func:`merge` takes; None where the run has no adapters.

    Raises:
        ImportError: there are adapters, and ``peft`` is missing.
    """
    tuner = add_adapters(model, LoraSettings(**lora)) if lora and lora["r"] else None
    model.load_state_dict(weights)
    return tuner


def write_adapters(
    folder: Path, config: BDHConfig, weights: Mapping[str, torch.Tensor], settings: LoraSettings, base: Base
) -> None:
    """Writes the adapters among a run's weights as ``peft.PeftModel.from_pretrained(base_model, folder)`` reads them.

    Args:
        base: the model that they were trained beside; it is recorded too.

    Raises:
        ImportError: ``peft`` is missing.
    """
    check_peft()
    ours = {
        f"{_PEFT_PREFIX}{name.replace(f'.{_NAME}.', '.')}": weight.contiguous()
        for name, weight in weights.items()
        if ".lora_" in name
    }
    save_file(ours, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    peft_config = _config(config, settings, base)
    peft_config.inference_mode = True
    peft_config.save_pretrained(str(folder))
    write_base(folder, base)


def load_adapters(base: BDHForCausalLM, folder: Path) -> Any:
    """Puts the adapters of a folder into the layers of a model.

    Returns:
        What :func:`merge` takes.

    Raises:
        ImportError: ``peft`` is missing.
        FileNotFoundError: the folder lacks their weights.
        ValueError: they are damaged or not complete, or those of a model of another shape.
    """
    check_peft()
    from peft import PeftModel, get_peft_model_state_dict

    path = folder / ADAPTER_WEIGHTS
    if not path.is_file():  # which peft would ask the hub for
        raise FileNotFoundError(f"the adapters of {folder} are not complete: {ADAPTER_WEIGHTS} is missing")
    try:
        stored = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is cut off or damaged: {error}") from error
    try:
        with warnings.catch_warnings():
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
    """The model, plain again, with its adapters added to its weights.

    Raises:
        ValueError: the sums are not finite.
    """
    return tuner.merge_and_unload(safe_merge=True)  # into new memory, which shows that the weights are others


def scale(tuner: Any) -> float:
    """The factor of the adapters' product."""
    config = tuner.peft_config[_NAME]
    return config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)


def _config(config: BDHConfig, settings: LoraSettings, base: Base | None = None) -> Any:
    from peft import LoraConfig, TaskType

    # peft looks for linear layers, of which encoder_v is a list: one a head.
    heads = [f"encoder_v.{head}" for head in range(config.n_head)]
    targets = [name for name in settings.target_modules if name != "encoder_v"]
    return LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=None if base is None else _place(base),
        revision=None if base is None else base.commit,
        r=settings.r,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # any number: it is only divided by r
        lora_dropout=settings.dropout,
        target_modules=targets + (heads if "encoder_v" in settings.target_modules else []),
    )


def _place(base: Base) -> str:
    """Absolute: peft and transformers take a path that is not there, such as runs/first, for a name of the hub."""
    if base.folder is None:
        return base.name
    return base.folder if base.step is None else str(CheckpointFolder(Path(base.folder)).path_of(base.step))
