"""Names of the Hugging Face hub: which it is asked for at all, and the folder of a model that it has."""

import logging
import re
from pathlib import Path
from typing import Literal

from bdh.words import nearest

_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
_RUNS = "runs"  # where bdh train keeps them unless told otherwise
_MODEL_FILES = ["*.json", "*.jinja", "model*.safetensors"]
_logger = logging.getLogger(__name__)


def is_path(name: str) -> bool:
    """Whether a name can only be that of a path: the hub's are NAME or ORGANISATION/NAME."""
    return _ID.fullmatch(name) is None


def why_not_asked(name: str, kind: Literal["model", "dataset"] = "model") -> str | None:
    """Why the hub is not asked for a name of which there is nothing here, the end of a message; None where it is asked.

    It takes half a minute of retries without a network, and a wrong name of a run was taken for one of the hub.
    """
    first, slash, _ = name.partition("/")
    if not slash or _is_cached(name, kind):
        return None
    folder = Path(first)
    if folder.is_dir():
        near = nearest(name, (f"{first}/{each.name}" for each in folder.iterdir()))
        reason = f"{first} is a folder here" + (f"; did you mean {near}?" if near else "")
    elif first == _RUNS:
        reason = f"bdh train keeps its runs in {first}, which is not here"
    else:
        return None
    of_kind = "" if kind == "model" else f" --repo-type {kind}"
    return f"the hub was not asked for it, as {reason} (what hf download{of_kind} {name} has fetched is found)"


def why_not_reached(name: str) -> str | None:
    """Why the hub can give no model or tokenizer of a name; None where it may."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE and not _is_cached(name, "model"):
        return "it is not in the hub's cache, and HF_HUB_OFFLINE is set"
    return None


def _is_cached(name: str, kind: str) -> bool:
    from huggingface_hub import constants

    return (Path(constants.HF_HUB_CACHE) / f"{kind}s--{name.replace('/', '--')}" / "snapshots").is_dir()


def model_not_found(name: str, reason: str) -> FileNotFoundError:
    """The error for a name that stands for no folder, where the hub has answered ``reason``, of which the first line counts."""
    reason = reason.splitlines()[0].rstrip(".")
    return FileNotFoundError(
        f"{name!r} is neither a folder here nor a model that the hub gives: {reason}. Without a network, give the folder "
        "of an export or of a run"
    )


def model_folder(name: str, commit: str | None = None) -> Path:
    """The folder of the hub's cache that holds a commit of a model, by default the newest; downloaded where it is not there yet.

    The folder has the hash of the commit for its name.

    Raises:
        FileNotFoundError: the hub does not give it, or what it gives is no model.
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
    except OSError as error:  # of the network, and of the hub
        is_not_cached = constants.HF_HUB_OFFLINE and isinstance(error, LocalEntryNotFoundError)
        reason = "this commit is not in the hub's cache, and HF_HUB_OFFLINE is set" if is_not_cached else str(error)
        raise model_not_found(name, reason) from error
    return folder
