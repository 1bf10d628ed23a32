"""Models on the Hugging Face hub: rules for their names, and their download."""

import logging
import re
from pathlib import Path
from typing import Literal

from bdh.words import nearest

_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
_RUNS = "runs"  # the default folder of bdh train
_MODEL_FILES = ["*.json", "*.jinja", "model*.safetensors"]
_logger = logging.getLogger(__name__)


def is_path(name: str) -> bool:
    """Whether a name can only be a path. Hub ids have the form NAME or ORGANISATION/NAME."""
    return _ID.fullmatch(name) is None


def why_not_asked(name: str, kind: Literal["model", "dataset"] = "model") -> str | None:
    """Returns why the hub is not asked for a name that does not exist locally, or None if it is asked.

    The reason is the end of an error message. Without this check, a misspelt name of a run would be taken for a hub id,
    and without a network the retries take half a minute.
    """
    first, slash, _ = name.partition("/")
    if not slash or _is_cached(name, kind):
        return None
    folder = Path(first)
    if folder.is_dir():
        near = nearest(name, (f"{first}/{each.name}" for each in folder.iterdir()))
        reason = f"{first} is a local folder" + (f"; did you mean {near}?" if near else "")
    elif first == _RUNS:
        reason = f"bdh train keeps its runs in {first}, which does not exist here"
    else:
        return None
    of_kind = "" if kind == "model" else f" --repo-type {kind}"
    return f"the hub was not asked for it, as {reason} (a copy that hf download{of_kind} {name} has fetched is found)"


def why_not_reached(name: str) -> str | None:
    """Returns why the hub cannot provide the model or tokenizer of this name, or None if it may."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE and not _is_cached(name, "model"):
        return "it is not in the hub's cache, and HF_HUB_OFFLINE is set"
    return None


def _is_cached(name: str, kind: str) -> bool:
    from huggingface_hub import constants

    return (Path(constants.HF_HUB_CACHE) / f"{kind}s--{name.replace('/', '--')}" / "snapshots").is_dir()


def model_not_found(name: str, reason: str) -> FileNotFoundError:
    """Returns the error for a name that is neither a folder nor a model on the hub.

    Args:
        name: the name.
        reason: the hub's answer. The message contains its first line.
    """
    reason = reason.splitlines()[0].rstrip(".")
    return FileNotFoundError(
        f"{name!r} is neither a local folder nor a model found on the hub: {reason}. Without a network, give the "
        "folder of an export or of a run"
    )


def model_folder(name: str, commit: str | None = None) -> Path:
    """Returns the folder of a model in the hub's cache. Downloads the model if it is not there yet.

    The folder is named after the hash of the commit.

    Args:
        name: the hub id.
        commit: the hash of the commit; None for the newest.

    Raises:
        FileNotFoundError: the hub does not provide it, or what it provides is not a model.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    if not constants.HF_HUB_OFFLINE:
        _logger.warning("there is no folder %s: looking for it on the Hugging Face hub", name)
    try:
        folder = Path(snapshot_download(name, revision=commit, allow_patterns=_MODEL_FILES))
        if not any(folder.glob("*.safetensors")):
            folder = Path(
                snapshot_download(name, revision=commit, allow_patterns=[*_MODEL_FILES, "pytorch_model*.bin"])
            )
        if not (folder / "config.json").is_file():
            raise FileNotFoundError("it has no config.json")
    except OSError as error:  # errors of the network and of the hub
        is_not_cached = constants.HF_HUB_OFFLINE and isinstance(error, LocalEntryNotFoundError)
        reason = "this commit is not in the hub's cache, and HF_HUB_OFFLINE is set" if is_not_cached else str(error)
        raise model_not_found(name, reason) from error
    return folder
