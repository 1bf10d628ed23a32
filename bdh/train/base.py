"""The model that adapters were trained beside: what is recorded of it, and where to look for it."""

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bdh.model import BDHForCausalLM
from bdh.model.fingerprint import Identity, identity
from bdh.storage import recover_dir
from bdh.train.places import ADAPTER_CONFIG

BASE_FILE = "base_model.json"


@dataclass(frozen=True)
class Base:
    """A model, pinned to one checkpoint, export or commit, with the fingerprint of its weights."""

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
    identity: Identity | None = None
    """None where the version that wrote the adapters did not record it."""
    dtype: str = "float32"
    """Of the weights, as they were when the fingerprint was taken."""

    @property
    def fingerprint(self) -> str | None:
        return None if self.identity is None else self.identity.fingerprint

    def describe(self) -> str:
        """In a line, for a person."""
        which = [] if self.step is None else [f"checkpoint of step {self.step}"]
        which += [] if self.export_step is None else [f"export of step {self.export_step}"]
        which += [] if self.commit is None else [f"commit {self.commit[:12]}"]
        which += [] if self.fingerprint is None else [f"fingerprint {self.fingerprint[:12]}"]
        return f"{self.name} ({', '.join(which)})" if which else self.name

    def with_identity(self, identity: Identity, dtype: torch.dtype) -> "Base":
        """The record with the fingerprint of weights of this dtype."""
        return replace(self, identity=identity, dtype=str(dtype).removeprefix("torch."))

    def summary(self) -> dict[str, Any]:
        """For the configuration of a model that adapters were merged into."""
        step = self.export_step if self.step is None else self.step
        return {"name": self.name, "step": step, "commit": self.commit, "fingerprint": self.fingerprint}

    def facts(self) -> dict[str, Any]:
        """All of it, in JSON's types."""
        known = self.identity
        return {name: getattr(self, name) for name in (*_PLACE, "dtype")} | {
            "configuration": None if known is None else known.configuration,
            "weights": None if known is None else known.weights,
            "fingerprint": self.fingerprint,
        }

    @classmethod
    def from_facts(cls, facts: dict[str, Any]) -> "Base":
        """
        Raises:
            ValueError: something is missing, or the fingerprint is not that of the rest.
        """
        if lacking := [name for name in (*_PLACE, "dtype", *_IDENTITY) if name not in facts]:
            raise ValueError(f"it lacks {', '.join(lacking)}")
        configuration, weights, fingerprint = (facts[name] for name in _IDENTITY)
        identity = None if fingerprint is None else Identity(configuration, weights)
        if identity is not None and identity.fingerprint != fingerprint:
            raise ValueError(f"its fingerprint {fingerprint} is not that of its configuration and weights")
        return cls(**{name: facts[name] for name in (*_PLACE, "dtype")}, identity=identity)

    def check_same_layer(self, model: BDHForCausalLM) -> None:
        """Of a run that is to export adapters alone.

        Raises:
            ValueError: its model differs from this one in more than weights, as by a decay of its own.
        """
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
        found = []
        if self.relative_folder is not None:
            found.append(Path(os.path.normpath(stored_in.resolve() / self.relative_folder)))
        if self.folder is not None:
            found.append(Path(self.folder))
        return list(dict.fromkeys(found))

    def others(self, folder: Path) -> list[Path]:
        """Where its weights may be if ``folder`` has others by now: a run has them twice, in a checkpoint and its export."""
        export, run = folder / "model", folder.parent
        recover_dir(folder)
        if not folder.is_dir():
            return []
        recover_dir(export)
        found = [export] if self.step is not None and (export / "config.json").is_file() else []
        return found + ([run] if self.export_step is not None and (run / "checkpoints").is_dir() else [])

    def seen_from(self, folder: Path) -> "Base":
        """The record as it is to be stored in ``folder``."""
        if self.folder is None:
            return self
        try:
            relative = Path(os.path.relpath(self.folder, folder.resolve())).as_posix()
        except ValueError:  # on another drive
            relative = None
        return replace(self, relative_folder=relative)

    def found_at(self, place: "Base") -> "Base":
        """The record with the place where the model was found."""
        return replace(self, folder=place.folder, step=place.step, export_step=place.export_step)


_PLACE = ("name", "folder", "relative_folder", "step", "export_step", "commit")
_IDENTITY = ("configuration", "weights", "fingerprint")


def write_base(folder: Path, base: Base) -> None:
    """Stores a record beside adapters, in a file of its own, which ``peft`` does not read."""
    (folder / BASE_FILE).write_text(json.dumps(base.facts(), indent=2) + "\n", encoding="utf-8")


def read_base(folder: Path) -> Base | None:
    """The model that a folder of adapters belongs to; None if it is no such folder.

    Raises:
        ValueError: the folder does not say, or its record is damaged.
    """
    recover_dir(folder)
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        return None
    try:
        name = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} does not say which model the adapters belong to: {error!r}") from error
    if not isinstance(name, str):
        raise ValueError(f"{path} does not say which model the adapters belong to: base_model_name_or_path is {name!r}")
    record = folder / BASE_FILE
    if not record.is_file():
        return Base(name)
    try:
        return Base.from_facts(json.loads(record.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{record} is cut off or damaged: {error}") from error
