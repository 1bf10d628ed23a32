"""Finds the model that a name stands for: an exported folder, a run, or a hub id."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from bdh.model import BDHConfig, BDHForCausalLM
from bdh.model.configuration import one_line_type_faults
from bdh.storage import recover_dir
from bdh.tokenizer import TokenizerConfig, load_tokenizer
from bdh.train.checkpoint import Checkpoint, Checkpointer, is_checkpoint, step_of_folder
from bdh.train.config import TrainSettings
from bdh.train.lora import base_of, merged, with_weights
from bdh.train.runtime import choose_runtime

TOKENIZER_FOLDER = "tokenizer"


def load_model(
    name: str, *, checkpoint: str | None = None, device: str = "auto"
) -> tuple[BDHForCausalLM, PreTrainedTokenizerFast]:
    """The model, in evaluation mode, and its tokenizer.

    Args:
        name: a folder with ``config.json``, or of adapters, which are merged into their model; a run's folder, of which the checkpoint is taken; the folder of one of
            its checkpoints; or a hub id.
        checkpoint: for a run: last (the default), best, or a step.
        device: as ``train.device``.

    Raises:
        FileNotFoundError: a folder that holds neither.
        ValueError: it is no BDH model, its configuration is wrong, or its weights are not those of the configuration,
            not complete or damaged; or the device is not there.
    """
    target = choose_runtime(TrainSettings(device=device)).device
    path = Path(name)
    recover_dir(path)
    if checkpoint is None and is_checkpoint(path):
        path, checkpoint = path.parent.parent, str(step_of_folder(path))
    if is_run(path):
        model, tokenizer, _ = load_run(path, checkpoint or "last")
        return model.to(target), tokenizer  # type: ignore[arg-type]
    if checkpoint is not None:
        raise ValueError(f"checkpoint is {checkpoint!r}, but {name} is not a run: leave it out")
    if (base := base_of(path)) is not None:
        model, _ = load_model(base, device=device)
        return merged(model, path).eval(), load_tokenizer(TokenizerConfig(path=name))
    if path.exists() and not (path / "config.json").is_file():
        raise FileNotFoundError(f"{name} holds no model: it has neither config.json nor checkpoints")
    if not path.exists() and (path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1):
        raise FileNotFoundError(f"there is no folder {name}")  # a hub id is NAME or ORGANISATION/NAME
    model = _pretrained(name, is_local=path.exists())
    return model.to(target).eval(), load_tokenizer(TokenizerConfig(path=name))  # type: ignore[arg-type]


def is_run(folder: Path) -> bool:
    return (folder / "checkpoints").is_dir()


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
    if not is_run(run_dir):
        raise FileNotFoundError(f"{run_dir} holds no run: it has no folder checkpoints")
    checkpointer = Checkpointer(run_dir)
    if which == "last":
        step = None
    elif which == "best":
        step = checkpointer.step_of("best")
    elif which.isdigit():
        step = int(which)
    else:
        raise ValueError(f"checkpoint is {which!r}: must be last, best, or a step")
    checkpoint = checkpointer.load(step)
    model = BDHForCausalLM(BDHConfig(**checkpoint.training["model_config"]))
    model = with_weights(model, run_weights(checkpoint, ema=ema), checkpoint.training["settings"]["train"].get("lora"))
    return model.eval(), load_tokenizer(run_dir / TOKENIZER_FOLDER), checkpoint


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


def _pretrained(name: str, *, is_local: bool) -> BDHForCausalLM:
    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what its tables of warnings say is an error here
    try:
        config = _pretrained_config(name)
        loaded: Any = BDHForCausalLM.from_pretrained(
            name, config=config, output_loading_info=True, ignore_mismatched_sizes=True
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


def _pretrained_config(name: str) -> BDHConfig:
    try:
        with one_line_type_faults(f"the config.json of {name} is wrong"):
            config = BDHConfig.from_pretrained(name)
    except (TypeError, AttributeError) as error:  # no object of JSON, or a dtype that PyTorch does not have
        raise ValueError(f"the config.json of {name} is wrong: {error}") from error
    if config.model_type != "bdh" or "n_embd" not in config.to_dict():
        raise ValueError(f"{name} is no BDH model: its model_type is {config.model_type!r}")
    return config
