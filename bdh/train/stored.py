"""The settings of a run that lie in its folder, and what of them a run that goes on may change."""

import shlex
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bdh.train.config import RunSettings
from bdh.train.places import CONFIG_FILE
from bdh.validation import Faults
from bdh.yaml_files import read_yaml

if TYPE_CHECKING:
    from bdh.distributed.world import World

# A run cannot go on exactly, or at all, if one of these is another: name of the section, and its fields.
_FIXED = {
    "model": None,
    "tokenizer": None,
    "data": None,
    "train": ("block_size", "carry_state", "optimizer", "seed", "init_from", "lora"),
}
_FREE = {
    # The text itself is compared, wherever it lies now: see Run.restore.
    "data.source",
    "data.val_source",
    "model.attention_form",
    "model.chunk_size",
    "model.dropout",
    "data.cache_dir",
    "train.lora.dropout",
    "train.lora.merge",
}
_NOT_STORED = ("run_dir", "resume", "resume_step", "dry_run")


def rows_per_step(settings: RunSettings, world: "World") -> int:
    return settings.train.batch_size * settings.train.gradient_accumulation_steps * world.size


def with_same_rows(settings: RunSettings, stored: dict[str, Any], rows: int, world: "World") -> RunSettings:
    """The settings of a run that goes on, such that a step has as many sequences as before, whoever shares them.

    Args:
        stored: the run's settings until now.
        rows: sequences of a step until now.

    Raises:
        ValueError: the processes cannot share so many, or batch size and accumulation were set to give others.
    """
    now = rows_per_step(settings, world)
    if now == rows:
        return settings
    train = settings.train
    names = ("batch_size", "gradient_accumulation_steps")
    if any(getattr(train, name) != stored["train"][name] for name in names):
        raise ValueError(
            f"train.batch_size {train.batch_size} x train.gradient_accumulation_steps {train.gradient_accumulation_steps} "
            f"x {world.size} processes are {now} sequences a step: the run has had {rows}, and must go on with as many"
        )
    if rows % world.size:
        fitting = [str(number) for number in range(1, rows + 1) if rows % number == 0]
        raise ValueError(
            f"a step of this run has {rows} sequences, which {world.size} processes cannot share evenly: start "
            f"{', '.join(fitting[:-1])} or {fitting[-1]}"
        )
    share = rows // world.size
    batch_size = max(size for size in range(1, min(share, train.batch_size) + 1) if share % size == 0)
    return replace(
        settings, train=replace(train, batch_size=batch_size, gradient_accumulation_steps=share // batch_size)
    )


def resume_command(folder: Path) -> str:
    """What to type to continue the run of a folder, quoted for the shell."""
    return shlex.join(("bdh", "train", "--run_dir", str(folder), "--resume"))


def settings_to_store(settings: RunSettings) -> dict[str, Any]:
    """The settings as plain data, without those that say where this start of the run reads and writes."""
    stored = asdict(settings)
    for name in _NOT_STORED:
        del stored[name]
    return stored


def stored_settings(folder: Path) -> dict[str, Any]:
    """What a run's ``config.yaml`` holds, in the settings of this version.

    Raises:
        FileNotFoundError: the folder holds no run.
        ValueError: the file is cut off, holds something else, or holds settings twice or without a value.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"there is no run to resume in {folder}: it has no {CONFIG_FILE}")
    faults = Faults()
    try:
        stored = read_yaml(path, faults).tree
    except ValueError as error:
        raise ValueError(f"{path} is cut off or damaged: {error}") from error
    sections = stored if isinstance(stored, dict) else {}
    if lacking := [name for name in _FIXED if not isinstance(sections.get(name), dict)]:
        raise ValueError(f"{path} is cut off or damaged: it has no settings for {', '.join(lacking)}")
    faults.raise_if_any()
    _translate(stored)
    return stored


def _translate(stored: dict[str, Any]) -> None:
    """Puts today's settings in the place of those that earlier versions stored."""
    if stored["train"].pop("gradient_checkpointing", False):
        stored["train"]["recompute"] = "pass"
    monitor = stored.get("monitor") or {}
    if monitor.pop("tensorboard", None) == "off":
        monitor["backends"] = ["console", "jsonl"]


def check_unchanged(settings: RunSettings, stored: dict[str, Any]) -> None:
    """Raises ``ValueError`` naming every field of the model or the data that is not as it was stored."""
    now = settings_to_store(settings)
    changed = [
        f"{name}: {before.get(own)!r} in the run, {value!r} now"
        for section, names in _FIXED.items()
        for name, own, value, before in _fields(section, now[section], stored.get(section, {}))
        if (names is None or name.split(".")[1] in names)
        and name not in _FREE
        and _without_places(before.get(own, value))
        != _without_places(value)  # what the run's version did not have is new
    ]
    if changed:
        raise ValueError("a resumed run keeps its model and data, but these differ: " + "; ".join(changed))


def _without_places(value: Any) -> Any:
    """The setting ``data.mix`` without where its texts lie; any other as it is."""
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        return value
    return [{name: each for name, each in entry.items() if f"data.{name}" not in _FREE} for entry in value]


def check_steps_are_left(settings: RunSettings, step: int) -> None:
    """Raises ``ValueError`` where a resumed run is to end before the step that it has reached."""
    for name in ("max_steps", "stop_at_step"):
        last = getattr(settings.train, name)
        if last is not None and last < step:
            raise ValueError(
                f"train.{name} is {last}, but the run has reached step {step}: give more to continue it, or an earlier "
                "checkpoint with --resume_step; nothing was changed"
            )


def _fields(prefix: str, now: dict[str, Any], stored: dict[str, Any]) -> Iterator[tuple[str, str, Any, dict[str, Any]]]:
    """Of each field, those of nested sections among them: its dotted name, its own, its value, and what was stored."""
    for own, value in now.items():
        if isinstance(value, dict):
            yield from _fields(f"{prefix}.{own}", value, stored.get(own) or {})
        else:
            yield f"{prefix}.{own}", own, value, stored
