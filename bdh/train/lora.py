"""Training of low-rank adapters (LoRA, arXiv 2106.09685) beside weights that stay as they are, with ``peft``.

The adapters sit in the linear layers of the model itself: what trains, evaluates, samples and saves it sees a model
with a few weights more, of which these alone want gradients.
"""

import importlib.util
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from bdh.model import BDHConfig, BDHForCausalLM
from bdh.train.config import LoraSettings

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_NAME = "default"  # of the adapters, within the model
_PEFT_PREFIX = "base_model.model."  # of the weights of a model that peft wraps


def check_peft() -> None:
    """
    Raises:
        ImportError: the package is missing; the message says how to get it.
    """
    if importlib.util.find_spec("peft") is None:
        raise ImportError('LoRA needs the package peft: pip install "bdh[finetune]"')


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


def with_weights(
    model: BDHForCausalLM, weights: Mapping[str, torch.Tensor], lora: Mapping[str, Any] | None
) -> BDHForCausalLM:
    """The model with the weights of a run, the adapters among them merged into the others.

    Args:
        lora: the run's settings of them, as stored; None where its version had none.

    Raises:
        ImportError: there are adapters, and ``peft`` is missing.
    """
    if not lora or not lora["r"]:
        model.load_state_dict(weights)
        return model
    tuner = add_adapters(model, LoraSettings(**lora))
    model.load_state_dict(weights)
    return tuner.merge_and_unload()


def write_adapters(
    folder: Path, config: BDHConfig, weights: Mapping[str, torch.Tensor], settings: LoraSettings, base: str
) -> None:
    """Writes the adapters among a run's weights as ``peft.PeftModel.from_pretrained(base_model, folder)`` reads them.

    Args:
        base: the name of the model that they belong to, ``train.init_from``.

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


def base_of(folder: Path) -> str | None:
    """The model that a folder of adapters belongs to; None if it is no such folder.

    Raises:
        ValueError: the folder does not say.
    """
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        return None
    try:
        base = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} does not say which model the adapters belong to: {error!r}") from error
    if not isinstance(base, str):
        raise ValueError(f"{path} does not say which model the adapters belong to: base_model_name_or_path is {base!r}")
    return base


def merged(base: BDHForCausalLM, folder: Path) -> BDHForCausalLM:
    """The model with the adapters of a folder in its weights.

    Raises:
        ImportError: ``peft`` is missing.
        ValueError: the adapters are those of a model of another shape.
    """
    check_peft()
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks the model by a name that transformers will drop
            return PeftModel.from_pretrained(base, str(folder)).merge_and_unload()
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"the adapters of {folder} do not fit the model that they name: {reason}") from error


def _config(config: BDHConfig, settings: LoraSettings, base: str | None = None) -> Any:
    from peft import LoraConfig, TaskType

    # peft looks for linear layers, of which encoder_v is a list: one a head.
    heads = [f"encoder_v.{head}" for head in range(config.n_head)]
    targets = [name for name in settings.target_modules if name != "encoder_v"]
    return LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=base,
        r=settings.r,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # any number: it is only divided by r
        lora_dropout=settings.dropout,
        target_modules=targets + (heads if "encoder_v" in settings.target_modules else []),
    )
