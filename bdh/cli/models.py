"""Finds the model that a command is given: an exported folder, a run, or a hub id."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from bdh.model import BDHForCausalLM


def load_model(
    name: str, *, checkpoint: str | None = None, device: str = "auto"
) -> "tuple[BDHForCausalLM, PreTrainedTokenizerFast]":
    """The model, in evaluation mode, and its tokenizer.

    Args:
        name: a folder with ``config.json``; a run's folder, of which the checkpoint is taken; or a hub id.
        checkpoint: for a run: last (the default), best, or a step.
        device: as ``train.device``.

    Raises:
        FileNotFoundError: a folder that holds neither.
        ValueError: the model on the hub cannot be had, or is no BDH model; or the device is not there.
    """
    from bdh.train.config import TrainSettings
    from bdh.train.runtime import choose_runtime

    target = choose_runtime(TrainSettings(device=device)).device
    path = Path(name)
    if (path / "checkpoints").is_dir():
        from bdh.train.export import load_run

        model, tokenizer, _ = load_run(path, checkpoint or "last")
        return model.to(target), tokenizer  # type: ignore[arg-type]
    if checkpoint is not None:
        raise ValueError(f"checkpoint is {checkpoint!r}, but {name} is not a run: leave it out")
    if path.exists() and not (path / "config.json").is_file():
        raise FileNotFoundError(f"{name} holds no model: it has neither config.json nor checkpoints")
    if not path.exists() and (path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1):
        raise FileNotFoundError(f"there is no folder {name}")  # a hub id is NAME or ORGANISATION/NAME
    model = _pretrained(name, is_local=path.exists())
    from bdh.tokenizer import TokenizerConfig, load_tokenizer

    return model.to(target).eval(), load_tokenizer(TokenizerConfig(path=name))  # type: ignore[arg-type]


def _pretrained(name: str, *, is_local: bool) -> "BDHForCausalLM":
    from safetensors import SafetensorError
    from transformers.utils import logging

    from bdh.model import BDHConfig, BDHForCausalLM

    logging.disable_progress_bar()
    try:
        config = BDHConfig.from_pretrained(name)
        if config.model_type != "bdh" or "n_embd" not in config.to_dict():
            raise ValueError(f"{name} is no BDH model: its model_type is {config.model_type!r}")
        return BDHForCausalLM.from_pretrained(name, config=config)
    except SafetensorError as error:
        raise ValueError(f"the weights of {name} are cut off or damaged: {error}") from error
    except OSError as error:
        if is_local:
            raise
        raise FileNotFoundError(
            f"{name!r} is neither a folder here nor a model that the hub gives: {str(error).splitlines()[0].rstrip('.')}. Without "
            "a network, give the folder of an export or of a run"
        ) from error
