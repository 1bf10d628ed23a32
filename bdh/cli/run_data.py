"""The data settings of the run that a model comes from, for commands that measure it."""

import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from bdh.data.config import DataConfig
from bdh.data.files import item_names
from bdh.train.config import stored_settings
from bdh.train.places import CONFIG_FILE, run_of

_SPLITTING = ("val_fraction", "pack")  # the settings that also apply to other texts than the run's


def data_of_run(given: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the ``data`` settings of the run that the model comes from, as defaults; None if there is no such run.

    With other settings, text that the model was trained on could count as held out.

    Args:
        given: the settings of the command line by dotted name, which override those of the run.
    """
    if given.get("model") is None or given.get("tasks"):
        return None
    run = run_of(Path(given["model"]))
    if run is None or not (run / CONFIG_FILE).is_file():
        return None
    known = {each.name for each in fields(DataConfig)}
    data = {name: value for name, value in stored_settings(run)["data"].items() if name in known}
    source = given.get("data.source")
    if source is not None or given.get("data.mix") is not None:
        texts = data.get("mix") or [{"source": data.get("source")}]
        entry = next((each for each in texts if _places(each["source"]) == _places(source)), None)
        names = _SPLITTING if entry is None else data
        data = {name: data[name] for name in names if name in data} | (entry or {}) | {"mix": None}
        data.pop("weight", None)
    for name, other in (("val_source", "val_split"), ("val_split", "val_source")):
        if given.get(f"data.{name}") is not None:
            data.pop(other, None)
    default = DataConfig()
    taken = {name: value for name, value in data.items() if f"data.{name}" not in given}
    shown = ", ".join(f"{name} {value}" for name, value in taken.items() if value != getattr(default, name))
    print(f"data settings of {run}: {shown or 'the defaults'}", file=sys.stderr)
    return {"data": taken}


def _places(source: str | list[str] | None) -> list[Path]:
    return [Path(item).resolve() for item in item_names(source or [])]
